"""Arms: ways of teaching side by side, on the same students, examples, steps, seeds and questions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semalign.profiles import Profile
from semalign.study import trials
from semalign.study.analysis import Estimate, over_seeds_and_items
from semalign.study.regimes import Way

SEEDS = 2
"""How many of a profile's training seeds an arm has."""
WATCHED = 8
"""Validation examples in a training, which reads them at every epoch and decides nothing by them."""
ASKED = 200
"""At most so many test questions whose reference answers are read, at every epoch as well."""


def label(name: str) -> str:
    """The name of an arm as a part of a file's."""
    return name.replace(",", "").replace(" ", "-")


def answered(
    p: Profile,
    task: str,
    ways: Mapping[str, Way],
    folder: str | Path,
    *,
    examples: int,
    steps: int,
    measure: str = "answers",
) -> dict[str, Tensor]:
    """By arm, and of the ``untouched`` students, which test answers are right: (students, seeds, questions).

    With ``tokens`` as ``measure`` it is the share of the tokens of each reference answer that is predicted.

    Every arm has ``examples`` training examples and about ``steps`` steps of the optimizer, in each stage where it has
    several; its hyperparameters are those of the method that it is ``like``, and then its own settings.
    """
    sizes: dict[str, int] = {"train": examples, "validation": WATCHED}
    how: dict[str, Any] = {}
    if measure == "tokens":
        sizes, how = {"train": examples, "test": min(p.sizes.test or ASKED, ASKED)}, {"split": None, "watched": "test"}
    right = {}
    for name, way in {"untouched": Way("none"), **ways}.items():
        changes = None if way.method == "none" else way.changes(p, task, examples, steps)
        of_students = []
        for at, student in enumerate(p.students):
            taught = p.changed(student=student, sizes=sizes)
            seeds = trials.seeds_of(way.method, p.seeds[:SEEDS])
            made = [
                trials.run_trial(
                    taught, task, way.method, s, folder, changes=changes, variant=f"{label(name)}-{at}", **how
                )
                for s in seeds
            ]
            of_students.append(trials.measured(made, task, measure))
        right[name] = torch.stack(of_students)
    return right


def overall(right: Mapping[str, Mapping[str, Tensor]], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Estimate]:
    """What one arm has minus what another has, over all tasks' questions; ``pairs`` name the two arms."""
    return {
        name: over_seeds_and_items(torch.cat([of[one] - of[other] for of in right.values()], dim=-1))
        for name, (one, other) in pairs.items()
    }
