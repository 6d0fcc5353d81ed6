"""Layer attribution (section 4.1): gradient x activation of every layer in one forward and one backward pass.

The objective is the mean cross-entropy over supervised positions. Under RMSNorm the *signed* sum over channels at the
last layer's stream is 0 at every position: the loss does not change with the length of that vector, so its gradient is
orthogonal to it. ``abs`` and ``l2`` do not have this blind spot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from semalign.lm.examples import IGNORED, Encoded, collate, mask_of, supervised
from semalign.lm.hooks import POINTS, SUBLAYERS, capture, check_sublayers, skip_layers
from semalign.lm.parts import Model, decoder_layers, head_weight

REDUCES = ("signed", "abs", "l2")
Batch = dict[str, Tensor]


def objective(model: Model, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the supervised positions of ``batch`` (section 4.1's supervised objective).

    The batch may lie on another device than the model.

    Raises:
        ValueError: the batch has no label, so that there is nothing to attribute.
    """
    if not (batch["labels"][:, 1:] != IGNORED).any():
        raise ValueError("the batch has no supervised position: every label is -100: give examples with a response")
    device = next(model.parameters()).device
    ids, labels, mask = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device), mask_of(batch)
    mask = None if mask is None else mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside, and every module's own mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _graph_from_embeddings(model: Model) -> Iterator[None]:
    """Start the graph at the embeddings' output and leave every parameter out of it; all flags are put back after."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    handle = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _module, _args, output: output.detach().requires_grad_().clone()  # a leaf cannot be changed in place
    )
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with _evaluating(model), torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _reduce(product: Tensor, reduce: str) -> Tensor:
    """(..., D) -> (...): the aggregate over channels."""
    if reduce == "signed":
        return product.sum(-1)
    return product.abs().sum(-1) if reduce == "abs" else product.square().sum(-1)


def _gradients(model: Model, loss: Tensor, activations: list[Tensor]) -> list[Tensor]:
    """The gradient of the loss at each layer's activation."""
    reached = loss.requires_grad and all(a.requires_grad for a in activations)
    found = torch.autograd.grad(loss, activations, allow_unused=True) if reached else [None] * len(activations)
    for k, gradient in enumerate(found, start=1):
        if gradient is None:
            raise ValueError(
                f"the loss of a {type(model).__name__} has no gradient at layer {k}: choose a model in which every "
                "layer lies between the embeddings and the logits"
            )
    return [gradient for gradient in found if gradient is not None]


def layer_attribution(
    model: Model, batch: Batch, *, point: str = "stream", reduce: str = "signed", per_token: bool = False
) -> Tensor:
    """The importance of every layer: gradient of the objective times activation, aggregated.

    Args:
        model: a causal LM; it is left as it was found.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T), padded on the right. No supervised token
            looks at the padding behind it, so its gradient, and with it its score, is exactly 0.
        point: ``stream`` (the layer's output), ``residual`` (what the whole layer adds, with the gradient of its
            output), ``mlp`` or ``attention`` (what the sublayer adds).
        reduce: ``signed`` sum, sum of absolute values, or ``l2`` norm, over tokens and channels.
        per_token: keep the tokens: the aggregate over channels only.

    Returns:
        (L,) scores, layer 1 first; (L, B, T) if ``per_token``. Equal to Captum's LayerGradientXActivation, reduced.

    Raises:
        ValueError: an unknown point or reduction, a batch without labels, or a sublayer point of a model in which
            attention and MLP are not all that a layer adds.
    """
    if point not in POINTS:
        raise ValueError(f"unknown point {point!r}; choose one of {', '.join(POINTS)}")
    if reduce not in REDUCES:
        raise ValueError(f"unknown reduction {reduce!r}; choose one of {', '.join(REDUCES)}")
    layers = range(1, len(decoder_layers(model)) + 1)
    read = "stream" if point == "residual" else point
    taps = [(k, read) for k in layers] + ([(k, "residual") for k in layers] if point == "residual" else [])
    if point in SUBLAYERS:
        with _evaluating(model):
            check_sublayers(model)
    with _graph_from_embeddings(model), capture(model, taps, raw=True) as seen:
        loss = objective(model, batch)
        gradients = _gradients(model, loss, [seen[k, read] for k in layers])
    products = [seen[k, point].detach().float() * g.float() for k, g in zip(layers, gradients, strict=True)]
    scores = torch.stack([_reduce(product, reduce) for product in products])
    if not per_token:
        scores = scores.sum((1, 2))
    return scores.sqrt() if reduce == "l2" else scores


def over_examples(model: Model, encoded: Sequence[Encoded], read: Callable[[Model, Batch], Tensor]) -> Tensor:
    """What ``read`` scores, summed over all supervised positions of the examples; the shape is that of its scores.

    They are read one by one: the tensors that are kept for a teacher's backward pass are the peak of a run.
    """
    total = torch.zeros(())
    for score, count in _one_by_one(model, encoded, read):
        total = total + score * count
    return total


def _one_by_one(
    model: Model, encoded: Sequence[Encoded], read: Callable[[Model, Batch], Tensor]
) -> Iterator[tuple[Tensor, int]]:
    """What ``read`` scores of each example, on the CPU, and how many supervised positions it has."""
    for e in encoded:
        yield read(model, collate([e], 0, head_weight(model).device)).cpu(), int(supervised(e.labels).sum())


def of_each(model: Model, encoded: Sequence[Encoded], read: Callable[[Model, Batch], Tensor]) -> Tensor:
    """What each of n examples contributes to what ``read`` scores of all of them in one batch: (n, ...), on the CPU.

    That is its own score by its share of the supervised positions, over which the objective is a mean. Scores of the
    batch are the sum of these, where they are ``signed`` or ``abs``, and the root of their summed squares as ``l2``.
    """
    scores, counts = zip(*_one_by_one(model, encoded, read), strict=True)
    return torch.stack([score * (n / sum(counts)) for score, n in zip(scores, counts, strict=True)])


@torch.no_grad()
def skip_loss(model: Model, batch: Batch) -> Tensor:
    """How much the objective rises, in nats, when a layer is left out: (L,). What attribution estimates, measured.

    Raises:
        ValueError: a batch without labels.
    """
    rises = []
    with _evaluating(model):
        whole = objective(model, batch)
        for k in range(1, len(decoder_layers(model)) + 1):
            with skip_layers(model, [k]):
                rises.append(objective(model, batch) - whole)
    return torch.stack(rises)


def neuron_attribution(model: Model, batch: Batch) -> Tensor:
    """Gradient x activation of every MLP neuron, signed and summed over tokens: (L, F).

    A neuron is a coordinate of the input of ``down_proj``, where one number gates one column of the layer's output.

    Raises:
        ValueError: an MLP without a ``down_proj``, or a batch without labels.
    """
    seen: dict[int, Tensor] = {}
    handles = []

    def hook(layer: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0]

        return keep

    blocks = list(decoder_layers(model))
    for layer, block in enumerate(blocks):
        down = getattr(getattr(block, "mlp", None), "down_proj", None)
        if down is None:
            raise ValueError(
                f"layer {layer + 1} of a {type(model).__name__} has no mlp.down_proj, so no neurons to score: "
                "choose a model whose MLP is built as Llama's is"
            )
        handles.append(down.register_forward_pre_hook(hook(layer)))
    try:
        with _graph_from_embeddings(model):
            gradients = torch.autograd.grad(objective(model, batch), [seen[i] for i in range(len(blocks))])
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([(seen[i].detach() * g).float().sum((0, 1)) for i, g in enumerate(gradients)])
