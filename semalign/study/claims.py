"""The paper's claims against this book's numbers: a verdict follows from a rule that stands beside the claim.

``book/claims.yaml`` lists what the paper says, where a chapter's metrics hold the number that tests it, and the bound
that the number's interval has to clear. Nothing here knows a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from semalign.study.analysis import holm

VERDICTS = ("reproduced", "not reproduced", "contradicted", "not testable here")
LEVEL = 0.05  # of p-values, after Holm's adjustment within a family


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
    paper: str | tuple[tuple[str, ...], ...] = "–"  # its words, or a path in paper_results.yaml, or two: a difference
    family: str = ""  # claims that are tested together
    figure: str = ""  # the anchor of the figure that shows it
    reason: str = ""  # why it cannot be tested here


@dataclass(frozen=True)
class Number:
    """Ours: the value, the ends of its interval (the value itself where there is none), and a p-value or None."""

    value: float
    low: float
    high: float
    p: float | None = None


def load_claims(path: str | Path) -> list[Claim]:
    """The claims of a yaml file, checked.

    Raises:
        ValueError: an entry has an unknown key, or no bound and no reason; the message names the claim.
    """
    claims = []
    for entry in yaml.safe_load(Path(path).read_text(encoding="utf-8")):
        said = str(entry.get("claim", entry))
        if unknown := set(entry) - set(Claim.__dataclass_fields__):
            raise ValueError(f"claim {said!r} has the unknown key {sorted(unknown)[0]!r}")
        if isinstance(entry.get("paper"), list):
            entry["paper"] = tuple(map(tuple, entry["paper"]))
        for name in ("ours", "range"):
            if name in entry:
                entry[name] = tuple(entry[name])
        claim = Claim(**entry)
        if (claim.above is None) == (claim.below is None) and not claim.reason:
            raise ValueError(f"claim {said!r} needs one of above and below, or the reason why it cannot be tested")
        claims.append(claim)
    return claims


def ours(claim: Claim, metrics: Mapping[str, Mapping[str, Any]]) -> Number | None:
    """Our number for a claim from the metrics by chapter; None where the run does not have it."""
    found: Any = metrics.get(claim.chapter) if claim.ours else None
    for step in claim.ours:
        found = found.get(step) if isinstance(found, Mapping) else None
    if isinstance(found, int | float):
        return Number(float(found), float(found), float(found))
    if not isinstance(found, Mapping):
        return None
    value = found.get("mean", found.get("difference"))
    low, high = (found[end] for end in claim.range)
    return Number(value, low, high, found.get("p"))


def published(claim: Claim, results: Mapping[str, Any]) -> str:
    """What the paper says, as words, a number, or a difference of two in points."""
    if isinstance(claim.paper, str):
        return claim.paper
    numbers = []
    for path in claim.paper:
        found: Any = results
        for step in path:
            found = found[step]
        numbers.append(float(found))
    return f"{numbers[0] - numbers[1]:+.2f} points" if len(numbers) == 2 else f"{numbers[0]:.2f}"


def judge(claims: Sequence[Claim], numbers: Sequence[Number | None]) -> list[str]:
    """One of ``VERDICTS`` for each claim.

    Reproduced: the interval lies on the claim's side of its bound, and in a family of tests the p-value holds after
    Holm's adjustment. Contradicted: the interval lies on the other side, under the same condition. Not reproduced:
    neither. Without a number there is nothing to judge.
    """
    families: dict[str, dict[str, float]] = {}
    for i, (claim, number) in enumerate(zip(claims, numbers, strict=True)):
        if claim.family and number and number.p is not None:
            families.setdefault(claim.family, {})[str(i)] = number.p
    adjusted = {i: p for family in families.values() for i, p in holm(family).items()}

    def one(i: int, claim: Claim, number: Number | None) -> str:
        if number is None or claim.reason:
            return "not testable here"
        if adjusted.get(str(i), 0.0) >= LEVEL:
            return "not reproduced"
        if claim.above is not None:
            borne_out, refuted = number.low > claim.above, number.high < claim.above
        else:
            assert claim.below is not None
            borne_out, refuted = number.high < claim.below, number.low > claim.below
        return "reproduced" if borne_out else "contradicted" if refuted else "not reproduced"

    return [one(i, *both) for i, both in enumerate(zip(claims, numbers, strict=True))]
