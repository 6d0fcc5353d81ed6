"""Tiny random-weight models of real architectures, built from configurations: no network, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from semalign.lm.examples import Encoded


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


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GROUPS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, Any] = {
    "llama": lambda: tiny_llama(3),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NO_GROUPS)),
}


class Letters:
    """A tokenizer of one token a character, with BOS 1 and EOS 2, as far as ``encode`` needs one."""

    bos_token_id = 1
    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 90 + 3 for c in text]}


def toy_data(n: int = 7, seed: int = 0, vocab: int = 97) -> list[Encoded]:
    """``n`` random examples of 3 to 6 prompt tokens and 1 to 5 response tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        prompt, response = (int(torch.randint(a, b, (), generator=generator)) for a, b in ((3, 7), (1, 6)))
        ids = torch.randint(3, vocab, (prompt + response,), generator=generator)
        found.append(Encoded(ids, torch.where(torch.arange(len(ids)) < prompt, -100, ids)))
    return found
