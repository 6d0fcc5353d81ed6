"""Verdicts follow from intervals and bounds alone, and the book's claims point at numbers that chapters save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from semalign import pipeline
from semalign.study.claims import VERDICTS, Claim, Number, judge, load_claims, ours, published

BOOK = pipeline.ROOT / "book"
ABOVE = Claim("better", "here", above=0.0)
BELOW = Claim("small", "here", below=0.1)


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        (ABOVE, 0.01, 0.05, "reproduced"),
        (ABOVE, -0.01, 0.05, "not reproduced"),
        (ABOVE, -0.05, -0.01, "contradicted"),
        (ABOVE, 0.0, 0.0, "not reproduced"),
        (BELOW, 0.01, 0.05, "reproduced"),
        (BELOW, 0.05, 0.15, "not reproduced"),
        (BELOW, 0.9, 0.99, "contradicted"),
    ],
)
def test_the_interval_decides(claim: Claim, low: float, high: float, verdict: str) -> None:
    assert judge([claim], [Number((low + high) / 2, low, high)]) == [verdict]


def test_a_family_of_tests_is_adjusted_together_and_others_are_not() -> None:
    """Of four p-values of 0.03 none holds after Holm; alone it does."""
    clear = Number(0.03, 0.01, 0.05, p=0.03)
    family = [Claim(f"{i}", "here", above=0.0, family="four") for i in range(4)]
    assert judge(family, [clear] * 4) == ["not reproduced"] * 4
    assert judge(family[:1], [clear]) == ["reproduced"]
    assert judge([*family[:1], ABOVE, ABOVE, ABOVE], [clear] * 4) == ["reproduced"] * 4
    strong = Number(0.03, 0.01, 0.05, p=0.001)
    assert judge(family, [strong, clear, clear, clear])[:2] == ["reproduced", "not reproduced"]


def test_without_a_number_or_with_a_reason_nothing_is_judged() -> None:
    assert judge([ABOVE], [None]) == ["not testable here"]
    assert judge([Claim("fast", "here", reason="no GPU")], [Number(1, 1, 1)]) == ["not testable here"]


def test_our_number_is_read_from_a_chapters_metrics() -> None:
    metrics = {
        "a": {"gains": {"none": {"semalign": {"mean": 0.1, "low": 0.0, "high": 0.2, "p": 0.04}}}, "share": 0.5},
        "b": {"curve": {"mean": 0.7, "min": 0.6, "max": 0.8}, "d": {"difference": -1, "low": -2, "high": 0}},
    }
    nested = Claim("x", "y", chapter="a", ours=("gains", "none", "semalign"), above=0.0)
    assert ours(nested, metrics) == Number(0.1, 0.0, 0.2, 0.04)
    assert ours(Claim("x", "y", chapter="a", ours=("share",), above=0.0), metrics) == Number(0.5, 0.5, 0.5)
    ranged = Claim("x", "y", chapter="b", ours=("curve",), range=("min", "max"), above=0.0)
    assert ours(ranged, metrics) == Number(0.7, 0.6, 0.8)
    assert ours(Claim("x", "y", chapter="b", ours=("d",), above=0.0), metrics) == Number(-1, -2, 0)
    assert ours(Claim("x", "y", chapter="b", ours=("nowhere", "at all"), above=0.0), metrics) is None
    assert ours(nested, {}) is None
    assert ours(Claim("x", "y", chapter="a", reason="no GPU"), metrics) is None


def test_a_claim_without_a_rule_or_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text("- {claim: it works, where: everywhere}\n")
    with pytest.raises(ValueError, match="claim 'it works' needs one of above and below, or the reason"):
        load_claims(path)
    path.write_text("- {claim: it works, where: everywhere, above: 0, abvoe: 1}\n")
    with pytest.raises(ValueError, match="claim 'it works' has the unknown key 'abvoe'"):
        load_claims(path)


def test_the_books_claims_name_chapters_figures_and_published_numbers() -> None:
    claims = load_claims(BOOK / "claims.yaml")
    results = yaml.safe_load((BOOK / "paper_results.yaml").read_text())
    assert {c.chapter for c in claims} <= set(pipeline.ORDER)
    read = set(pipeline.ORDER["15_paper_against_ours"]) | {"15_paper_against_ours"}
    for claim in claims:
        assert published(claim, results)
        assert claim.reason or claim.chapter in read, f"{claim.claim}: the page does not wait for {claim.chapter}"
        source = (pipeline.ROOT / "notebooks" / f"{claim.chapter}.ipynb").read_text()
        assert f'"{claim.figure}"' in source or not claim.figure, claim.claim
    gain = next(c for c in claims if c.claim == "SemAlign improves the student on MMLU")
    assert published(gain, results) == "+6.10 points"


def test_every_number_that_a_claim_names_is_in_the_full_run() -> None:
    """A path that no chapter writes would read as not testable for ever."""
    claims = [c for c in load_claims(BOOK / "claims.yaml") if not c.reason]
    kept = {p.stem: yaml.safe_load(p.read_text())["metrics"] for p in (BOOK / "full_run").glob("*.json")}
    missing = [c.claim for c in claims if ours(c, kept) is None]
    assert not missing
    assert set(judge(claims, [ours(c, kept) for c in claims])) <= set(VERDICTS)


def test_the_front_page_says_what_the_full_run_says() -> None:
    """Every sentence of "What we found, in short" that a number could refute: a new run may ask for new sentences."""
    kept = {p.stem: json.loads(p.read_text())["metrics"] for p in (BOOK / "full_run").glob("*.json")}
    chapters = [kept[name] for name in ("05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp")]
    cosines = kept["01_semantics"]["cosine_over_layers"]
    assert cosines["random"]["min"] > cosines["output side"]["max"]

    curve = kept["11_ablations"]["curve"]["semalign"]
    assert kept["04_alignment"]["gain_in_cosine"]["low"] > 0 and curve[-1] < curve[-2] < min(curve[:3])
    assert kept["11_ablations"]["table"]["paper: as in the paper"]["high"] < 0
    assert all(abs(c["finer"]["none"]["semalign"]["mean"]) < 0.01 for c in chapters)

    assert all(c["finer"]["none"]["sft"]["low"] > 0 for c in chapters)
    assert all(c["closeness"]["logit_kd"]["kl"] < c["closeness"]["none"]["kl"] for c in chapters)
    for method in ("sft", "logit_kd"):
        assert all(c["gains"]["none"][method]["low"] < 0 < c["gains"]["none"][method]["high"] for c in chapters)

    search = kept["14_search"]
    assert search["wins"] == [] and search["leads_over_tasks"]["states, no layer term"]["low"] < 0
    planted = kept["12_controls"]["planted"]
    assert planted["residual, logit map"] < planted["before"] / 5 and planted["the paper's"] > planted["before"]
