"""A language model seen from outside: its parts, its inner states, its examples, and files."""
