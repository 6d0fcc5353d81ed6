"""Alignment below the layer: each attention head, or each group of MLP neurons, towards a part of the teacher's layer.

The rows differ from ``semalign`` in where the teacher is read and in nothing else. What trains is the same LoRA in the
same layer. What is supervised is as many numbers: a layer's target is D_S numbers a position, and here each of H parts
has D_S / H of them, its contribution in the D_S / H directions in which it writes most before training. The output loss
and its weight are the configuration's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from semalign import alignment
from semalign.contributions import (
    attributed,
    contributions,
    entering,
    head_columns,
    likeness,
    neuron_columns,
    own_directions,
    pair_parts,
    part_scores,
    read_columns,
    within,
    written,
)
from semalign.lm.examples import Encoded, TaskData, by_length, collate, encode, mask_of, supervised
from semalign.lm.hooks import check_sublayers, skip_layers
from semalign.lm.parts import Model, decoder, decoder_layers, fingerprint, head_weight
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.supervision import SupervisionCache
from semalign.training.config import TransferConfig, TransferResult
from semalign.training.loop import Stage
from semalign.training.losses import DIVERGENCES

POSITIONS = 256
"""Positions whose contributions, of all parts, are in memory at once."""


@dataclass(frozen=True)
class Parts:
    """The parts of one sublayer, and what they were seen to do at n supervised positions of the seed examples.

    ``weight`` W (D, P), or M W of a teacher; ``columns`` (H, P / H); ``states`` x (n, P) that enter W; ``scores`` (H,)
    attribution.
    """

    weight: Tensor
    columns: Tensor
    states: Tensor
    scores: Tensor


@torch.no_grad()
def parts_of(
    model: Model, encoded: Sequence[Encoded], k: int, point: str, *, groups: int = 0, reduce: str = "abs"
) -> Parts:
    """The parts of layer k at ``point``: its heads at ``attention``, or ``groups`` groups of its neurons at ``mlp``.

    Raises:
        ValueError: as :func:`semalign.contributions.head_columns` and :func:`semalign.contributions.neuron_columns`,
            or a sublayer whose output is not what it adds to the stream.
    """
    check_sublayers(model, k)
    heads = head_columns(model, k) if point == "attention" else None
    states, total = [], torch.zeros(())
    for example in encoded:  # one by one, as the layer's own attribution
        batch = collate([example], 0, head_weight(model).device)
        (x,), (scores,) = read_columns(model, batch, point, [k], reduce)
        mask = supervised(batch["labels"])
        states.append(x[mask].float().cpu())
        total = total + scores.cpu() * int(mask.sum())
    columns = neuron_columns(total, groups) if heads is None else heads
    weight = written(model, k, point).detach().float().cpu()
    return Parts(weight, columns, torch.cat(states), part_scores(total, columns, reduce))


def paired(teacher: Parts, student: Parts) -> tuple[list[int], Tensor]:
    """The teacher part of each student part, from 1, and the mean cosine (H_T, H_S) of all pairs of contributions."""
    total = torch.zeros(len(teacher.columns), len(student.columns))
    for theirs, ours in zip(teacher.states.split(POSITIONS), student.states.split(POSITIONS), strict=True):
        sent = contributions(theirs, teacher.weight, teacher.columns)
        total += len(theirs) * likeness(sent, contributions(ours, student.weight, student.columns))
    alike = total / len(teacher.states)
    return pair_parts(attributed(alike, teacher.scores, student.scores)), alike


def align_heads(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """SemAlign with a target for each attention head of layer k: L_layer = 1 - mean over heads of cos(h_k,i, h*_i).

    h_k,i is head i's contribution through its slice of ``o_proj``, h*_i that of its partner in teacher layer l(k), sent
    by M; both are read in the D_S / H_S directions in which head i writes most before training, so that all heads
    together have D_S supervised numbers a position, as a layer has. Partners are the assignment of the largest
    attributed similarity on the seed examples (:func:`paired`). LoRA trains on the same matrices of layer k as for
    ``semalign``; those behind attention hear of the layer term nothing.

    Raises:
        ValueError: several layers, heads that do not divide, a model whose attention does not end in ``o_proj``, or as
            :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    return _align(pair, data, config, "attention")


def align_neurons(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, groups: int = 4
) -> TransferResult:
    """As :func:`align_heads`, with ``groups`` equal groups of MLP neurons of both models in place of heads.

    A group is a quarter, by default, of the neurons in the order of their attribution, and contributes through its
    columns of ``down_proj``. Each has D_S / G supervised numbers a position, D_S in all.

    Raises:
        ValueError: groups that do not divide the neurons of both MLPs and the student's width, or as
            :func:`align_heads`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    return _align(pair, data, config, "mlp", groups=groups)


def scrambled_heads(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """The control for the pairing: as :func:`align_heads`, but each head has the target of the head after it.

    Raises:
        ValueError: a student of one head, or as :func:`align_heads`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    return _align(pair, data, config, "attention", turned=1)


def _align(
    pair: Pair, data: TaskData, config: TransferConfig | None, point: str, *, groups: int = 0, turned: int = 0
) -> TransferResult:
    """Train layer k with a target for each part at ``point``; with ``turned``, for that many parts further on."""
    start = time.perf_counter()
    config = replace(
        config or TransferConfig(), interface=point, interpolate=False, layer_loss="cosine", targets="teacher",
        projection=None,
    )  # fmt: skip
    with alignment.workplace(config) as scratch:
        given, watched = alignment.examples_of(pair, data, config)
        seeds = encode(pair.tokenizer, data.extract or data.align or data.train, max_length=config.max_length)
        encoded = given + watched
        n_student, head, gain = alignment.read_off(pair, replace(config, layer_weight=0.0))
        teacher = pair.load_teacher().eval()
        (k,), (source, *_) = alignment.choose_layers(pair, teacher, data, n_student, _of_one_layer(config))
        reduce = config.attribution_reduce
        theirs = parts_of(teacher, seeds, source.low, point, groups=groups, reduce=reduce)
        theirs = replace(theirs, weight=_matrix(config, teacher, head, gain) @ theirs.weight)
        states, tokens = _states(teacher, encoded, source.low, point, config.target_dtype)
        vocabulary, whose = min(len(head), len(head_weight(teacher))), fingerprint(teacher)
        asked = teacher if config.output_loss in DIVERGENCES else None
        supervision = SupervisionCache.build(
            config.cache_folder or scratch / "supervision",
            asked,
            encoded,
            (),
            dtype=config.target_dtype,
            top_k=min(config.top_k, vocabulary) if asked is not None else 0,
            vocabulary=vocabulary,
        )
        del teacher, asked
        gc.collect()
        student = pair.load_student().eval()
        ours = parts_of(student, seeds, k, point, groups=groups, reduce=reduce)
        partners, _ = paired(theirs, ours)
        if turned and len(partners) == 1:
            raise ValueError(f"layer {k} of the student has one head, and no other's target: choose another student")
        partners = partners[turned:] + partners[:turned]
        own = own_directions(ours.weight, ours.columns)
        columns = theirs.columns[[i - 1 for i in partners]]
        sent = within(own, theirs.weight, columns)
        output = alignment.objective_of(
            replace(config, layer_weight=0.0), student, encoded, supervision, (k,), vocabulary
        )
        device = student.device

        def terms(stage: Stage, examples: list[int]) -> dict[str, Tensor]:
            with entering(student, [(k, point)]) as seen:
                sums = output(stage, examples)
            mask = supervised(collate([encoded[i] for i in examples], 0, device)["labels"])
            rows = supervision.rows(examples)
            with torch.autocast(device.type, enabled=False):
                now = within(own.to(device), written(student, k, point).float(), ours.columns)
                h = read_parts(seen[k, point][mask].float(), now, ours.columns)
                target = read_parts(states[rows].float(), sent, columns).to(device)
                cosine = F.cosine_similarity(h, target, dim=-1).mean(1)
            sums["cos"], sums["layer_loss"] = cosine.detach().sum(), (1 - cosine).sum()
            return {name: value for name, value in sums.items() if name != "norm_ratio"}

        said = f"{point} {groups} {partners} {source} {whose}"
        result = alignment.fit(student, encoded, len(given), config, (k,), supervision, terms, scratch, objective=said)
    result.cost["teacher_tokens"] = float(tokens)
    result.cost["cached_bytes_per_token"] += states.shape[1] * states.element_size()
    result.cost["wall_s"] = time.perf_counter() - start
    return result


def read_parts(x: Tensor, reading: Tensor, columns: Tensor) -> Tensor:
    """Each part's contribution in its own directions, (n, H, r), of x (n, P), readings (H, r, P / H) and columns."""
    return torch.einsum("nhp,hrp->nhr", x[:, columns.to(x.device)], reading)


def _of_one_layer(config: TransferConfig) -> TransferConfig:
    if config.layers is not None and (isinstance(config.layers, str) or len(config.layers) != 1):
        raise ValueError(f"parts are aligned at one layer pair, and layers={config.layers!r}: name one layer")
    return config


def _matrix(config: TransferConfig, teacher: Model, head: Tensor, gain: Tensor) -> Tensor:
    """M (D_S, D_T) on the CPU: a kind of map, the matrix that was given, or the identity."""
    width = head_weight(teacher).shape[1]
    found = alignment.map_of(config, teacher, head, gain)
    matrix = torch.eye(width) if found is None else found.float().cpu()
    alignment.check_map(tuple(matrix.shape), (head.shape[1], width))
    return matrix


@torch.no_grad()
def _states(
    teacher: Model, encoded: Sequence[Encoded], layer: int, point: str, dtype: str, batch_tokens: int = 2048
) -> tuple[Tensor, int]:
    """x (n, P_T) that enters the teacher's last matrix at every supervised position, and how many tokens were read.

    Rows follow the examples in order. Layers above ``layer`` are not run.
    """
    counts = [int(supervised(e.labels).sum()) for e in encoded]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    kept = torch.empty(0)
    above = range(layer + 1, len(decoder_layers(teacher)) + 1)
    with entering(teacher, [(layer, point)]) as seen, skip_layers(teacher, above):
        for some in by_length(encoded, batch_tokens):
            batch = collate([encoded[i] for i in some], 0, head_weight(teacher).device)
            decoder(teacher)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
            x = seen[layer, point]
            if not len(kept):
                kept = torch.empty(starts[-1], x.shape[-1], dtype=getattr(torch, dtype))
            for row, i in enumerate(some):
                kept[starts[i] : starts[i + 1]] = x[row, supervised(batch["labels"])[row]].to(kept)
    if not kept.isfinite().all():
        raise ValueError(
            f"what enters the last matrix of the teacher's {point} in layer {layer} is not finite as {dtype}: set "
            "target_dtype to float32, or look at it"
        )
    return kept, sum(len(e.input_ids) for e in encoded)


METHODS = {
    "align_heads": Method(
        "SemAlign, head by head", align_heads, "train, extract", "LoRA on layer k", "states of l(k)'s heads", True,
        colour="#88c820",
    ),
    "align_neurons": Method(
        "SemAlign, by groups of neurons", align_neurons, "train, extract", "LoRA on layer k",
        "states of l(k)'s neurons", True, colour="#a89090",
    ),
    # Targets of the same layer, map and number, each for another head than its own.
    "scrambled_heads": Method(
        "SemAlign towards other heads", scrambled_heads, "train, extract", "LoRA on layer k", "states of l(k)'s heads",
        True, colour="#e0d8a8", follows="align_heads",
    ),
}  # fmt: skip
