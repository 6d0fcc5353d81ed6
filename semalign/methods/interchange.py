"""Interchange: put the teacher's aligned states into the student at k, and ask that it moves as the teacher does.

The paper names objectives that combine causal and semantic constraints as future work. The causal one here is
activation patching on both sides: the states of a second question take the place of the first one's, in the teacher at
l(k) as they are, in the student at k aligned. What is exchanged is their direction, which is all that a semantic basis
sees of a state (section 3); the length stays the model's own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from semalign import alignment
from semalign.lm.examples import IGNORED, Encoded, TaskData, by_length, collate, mask_of, supervised
from semalign.lm.hooks import capture, check_head, float_logits, skip_layers
from semalign.lm.parts import Model, decoder, decoder_layers, final_norm, head_weight
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.pairing import depth_pairs
from semalign.training.config import TransferConfig, TransferResult
from semalign.training.loop import Stage
from semalign.training.losses import LOGITS

LEAST = -27.0
"""The least log-probability that the rest of a vocabulary counts with: of about 1e-12."""


class Movement(NamedTuple):
    """How a teacher's predictions move, at P supervised positions.

    ``tokens`` (P, k): those that are kept; ``before`` and ``after`` (P, k + 1): their log-probabilities without and
    with the swap, and that of all other tokens; (P, k) where k is the whole vocabulary.
    """

    tokens: Tensor
    before: Tensor
    after: Tensor


def transfer(
    pair: Pair,
    data: TaskData,
    config: TransferConfig | None = None,
    *,
    semantic_weight: float = 1.0,
    causal_weight: float = 1.0,
    scrambled: bool = False,
) -> TransferResult:
    """Train layer k on labels, on the aligned state (semantic), and on what a swap of states does (causal).

    The layer term is ``semantic_weight`` (1 - cos(h_k, h*)) + ``causal_weight`` KL, with h_k the stream after layer k
    and the KL of :func:`movement_loss`, read at the response while the question's states are another question's. Every
    example has another one of its split as its partner, the same at every epoch; the two questions are laid together at
    their ends. The map is the logit one, through which a state of the student itself comes back, and the output loss is
    cross-entropy with the labels.

    The teacher is loaded twice, never beside the student: for its states, and for its swaps.

    Args:
        scrambled: a control: the student receives its partner's states, and is asked to move as the teacher does
            under the swap with somebody else.

    Raises:
        ValueError: more than one layer, or as :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    start = time.perf_counter()
    config = replace(
        config or TransferConfig(), interface="stream", map="logit", output_loss="ce", schedule="joint",
        interpolate=False,
    )  # fmt: skip
    if not config.layer_weight:
        return alignment.transfer(pair, data, config)
    if config.layers is not None and len(config.layers) != 1:
        raise ValueError(f"an interchange swaps states at one layer pair: choose one of layers={config.layers}")
    # A step keeps two passes for the one backwards: of half as many examples each, they take the memory of one.
    config = replace(config, micro_batch=max(1, config.micro_batch // 2))
    with alignment.workplace(config) as scratch:
        given, watched = alignment.examples_of(pair, data, config)
        encoded = given + watched
        both = [*encoded, *map(question_of, encoded)]
        layers, supervision, vocabulary = alignment.supervise(pair, data, both, config, scratch)
        (k,), n_student = layers, len(decoder_layers(pair.load_student()))
        partners, others = (partners_of([len(given), len(watched)], config.seed, other=other) for other in (1, 2))
        teacher = pair.load_teacher().eval()
        (depth,) = config.teacher_layers or (depth_pairs(len(decoder_layers(teacher)), n_student)[k - 1],)
        swaps, top_k = others if scrambled else partners, min(config.top_k, vocabulary)
        moved = movements(teacher, encoded, swaps, depth, top_k, vocabulary)
        del teacher
        gc.collect()
        student = pair.load_student().eval()
        output = alignment.objective_of(config, student, encoded, supervision, layers, vocabulary)
        ends = [question_end(e) for e in encoded]

        def aligned(example: int) -> Tensor:
            return supervision.target(0, supervision.rows([len(encoded) + example]))[0].to(student.device)

        def terms(stage: Stage, examples: list[int]) -> dict[str, Tensor]:
            batch = collate([encoded[i] for i in examples], 0, student.device)
            mask, rows = supervised(batch["labels"]), supervision.rows(examples)
            with capture(student, [(n_student, "stream")]) as seen:
                sums = output(stage, examples)
            before = final_norm(student)(seen[n_student, "stream"][mask])
            theirs = [aligned(partners[i]) for i in examples]
            with swapped(student, k, [ends[i] for i in examples], theirs):
                after = stage.forward(stage.read(examples), mask_of(batch))[mask]
            with torch.autocast(student.device.type, enabled=False):
                causal = _movement_of(student, before, after, Movement(*(t[rows] for t in moved)), vocabulary).sum()
            sums |= {"semantic": sums["layer_loss"], "causal": causal}
            sums["layer_loss"] = semantic_weight * sums["semantic"] + causal_weight * causal
            return sums

        said = f"interchange {semantic_weight} {causal_weight} {scrambled}"
        result = alignment.fit(
            student, encoded, len(given), config, layers, supervision, terms, scratch, objective=said
        )
    result.cost["teacher_tokens"] += 3.0 * sum(len(e.input_ids) for e in encoded)
    result.cost["wall_s"] = time.perf_counter() - start
    return result


def partners_of(sizes: Sequence[int], seed: int, *, other: int = 1) -> list[int]:
    """For every example of splits of ``sizes`` another one of its split, at random: a number counted over all of them.

    ``other`` = 2 names somebody else: the partner's partner. An example alone in its split is its own.
    """
    found, start = [0] * sum(sizes), 0
    for size in sizes:
        order = start + np.random.default_rng((seed, start)).permutation(size)
        for i, j in zip(order.tolist(), np.roll(order, -other).tolist(), strict=True):
            found[i] = j
        start += size
    return found


def question_end(example: Encoded) -> int:
    """The place of a question's last token: the first position at which the response is predicted."""
    return int(supervised(example.labels).nonzero()[0])


def question_of(example: Encoded) -> Encoded:
    """The same tokens with the question's positions as the supervised ones, for a cache of the states there."""
    asked = torch.arange(len(example.labels)) <= question_end(example) + 1
    return Encoded(example.input_ids, torch.where(asked, example.input_ids, IGNORED))


@contextmanager
def swapped(model: Model, layer: int, ends: Sequence[int], states: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a question's stream after ``layer`` points where another question's states point.

    The two are laid together at their ends; of the longer one the beginning stays out. The direction alone is put in,
    with the length that the stream has there. It is a constant: no gradient reaches the layer through the question.

    Args:
        layer: from 1.
        ends: the place of each sequence's last question token.
        states: for each sequence the other question's states (T', D) in the model's width.
    """
    sizes = [min(end + 1, len(own)) for end, own in zip(ends, states, strict=True)]
    rows = torch.cat([torch.full((n,), row) for row, n in enumerate(sizes)])
    places = torch.cat([torch.arange(end + 1 - n, end + 1) for end, n in zip(ends, sizes, strict=True)])
    put = F.normalize(torch.cat([own[-n:] for own, n in zip(states, sizes, strict=True)]).float(), dim=-1)

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        at = rows.to(stream.device), places.to(stream.device)
        length = stream.detach()[at].float().norm(dim=-1, keepdim=True)
        stream = stream.index_put(at, (length * put).to(stream.dtype))
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = decoder_layers(model)[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def movements(
    teacher: Model,
    encoded: Sequence[Encoded],
    partners: Sequence[int],
    layer: int,
    top_k: int,
    vocabulary: int,
    *,
    batch_tokens: int = 2048,
) -> Movement:
    """How a teacher's predictions of each response move when the question's stream after ``layer`` is the partner's.

    Kept are the ``top_k`` tokens that are likeliest without and with the swap, of the first ``vocabulary``. The rows
    are the supervised positions in the order of ``encoded``.
    """
    check_head(teacher)
    device = next(teacher.parameters()).device
    ends, states = list(map(question_end, encoded)), dict[int, Tensor]()
    above = range(layer + 1, len(decoder_layers(teacher)) + 1)

    def run(examples: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        batch = collate([encoded[i] for i in examples], 0, device)
        out = decoder(teacher)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
        return batch, out.last_hidden_state

    with capture(teacher, [(layer, "stream")]) as seen, skip_layers(teacher, above):
        for examples in by_length(encoded, batch_tokens):
            run(examples)
            for row, i in enumerate(examples):
                states[i] = seen[layer, "stream"][row, : ends[i] + 1].clone()
    kept: dict[int, Movement] = {}
    for examples in by_length(encoded, batch_tokens):
        batch, before = run(examples)
        with swapped(teacher, layer, [ends[i] for i in examples], [states[partners[i]] for i in examples]):
            _, after = run(examples)
        for row, i in enumerate(examples):
            mask = supervised(batch["labels"][row])
            logp = [float_logits(teacher, h[row, mask])[:, :vocabulary].log_softmax(-1) for h in (before, after)]
            index = (logp[0].exp() + logp[1].exp()).topk(top_k, dim=-1).indices
            kept[i] = Movement(index.cpu(), *(_kept(p, index).cpu() for p in logp))
    return Movement(*(torch.cat(parts) for parts in zip(*(kept[i] for i in range(len(encoded))), strict=True)))


def _kept(logp: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities (n, k + 1) of the tokens ``index`` (n, k) and of all others, of ``logp`` (n, m)."""
    chosen = logp.gather(1, index)
    if index.shape[1] == logp.shape[1]:
        return chosen
    rest = logp.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest.clamp_min(LEAST)], 1)


def movement_loss(before: Tensor, after: Tensor, teacher: Movement) -> Tensor:
    """KL(p', q') in nats (n,): p' is the teacher's prediction with the swap, q' its own without, moved as the student.

    log q' = log p + log s' - log s up to a constant, with the student's s and s' from logits ``before`` and ``after``
    the swap (n, m). It is 0 where both models move alike, however far apart they are.
    """
    s, moved = (_kept(z.log_softmax(-1), teacher.tokens) for z in (before, after))
    logq = (teacher.before + moved - s).log_softmax(-1)
    return (teacher.after.exp() * (teacher.after - logq)).sum(-1)


def _movement_of(student: Model, before: Tensor, after: Tensor, teacher: Movement, vocabulary: int) -> Tensor:
    """:func:`movement_loss` of normalised final states (n, D), some positions at once, and again backwards."""

    def part(one: Tensor, two: Tensor, *of_teacher: Tensor) -> Tensor:
        s, moved = (float_logits(student, states)[:, :vocabulary] for states in (one, two))
        return movement_loss(s, moved, Movement(*of_teacher))

    everything = (before, after, *(t.to(before.device) for t in teacher))
    chunk = max(1, LOGITS // (2 * len(head_weight(student))))
    pieces = list(zip(*(t.split(chunk) for t in everything), strict=True))
    if len(pieces) == 1:
        return part(*pieces[0])
    return torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces])


METHODS = {
    "interchange": Method(
        "labels, and swaps of states", partial(transfer, semantic_weight=0.0), "train, extract", "LoRA on layer k",
        "states at l(k), their effects", True, colour="#779988",
    ),
    "semantic_and_causal": Method(
        "labels, states, and their swaps", transfer, "train, extract", "LoRA on layer k",
        "states at l(k), their effects", True, colour="#eeddaa",
    ),
    # The same with the effect of another swap than the student's: what swaps add beside meaning.
    "scrambled_pairs": Method(
        "labels, states, and others' swaps", partial(transfer, scrambled=True), "train, extract", "LoRA on layer k",
        "states at l(k), their effects", True, colour="#440044", follows="semantic_and_causal",
    ),
}  # fmt: skip
