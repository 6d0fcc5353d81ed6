"""Where the parts of a causal language model are, whatever its architecture calls them.

Layers are numbered from 1, as in the paper; a module list is indexed with ``k - 1`` at the point of use.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

Model = nn.Module
"""A causal language model with the parts that the functions below find (a transformers model)."""


def decoder(model: Model) -> Model:
    """The stack without the head: what maps token ids to normalised final states."""
    stack: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[operator]
    return getattr(model, "model", stack) if stack is model else stack  # Llama-4's text model takes itself for it


def decoder_layers(model: Model) -> nn.ModuleList:
    """The layers 1..L of ``model`` in order (index 0 is layer 1).

    Raises:
        ValueError: the architecture keeps its layers under a name that is not known here.
    """
    stack = decoder(model)
    for name in ("layers", "h", "blocks"):
        layers = getattr(stack, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(
        f"no layer list found in a {type(model).__name__}, under none of the names layers, h and blocks: choose a "
        "model whose decoder is one stack of layers"
    )


POST_NORMS = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM-4, whose post_attention_layernorm comes before the MLP
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # OLMo-2, Gemma-2 and 3
    ("post_attention_layernorm", "post_mlp_layernorm"),  # AFMoE
)
"""What norms of a sublayer's output are called, attention's and the MLP's."""


def sublayers(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules of one layer whose outputs are added to the residual stream: (attention, MLP).

    Where a sublayer's output is normalised before it is added (``POST_NORMS``), the added vector, and so the sublayer
    output of section 4, is that norm's output. Names can mislead: ``hooks.check_sublayers`` holds them to the sum.
    """
    for names in POST_NORMS:
        if all(hasattr(layer, name) for name in names):
            return getattr(layer, names[0]), getattr(layer, names[1])
    attention = next((getattr(layer, n) for n in ("self_attn", "attention", "attn") if hasattr(layer, n)), None)
    mlp = getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise ValueError(
            f"no attention and MLP found in a {type(layer).__name__}: read it at stream or residual, where the whole "
            "layer counts"
        )
    return attention, mlp


FINAL_NORMS = (
    "norm", "final_layer_norm", "final_layernorm", "final_norm", "ln_f", "norm_f", "layer_norm", "embedding_norm"
)  # fmt: skip
"""What the norm after the last layer is called; the last is LFM2's."""


def final_norm(model: Model) -> nn.Module:
    """The norm between the last layer and the head.

    Raises:
        ValueError: the decoder has none under a name that is known here.
    """
    stack = decoder(model)
    for name in FINAL_NORMS:
        if isinstance(getattr(stack, name, None), nn.Module):
            return getattr(stack, name)
    raise ValueError(
        f"no final norm found in a {type(model).__name__}, under none of the names {', '.join(FINAL_NORMS)}: choose a "
        "model that has one before its head"
    )


def norm_gain(model: Model) -> Tensor:
    """The final norm's gain g (D,), float32 (float64 of a float64 norm). Entries can be negative.

    Some norms (Gemma's among them) store w = g - 1, and 1 + w has more digits than 16 bits hold. Which is which shows
    in what the norm does to a vector of alternating signs, whose mean is 0 and whose variance is 1; the difference with
    its mirror image drops a bias. A norm without a weight (OLMo's, NanoChat's) has the gain 1.
    """
    norm, stored = final_norm(model), head_weight(model)
    if getattr(norm, "weight", None) is None:
        return torch.ones(stored.shape[1], device=stored.device)
    stored = norm.weight.detach()  # type: ignore[operator]
    signs = torch.ones_like(stored)
    signs[1::2] = -1
    with torch.no_grad():
        gain = (norm(signs) - norm(-signs)) / 2 * signs
    weight = stored.to(torch.promote_types(stored.dtype, torch.float32))
    return weight + 1 if (gain - weight - 1).norm() < (gain - weight).norm() else weight


def head_weight(model: Model) -> Tensor:
    """The LM head W (m, D), detached; the embedding matrix where the two are tied.

    Raises:
        ValueError: the head is no single matrix.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if weight is None or weight.dim() != 2:
        raise ValueError(f"the head of a {type(model).__name__} is no matrix (m, D): choose a model with a linear head")
    return weight.detach()


def embedding_weight(model: Model) -> Tensor:
    """The input embeddings (m, D), detached."""
    return model.get_input_embeddings().weight.detach()  # type: ignore[operator]


def describe(model: Model) -> dict[str, int | str | bool]:
    """What sets one model of a family apart: layers, width, vocabulary, parameters, tied heads, and the final norm."""
    head = head_weight(model)
    return {
        "architecture": type(model).__name__,
        "layers": len(decoder_layers(model)),
        "width": head.shape[1],
        "vocabulary": head.shape[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "tied head": head.data_ptr() == embedding_weight(model).data_ptr(),
        "final norm": type(final_norm(model)).__name__,
    }


_WORDS = 2**24  # of 8 bytes, which are mixed at once
_GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, and SplitMix64's two rounds, as signed numbers
_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def fingerprint(model: Model) -> str:
    """SHA-256 (hex) over a model's configuration and every parameter's name, type, shape and bytes.

    What only says where a model was read from, or by which version, is left out: equal weights are equal prints. On a
    GPU the bytes are not brought to the host, which would take a minute of a 13-billion model: :func:`mixed` stands for
    them, so that the print is another one than on a CPU.
    """
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    for origin in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(origin, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content = parameter.detach().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data if parameter.device.type == "cpu" else f"{mixed(content)}".encode())
    return digest.hexdigest()


def mixed(content: Tensor) -> tuple[int, int]:
    """Two sums, modulo 2^64, over a tensor's bytes (n,) uint8, where they lie: of each 8 with their place, mixed.

    The mixing is that of SplitMix64 (Steele et al., OOPSLA 2014), after which changes cancel by chance alone.
    """
    words = torch.nn.functional.pad(content, (0, -len(content) % 8)).view(torch.int64)
    sums = [torch.zeros((), dtype=torch.int64, device=content.device) for _ in range(2)]
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        place = torch.arange(start, start + len(part), device=content.device).mul_(_GOLDEN)
        for lane, total in enumerate(sums):
            z = (part ^ place).add_(lane * _GOLDEN + len(content))
            for shift, factor in _ROUNDS:
                z.bitwise_xor_(z >> shift).mul_(factor)
            total += z.bitwise_xor_(z >> 31).sum()
    return int(sums[0]), int(sums[1])


def layer_parameters(model: Model, k: int) -> list[str]:
    """The names of layer k's parameters in ``model``, whatever the architecture calls its layers."""
    inside = {id(p) for p in decoder_layers(model)[k - 1].parameters()}
    return [name for name, p in model.named_parameters() if id(p) in inside]
