"""Below the layer: what single attention heads and groups of MLP neurons add to the stream.

A sublayer ends in one matrix, W_o (``o_proj``) of attention or W_down (``down_proj``) of the MLP, and a *part* of it is
a set of this matrix's columns: a head owns the slice that its output enters, a group of neurons one column each. The
contribution of part i at a position is c_i = W[:, i] x_i, and all of them add up to what the sublayer adds, but for a
bias, which belongs to no part. Each c_i lives in the residual stream, so that the map M sends it as it sends a whole
layer's contribution. Layers and parts are numbered from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from semalign.attribution import REDUCES, Batch, objective
from semalign.lm.parts import Model, decoder, decoder_layers, sublayers

MATRICES = {"attention": "o_proj", "mlp": "down_proj"}
"""The last matrix of each sublayer, whose output is what the sublayer adds to the stream."""


def last_matrix(model: Model, k: int, point: str) -> Any:
    """The module of layer k that holds W (D, P): ``o_proj`` at ``attention``, ``down_proj`` at ``mlp``.

    Raises:
        ValueError: the sublayer does not end in such a matrix, as where a norm stands behind it or experts share it.
    """
    layer = decoder_layers(model)[k - 1]
    module = getattr(sublayers(layer)[point == "mlp"], MATRICES[point], None)
    if module is None:
        raise ValueError(
            f"the {point} of layer {k} of a {type(model).__name__} does not end in one {MATRICES[point]}, so that it "
            "has no parts that add up: choose a model built as Llama's is, or align its whole sublayer"
        )
    return module


def head_columns(model: Model, k: int) -> Tensor:
    """The columns of W_o that each query head of layer k owns: (H, P / H) int64.

    With grouped queries H counts queries: heads of a group share keys and values, and each has a slice of its own.

    Raises:
        ValueError: H divides the width of W_o's input not, or the number of key heads does not divide H.
    """
    config: Any = decoder(model).config
    heads, width = int(config.num_attention_heads), _width(last_matrix(model, k, "attention"))
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if width % heads:
        raise ValueError(
            f"{heads} heads do not divide the {width} columns of o_proj in layer {k} of a {type(model).__name__}: "
            "correct num_attention_heads"
        )
    if heads % groups:
        raise ValueError(
            f"{groups} key and value heads do not divide the {heads} query heads of a {type(model).__name__}: correct "
            "num_key_value_heads"
        )
    return torch.arange(width).view(heads, -1)


def neuron_columns(scores: Tensor, groups: int) -> Tensor:
    """``groups`` equal groups of neurons by size of score, the highest first: (G, F / G) columns of W_down, int64.

    Neurons have no order of their own; by attribution, groups of two models hold neurons of like rank.

    Args:
        scores: (F,) attribution of each neuron; its sign does not count.
        groups: G.

    Raises:
        ValueError: G does not divide F.
    """
    if groups < 1 or len(scores) % groups:
        raise ValueError(
            f"groups={groups} does not divide the {len(scores)} neurons of an MLP: choose a divisor of that"
        )
    return scores.abs().argsort(descending=True, stable=True).cpu().view(groups, -1)


def _width(module: Any) -> int:
    return int(module.in_features)


def written(model: Model, k: int, point: str) -> Tensor:
    """W (D, P) as layer k applies it now, with adapters and any multiplier of the sublayer, and with its graph.

    It is what the module does to the unit vectors, so that it need not be known how an adapter keeps its factors.
    """
    module, layer = last_matrix(model, k, point), decoder_layers(model)[k - 1]
    weight = next(module.parameters())
    units = torch.eye(_width(module), device=weight.device, dtype=weight.dtype)
    columns = module(units) - module(torch.zeros_like(units[:1]))
    return columns.T * float(getattr(layer, "residual_multiplier", 1.0))


@contextmanager
def entering(
    model: Model, taps: Iterable[tuple[int, str]], *, leaves: bool = False
) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Record what enters the last matrix of every (layer, point) in ``taps``: x (B, T, P), with its graph.

    ``leaves`` starts a graph at each x that has none, for gradients of models whose parameters take none.
    """
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(tap: tuple[int, str]) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0] if args[0].requires_grad or not leaves else args[0].detach().requires_grad_()
            seen[tap] = x
            return (x, *args[1:])

        return hook

    handles = [last_matrix(model, *tap).register_forward_pre_hook(keep(tap)) for tap in taps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def contributions(x: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """c (n, H, D), what each part adds: W[:, i] x_i of x (n, P), W (D, P) or M W (D', P), and columns (H, P / H)."""
    columns = columns.to(x.device)
    return torch.einsum("nhp,dhp->nhd", x[:, columns], weight[:, columns])


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No parameter takes a gradient inside; all flags are put back after."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def read_columns(
    model: Model, batch: Batch, point: str, layers: Iterable[int] = (), reduce: str = "signed"
) -> tuple[list[Tensor], list[Tensor]]:
    """What enters the last matrix of some layers (all by default), and gradient x activation of each of its columns.

    Args:
        model: a causal LM in eval mode; it is left as it was found.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T).
        reduce: ``signed`` sum, sum of absolute values, or ``l2`` norm, over tokens.

    Returns:
        A list each over layers: x (B, T, P), and scores (P,) of the objective in nats (section 4.1), float32. Equal to
        Captum's LayerGradientXActivation at the matrix's input, reduced.

    Raises:
        ValueError: as :func:`last_matrix`, an unknown reduction, or a batch without labels.
    """
    if reduce not in REDUCES:
        raise ValueError(f"unknown reduction {reduce!r}; choose one of {', '.join(REDUCES)}")
    taps = [(k, point) for k in layers or range(1, len(decoder_layers(model)) + 1)]
    with _frozen(model), entering(model, taps, leaves=True) as seen:
        loss = objective(model, batch)
        states = [seen[tap] for tap in taps]
        gradients = torch.autograd.grad(loss, states)
    products = [x.detach().float() * g.float() for x, g in zip(states, gradients, strict=True)]
    sums = {"signed": lambda p: p.sum((0, 1)), "abs": lambda p: p.abs().sum((0, 1)), "l2": lambda p: p.norm(dim=(0, 1))}
    return [x.detach() for x in states], [sums[reduce](p) for p in products]


def part_scores(scores: Tensor, columns: Tensor, reduce: str = "signed") -> Tensor:
    """(H,) scores of parts from those of their columns (P,), put together as ``reduce`` puts channels together."""
    own = scores[columns.to(scores.device)]
    return own.norm(dim=1) if reduce == "l2" else own.sum(1)


def head_attribution(model: Model, batch: Batch, *, reduce: str = "signed") -> Tensor:
    """Gradient x activation of every attention head (section 4.1, below the layer): (L, H).

    The activation is the head's output, the slice of x that enters ``o_proj``. The signed scores of a layer's heads add
    up to the signed score of its attention output (:func:`semalign.attribution.layer_attribution`), but for a bias.

    Raises:
        ValueError: as :func:`head_columns` and :func:`read_columns`.
    """
    layers = range(1, len(decoder_layers(model)) + 1)
    columns = [head_columns(model, k) for k in layers]
    _, scores = read_columns(model, batch, "attention", layers, reduce)
    return torch.stack([part_scores(s, c, reduce) for s, c in zip(scores, columns, strict=True)])


def likeness(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean cosine (H_T, H_S) over n positions of mapped contributions M c_T (n, H_T, D_S) with c_S (n, H_S, D_S).

    Raises:
        ValueError: the positions or the widths differ.
    """
    if teacher.shape[::2] != student.shape[::2]:
        raise ValueError(
            f"contributions of {tuple(teacher.shape)} and {tuple(student.shape)} cannot be compared: give both at the "
            "same positions and in the student's width"
        )
    return torch.einsum("nid,njd->ij", F.normalize(teacher, dim=-1), F.normalize(student, dim=-1)) / len(teacher)


def attributed(alike: Tensor, teacher_scores: Tensor, student_scores: Tensor) -> Tensor:
    """Similarity (H_T, H_S) times sqrt(a_i b_j): a (H_T,) and b (H_S,) are the parts' shares of attribution, unsigned.

    Pairs of parts that matter in both models weigh most in an assignment of the largest total.
    """
    a, b = (s.abs() / s.abs().sum().clamp_min(1e-30) for s in (teacher_scores, student_scores))
    return alike * (a[:, None] * b).sqrt().to(alike)


def pair_parts(similarity: Tensor) -> list[int]:
    """For each student part the teacher part of the assignment of the largest total similarity (H_T, H_S).

    No teacher part has two student parts, unless the student has more of them: then each may have ceil(H_S / H_T). So
    every student part has a partner, and a teacher with more parts keeps some to itself.

    Raises:
        ValueError: no matrix, an empty one, or a number that is not finite.
    """
    if similarity.dim() != 2 or 0 in similarity.shape or not similarity.isfinite().all():
        raise ValueError(f"a similarity matrix must be (H_T, H_S) and finite, got shape {tuple(similarity.shape)}")
    n_teacher, n_student = similarity.shape
    places = similarity.detach().cpu().double().repeat(-(-n_student // n_teacher), 1)
    rows, parts = linear_sum_assignment(places.numpy(), maximize=True)
    return [int(row) % n_teacher + 1 for _, row in sorted(zip(parts, rows, strict=True))]


def own_directions(weight: Tensor, columns: Tensor) -> Tensor:
    """Q (H, D, D / H): the orthonormal directions in which each part writes most, H of which make D numbers in all.

    The leading left singular vectors of W[:, i]: what a head of width D / H can write lies in their span.

    Args:
        weight: W (D, P).
        columns: (H, P / H).

    Raises:
        ValueError: H does not divide D, or a part has fewer than D / H columns.
    """
    width, (parts, owned) = len(weight), columns.shape
    if width % parts or owned < width // parts:
        raise ValueError(
            f"{parts} parts of {owned} columns cannot share a width of {width} equally: choose a student whose parts "
            "divide its width"
        )
    slices = weight[:, columns.to(weight.device)].permute(1, 0, 2).float()
    return torch.linalg.svd(slices, full_matrices=False).U[:, :, : width // parts]


def within(directions: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Q_i' W[:, i] (H, D / H, P / H): from what enters a part to its contribution in its own directions."""
    return torch.einsum("hdr,dhp->hrp", directions, weight[:, columns.to(weight.device)])
