"""Version 2 of the paper, in our reading: layer by layer from shallow to deep, by geometry or by curvature, beside KL.

Of version 2 two abstracts are all there is (arXiv 2510.24208 v2 and ACL Findings 2026), and they name different layer
terms. What they share: one source layer for each student layer, a frontier of which each stage trains the current layer
alone, and KL to the teacher at the output in place of the paper's cosines. No number here is one of theirs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semalign import alignment
from semalign.lm.examples import Encoded, TaskData, by_length, collate, mask_of, supervised
from semalign.lm.hooks import capture
from semalign.lm.parts import Model, decoder, decoder_layers, final_norm, head_weight, norm_gain
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.pairing import depth_pairs, order_preserving
from semalign.semantics import semantic_map
from semalign.training.config import TransferConfig, TransferResult
from semalign.training.loop import Stage

TERMS = {"geometry": "residual", "fisher": "stream"}
"""The layer terms, and the point of the layer that each reads."""
TOP = 64
"""How many tokens of p* the Fisher quadratic reads."""


def token_relations(contributions: Tensor, metric: Tensor | None = None) -> Tensor:
    """The cosines (T, T) between the contributions R (T, D) of a sequence's positions, less their mean over positions.

    G = row-normalised C R A R' C, with C = I - 11'/T. ``metric`` A (D, D) is what makes an inner product in R's space;
    None is the identity. Of a teacher that a map M takes to the student A is M'M, so that M and UM with U'U = I give
    the same G. It is 0 where there is one position.
    """
    centred = contributions - contributions.mean(0)
    gram = centred @ centred.T if metric is None else centred @ metric.to(centred) @ centred.T
    least = torch.finfo(gram.dtype).eps * contributions.detach().square().sum() + torch.finfo(gram.dtype).tiny
    length = gram.diagonal().clamp_min(least).sqrt()  # what is less is rounding, and has no direction
    return gram / (length[:, None] * length)


def geometry_loss(own: Tensor, target: Tensor, counts: Sequence[int], metric: Tensor | None = None) -> Tensor:
    """|G_S - G*|_F^2 / T^2 of each sequence, at each of its positions (n,).

    Args:
        own: contributions of the student's layer (n, D_S).
        target: those of the teacher's (n, D), as they are or mapped.
        counts: positions of each sequence, one after the other.
        metric: A (D, D) of the target's space, as in :func:`token_relations`.
    """
    pairs = zip(own.split(list(counts)), target.split(list(counts)), strict=True)
    return torch.cat(
        [(token_relations(a) - token_relations(b, metric)).square().mean().expand(len(a)) for a, b in pairs]
    )


def fisher_quadratic(own: Tensor, target: Tensor, head: Tensor, top: int = TOP) -> Tensor:
    """(h - h*)' Cov_p*(w) (h - h*) / 2 in nats (n,), with p* = softmax(W h*): KL(p*, p) to second order.

    The covariance is over the ``top`` likeliest tokens of p* alone, in which p* is made to sum to 1: k D products a
    position instead of m D. With all tokens it is (z - z*)' (diag p* - p* p*') (z - z*) / 2.

    Args:
        own: normalised states h (n, D), as the head reads them.
        target: h* (n, D), constants.
        head: W (m, D).
        top: k, at most m.
    """
    weight = head.detach().to(own.dtype)
    logp, index = (target @ weight.T).topk(min(top, len(weight)), dim=-1)
    p, moved = logp.softmax(-1), (weight[index] @ (own - target)[..., None])[..., 0]
    return ((p * moved.square()).sum(-1) - (p * moved).sum(-1).square()) / 2


def attributed_pairs(scores: Tensor, n_student: int, *, window: int = 1) -> list[int]:
    """One teacher layer for each student layer: l(1) <= ... <= l(L_S) of the largest total score.

    Each lies within ``window`` layers of the depth rule's.

    Args:
        scores: attribution of every teacher layer (L_T,).

    Raises:
        ValueError: scores that are not finite, or no student layer.
    """
    middle = torch.tensor(depth_pairs(len(scores), n_student))
    off = (torch.arange(1, len(scores) + 1)[:, None] - middle).abs() > window
    share = scores.detach().cpu().double()[:, None] / scores.detach().abs().max().clamp_min(1e-30).cpu()
    return order_preserving(share - 4.0 * n_student * off)  # more than all shares of a path together


def transfer(
    pair: Pair,
    data: TaskData,
    config: TransferConfig | None = None,
    *,
    term: str = "geometry",
    schedule: str = "frontier",
    inputs: str = "own",
) -> TransferResult:
    """Align every layer of the student to one of the teacher's, shallow to deep, beside KL to the teacher's output.

    Sources are those of :func:`attributed_pairs`, unless ``teacher_layers`` names them. In each stage of the frontier
    the current layer alone is trained, for all epochs. ``map`` is what makes the metric of ``geometry``, None the
    identity; ``fisher`` needs a map of the student's width, and has the final norms' gains folded in.

    Args:
        term: ``geometry``, :func:`geometry_loss` of the layers' contributions at the supervised positions; or
            ``fisher``, :func:`fisher_quadratic` of the streams as the student's final norm and head read them.
        schedule: ``frontier``, or ``joint`` with all layers at once.
        inputs: what a layer receives while it is trained: the student's ``own`` states; or in a frontier the
            ``teacher``'s below its source, aligned by the logit map, in the length of the student's own. The states of
            all tokens are then in memory.

    Raises:
        ValueError: an unknown term or kind of inputs, teacher's inputs outside a frontier, or as
            :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    if term not in TERMS or inputs not in ("own", "teacher"):
        raise ValueError(
            f"term={term!r} must be one of {', '.join(TERMS)}, and inputs={inputs!r} one of own, teacher: choose these"
        )
    if inputs == "teacher" and schedule != "frontier":
        raise ValueError("layers that train together feed each other: choose schedule='frontier', or inputs='own'")
    start = time.perf_counter()
    config = replace(
        config or TransferConfig(), layers="all", interface=TERMS[term], fold_gain=term == "fisher",
        layer_loss="relational" if term == "geometry" else "cosine", output_loss="kl", schedule=schedule,
        interpolate=False,
    )  # fmt: skip
    with alignment.workplace(config) as scratch:
        given, watched = alignment.examples_of(pair, data, config)
        encoded, n_student = given + watched, len(decoder_layers(pair.load_student()))
        config = replace(config, layers=tuple(range(1, n_student + 1)))
        if config.teacher_layers is None:
            sources = attributed_pairs(attributed(pair, data, config), n_student)
            config = replace(config, teacher_layers=tuple(sources))
        layers, supervision, vocabulary = alignment.supervise(pair, data, encoded, config, scratch)
        fed = below(pair, encoded, config.teacher_layers or ()) if inputs == "teacher" else {}
        student = pair.load_student().eval()
        objective = alignment.objective_of(
            replace(config, layer_weight=0.0), student, encoded, supervision, layers, vocabulary
        )
        read: Callable[..., Tensor] = partial(_layer_term, term, student)

        def terms(stage: Stage, examples: list[int]) -> dict[str, Tensor]:
            if stage.layers[0] in fed:
                stage = replace(stage, read=in_place_of(stage.read, fed[stage.layers[0]]))
            taps = [(k, config.interface) for k in stage.layers] if config.layer_weight else []
            with capture(student, taps) as seen:
                sums = objective(stage, examples)
            mask = supervised(collate([encoded[i] for i in examples], 0, student.device)["labels"])
            rows, counts = supervision.rows(examples), mask.sum(1).tolist()
            with torch.autocast(student.device.type, enabled=False):
                for tap in taps:
                    target, norm = (t.to(student.device) for t in supervision.target(layers.index(tap[0]), rows))
                    found = read(seen[tap][mask].float(), target * norm[:, None], counts).sum()
                    sums["layer_loss"] = sums["layer_loss"] + found / len(taps)
            return {name: value for name, value in sums.items() if name not in ("cos", "norm_ratio")}

        said = f"version two {term} {inputs}"
        result = alignment.fit(
            student, encoded, len(given), config, layers, supervision, terms, scratch, objective=said
        )
    result.cost["wall_s"] = time.perf_counter() - start
    return result


def _layer_term(term: str, student: Model, own: Tensor, target: Tensor, counts: Sequence[int]) -> Tensor:
    if term == "geometry":
        return geometry_loss(own, target, counts)
    norm, head = final_norm(student), head_weight(student)
    return fisher_quadratic(norm(own.to(head.dtype)).float(), norm(target.to(head.dtype)).float(), head)


def attributed(pair: Pair, data: TaskData, config: TransferConfig) -> Tensor:
    """The score of every teacher layer (L_T,), as :func:`semalign.alignment.choose_layers` finds the critical one."""
    teacher = pair.load_teacher().eval()
    scores = alignment.attributed(pair, teacher, data, config)
    del teacher
    gc.collect()
    return scores


@torch.no_grad()
def below(pair: Pair, encoded: Sequence[Encoded], sources: Sequence[int]) -> dict[int, list[Tensor]]:
    """What student layers receive where the teacher's states take the place of their own.

    Layer k whose source is l, both above 1, receives the teacher's stream after layer l - 1 through the logit map with
    gains folded in: for each of ``encoded`` a tensor (T, D_S), on the CPU. Layer 1 receives the student's embeddings.
    """
    _, head, gain = alignment.read_off(pair, TransferConfig(layer_weight=0.0))
    teacher = pair.load_teacher().eval()
    matrix = semantic_map(
        head_weight(teacher), head, kind="logit", teacher_gain=norm_gain(teacher), student_gain=gain
    )  # fmt: skip
    layers = {k: depth - 1 for k, depth in enumerate(sources, start=1) if k > 1 and depth > 1}
    found: dict[int, dict[int, Tensor]] = {k: {} for k in layers}
    with capture(teacher, [(depth, "stream") for depth in {*layers.values()}]) as seen:
        for examples in by_length(encoded, 2048):
            batch = collate([encoded[i] for i in examples], 0, head_weight(teacher).device)
            decoder(teacher)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
            for k, depth in layers.items():
                mapped = (seen[depth, "stream"].float() @ matrix.to(seen[depth, "stream"].device).float().T).cpu()
                found[k] |= {i: mapped[row, : len(encoded[i].input_ids)].clone() for row, i in enumerate(examples)}
    del teacher
    gc.collect()
    return {k: [of[i] for i in range(len(encoded))] for k, of in found.items()}


def in_place_of(read: Callable[[Sequence[int]], Tensor], states: Sequence[Tensor]) -> Callable[[Sequence[int]], Tensor]:
    """A reader of padded (B, T, D) that gives the directions of ``states``, in the lengths of what ``read`` gives."""

    def instead(examples: Sequence[int]) -> Tensor:
        own = read(examples)
        given = nn.utils.rnn.pad_sequence([states[i] for i in examples], batch_first=True).to(own.device)
        return (F.normalize(given, dim=-1) * own.float().norm(dim=-1, keepdim=True)).to(own.dtype)

    return instead


METHODS = {
    "geometry_frontier": Method(
        "version 2, our reading: geometry", transfer, "train, extract", "LoRA on all layers",
        "states of all layers, logits", False, colour="#553399",
    ),
    "fisher_frontier": Method(
        "version 2, our reading: curvature", partial(transfer, term="fisher"), "train, extract", "LoRA on all layers",
        "states of all layers, logits", False, colour="#aa6633",
    ),
}  # fmt: skip
