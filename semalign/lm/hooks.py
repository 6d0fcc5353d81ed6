"""Looking into a forward pass and running a part of it: taps, skipped layers, a decoder from layer k on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from semalign.lm.parts import Model, decoder, decoder_layers, sublayers

POINTS = ("stream", "residual", "mlp", "attention")
"""Where a layer can be read."""
SUBLAYERS = ("mlp", "attention")
"""The points inside a layer."""
_CHECKED: weakref.WeakKeyDictionary[Model, int] = weakref.WeakKeyDictionary()  # how many of its layers
_HEADS: weakref.WeakSet[Model] = weakref.WeakSet()  # whose logits are known to be their head on their final states
_TUPLES: dict[type, int] = {}  # by class of layer: how many things it returns in a tuple, its output first; 0: no tuple


class _Seen(dict[tuple[int, str], Tensor]):
    """What was recorded; what was not is refused by name."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def __missing__(self, tap: tuple[int, str]) -> Tensor:
        layer, point = tap
        raise ValueError(
            f"the {point} of layer {layer} of a {self.architecture} was not computed in a forward pass: choose a model "
            "that runs each of its layers once"
        )


def _received(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states that a layer is called with."""
    states: Any = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise ValueError(
            f"a {type(layer).__name__} is not called with its hidden states first: choose a model whose layers pass "
            "one stream of states on"
        )
    return states


@contextmanager
def capture(
    model: Model, taps: Iterable[tuple[int, str]], *, raw: bool = False
) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Record (B, T, D) tensors, with their graph, of every (layer, point) in ``taps`` during the forward passes inside.

    Points are ``stream`` (the layer's output), ``residual`` (output minus input), ``mlp`` and ``attention`` (what the
    sublayer adds to the stream), and ``input`` (what the layer receives). Granite multiplies a sublayer's output before
    it adds it; ``raw`` records the output itself, on which the loss depends.

    Raises:
        ValueError: inside, where a layer hands on something else than one stream of states, or does not run.
    """
    seen = _Seen(type(model).__name__)
    handles = []

    def tap(layer: int, point: str) -> Any:
        inside = point in SUBLAYERS and not raw
        factor: Any = getattr(decoder_layers(model)[layer - 1], "residual_multiplier", 1.0) if inside else 1.0

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, Tensor) or value.dim() != 3:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"layer {layer} of a {type(model).__name__} gives {shape} at {point} and no states (B, T, D): "
                    "choose a model whose layers pass one stream of states on"
                )
            if point in ("input", "residual"):
                received = _received(module, args, kwargs)
                value = received if point == "input" else value - received
            seen[layer, point] = value if factor == 1.0 else value * factor

        return hook

    for layer, point in taps:
        block = decoder_layers(model)[layer - 1]
        module = sublayers(block)[point == "mlp"] if point in SUBLAYERS else block
        handles.append(module.register_forward_hook(tap(layer, point), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_sublayers(model: Model, last: int | None = None) -> None:
    """Refuse a model in eval mode whose attention and MLP outputs are not what its layers add, once a model.

    Eight tokens are run through layers 1..``last``, all by default. A layer passes where most positions do, within what
    its floating point type rounds off.

    Raises:
        ValueError: the two do not add up to the residual contribution of some layer.
    """
    depth = len(decoder_layers(model))
    last = last or depth
    if _CHECKED.get(model, 0) >= last:
        return
    weight = next(model.parameters())
    ids = torch.arange(1, 9, device=weight.device)[None] % model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    depths = range(1, last + 1)
    taps = [(k, point) for k in depths for point in ("stream", "residual", *SUBLAYERS)]
    with capture(model, taps) as seen, skip_layers(model, range(last + 1, depth + 1)):
        decoder(model)(ids, use_cache=False)
    for k in depths:
        stream, residual, mlp, attention = (seen[k, p].double() for p in ("stream", "residual", *SUBLAYERS))
        off, rounding = (residual - mlp - attention).norm(dim=-1), 4 * torch.finfo(weight.dtype).eps
        allowed = 0.02 * residual.norm(dim=-1) + rounding * stream.norm(dim=-1)
        if bool((off > allowed).double().median()):  # what is not finite is another check's to name
            raise ValueError(
                f"attention and MLP of layer {k} of a {type(model).__name__} do not add up to what the layer adds to "
                "the stream: read it at stream or residual, where the whole layer counts"
            )
    _CHECKED[model] = last


def _returned(model: Model) -> int:
    """How many things a layer of this class returns in a tuple (GPT-Neo's, Bloom's), or 0; asked by one token, once."""
    layer = decoder_layers(model)[0]

    class Answered(Exception):
        pass

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        _TUPLES[type(layer)] = len(output) if isinstance(output, tuple) else 0
        raise Answered

    if type(layer) not in _TUPLES:
        handle = layer.register_forward_hook(stop)
        try:
            with torch.no_grad():
                one = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
                decoder(model)(one, use_cache=False)
        except Answered:
            pass
        finally:
            handle.remove()
    return _TUPLES[type(layer)]


@contextmanager
def skip_layers(model: Model, numbers: Iterable[int]) -> Iterator[None]:
    """Inside, the given layers hand their input on unchanged and cost nothing; the decoder's own code runs as ever."""
    layers = decoder_layers(model)
    skipped = [(layers[n - 1], layers[n - 1].__dict__.get("forward")) for n in numbers]
    in_tuple = _returned(model) if skipped else 0

    def unchanged(layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = _received(layer, args, kwargs)
            return (states, *[None] * (in_tuple - 1)) if in_tuple else states

        return forward

    for layer, _ in skipped:
        layer.forward = unchanged(layer)
    try:
        yield
    finally:
        for layer, replaced in skipped:
            del layer.forward
            if replaced is not None:
                layer.forward = replaced


def logits_of(model: Model, final: Tensor) -> Tensor:
    """Logits (n, m) float32 of normalised final states (n, D), with the architecture's scale and soft cap."""
    return head_logits(model.get_output_embeddings(), decoder(model).config, final)  # type: ignore[operator]


def head_logits(head: nn.Module, config: Any, final: Tensor) -> Tensor:
    """:func:`logits_of` for a head and a decoder's configuration, where there is no model around them."""
    z: Tensor = head(final).float()
    z = z * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(z / cap) if cap else z


def float_logits(model: Model, final: Tensor) -> Tensor:
    """Logits (n, m) of normalised final states (n, D), computed in float32 whatever the model is in.

    A head in bfloat16 rounds a logit of 20 to steps of 0.125, which is more than most of a divergence: in it a KL of
    0.01 nats came out a tenth too large. Of a float32 model these are its own logits to the bit.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return head_logits(head if head.weight.dtype == torch.float32 else _FloatHead(head), decoder(model).config, final)


class _FloatHead(nn.Module):
    """A linear head in float32, its weight converted for the call."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.of = (head,)  # in a tuple, so that it stays no child of this module

    def forward(self, states: Tensor) -> Tensor:
        (head,) = self.of
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(states.float(), head.weight.float(), bias)


@torch.no_grad()
def check_head(model: Model) -> None:
    """Refuse a model in eval mode whose logits are not what :func:`logits_of` makes of its final states, once a model.

    Raises:
        ValueError: something stands between the decoder and the logits that is not known here.
    """
    if model in _HEADS:
        return
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    final = decoder(model)(ids, use_cache=False).last_hidden_state[0]
    wanted = model(input_ids=ids, use_cache=False).logits[0].float()
    got = logits_of(model, final)
    if got.shape != wanted.shape or (got - wanted).norm() > 0.02 * wanted.norm():  # not finite is another's to name
        raise ValueError(
            f"the logits of a {type(model).__name__} are not its head on its decoder's states: choose a model in which "
            "nothing but a scale or a soft cap stands between the two"
        )
    _HEADS.add(model)


@contextmanager
def partial_decoder(model: Model, first: int, last: int) -> Iterator[Callable[[Tensor, Tensor | None], Tensor]]:
    """A function (hidden, attention_mask) -> final states that runs layers first..last on layer ``first``'s input.

    The decoder's own forward runs, so positions and masks are the architecture's; ``hidden`` (B, T, D) enters at the
    layer itself, so that what the decoder does to its embeddings (scaling, added positions) has no effect.
    """
    layers = decoder_layers(model)
    feed: list[Tensor] = []

    def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        _received(module, args, kwargs)
        return ((feed[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": feed[0]})

    def forward(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        feed[:] = [hidden]
        out = decoder(model)(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False)
        return out.last_hidden_state

    handle = layers[first - 1].register_forward_pre_hook(inject, with_kwargs=True)
    try:
        with skip_layers(model, [*range(1, first), *range(last + 1, len(layers) + 1)]):
            yield forward
    finally:
        handle.remove()
