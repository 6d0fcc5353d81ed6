"""What the chapters on benchmarks have in common: all trials of a task, and tables of what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from semalign.methods import REGISTRY
from semalign.profiles import Profile
from semalign.study import analysis, trials
from semalign.study.trials import TEACHER

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""The trials of one task by who answers, one a seed."""

CONTROLS = ("none", "sft", "sft_layer", "seeking", "laten")
"""What the others are held against, where a profile has it."""
COSTS = ["wall_s", "teacher_tokens", "student_tokens", "trainable_parameters", "cached_bytes_per_token"]


def run_methods(p: Profile, task: str, folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """All trials of a task under the profile's seeds, made or read: the teacher, the untouched student, its methods."""
    names = dict.fromkeys([TEACHER, "none", *p.methods])
    seeds = {m: trials.seeds_of(m, p.seeds) for m in names}
    return {m: [trials.run_trial(p, task, m, s, folder, others=p.others) for s in seeds[m]] for m in names}


def over_students(
    p: Profile, task: str, methods: Iterable[str], folder: str | Path, seeds: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """By method, which answers are right, of the student and its siblings: (students, seeds, questions).

    A method that draws nothing has one seed; as it answers the same under all, it stands for each of them. The seeds
    are the profile's where none are given.
    """
    right = {}
    for m in methods:
        of_students = []
        for at, student in enumerate(p.students):
            taught, variant = (p.changed(student=student), f"sibling{at}") if at else (p, "")
            made = [
                trials.run_trial(taught, task, m, s, folder, others=p.others, variant=variant)
                for s in trials.seeds_of(m, seeds or p.seeds)
            ]
            of_students.append(trials.right(made, task))
        right[m] = torch.stack(of_students)
    return right


def draw_contest(gains: Mapping[tuple[str, str], analysis.Estimate], called: Mapping[str, str]) -> Any:
    """Gains over the untouched students in points: a panel a task, a row a method, the largest mean over tasks first.

    Args:
        gains: by method and task.
        called: what titles call the data of each task.
    """
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(task for _, task in gains))
    methods = by_gain(gains)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(2.4 * len(tasks) + 1.5, 0.27 * len(methods) + 1), sharey=True, squeeze=False
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        for row, m in enumerate(methods):
            if e := gains.get((m, task)):
                bar = [[100 * (e.mean - e.low)], [100 * (e.high - e.mean)]]
                ax.errorbar(100 * e.mean, row, xerr=bar, fmt="o", ms=4, capsize=2, color=REGISTRY[m].colour)
        ax.axvline(0, color="0.5", lw=1)
        ax.set(title=called[task], xlabel="points")
        ax.set(yticks=range(len(methods)), yticklabels=methods)
    axes[0, 0].invert_yaxis()
    return figure


def by_gain(gains: Mapping[tuple[str, str], analysis.Estimate]) -> list[str]:
    """The methods of gains by method and task, the largest mean over tasks first."""
    of = {m: [e.mean for (name, _), e in gains.items() if name == m] for m, _ in gains}
    return sorted(of, key=lambda m: -sum(of[m]) / len(of[m]))


def points(e: analysis.Estimate) -> str:
    """A difference in points with its interval, and a star where that leaves out zero."""
    star = " *" if e.low > 0 or e.high < 0 else ""
    return f"{100 * e.mean:+.1f} ({100 * e.low:+.1f} to {100 * e.high:+.1f}){star}"


def pooled(found: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], metric: str) -> torch.Tensor:
    """What the trials of each student say by task, as one: (students, seeds, items of all tasks).

    Args:
        found: by task a list of trials for each student; ``metric`` as for :func:`trials.measured`.
    """
    by_task = [torch.stack([trials.measured(one, task, metric) for one in of]) for task, of in found.items()]
    return torch.cat(by_task, dim=-1)


def unasked(found: Sequence[Mapping[str, Any]], task: str) -> int:
    """How many questions were too long to be asked, and count as wrong."""
    return sum(bool(a.get("too_long")) for a in found[0]["answers"][task])


def scores(runs: Runs, task: str) -> pd.DataFrame:
    """A row each: the share of questions right with its interval, and how many of the wrong ones were not asked."""
    rows = {m: analysis.over_seeds_and_items(trials.right(found, task))._asdict() for m, found in runs.items()}
    return pd.DataFrame(rows).T.assign(unasked=[unasked(found, task) for found in runs.values()])


def gains(runs: Runs, task: str, metric: str, others: Iterable[str] = CONTROLS) -> dict[str, pd.DataFrame]:
    """By control, those of ``others`` that were run: every method's difference to it, on the same seeds and items."""
    values = {m: trials.measured(found, task, metric) for m, found in runs.items()}
    return {other: _against(values, other) for other in others if other in runs}


def _against(values: Mapping[str, torch.Tensor], other: str) -> pd.DataFrame:
    compared = [m for m in values if m not in (TEACHER, "none", other)]
    found = {m: analysis.over_seeds_and_items(values[m] - values[other])._asdict() for m in compared}
    return pd.DataFrame(found, index=["mean", "low", "high", "p", "error", "df"]).T


def groups(runs: Runs, task: str, what: str) -> dict[str, list[int]]:
    """The questions by their ``topic`` or ``known``, in the order of the alphabet; empty where they do not say it."""
    said = [str(a.get(what, "")) for a in next(iter(runs.values()))[0]["answers"][task]]
    return {one: [i for i, s in enumerate(said) if s == one] for one in sorted({*said} - {""})}


def told(kinds: Mapping[str, Sequence[int]], what: str) -> str:
    """How many questions there are of each kind, or that they do not say ``what``."""
    if not kinds:
        return f"The questions of this run do not say {what}: what would be told apart by it is empty here."
    return f"Questions by {what}: " + ", ".join(f"{name} {len(where)}" for name, where in kinds.items()) + "."


def by(runs: Runs, task: str, kinds: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Of each kind: how many ``questions`` there are, and the share that each answers right, a mean over seeds."""
    right = {m: trials.right(found, task).mean(0) for m, found in runs.items()}
    rows = {k: {"questions": len(w), **{m: r[w].mean().item() for m, r in right.items()}} for k, w in kinds.items()}
    return pd.DataFrame(rows, index=["questions", *right]).T


def gains_in(runs: Runs, task: str, kinds: Mapping[str, Sequence[int]], other: str = "none") -> dict[str, pd.DataFrame]:
    """By kind of question: every method's difference to ``other`` in answers, on the questions of this kind alone.

    Kinds of a single question are left out: nothing can be said of how sure such a difference is.
    """
    right = {m: trials.right(found, task) for m, found in runs.items()}
    several = {kind: where for kind, where in kinds.items() if len(where) > 1}
    return {kind: _against({m: r[:, where] for m, r in right.items()}, other) for kind, where in several.items()}


def tally(
    runs: Runs, task: str, rows: Sequence[Any], judge: Callable[[Any, Any], str], verdicts: Sequence[str]
) -> pd.DataFrame:
    """The share of answers, over questions and seeds, that ``judge(answer, row)`` calls by each of ``verdicts``."""
    table = {}
    for m, found in runs.items():
        judged = [judge(a, row) for t in found for a, row in zip(t["answers"][task], rows, strict=True)]
        table[m] = {verdict: judged.count(verdict) / len(judged) for verdict in verdicts}
    return pd.DataFrame(table).T


def headroom(runs: Runs, task: str) -> pd.DataFrame:
    """The gain over the untouched student as a share of the teacher's lead, and where it comes from.

    ``gained``: of the questions that the teacher knew and the student did not (there are ``to gain``), the share right
    now. ``copied``: of those that the student knew and the teacher did not (``to copy``), the share wrong now.
    """
    right = {m: trials.right(found, task) for m, found in runs.items()}
    teacher, student = right[TEACHER][0] > 0, right["none"][0] > 0
    lead = (right[TEACHER].mean() - right["none"].mean()).item()
    rows = {}
    for m in [m for m in runs if m != TEACHER]:
        gain = (right[m].mean() - right["none"].mean()).item()
        rows[m] = {"of headroom": gain / lead if lead else math.nan}
        rows[m] |= {"gained": _share(right[m], teacher & ~student), "to gain": float((teacher & ~student).sum())}
        rows[m] |= {"copied": _share(1 - right[m], student & ~teacher), "to copy": float((student & ~teacher).sum())}
    return pd.DataFrame(rows).T


def _share(values: torch.Tensor, where: torch.Tensor) -> float:
    return values[:, where].mean().item() if where.any() else math.nan


def closeness(runs: Runs) -> pd.DataFrame:
    """On the watched examples: divergence from the teacher, tokens predicted as it does, loss on the right answer."""
    names = ("kl", "agree", "loss")
    return pd.DataFrame({m: {n: trials.seen(f, n).mean().item() for n in names} for m, f in runs.items()}).T


def forgotten(runs: Runs, task: str) -> pd.DataFrame:
    """The change in the share right of the other tasks that were asked, against the untouched student."""
    rest = [t for t in runs["none"][0]["answers"] if t not in (task, trials.PLACEBO)]
    before = {t: trials.right(runs["none"], t).mean() for t in rest}
    own = [m for m in runs if m not in (TEACHER, "none")]
    rows = {m: {t: (trials.right(runs[m], t).mean() - b).item() for t, b in before.items()} for m in own}
    return pd.DataFrame(rows, index=rest).T


def cost(runs: Runs) -> pd.DataFrame:
    """What one training took, a mean over seeds."""
    return pd.DataFrame(
        {m: pd.DataFrame([f["cost"] for f in found]).mean() for m, found in runs.items() if m != TEACHER}
    ).T


def measures(p: Profile, runs: Runs, task: str) -> dict[str, Any]:
    """All of the above, under the names by which the pages that draw the chapters together read it."""
    return {
        "task": task, "questions": len(runs["none"][0]["answers"][task]), "seeds": len(p.seeds),
        "scores": scores(runs, task), "primary": p.primary, "gains": gains(runs, task, p.primary),
        "finer": gains(runs, task, "loss", CONTROLS[:3]), "headroom": headroom(runs, task),
        "closeness": closeness(runs), "forgotten": forgotten(runs, task), "cost": cost(runs),
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Tables as mappings, row by row, and None for what is not a number: what a file of metrics holds."""
    if isinstance(value, pd.DataFrame):
        return plain({str(name): row.to_dict() for name, row in value.iterrows()})
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(e: Mapping[str, float], digits: int = 3) -> str:
    """An estimated difference in one line: the mean, and the ends of its interval."""
    return f"{e['mean']:+.{digits}f} ({e['low']:+.{digits}f} to {e['high']:+.{digits}f})"


def compact(differences: Mapping[str, pd.DataFrame], prefix: str = "minus ", digits: int = 3) -> pd.DataFrame:
    """Tables of differences side by side, a column each, as text."""
    columns = {f"{prefix}{name}": {m: interval(e, digits) for m, e in t.iterrows()} for name, t in differences.items()}
    return pd.DataFrame(columns).fillna("")


def said(differences: Mapping[str, pd.DataFrame], method: str, digits: int = 3) -> list[str]:
    """Of one method against each control: better, worse or not distinguishable, with the interval and its p-value."""
    lines = []
    for other, table in differences.items():
        if method in table.index:
            e = table.loc[method]
            p = "p < 0.001" if e["p"] < 0.001 else f"p = {e['p']:.3f}"
            word = analysis.verdict(e["low"], e["high"])
            lines.append(f"{method} is {word} {other}: {interval(e, digits)}, {p}")
    return lines


def draw_gains(differences: Mapping[str, pd.DataFrame], label: str) -> Any:
    """A row for each kind of question, and in it a dot with its interval for each method's difference to a control."""
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(m for table in differences.values() for m in table.index))
    _, ax = plt.subplots(figsize=(7, 0.16 * (len(methods) + 2) * max(1, len(differences)) + 1))
    for row, table in enumerate(differences.values()):
        for place, (method, e) in enumerate(table.iterrows()):
            y, bar = row + 0.7 * (place + 0.5) / len(methods) - 0.35, [[e["mean"] - e["low"]], [e["high"] - e["mean"]]]
            ax.errorbar(e["mean"], y, xerr=bar, fmt="o", ms=4, color=REGISTRY[str(method)].colour, label=method)
    ax.axvline(0, color="0.5", lw=1)
    ax.set(yticks=range(len(differences)), yticklabels=list(differences), xlabel=label)
    ax.set_ylim(max(1, len(differences)) - 0.5, -0.5)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def draw_scores(table: pd.DataFrame) -> Any:
    """Every method's share of questions right with its interval; dotted lines for the student and the teacher."""
    import matplotlib.pyplot as plt

    shown = table.drop(index=[TEACHER, "none"])
    _, ax = plt.subplots(figsize=(7, 0.4 * len(shown) + 1))
    for row, (method, s) in enumerate(shown.iterrows()):
        bar = [[s["mean"] - s["low"]], [s["high"] - s["mean"]]]
        ax.errorbar(s["mean"], row, xerr=bar, fmt="o", capsize=3, color=REGISTRY[str(method)].colour)
    for name, label in {"none": "student", TEACHER: "teacher"}.items():
        ax.axvline(table.loc[name, "mean"], color="0.4", ls=":")
        ax.text(table.loc[name, "mean"], -0.7, label, ha="center", fontsize="small")
    ax.set(yticks=range(len(shown)), yticklabels=shown.index, xlabel="share of questions right")
    ax.set_ylim(len(shown) - 0.5, -1)
    return ax
