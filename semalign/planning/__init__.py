"""What is known before a run: what it needs, and whether that is there. Both are learned without a model's weights."""
