"""The paper's claims against this book's numbers: a verdict follows from a rule that stands beside the claim.

``book/claims.yaml`` lists what the paper says, where a chapter's metrics hold the number that tests it, the bound that
the number's interval has to clear, and the gates that stand before it. Nothing here knows a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy import stats

from semalign.report import entry
from semalign.study.analysis import Estimate, equivalence, holm
from semalign.study.gates import NAMES, Gate

VERDICTS = (
    "reproduced", "contradicted", "no benefit", "undecided", "true by construction", "not testable here"
)  # fmt: skip
DESCRIBED = "described"  # no verdict: a number without an interval
LEVEL = 0.05  # of p-values, after Holm's adjustment within a family
SHARE = 0.35  # of the ceiling's gain that a reproduced gain reaches


@dataclass(frozen=True)
class Claim:
    """One statement of the paper (or one that it needs and leaves out), and what would bear it out."""

    claim: str
    where: str  # section, table or figure
    chapter: str = ""  # the notebook whose metrics hold our number
    ours: tuple[str, ...] = ()  # the path to it in those metrics
    range: tuple[str, str] = ("low", "high")  # what the ends of its interval are called there
    above: float | None = None  # reproduced if the whole interval lies above ...
    below: float | None = None  # ... or below this
    ceiling: tuple[str, ...] = ()  # the path, in the same metrics, to the gain of a method known to close the gap
    margin: float | None = None  # a gain smaller than this is none; in the number's own unit
    paper: str | tuple[tuple[str, ...], ...] = "–"  # its words, or a path in paper_results.yaml, or two: a difference
    family: str = ""  # claims that are tested together
    behind: tuple[str, ...] = NAMES  # the gates before it: all, unless it is about no effect of the method
    figure: str = ""  # the anchor of the figure that shows it
    by_construction: str = ""  # why it cannot be otherwise
    reason: str = ""  # why it cannot be tested here


@dataclass(frozen=True)
class Number:
    """Ours: the value, and as far as it has them the ends of its interval, p, standard error, degrees of freedom."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    error: float | None = None
    df: float | None = None
    ceiling: float | None = None  # the gain of a method known to close the gap


class Verdict(NamedTuple):
    """One of ``VERDICTS`` or ``DESCRIBED``, and why where that does not follow from the number."""

    word: str
    reason: str = ""


def load_claims(path: str | Path) -> list[Claim]:
    """The claims of a yaml file, checked.

    Raises:
        ValueError: an entry has an unknown key or gate, no bound and no reason, or a margin without a bound below it;
            the message names the claim.
    """
    claims = []
    for row in yaml.safe_load(Path(path).read_text(encoding="utf-8")):
        said = str(row.get("claim", row))
        if unknown := set(row) - set(Claim.__dataclass_fields__):
            raise ValueError(f"claim {said!r} has the unknown key {sorted(unknown)[0]!r}: take it out, or correct it")
        if isinstance(row.get("paper"), list):
            row["paper"] = tuple(map(tuple, row["paper"]))
        for name in ("ours", "range", "ceiling", "behind"):
            if name in row:
                row[name] = tuple(row[name])
        claim = Claim(**row)
        if (claim.above is None) == (claim.below is None) and not claim.reason:
            raise ValueError(f"claim {said!r} needs one of above and below, or the reason why it cannot be tested")
        if unknown := set(claim.behind) - set(NAMES):
            raise ValueError(
                f"claim {said!r} stands behind the unknown gate {sorted(unknown)[0]!r}: choose of {', '.join(NAMES)}"
            )
        if claim.margin is not None and claim.above is None:
            raise ValueError(
                f"claim {said!r} has a margin, which is about a gain, and no bound that it lies above: give it "
                "above, or take the margin out"
            )
        claims.append(claim)
    return claims


def ours(claim: Claim, metrics: Mapping[str, Mapping[str, Any]]) -> Number | None:
    """Our number for a claim from the metrics by chapter; None where the run does not have it."""
    kept = metrics.get(claim.chapter, {})
    at = entry(kept, claim.ours) if claim.ours else None
    if isinstance(at, int | float):
        return Number(float(at))
    if not isinstance(at, Mapping):
        return None
    low, high = (at.get(end) for end in claim.range)
    ceiling = entry(kept, claim.ceiling) if claim.ceiling else None
    ceiling = ceiling.get("mean") if isinstance(ceiling, Mapping) else ceiling
    return Number(
        at.get("mean", at.get("difference")), low, high, at.get("p"), at.get("error"), at.get("df"), ceiling
    )  # fmt: skip


def published(claim: Claim, results: Mapping[str, Any]) -> str:
    """What the paper says, as words, a number, or a difference of two in points."""
    if isinstance(claim.paper, str):
        return claim.paper
    numbers = [float(entry(results, path)) for path in claim.paper]
    return f"{numbers[0] - numbers[1]:+.2f} points" if len(numbers) == 2 else f"{numbers[0]:.2f}"


def judge(
    claims: Sequence[Claim], numbers: Sequence[Number | None], gates: Mapping[str, Gate] | None = None
) -> list[Verdict]:
    """A verdict for each claim, by the first of these rules that applies.

    1. *Not testable here*: there is a ``reason``.
    2. *True by construction*: it says so, and its interval does not lie on the other side of the bound.
    3. *Not testable here*: the run does not have its number, or a gate before it failed or was not measured.
    4. *Described*, which is no verdict: the number has no interval (that of sampling, or the range over all that the
       claim speaks of); or the claim is of a family and the number has no p-value.
    5. *Contradicted*: the whole interval lies on the other side of the bound.
    6. *Reproduced*: the whole interval lies on the claim's side, and where there is a ceiling, the value is at least
       ``SHARE`` of its gain.
    7. *No benefit*: there is a ``margin``, and two one-sided tests place the number within it on both sides (its 90 %
       interval lies inside; where only a 95 % interval is known, that one).
    8. *Undecided*: all else.

    Rules 5 and 6 need a p-value below ``LEVEL`` too where the claim is of a family, after Holm's adjustment within it.
    """
    families: dict[str, dict[str, float]] = {}
    for i, (claim, number) in enumerate(zip(claims, numbers, strict=True)):
        if claim.family and number and number.p is not None:
            families.setdefault(claim.family, {})[str(i)] = number.p
    adjusted = {i: p for family in families.values() for i, p in holm(family).items()}
    pairs = enumerate(zip(claims, numbers, strict=True))
    return [_judge_one(claim, number, adjusted.get(str(i)), gates or {}) for i, (claim, number) in pairs]


def _judge_one(claim: Claim, number: Number | None, p: float | None, gates: Mapping[str, Gate]) -> Verdict:
    if claim.reason:
        return Verdict("not testable here", claim.reason)
    interval = None
    if number is not None and number.low is not None and number.high is not None:
        interval = (number.low, number.high)
    holds, fails = _sides(claim, interval)
    if claim.by_construction and not fails:
        return Verdict("true by construction", claim.by_construction)
    if number is None:
        return Verdict("not testable here", "this run does not have the number")
    for name in claim.behind:
        if name not in gates:
            return Verdict("not testable here", f"{name}: not measured")
        if not gates[name].passed:
            return Verdict("not testable here", f"{name}: {gates[name].sentence}")
    if interval is None:
        return Verdict(DESCRIBED, "a number without an interval")
    if claim.family and p is None:
        return Verdict(DESCRIBED, "a test of a family, without a p-value")
    significant = not claim.family or (p is not None and p < LEVEL)
    if fails and significant:
        return Verdict("contradicted")
    if holds and significant and (number.ceiling is None or number.value >= SHARE * number.ceiling):
        return Verdict("reproduced")
    if claim.margin is not None and _within(number, interval, claim.margin):
        return Verdict("no benefit", f"within {100 * claim.margin:g} points of none")
    return Verdict("undecided")


def _sides(claim: Claim, interval: tuple[float, float] | None) -> tuple[bool, bool]:
    """Whether the whole interval lies on the claim's side of its bound, and whether on the other."""
    if interval is None:
        return False, False
    if claim.above is not None:
        return interval[0] > claim.above, interval[1] < claim.above
    assert claim.below is not None
    return interval[1] < claim.below, interval[0] > claim.below


def _within(number: Number, interval: tuple[float, float], margin: float) -> bool:
    if number.error is None or number.df is None:
        return -margin < interval[0] and interval[1] < margin
    estimate = Estimate(number.value, *interval, number.p or 0.0, number.error, number.df, 1)
    return equivalence(estimate, margin).within


def mean_gaps(
    scores: Mapping[str, Mapping[str, float]], methods: Sequence[str] = ("semalign", "laten", "seeking")
) -> dict[str, dict[str, float]]:
    """Each method's mean distance to the teacher over tasks, without and with its sign; of {method: {task: points}}."""
    gaps = {m: [scores["teacher"][t] - s for t, s in scores[m].items()] for m in methods if m in scores}
    return {m: {"distance": sum(map(abs, g)) / len(g), "signed": sum(g) / len(g)} for m, g in gaps.items()}


def lead_in_gap(chapters: Sequence[Mapping[str, Any]], rival: str) -> dict[str, float] | None:
    """SemAlign's lead over a rival in the mean gap to the teacher, in points, with an interval.

    None where a chapter lacks the comparison, or one of the two is not below the teacher on every task: only there is
    the lead in the gap the mean difference of the two. Tasks are independent samples of questions.
    """
    gains = [c.get("gains", {}).get(rival, {}).get("semalign") for c in chapters]
    if not gains or None in gains:
        return None
    below = all(c["scores"][m]["mean"] < c["scores"]["teacher"]["mean"] for c in chapters for m in ("semalign", rival))
    if not below:
        return None
    mean = 100 * sum(e["mean"] for e in gains) / len(gains)
    half = 100 * sum(((e["high"] - e["low"]) / 2) ** 2 for e in gains) ** 0.5 / len(gains)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def is_single_run(score: float, n: int) -> bool:
    """Whether a score in percent, rounded to two decimals, is a number of right answers out of n."""
    return abs(round(score / 100 * n) * 100 / n - score) <= 0.00501


def z_score(a: float, b: float, n: int) -> float:
    """The difference of two scores in percent over its standard error, for n unpaired questions each."""
    p, q = a / 100, b / 100
    return (p - q) / ((p * (1 - p) + q * (1 - q)) / n) ** 0.5


class CommonShare(NamedTuple):
    """How well one share of the gap describes scores of several tasks, and how likely that is by chance."""

    share: float  # of the gap between student and teacher
    scores: dict[str, float]  # what it gives, in points
    largest: float  # the largest distance to a printed score, in points
    chance: float  # that sampled scores lie as near to *this* share
    chance_free: float  # ... or to any common share


def common_share(
    student: Mapping[str, float],
    teacher: Mapping[str, float],
    printed: Mapping[str, float],
    questions: Mapping[str, int],
    *,
    share: float = 0.7,
    within: float = 0.01,
) -> CommonShare:
    """Whether student + share x (teacher - student) gives the printed scores, on every task.

    The chances are those that scores come within ``within`` points on every task where the true ones lie exactly on
    that line, and each is measured once on so many questions: normal errors of the size that sampling questions gives.
    True scores off the line make it less likely.

    Raises:
        ValueError: a task on which teacher and student score the same.
    """
    tasks = list(printed)
    low, high, seen = (np.array([scores[t] for t in tasks]) for scores in (student, teacher, printed))
    gap = high - low
    if not gap.all():
        same = tasks[int(np.argmin(np.abs(gap)))]
        raise ValueError(f"teacher and student score the same on {same}, and there is no gap to share: leave it out")
    line = low + share * gap
    error = np.sqrt(line * (100 - line) / [questions[t] for t in tasks])
    chance = float(np.prod(stats.norm.cdf(within / error) - stats.norm.cdf(-within / error)))
    free = _chance_of_any_share(error / np.abs(gap), within / np.abs(gap))
    fitted = dict(zip(tasks, line.tolist(), strict=True))
    return CommonShare(share, fitted, float(np.abs(line - seen).max()), chance, free)


def _chance_of_any_share(error: np.ndarray, half: np.ndarray) -> float:
    """The chance that intervals of half width ``half``, around normal shares with these errors, have a point in common.

    They do where the largest lower end lies below all upper ends; the integral is over where that lower end is.
    """
    reach = 6 * error.min() + 2 * half.max()
    at = np.linspace(-reach, reach, 20_001)[:, None]
    density = stats.norm.pdf(at + half, scale=error)  # of each lower end
    beside = stats.norm.cdf(at + half, scale=error) - stats.norm.cdf(at - half, scale=error)
    others = [np.delete(beside, i, axis=1).prod(1) for i in range(len(error))]
    return float(np.trapezoid((density * np.array(others).T).sum(1), at[:, 0]))
