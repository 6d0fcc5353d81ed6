"""The losses, as functions over tensors: of layer k against its target, and of the output against labels or teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from semalign.lm.parts import Model, decoder

LOGITS = 2**24
"""Logits in memory at once."""


def cosine_distance(
    h: Tensor, target: Tensor, norm: Tensor, counts: Sequence[int], head: Tensor | None = None
) -> Tensor:
    """The paper's 1 - cos(h_k, h*) (section 4.3)."""
    return 1 - F.cosine_similarity(h, target, dim=-1)


def relative_square(
    h: Tensor, target: Tensor, norm: Tensor, counts: Sequence[int], head: Tensor | None = None
) -> Tensor:
    """|h_k - M h_T|^2 / |M h_T|^2, which also fixes the length."""
    aligned = target * norm[:, None]
    return (h - aligned).pow(2).sum(-1) / aligned.pow(2).sum(-1)


def mean_square(h: Tensor, target: Tensor, norm: Tensor, counts: Sequence[int], head: Tensor | None = None) -> Tensor:
    """|h_k - M h_T|^2 / D: long states, those of deep layers, weigh more."""
    return (h - target * norm[:, None]).pow(2).mean(-1)


def relational_square(
    h: Tensor, target: Tensor, norm: Tensor, counts: Sequence[int], head: Tensor | None = None
) -> Tensor:
    """Mean squared difference of the centred Gram matrices of unit rows, in each sequence of ``counts`` positions.

    The widths D and D' may differ, so that no map is needed.
    """
    pairs = zip(h.split(list(counts)), target.split(list(counts)), strict=True)
    return torch.cat([(token_geometry(a) - token_geometry(b)).pow(2).mean().expand(len(a)) for a, b in pairs])


def fisher_quadratic(
    h: Tensor, target: Tensor, norm: Tensor, counts: Sequence[int], head: Tensor | None = None
) -> Tensor:
    """(z - z*)' (diag p - p p') (z - z*) / 2 in nats, for z = W h_k, z* = W M h_T, p = softmax(z*).

    KL(z*, z) to second order, with the student's ``head`` W (m, D).
    """
    if head is None:
        raise ValueError("the fisher loss reads logits: give the student's head (m, D)")
    aligned, weight = target * norm[:, None], head.detach().to(h.dtype)
    p, moved = (aligned @ weight.T).softmax(-1), (h - aligned) @ weight.T
    return ((p * moved.pow(2)).sum(-1) - (p * moved).sum(-1).pow(2)) / 2


LAYER_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine_distance,
    "mse": relative_square,
    "relational": relational_square,
    "fisher": fisher_quadratic,
    "mean_square": mean_square,
}
"""The layer term at each supervised position (n,), from h_k (n, D), h* (n, D'), |h_T| (n,), counts and the head."""


def token_geometry(x: Tensor) -> Tensor:
    """The centred Gram matrix (T, T) of the unit rows of x (T, D)."""
    unit = F.normalize(x, dim=-1)
    centred = unit - unit.mean(0)
    return centred @ centred.T


def head_factor(model: Model) -> Tensor | None:
    """R (D, D) float32 with R'R = W'W, so that |z| = |R h|; None where logits are not W h (bias, soft cap)."""
    config: Any = decoder(model).config
    head = model.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None):
        return None
    gram = sum(w.double().T @ w.double() for w in head.weight.detach().split(4096))
    values, vectors = torch.linalg.eigh(gram)
    return (values.clamp_min(0).sqrt()[:, None] * vectors.T).float()


def divergence(kind: str, z: Tensor, logp: Tensor, index: Tensor, tail: Tensor) -> Tensor:
    """Between teacher p and student q (n,), over the teacher's top-k tokens and one bin for the rest.

    ``kl`` is KL(p || q), ``reverse_kl`` is KL(q || p), ``jsd`` the mean of both against (p + q) / 2. Student logits z
    (n, m); the teacher's ``logp`` and ``index`` (n, k), and the mass of its rest ``tail`` (n,).
    """
    whole = z.log_softmax(-1)
    logq = whole.gather(1, index)
    if index.shape[1] < z.shape[1]:
        rest = whole.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
        logp, logq = torch.cat([logp, tail.clamp_min(1e-12).log()[:, None]], 1), torch.cat([logq, rest], 1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "kl":
        return kl(logp, logq)
    if kind == "reverse_kl":
        return kl(logq, logp)
    middle = torch.logaddexp(logp, logq) - math.log(2)
    return (kl(logp, middle) + kl(logq, middle)) / 2


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def _onehot_cosine(z: Tensor, y: Tensor) -> Tensor:
    return 1 - z.gather(1, y[:, None])[:, 0] / z.norm(dim=-1)


OUTPUT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cosine": _onehot_cosine,
    "ce": _cross_entropy,
    "kl": lambda z, y, *teacher: divergence("kl", z, *teacher),
    "reverse_kl": lambda z, y, *teacher: divergence("reverse_kl", z, *teacher),
    "jsd": lambda z, y, *teacher: divergence("jsd", z, *teacher),
}
"""The output term (n,) from logits z (n, m), next tokens y (n,), and what :func:`divergence` reads of the teacher."""

DIVERGENCES = ("kl", "reverse_kl", "jsd")
"""The output losses that read the teacher's distribution."""


def output_loss(
    kind: str,
    final: Tensor,
    labels: Tensor,
    readout: Callable[[Tensor], Tensor],
    head: Tensor,
    *,
    factor: Tensor | None = None,
    teacher: Sequence[Tensor] = (),
    vocabulary: int | None = None,
) -> Tensor:
    """The output term at each supervised position (n,).

    Args:
        kind: of ``OUTPUT_LOSSES``, or ``none`` for zeros.
        final: normalised final states (n, D).
        labels: next tokens (n,).
        readout: from states to logits; at most ``LOGITS`` of them are kept, the rest is computed again backwards.
        head: W (m, D).
        factor: R of :func:`head_factor`; with it the cosine with the onehot needs no logit.
        teacher: log-probabilities, indices (n, k) and the mass of the rest (n,), for ``DIVERGENCES``.
        vocabulary: how many tokens both models have; a divergence reads no others.
    """
    if kind == "none":
        return torch.zeros(len(labels), device=final.device)
    if kind == "cosine" and factor is not None:
        final = final.float()
        return 1 - (final * head.detach()[labels].float()).sum(-1) / (final @ factor.T).norm(dim=-1)
    extra = [t.to(final.device) for t in teacher] if kind in DIVERGENCES else []
    read = vocabulary if kind in DIVERGENCES else None

    def part(states: Tensor, y: Tensor, *of_teacher: Tensor) -> Tensor:
        return OUTPUT_LOSSES[kind](readout(states)[:, :read], y, *of_teacher)

    chunk = max(1, LOGITS // len(head))
    pieces = list(zip(*(t.split(chunk) for t in (final, labels, *extra)), strict=True))
    if len(pieces) == 1:
        return part(*pieces[0])
    return torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces])
