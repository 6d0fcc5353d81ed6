"""Gates: what must hold before a number of the method under test says anything.

An instrument that moves for nothing cannot tell a method that fails from one that was never seen. So a method known to
close the gap must close it here, questions that nothing in the training helps with must stay where they are, and a
change that states can carry must be carried. A gate that fails is shown, and no claim behind it is tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from semalign.study.analysis import Estimate, over_seeds_and_items

NAMES = ("positive control", "placebo", "planted kin")
"""The gates, in the order in which they are passed."""

GAIN, LEAST, STILL, RECOVERED = 0.15, 0.10, 0.05, 0.5


@dataclass(frozen=True)
class Gate:
    """One gate: its number with the ends of its 95 % interval (None where it was not measured), and what it took."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    bound: float
    passed: bool
    sentence: str


def positive_control(gains: Mapping[str, Estimate]) -> Gate:
    """Labels in all layers gain 15 points, with an interval above 10, on all tasks but one (of one task, on it).

    Args:
        gains: by task, the share of questions right after supervised training in all layers minus the untouched
            student's. The gate's number is the gain of the task that decides.
    """
    name, needed = NAMES[0], max(1, len(gains) - 1)
    if not gains:
        return unmeasured(name, GAIN, "no task has a student trained on the labels")
    moved = [task for task, e in gains.items() if e.mean >= GAIN and e.low > LEAST]
    best_first = sorted(gains, key=lambda task: (task in moved, gains[task].mean), reverse=True)
    deciding = gains[best_first[needed - 1]]
    each = ", ".join(f"{task} {_points(e)}" for task, e in gains.items())
    passed = len(moved) >= needed
    sentence = (
        f"{_word(passed)}: labels in all layers gain {100 * GAIN:g} points or more, with an interval above "
        f"{100 * LEAST:g}, on {len(moved)} of {len(gains)} tasks, where it takes {needed}: {each}"
    )
    return Gate(name, *deciding[:3], GAIN, passed, sentence)


def placebo(change: Tensor | None) -> Gate:
    """Facts that nobody read move by less than 5 points.

    Args:
        change: (seeds, questions), right after training on labels minus right before, on questions whose facts were in
            no pretraining and in no training example; None or empty where there are no such questions.
    """
    name = NAMES[1]
    if change is None or change.shape[-1] < 2:
        return unmeasured(name, STILL, "no question is about facts that neither model read")
    e = over_seeds_and_items(change)
    passed = abs(e.mean) < STILL
    sentence = (
        f"{_word(passed)}: on {change.shape[-1]} questions about facts that nobody read, training on labels changes "
        f"{_points(e)} points, where it takes less than {100 * STILL:g}"
    )
    return Gate(name, *e[:3], STILL, passed, sentence)


def planted_kin(before: Tensor, after: Tensor) -> Gate:
    """States alone bring over half of what a fine-tuned copy of the student has learnt.

    Args:
        before: (items,) divergence of the untouched student from the planted teacher, in nats, on validation examples.
        after: (seeds, items), the same of students trained on the teacher's states alone.
    """
    name, size = NAMES[2], float(before.mean())
    if before.numel() < 2 or not size > 0:
        return unmeasured(name, RECOVERED, "the planted teacher does not differ from the student")
    share = 1 - float(after.mean()) / size
    # A ratio of means: each item's part in it, to first order, so that its interval is that of a mean.
    e = over_seeds_and_items(share + ((1 - share) * before - after) / size)
    passed = e.mean >= RECOVERED
    sentence = (
        f"{_word(passed)}: states alone recover {100 * e.mean:.0f} % ({100 * e.low:.0f} to {100 * e.high:.0f}) of the "
        f"divergence of {size:.4f} nats from a fine-tuned copy of the student, where it takes {100 * RECOVERED:g} %"
    )
    return Gate(name, *e[:3], RECOVERED, passed, sentence)


def unmeasured(name: str, bound: float, why: str) -> Gate:
    """A gate that could not be tried: it is not passed."""
    return Gate(name, None, None, None, bound, False, f"not measured: {why}")


def told(gates: Mapping[str, Gate]) -> dict[str, dict[str, Any]]:
    """Gates as the plain mappings that a chapter saves."""
    return {name: asdict(gate) for name, gate in gates.items()}


def of_run(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Gate]:
    """The gates of a run from its metrics by chapter; a run that has none of them has missed them all."""
    kept = metrics.get("04b_gates", {}).get("gates", {})
    return {
        name: Gate(**kept[name]) if name in kept else unmeasured(name, 0.0, "this run was made without the gate")
        for name in NAMES
    }


def _points(e: Estimate) -> str:
    return f"{100 * e.mean:+.1f} ({100 * e.low:+.1f} to {100 * e.high:+.1f})"


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"
