"""When do states help? A map over the teacher's kinship, what the student has read, and the number of examples.

*Latent* is what the student has read, if never as a chat; *absent*, what only its teachers have. A *wide* teacher has
another width, depth and start; a *kin* teacher is the student itself, trained on. Students are a random factor: each
cell is the mean over several that differ in their pretraining alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semalign.methods import REGISTRY
from semalign.planning.work import step_size
from semalign.profiles import Profile
from semalign.study import trials
from semalign.study.analysis import Estimate


@dataclass(frozen=True)
class Way:
    """A way of teaching: a method, with settings of its own, and whose tuned hyperparameters it starts from."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""

    @property
    def asks(self) -> bool:
        """Whether it takes anything from the teacher: otherwise its cells are the same for every teacher."""
        return REGISTRY[self.method].teacher not in ("-", "chooses k")

    def changes(self, p: Profile, task: str, examples: int, steps: int) -> dict[str, Any]:
        """What a trial of it is to change: what it is like, about so many steps (:func:`budget`), its own settings."""
        return {**trials.hyperparameters(p, self.like, task), **budget(p, examples, steps), **self.settings}


WAYS = {
    "labels": Way("sft"),
    "labels, layer k": Way("sft_layer"),
    "logits": Way("logit_kd"),
    # SemAlign where it can work: the layer's contribution to the stream, the logit map, cross-entropy as output loss.
    "states and labels, layer k": Way(
        "semalign", {"interface": "residual", "map": "logit", "output_loss": "ce"}, "sft_layer"
    ),
    "states first, then labels": Way("warm_up", {}, "sft"),
    "layers' logits": Way("fdd"),
    "own texts": Way("gkd"),
}
"""What is compared, by the name that the map has for it."""


MARKERS = "osD^vPX"
"""Of the ways in a figure, which must be told apart without their colours too."""


def budget(p: Profile, examples: int, steps: int) -> dict[str, int]:
    """``batch`` and ``epochs`` with which so many examples make about so many steps, in two epochs or more.

    Few examples are seen again and again; of many there are more in a step.
    """
    batch = step_size(p, examples)
    return {"batch": batch, "epochs": max(2, round(steps / math.ceil(examples / batch)))}


def kinds_of(p: Profile) -> list[str]:
    """The kinds of teachers that a profile has."""
    return ["wide", "kin"] if p.kin_teachers else ["wide"]


def cell(p: Profile, task: str, way: str, examples: int, kind: str, folder: str | Path) -> list[list[dict[str, Any]]]:
    """The trials of one cell of the map: a list a student, of one seed, for :func:`right`."""
    of_students = []
    for at, student in enumerate(p.students):
        of, teacher = WAYS[way], p.kin_teachers[at] if kind == "kin" else p.teacher
        taught = p.changed(student=student, teacher=teacher, sizes={"train": examples})
        changes = of.changes(p, task, examples, p.regimes.steps)
        name = f"{kind if of.asks else 'any'}-{list(WAYS).index(way)}-{examples}-{at}"
        of_students.append(
            [trials.run_trial(taught, task, of.method, p.seeds[0], folder, changes=changes, variant=name)]
        )
    return of_students


def untouched(p: Profile, task: str, folder: str | Path) -> list[list[dict[str, Any]]]:
    """The students as they are, a list each."""
    return [
        [trials.run_trial(p.changed(student=student), task, "none", p.seeds[0], folder, variant=f"untouched-{at}")]
        for at, student in enumerate(p.students)
    ]


def right(of_students: Sequence[Sequence[Mapping[str, Any]]], task: str) -> Tensor:
    """Correct (1.0) or not: (students, seeds, questions)."""
    return torch.stack([trials.right(of_one, task) for of_one in of_students])


def known(of_students: Sequence[Sequence[Mapping[str, Any]]], task: str) -> dict[str, list[int]]:
    """The questions by what the student has read: ``latent``, ``absent``; all are latent where records do not say."""
    said = [a["known"] for a in of_students[0][0]["answers"][task]]
    kinds = {"latent": "both", "absent": "teacher"} if any(said) else {"latent": ""}
    return {name: [i for i, s in enumerate(said) if s == word] for name, word in kinds.items()}


def draw_map(gains: Mapping[tuple[str, str, str, str, int], Estimate], called: Mapping[str, str]) -> Any:
    """Gains in points by the number of examples: a row a task and kind of question, a column a kind of teacher.

    Args:
        gains: by task, kind of question, kind of teacher, way, and number of examples.
        called: what titles call the data of each task.
    """
    import matplotlib.pyplot as plt
    import seaborn

    panels = list(dict.fromkeys((task, name) for task, name, *_ in gains))
    kinds, ways = list(dict.fromkeys(key[2] for key in gains)), list(dict.fromkeys(key[3] for key in gains))
    figure, axes = plt.subplots(
        len(panels), len(kinds), figsize=(4.2 * len(kinds), 2.8 * len(panels)), sharex="row", sharey="row",
        squeeze=False,
    )  # fmt: skip
    palette = seaborn.color_palette("colorblind", len(ways))
    for ax, (task, name), kind in ((axes[r, c], p, k) for r, p in enumerate(panels) for c, k in enumerate(kinds)):
        counts = sorted({key[4] for key in gains if key[:3] == (task, name, kind)})
        for at, (way, colour) in enumerate(zip(ways, palette, strict=True)):
            line = [gains[task, name, kind, way, n] for n in counts]
            bars = [[100 * (e.mean - e.low) for e in line], [100 * (e.high - e.mean) for e in line]]
            ax.errorbar(
                [n * 1.06 ** (at - len(ways) / 2) for n in counts], [100 * e.mean for e in line], yerr=bars, lw=1,
                ls="-" if "states" in way else "--", marker=MARKERS[at % len(MARKERS)], ms=4, color=colour, label=way,
            )  # fmt: skip
        ax.axhline(0, color="0.5", lw=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, counts)
        ax.set(title=f"{called[task]}, {name}: {kind} teacher", ylabel="gain, points" if kind == kinds[0] else "")
    for ax in axes[-1]:
        ax.set_xlabel("training examples")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def cells(p: Profile, task: str) -> Iterator[tuple[str, str, int]]:
    """Teacher's kind, way and number of examples of every cell; what needs no teacher stands with the first kind."""
    for kind in kinds_of(p):
        for way, of in WAYS.items():
            if of.asks or kind == kinds_of(p)[0]:
                yield from ((kind, way, n) for n in p.regimes.counts[task])
