"""Tiny random-weight models of real architectures, built from configurations: no network, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    n_layers: int = 3, hidden: int = 32, vocab: int = 97, seed: int = 0, **overrides: Any
) -> LlamaForCausalLM:
    """A seeded random Llama in float32 and eval mode: ``n_layers`` layers of width ``hidden`` over ``vocab`` tokens."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()
