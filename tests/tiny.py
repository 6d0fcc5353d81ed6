"""Tiny random-weight models of real architectures, built from configurations: no network, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
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
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_shared_experts": 1,
}
_SHORT: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_EMBD: dict[str, Any] = {**_SHORT, "n_embd": 32, "n_layer": 3, "n_head": 4}
_HIDDEN: dict[str, Any] = {**_SHORT, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_HEADS: list[Any] = [[["global"], 3]]
ODD: dict[str, Any] = {
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**SMALL, head_dim=8)),
    "afmoe": lambda: AfmoeForCausalLM(AfmoeConfig(**SMALL, head_dim=8, num_dense_layers=1, **_MOE)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, residual_multiplier=0.22)),
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**SMALL)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**SMALL)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_EMBD, rotary_dim=4)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(**_SHORT, hidden_size=32, num_layers=3, num_heads=4, attention_types=_HEADS)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**_SHORT, hidden_size=32, n_layer=3, n_head=4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**_HIDDEN)),
    "mpt": lambda: MptForCausalLM(MptConfig(**_SHORT, d_model=32, n_layers=3, n_heads=4, max_seq_len=64)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_HIDDEN, ffn_dim=64, word_embed_proj_dim=32)),
}
"""Architectures that go their own way: in post-norms, multipliers, norms without a weight, tuples, or fused names."""
APART = ("bloom", "falcon", "mpt", "opt")
"""Those of ``ODD`` whose layers have no attention and MLP of which both outputs are added to the stream."""


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
