"""Larger gaps: what states, logits and labels give a student, against how much smaller than its teacher it is.

The paper has one pair, four fifths of the width and of the depth, and names larger gaps as future work. Gains of
students of different sizes are put on one scale as shares of their own ceiling, the gain of labels at their best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semalign.lm.parts import describe
from semalign.models import load_pair
from semalign.planning.work import most_examples
from semalign.profiles import Pico, Profile, Random, Source, pico_names
from semalign.study import trials
from semalign.study.analysis import Estimate, over_seeds_and_items
from semalign.study.regimes import Way

WAYS = {
    "labels": Way("sft"),
    "logits": Way("logit_kd"),
    # Labels in all layers, and beside them each layer's contribution to the stream, through the logit map.
    "states": Way("semalign", {"layers": "all", "interface": "residual", "map": "logit", "output_loss": "ce"}, "sft"),
}
"""What is compared: the second and the third have the labels too, and all train adapters on all layers."""
WHOLE = "labels, whole layers"
CEILINGS = {"labels": WAYS["labels"], WHOLE: Way("sft", {"trained": "layer"}, "sft")}
"""The better of the two, by the answer tokens predicted right, is a student's ceiling; see :func:`ceilings`."""
AXES = ("width", "depth", "loss")
"""What a gap is measured in."""


@dataclass(frozen=True)
class Rung:
    """One gap: who teaches whom; several students differ in their pretraining alone."""

    name: str
    teachers: tuple[Source, ...]
    students: tuple[Source, ...]


def rungs(p: Profile) -> list[Rung]:
    """The gaps that a profile has: its students from kin, from their teacher and from the fine-tuned ones, then the
    smaller student, and where it is a Pico model its sibling that has read the tasks as chats.
    """
    students = tuple(p.students)
    found = [Rung("kin → student", tuple(p.kin_teachers), students)] if p.kin_teachers else []
    for name, teacher in {"teacher": p.teacher, **p.fine_tuned_teachers}.items():
        found.append(Rung(f"{name} → student", (teacher,) * len(students), students))
    if p.smaller_student:
        found.append(Rung("teacher → smaller", (p.teacher,), (p.smaller_student,)))
        if isinstance(p.smaller_student, Pico) and (saturated := f"{p.smaller_student.id}-chat") in pico_names():
            sibling = Pico(source="pico", id=saturated)
            found.append(Rung("teacher → smaller, saturated", (p.teacher,), (sibling,)))
    return found


def ceilings(p: Profile) -> list[str]:
    """Those of ``CEILINGS`` that a profile has room for: whole layers only where its ``search`` trains them too."""
    return [way for way in CEILINGS if way != WHOLE or p.search.whole_layers]


def called(source: Source) -> str:
    """A model's name, as a part of a file's."""
    if isinstance(source, Random):
        return f"random-{source.seed}"
    return str(getattr(source, "id", None) or Path(getattr(source, "path", "")).name).replace("/", "--")


def trained(p: Profile, task: str, rung: Rung, way: str, folder: str | Path) -> list[list[dict[str, Any]]]:
    """The trials of one rung: a list a student, of one seed; ``way`` of ``WAYS``, ``CEILINGS``, none, or teacher.

    What asks no teacher is the same training on every rung of a student.
    """
    ways, made, examples = {**WAYS, **CEILINGS}, [], most_examples(p)
    for teacher, student in zip(rung.teachers, rung.students, strict=True):
        of = ways.get(way)
        asks = of.asks if of else way == trials.TEACHER
        taught = p.changed(student=student, teacher=teacher if asks else p.teacher, sizes={"train": examples})
        name = f"{list(ways).index(way) if of else way}-{called(student)}{'-from-' + called(teacher) if asks else ''}"
        if of is None:
            asked = None if way == trials.TEACHER else "test"
            made.append([trials.run_trial(taught, task, way, p.seeds[0], folder, split=asked, variant=name)])
            continue
        changes = of.changes(p, task, examples, p.regimes.steps)
        made.append([trials.run_trial(taught, task, of.method, p.seeds[0], folder, changes=changes, variant=name)])
    return made


def gap(p: Profile, rung: Rung, losses: Mapping[str, Tensor]) -> dict[str, float]:
    """How far student and teacher are apart, by each of ``AXES``; of several students the mean.

    ``width`` and ``depth`` are the missing share, 1 - D_S / D_T and 1 - L_S / L_T; ``loss`` is in nats a token.

    Args:
        losses: of ``untouched`` student and ``teacher`` on the right answers, negative, as ``tables.pooled`` has them.
    """
    missing = []
    for teacher, student in zip(rung.teachers, rung.students, strict=True):
        pair = load_pair(p.changed(teacher=teacher, student=student))
        theirs, ours = describe(pair.load_teacher()), describe(pair.load_student())
        missing.append([1 - int(ours[what]) / int(theirs[what]) for what in ("width", "layers")])
    width, depth = torch.tensor(missing, dtype=torch.float64).mean(0).tolist()
    return {"width": width, "depth": depth, "loss": float(losses["teacher"].mean() - losses["untouched"].mean())}


def shares(values: Tensor, before: Tensor, ceiling: Tensor) -> Tensor | None:
    """A gain as a share of the ceiling's, item by item: its mean is the ratio of the two mean gains.

    A ratio of means has an interval by each item's part in it, to first order: share + (gain - share x ceiling's gain)
    / mean of the ceiling's gain.

    Args:
        values: (students, seeds, items) of the way; ``before`` of the untouched students, ``ceiling`` of labels at
            their best, on the same items.

    Returns:
        The same shape; None where the ceiling's own gain is not above zero, so that nothing is a share of it.
    """
    gain, most = (torch.as_tensor(t, dtype=torch.float64) - before for t in (values, ceiling))
    if over_seeds_and_items(most).low <= 0:
        return None
    whole = most.mean()
    share = gain.mean() / whole
    return share + (gain - share * most) / whole


def slope(found: Mapping[str, Tensor | None], gaps: Mapping[str, float]) -> Estimate | None:
    """How much the share changes from no gap to a whole one: the least squares line over rungs, with its interval.

    The interval is over the questions, which all rungs share; it speaks of these students and of no others.

    Args:
        found: by rung what :func:`shares` gave; None is left out.
        gaps: by rung the gap on one axis.

    Returns:
        None where fewer than two rungs have a share, or all have the same gap.
    """
    known = {name: share for name, share in found.items() if share is not None}
    x = torch.tensor([gaps[name] for name in known], dtype=torch.float64)
    centred = x - x.mean() if len(x) else x
    spread = float(centred.square().sum())
    if spread < 1e-9:
        return None
    lines = torch.stack([share.mean((0, 1)) for share in known.values()])
    return over_seeds_and_items((centred @ lines / spread)[None])
