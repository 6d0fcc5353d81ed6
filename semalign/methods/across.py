"""SemAlign between two vocabularies: a map from the tokens that both have, and targets where both have read as much."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from semalign import alignment
from semalign.lm.examples import Encoded, TaskData, collate, encode, fitting, supervised
from semalign.lm.hooks import capture
from semalign.lm.parts import head_weight
from semalign.lm.positions import matched, only
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.semantics import semantic_map
from semalign.supervision import SupervisionCache
from semalign.training.config import TransferConfig, TransferResult
from semalign.training.loop import Stage
from semalign.training.losses import DIVERGENCES, LAYER_LOSSES
from semalign.vocabularies import SharedTokens, shared_tokens


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """SemAlign (section 4) from a teacher with another tokenizer, as the paper's limitations ask for.

    M comes from the rows of the tokens that both heads have (:func:`shared_map`). Each model reads an example in its
    own tokens; a position of the student has a target where the teacher has a position that has read the same bytes
    (:func:`semalign.lm.positions.matched`), and the layer term is the mean over these alone. The output term counts
    everywhere. ``targets`` gives the controls. Between models of one tokenizer it is :func:`alignment.transfer`.

    Raises:
        ValueError: a divergence as output loss, which compares token with token, a learned projection, no position at
            which the two meet, or as :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    config = config or TransferConfig()
    if pair.teacher_tokenizer is None:
        return alignment.transfer(pair, data, config)
    _check(config)
    if not data.train:
        raise ValueError(f"task {data.name} has no training examples: give it at least one")
    start, tokenizers = time.perf_counter(), (pair.teacher_tokenizer, pair.tokenizer)
    with alignment.workplace(config) as scratch:
        given, watched = data.train, data.validation
        for tokenizer in tokenizers:  # what is too long for either is left out
            given, watched = (
                tuple(fitting(tokenizer, some, max_length=config.max_length)) for some in (given, watched)
            )
        examples = (*given, *watched)
        theirs, ours = (encode(tokenizer, examples, max_length=config.max_length) for tokenizer in tokenizers)
        met = matched(examples, (tokenizers[0], theirs), (tokenizers[1], ours))
        if not sum(map(len, met)):
            raise ValueError(
                f"teacher and student of {pair.name} never end a token at the same character of {data.name}: choose "
                "another pair, or longer responses"
            )
        of_teacher, of_student = (
            [only(e, at[:, side]) for e, at in zip(encoded, met, strict=True)]
            for side, encoded in enumerate((theirs, ours))
        )
        layers, supervision = _supervise(pair, data, of_teacher, config, scratch)
        student = pair.load_student().eval()
        terms = _objective(config, student, ours, of_student, supervision, layers)
        result = alignment.fit(
            student, ours, len(given), config, layers, supervision, terms, scratch, objective="across"
        )
    result.cost["wall_s"] = time.perf_counter() - start
    return result


def shared_map(
    shared: SharedTokens, teacher_head: Tensor, student_head: Tensor, *, kind: str = "paper", **options: Any
) -> Tensor:
    """The map M (D_S, D_T) of two heads (m_T, D_T), (m_S, D_S) by the rows of the tokens that both have.

    ``kind`` and ``options`` are those of :func:`semalign.semantics.semantic_map`, which pairs rows by their number.

    Raises:
        ValueError: as :func:`semalign.semantics.semantic_map`.
    """
    theirs, ours = shared.teacher.to(teacher_head.device), shared.student.to(student_head.device)
    return semantic_map(teacher_head[theirs], student_head[ours], kind=kind, **options)


def _check(config: TransferConfig) -> None:
    """Refuse what would compare two models token by token, and what no target here is compared with."""
    for name, wrong in {
        "output_loss": config.output_loss in DIVERGENCES,
        "projection": config.projection is not None,
    }.items():
        if wrong:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not for a pair of two vocabularies: choose ce or cosine as "
                "output loss, and no projection"
            )


def _supervise(
    pair: Pair, data: TaskData, positions: list[Encoded], config: TransferConfig, scratch: Path
) -> tuple[tuple[int, ...], SupervisionCache]:
    """The student layers to train, and the teacher's targets for them at ``positions``, its own supervised ones."""
    tokenizer = pair.teacher_tokenizer
    assert tokenizer is not None
    n_student, head, gain = alignment.read_off(pair, config)
    teacher = pair.load_teacher()
    read_by_teacher = replace(pair, tokenizer=tokenizer)
    layers, sources = alignment.choose_layers(read_by_teacher, teacher, data, n_student, config)

    def made(theirs: Tensor, ours: Tensor, **options: Any) -> Tensor:
        shared = shared_tokens(tokenizer, pair.tokenizer, len(theirs), len(ours))
        return shared_map(shared, theirs, ours, **options)

    matrix = alignment.map_of(config, teacher, head, gain, made)
    width = head_weight(teacher).shape[1]
    alignment.check_map((width, width) if matrix is None else tuple(matrix.shape), (head.shape[1], width))
    folder = config.cache_folder or scratch / "supervision"
    supervision = SupervisionCache.build(folder, teacher, positions, sources, matrix=matrix, dtype=config.target_dtype)
    del teacher
    gc.collect()
    return layers, supervision


def _objective(
    config: TransferConfig,
    student: Any,
    data: list[Encoded],
    places: list[Encoded],
    supervision: SupervisionCache,
    layers: tuple[int, ...],
) -> Callable[[Stage, list[int]], dict[str, Tensor]]:
    """L_layer at ``places``, the supervised positions that have a target, and L_out at all of ``data``.

    Of the layer term it gives the mean over its positions times the number of all, which is what the loop divides by.
    """
    output = alignment.objective_of(
        replace(config, layer_weight=0.0), student, data, supervision, layers, len(head_weight(student))
    )
    head = head_weight(student)

    def terms(stage: Stage, examples: list[int]) -> dict[str, Tensor]:
        device = student.device
        with capture(student, [(k, config.interface) for k in stage.layers]) as seen:
            sums = output(stage, examples)
        labels, at = (collate([of[i] for i in examples], 0, device)["labels"] for of in (data, places))
        mask, rows = supervised(at), supervision.rows(examples)
        if not len(rows):
            return sums
        share = int(supervised(labels).sum()) / len(rows) / len(stage.layers)
        with torch.autocast(device.type, enabled=False):
            for k in stage.layers:
                target, norm = alignment.controlled_targets(
                    config, supervision, layers.index(k), examples, rows, device
                )
                h = seen[k, config.interface][mask].float()
                of_layer = LAYER_LOSSES[config.layer_loss](h, target, norm, mask.sum(1).tolist(), head)
                cos = F.cosine_similarity(h.detach(), target, dim=-1)
                ratio = h.detach().norm(dim=-1) / (norm * target.norm(dim=-1))
                for name, values in {"layer_loss": of_layer, "cos": cos, "norm_ratio": ratio}.items():
                    sums[name] = sums[name] + share * values.sum()
        return sums

    return terms


METHODS = {
    "across": Method(
        "SemAlign over shared tokens", transfer, "train, extract", "LoRA on layer k", "states at l(k)", True,
        colour="#5f7f3f", vocabularies="shared",
    )
}  # fmt: skip
