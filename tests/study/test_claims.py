"""Verdicts follow from intervals and bounds alone, and the book's claims point at numbers that chapters save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from semalign.pipeline import notebooks as pipeline
from semalign.study import gates
from semalign.study.claims import (
    DESCRIBED,
    VERDICTS,
    Claim,
    Number,
    common_share,
    is_single_run,
    judge,
    lead_in_gap,
    load_claims,
    mean_gaps,
    ours,
    published,
    z_score,
)

BOOK = pipeline.ROOT / "book"
ABOVE = Claim("better", "here", above=0.0, behind=())
BELOW = Claim("small", "here", below=0.1, behind=())
OPEN = {name: gates.Gate(name, 1.0, 0.9, 1.1, 0.5, True, "passed") for name in gates.NAMES}


def words(claims: list[Claim], numbers: list[Number | None], **more: object) -> list[str]:
    return [verdict.word for verdict in judge(claims, numbers, **more)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        (ABOVE, 0.01, 0.05, "reproduced"),
        (ABOVE, -0.01, 0.05, "undecided"),
        (ABOVE, -0.05, -0.01, "contradicted"),
        (ABOVE, 0.0, 0.0, "undecided"),
        (BELOW, 0.01, 0.05, "reproduced"),
        (BELOW, 0.05, 0.15, "undecided"),
        (BELOW, 0.9, 0.99, "contradicted"),
    ],
)
def test_the_interval_decides(claim: Claim, low: float, high: float, verdict: str) -> None:
    assert words([claim], [Number((low + high) / 2, low, high)]) == [verdict]


def test_a_number_without_an_interval_is_described_and_not_judged() -> None:
    family = Claim("better", "here", above=0.0, behind=(), family="f")
    assert words([ABOVE, BELOW, family], [Number(0.5), Number(0.5, p=0.001), Number(0.5, 0.4, 0.6)]) == [DESCRIBED] * 3


def test_a_gain_reaches_a_part_of_the_ceilings() -> None:
    claim = Claim("better", "here", above=0.0, margin=0.03, behind=())
    clear = {"low": 0.08, "high": 0.12, "p": 0.001}
    assert words([claim], [Number(0.1, **clear, ceiling=0.28)]) == ["reproduced"]
    assert words([claim], [Number(0.1, **clear, ceiling=0.30)]) == ["undecided"]
    assert words([claim], [Number(0.1, **clear)]) == ["reproduced"]


def test_no_benefit_takes_an_interval_within_the_margin() -> None:
    claim = Claim("better", "here", above=0.0, margin=0.03, behind=())
    assert words([claim], [Number(0.005, -0.01, 0.02)]) == ["no benefit"]
    # The 95 % interval reaches beyond 3 points, the 90 % interval does not.
    assert words([claim], [Number(0.005, -0.021, 0.031, 0.7, 0.0133, 900.0)]) == ["no benefit"]
    assert words([claim], [Number(0.005, -0.03, 0.04, 0.7, 0.018, 900.0)]) == ["undecided"]
    assert words([ABOVE], [Number(0.005, -0.01, 0.02)]) == ["undecided"]  # without a margin there is no such verdict
    assert words([claim], [Number(-0.01, -0.02, -0.005)]) == ["contradicted"]  # which comes first
    assert words([claim], [Number(0.01, 0.005, 0.02, ceiling=0.4)]) == ["no benefit"]  # above 0, and next to nothing


def test_a_family_of_tests_is_adjusted_together_and_others_are_not() -> None:
    """Of four p-values of 0.03 none holds after Holm; alone it does."""
    clear = Number(0.03, 0.01, 0.05, p=0.03)
    family = [Claim(f"{i}", "here", above=0.0, family="four", behind=()) for i in range(4)]
    assert words(family, [clear] * 4) == ["undecided"] * 4
    assert words(family[:1], [clear]) == ["reproduced"]
    assert words([*family[:1], ABOVE, ABOVE, ABOVE], [clear] * 4) == ["reproduced"] * 4
    strong = Number(0.03, 0.01, 0.05, p=0.001)
    assert words(family, [strong, clear, clear, clear])[:2] == ["reproduced", "undecided"]


def test_a_gate_that_failed_or_is_missing_keeps_the_verdict_back_and_says_why() -> None:
    clear, claim = Number(0.2, 0.1, 0.3), Claim("better", "here", above=0.0)
    assert words([claim], [clear], gates=OPEN) == ["reproduced"]
    shut = {**OPEN, "placebo": gates.Gate("placebo", 0.2, 0.1, 0.3, 0.05, False, "FAILED: it moved")}
    (verdict,) = judge([claim], [clear], shut)
    assert verdict == ("not testable here", "placebo: FAILED: it moved")
    assert words([Claim("better", "here", above=0.0, behind=("planted kin",))], [clear], gates=shut) == ["reproduced"]
    assert judge([claim], [clear]) == [("not testable here", "positive control: not measured")]


def test_what_cannot_be_otherwise_is_named_so_unless_a_run_refutes_it() -> None:
    claim = Claim("falls", "here", above=0.0, by_construction="it is minimised")
    assert judge([claim], [Number(0.2)]) == [("true by construction", "it is minimised")]
    assert words([claim], [Number(0.2, 0.1, 0.3)]) == ["true by construction"]
    assert words([claim], [Number(-0.2, -0.3, -0.1)], gates=OPEN) == ["contradicted"]


def test_without_a_number_or_with_a_reason_nothing_is_judged() -> None:
    assert words([ABOVE], [None]) == ["not testable here"]
    assert judge([Claim("fast", "here", reason="no GPU")], [Number(1, 1, 1)]) == [("not testable here", "no GPU")]


def test_our_number_is_read_from_a_chapters_metrics() -> None:
    metrics = {
        "a": {
            "gains": {"none": {"semalign": {"mean": 0.1, "low": 0.0, "high": 0.2, "p": 0.04, "error": 0.05, "df": 9}}},
            "share": 0.5,
        },
        "b": {"curve": {"mean": 0.7, "min": 0.6, "max": 0.8}, "d": {"difference": -1, "low": -2, "high": 0}},
    }
    nested = Claim("x", "y", chapter="a", ours=("gains", "none", "semalign"), above=0.0)
    assert ours(nested, metrics) == Number(0.1, 0.0, 0.2, 0.04, 0.05, 9)
    assert ours(Claim("x", "y", chapter="a", ours=("share",), above=0.0), metrics) == Number(0.5)
    ranged = Claim("x", "y", chapter="b", ours=("curve",), range=("min", "max"), above=0.0)
    assert ours(ranged, metrics) == Number(0.7, 0.6, 0.8)
    assert ours(Claim("x", "y", chapter="b", ours=("d",), above=0.0), metrics) == Number(-1, -2, 0)
    assert ours(Claim("x", "y", chapter="b", ours=("nowhere", "at all"), above=0.0), metrics) is None
    assert ours(nested, {}) is None
    under = Claim("x", "y", chapter="a", ours=("share",), ceiling=("gains", "none", "semalign"), above=0.0)
    assert ours(under, metrics) == Number(0.5)
    of_gain = Claim("x", "y", chapter="a", ours=nested.ours, ceiling=("gains", "none", "semalign"), above=0.0)
    assert (number := ours(of_gain, metrics)) and number.ceiling == 0.1
    assert ours(Claim("x", "y", chapter="a", reason="no GPU"), metrics) is None


def test_a_claim_without_a_rule_or_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text("- {claim: it works, where: everywhere}\n")
    with pytest.raises(ValueError, match="claim 'it works' needs one of above and below, or the reason"):
        load_claims(path)
    path.write_text("- {claim: it works, where: everywhere, above: 0, behind: [a wall]}\n")
    with pytest.raises(ValueError, match="claim 'it works' stands behind the unknown gate 'a wall'"):
        load_claims(path)
    path.write_text("- {claim: it works, where: everywhere, below: 0, margin: 0.03}\n")
    with pytest.raises(ValueError, match="claim 'it works' has a margin"):
        load_claims(path)
    path.write_text("- {claim: it works, where: everywhere, above: 0, abvoe: 1}\n")
    with pytest.raises(ValueError, match="claim 'it works' has the unknown key 'abvoe'"):
        load_claims(path)


def test_the_books_claims_name_chapters_figures_and_published_numbers() -> None:
    claims = load_claims(BOOK / "claims.yaml")
    results = yaml.safe_load((BOOK / "paper_results.yaml").read_text())
    assert {c.chapter for c in claims} <= set(pipeline.ORDER)
    read = set(pipeline.ORDER["15_paper_against_ours"].reads) | {"15_paper_against_ours"}
    for claim in claims:
        assert published(claim, results)
        assert claim.reason or claim.chapter in read, f"{claim.claim}: the page does not wait for {claim.chapter}"
        source = (pipeline.ROOT / "notebooks" / f"{claim.chapter}.ipynb").read_text()
        assert f'"{claim.figure}"' in source or not claim.figure, claim.claim
    for claim in claims:  # what is said of the method waits for the instrument
        about_method = (
            claim.chapter.startswith(
                ("05", "06", "07", "08", "09", "12", "13b", "14", "15", "16", "17", "18", "19", "20")
            )
            and not claim.reason
        )
        assert claim.behind == (gates.NAMES if about_method else ()), claim.claim
    gain = next(c for c in claims if c.claim == "SemAlign improves the student on MMLU")
    assert published(gain, results) == "+6.10 points"


def test_every_number_that_a_claim_names_is_in_the_full_run() -> None:
    """A path that no chapter writes would read as not testable for ever."""
    claims = [c for c in load_claims(BOOK / "claims.yaml") if not c.reason]
    kept = {p.stem: yaml.safe_load(p.read_text())["metrics"] for p in (BOOK / "full_run").glob("*.json")}
    missing = [c.claim for c in claims if ours(c, kept) is None]
    assert not missing
    verdicts = judge(claims, [ours(c, kept) for c in claims], gates.of_run(kept))
    assert {v.word for v in verdicts} <= {*VERDICTS, DESCRIBED}


def test_the_papers_mean_gaps_count_without_their_sign() -> None:
    results = yaml.safe_load((BOOK / "paper_results.yaml").read_text())
    gaps = mean_gaps(results["table_1"])
    for method, printed in results["mean_gap_to_teacher"].items():
        assert gaps[method]["distance"] == pytest.approx(printed, abs=0.006)
    assert gaps["seeking"]["signed"] < 0 < gaps["semalign"]["signed"]


def test_the_lead_in_the_gap_is_the_mean_difference_where_both_are_below_the_teacher() -> None:
    def chapter(semalign: float) -> dict[str, object]:
        scores = {"semalign": {"mean": semalign}, "laten": {"mean": 0.3}, "teacher": {"mean": 0.5}}
        gain = {"mean": semalign - 0.3, "low": semalign - 0.33, "high": semalign - 0.27}
        return {"scores": scores, "gains": {"laten": {"semalign": gain}}}

    half = 100 * (2 * 0.03**2) ** 0.5 / 2
    assert lead_in_gap([chapter(0.4), chapter(0.2)], "laten") == pytest.approx({"mean": 0, "low": -half, "high": half})
    assert lead_in_gap([chapter(0.4), chapter(0.6)], "laten") is None
    assert lead_in_gap([chapter(0.4)], "seeking") is None and lead_in_gap([], "laten") is None


def test_what_a_printed_score_can_tell() -> None:
    assert is_single_run(50.0, 164) and is_single_run(17.07, 164) and not is_single_run(14.05, 164)
    assert z_score(60, 40, 100) == pytest.approx(20 / (100 * 0.48 / 10**2) ** 0.5 / 10)
    assert z_score(40, 60, 100) == -z_score(60, 40, 100)


def test_the_papers_scores_lie_on_one_line_between_student_and_teacher() -> None:
    results = yaml.safe_load((BOOK / "paper_results.yaml").read_text())
    rows, asked = results["table_1"], results["questions"]
    line = common_share(rows["student"], rows["teacher"], rows["semalign"], asked)
    assert line.scores == pytest.approx({"mmlu": 50.29, "gsm8k": 19.206, "humaneval": 17.34, "mbpp": 18.78})
    assert line.largest == pytest.approx(0.01) and line.chance < line.chance_free < 1e-6
    for rival in ("seeking", "laten"):
        assert common_share(rows["student"], rows["teacher"], rows[rival], asked).largest > 0.5


def test_the_chances_of_a_line_are_those_of_a_simulation() -> None:
    student, teacher, asked = (
        {"a": 40.0, "b": 20.0, "c": 30.0},
        {"a": 60.0, "b": 25.0, "c": 20.0},
        {"a": 900, "b": 400, "c": 100},
    )
    found = common_share(student, teacher, student, asked, share=0.5, within=1.5)
    low, gap, n = (
        torch.tensor([v[t] for t in "abc"]) for v in (student, {t: teacher[t] - student[t] for t in "abc"}, asked)
    )
    line = low + 0.5 * gap
    drawn = line + (line * (100 - line) / n).sqrt() * torch.randn(
        200_000, 3, generator=torch.Generator().manual_seed(0)
    )
    assert ((drawn - line).abs() <= 1.5).all(1).double().mean().item() == pytest.approx(found.chance, rel=0.05)
    share, half = (drawn - low) / gap, 1.5 / gap.abs()
    meets = (share - half).max(1).values <= (share + half).min(1).values
    assert meets.double().mean().item() == pytest.approx(found.chance_free, rel=0.03)
    with pytest.raises(ValueError, match="the same on b"):
        common_share({"a": 1, "b": 2}, {"a": 3, "b": 2}, {"a": 1, "b": 2}, {"a": 9, "b": 9})


def test_the_readmes_figure_says_what_the_full_run_says() -> None:
    """Random bases recompose a state better than the paper's; all else that the front pages say is computed."""
    kept = json.loads((BOOK / "full_run" / "01_semantics.json").read_text())["metrics"]["cosine_over_layers"]
    assert kept["random"]["min"] > kept["output side"]["max"]
