"""Looking into a forward pass and running a part of it: taps, skipped layers, a decoder from layer k on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from semalign.lm.parts import Model, decoder, decoder_layers, sublayers

POINTS = ("stream", "residual", "mlp", "attention")
"""Where a layer can be read."""


@contextmanager
def capture(model: Model, taps: Iterable[tuple[int, str]]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Record (B, T, D) tensors, with their graph, of every (layer, point) in ``taps`` during the forward passes inside.

    Points are ``stream`` (the layer's output), ``residual`` (output minus input), ``mlp`` and ``attention`` (what the
    sublayer adds to the stream), and ``input`` (what the layer receives).
    """
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []

    def tap(layer: int, point: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if point in ("input", "residual"):
                received = args[0] if args else kwargs["hidden_states"]
                value = received if point == "input" else value - received
            seen[layer, point] = value

        return hook

    for layer, point in taps:
        block = decoder_layers(model)[layer - 1]
        module = sublayers(block)[point == "mlp"] if point in ("mlp", "attention") else block
        handles.append(module.register_forward_hook(tap(layer, point), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_layers(model: Model, numbers: Iterable[int]) -> Iterator[None]:
    """Inside, the given layers hand their input on unchanged and cost nothing; the decoder's own code runs as ever."""
    layers = decoder_layers(model)
    skipped = [(layers[n - 1], layers[n - 1].__dict__.get("forward")) for n in numbers]
    for layer, _ in skipped:
        layer.forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    try:
        yield
    finally:
        for layer, replaced in skipped:
            del layer.forward
            if replaced is not None:
                layer.forward = replaced


def logits_of(model: Model, final: Tensor) -> Tensor:
    """Logits (n, m) float32 of normalised final states (n, D), with the architecture's scale and soft cap."""
    config: Any = decoder(model).config
    z: Tensor = model.get_output_embeddings()(final).float()  # type: ignore[operator]
    z = z * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(z / cap) if cap else z


@contextmanager
def partial_decoder(model: Model, first: int, last: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """A function (hidden, attention_mask) -> final states that runs layers first..last on layer ``first``'s input.

    The decoder's own forward runs, so positions and masks are the architecture's; ``hidden`` (B, T, D) enters at the
    layer itself, so that what the decoder does to its embeddings (scaling, added positions) has no effect.
    """
    layers = decoder_layers(model)
    feed: list[Tensor] = []

    def inject(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((feed[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": feed[0]})

    def forward(hidden: Tensor, attention_mask: Tensor) -> Tensor:
        feed[:] = [hidden]
        out = decoder(model)(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False)
        return out.last_hidden_state

    handle = layers[first - 1].register_forward_pre_hook(inject, with_kwargs=True)
    try:
        with skip_layers(model, [*range(1, first), *range(last + 1, len(layers) + 1)]):
            yield forward
    finally:
        handle.remove()
