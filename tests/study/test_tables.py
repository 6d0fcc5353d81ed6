"""The chapters' tables, from trials made by hand whose right values are known. No model is loaded."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest

from semalign.profiles import Profile, load_profile
from semalign.study import analysis, tables, trials

TASK, OTHER = "mmlu", "gsm8k"
KNOWN = ("both", "both", "teacher", "none")


def trial(right: str, other: str = "10", loss: float = 1.0, **more: Any) -> dict[str, Any]:
    """One trial: '1011' is right, wrong, right, right."""
    said = [
        {"correct": float(c), "known": k, "topic": "", "too_long": i == 1}
        for i, (c, k) in enumerate(zip(right, KNOWN, strict=True))
    ]
    seen = {"loss": [loss, loss], "right": [0.5, 1.0], "kl": [loss / 2] * 2, "agree": [1.0, 0.0]}
    answers = {TASK: said, OTHER: [{"correct": float(c)} for c in other]}
    return {"answers": answers, "validation": seen, "cost": {"wall_s": 4.0, "student_tokens": 10.0}, **more}


RUNS: dict[str, list[dict[str, Any]]] = {
    "teacher": [trial("1011", loss=0.5)],
    "none": [trial("1000")],
    "sft": [trial("1010", "00"), trial("1000", "10")],
    "semalign": [trial("1010", loss=0.75), trial("0011", loss=0.75)],
}


def test_scores_are_shares_with_what_was_not_asked() -> None:
    table = tables.scores(RUNS, TASK)
    assert table["mean"].to_dict() == {"teacher": 0.75, "none": 0.25, "sft": 0.375, "semalign": 0.5}
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    assert table["unasked"].tolist() == [1, 1, 1, 1]
    assert tables.unasked([{"answers": {TASK: [{"correct": 1.0}]}}], TASK) == 0  # a trial of before


def test_gains_are_against_those_controls_that_were_run() -> None:
    found = tables.gains(RUNS, TASK, "answers")
    assert list(found) == ["none", "sft"]
    assert found["none"]["mean"].to_dict() == {"sft": 0.125, "semalign": 0.25}
    assert found["sft"]["mean"].to_dict() == {"semalign": 0.125}
    assert tables.gains(RUNS, TASK, "loss")["none"].loc["semalign", "mean"] == 0.25  # a lower loss is a gain
    same = {**RUNS, "sft_layer": RUNS["sft"]}
    assert tables.gains(same, TASK, "answers")["sft_layer"].loc["sft", "mean"] == 0


def test_gains_are_drawn_in_points_from_the_largest_mean_down() -> None:
    def e(mean: float) -> analysis.Estimate:
        return analysis.Estimate(mean, mean - 0.05, mean + 0.1, 0.5, 0.02, 4.0, 2, 3)

    gains = {("sft", TASK): e(0.1), ("seeking", TASK): e(-0.02), ("sft", OTHER): e(0.0), ("seeking", OTHER): e(0.3)}
    assert tables.by_gain(gains) == ["seeking", "sft"]
    assert [tables.points(gains["sft", t]) for t in (TASK, OTHER)] == [
        "+10.0 (+5.0 to +20.0) *",
        "+0.0 (-5.0 to +10.0)",
    ]
    figure = tables.draw_contest(gains, {TASK: "facts", OTHER: "word problems"})
    left, right = figure.axes
    assert [ax.get_title() for ax in (left, right)] == ["facts", "word problems"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["seeking", "sft"]
    dots = [[float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o"] for ax in (left, right)]
    assert dots == [pytest.approx([-2.0, 10.0]), pytest.approx([30.0, 0.0])]


def test_every_student_is_asked_under_its_own_name_and_the_first_one_under_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def made(p: Profile, task: str, method: str, seed: int, folder: str, *, others: int, variant: str) -> Any:
        asked.append((method, seed, variant, getattr(p.student, "id", "")))
        return trial("1000" if method == "none" else "1110" if variant else "1100")

    monkeypatch.setattr(tables.trials, "run_trial", made)
    p = load_profile("classroom-full", seeds=[0, 1])
    right = tables.over_students(p, TASK, ["none", "sft"], "folder", [3, 4])
    assert {m: tuple(r.shape) for m, r in right.items()} == {"none": (3, 1, 4), "sft": (3, 2, 4)}
    assert right["sft"].mean(-1).tolist() == [[0.5, 0.5], [0.75, 0.75], [0.75, 0.75]]
    assert asked[:3] == [
        ("none", 3, "", "pico-s"), ("none", 3, "sibling1", "pico-s-1"), ("none", 3, "sibling2", "pico-s-2")
    ]  # fmt: skip
    assert asked[3:5] == [("sft", 3, "", "pico-s"), ("sft", 4, "", "pico-s")]
    # Where no seeds are given they are the profile's, and without siblings a profile has the first student's trials.
    alone = p.changed(siblings=[], kin_teachers=[])
    del asked[:]
    assert tables.over_students(alone, TASK, ["sft"], "folder")["sft"].shape == (1, 2, 4)
    assert asked == [("sft", 0, "", "pico-s"), ("sft", 1, "", "pico-s")]
    assert trials.trial_key(alone, [TASK], "sft", 0) == trials.trial_key(p, [TASK], "sft", 0)


def test_questions_are_told_apart_by_what_they_say_and_only_by_that() -> None:
    kinds = tables.groups(RUNS, TASK, "known")
    assert kinds == {"both": [0, 1], "none": [3], "teacher": [2]}
    assert tables.told(kinds, "reader") == "Questions by reader: both 2, none 1, teacher 1."
    assert tables.groups(RUNS, TASK, "topic") == {}
    assert "do not say their subject" in tables.told({}, "their subject")


def test_shares_and_gains_of_each_kind() -> None:
    kinds = tables.groups(RUNS, TASK, "known")
    table = tables.by(RUNS, TASK, kinds)
    assert table.loc["both"].to_dict() == {"questions": 2, "teacher": 0.5, "none": 0.5, "sft": 0.5, "semalign": 0.25}
    assert table.loc["teacher", "semalign"] == 1.0 and table.loc["none", "semalign"] == 0.5
    found = tables.gains_in(RUNS, TASK, kinds)
    # of the others there is one question each, of which no interval can be given
    assert {kind: t.loc["semalign", "mean"] for kind, t in found.items()} == {"both": -0.25}
    assert tables.by(RUNS, TASK, {}).empty and tables.gains_in(RUNS, TASK, {}) == {}


def test_headroom_says_of_how_many_questions_it_speaks() -> None:
    table = tables.headroom(RUNS, TASK)
    assert table.loc["none"].to_dict() | {"copied": 0} == {
        "of headroom": 0,
        "gained": 0,
        "to gain": 2,
        "copied": 0,
        "to copy": 0,
    }
    assert table.loc["semalign", ["of headroom", "gained"]].tolist() == [0.5, 0.75]
    assert math.isnan(table.loc["semalign", "copied"])  # the teacher knows all that the student does
    equal = tables.headroom({**RUNS, "teacher": RUNS["none"]}, TASK)
    assert math.isnan(equal.loc["sft", "of headroom"])


def test_closeness_forgotten_and_cost() -> None:
    assert tables.closeness(RUNS).loc["semalign"].to_dict() == {"kl": 0.375, "agree": 0.5, "loss": 0.75}
    assert tables.forgotten(RUNS, TASK).to_dict("index") == {"sft": {OTHER: -0.25}, "semalign": {OTHER: 0.0}}
    alone = {m: [{**t, "answers": {TASK: t["answers"][TASK]}} for t in found] for m, found in RUNS.items()}
    assert tables.forgotten(alone, TASK).shape == (2, 0)
    assert tables.cost(RUNS).loc["sft"].to_dict() == {"wall_s": 4.0, "student_tokens": 10.0}


def test_measures_are_what_a_file_of_metrics_holds() -> None:
    found = tables.plain(tables.measures(load_profile("smoke"), RUNS, TASK))
    json.dumps(found, allow_nan=False)
    assert {"scores", "gains", "finer", "headroom", "closeness", "forgotten", "cost"} < set(found)
    assert found["scores"]["semalign"]["mean"] == 0.5 and found["questions"] == 4
    assert set(found["gains"]["none"]["sft"]) == {"mean", "low", "high", "p", "error", "df"}
    assert found["headroom"]["semalign"]["copied"] is None


def test_differences_in_words() -> None:
    table = pd.DataFrame(
        {"a": {"mean": 0.1, "low": 0.05, "high": 0.2, "p": 0.0002}, "b": {"mean": 0, "low": -1, "high": 1, "p": 0.9}}
    ).T
    shown = tables.compact({"sft": table, "none": table.loc[["a"]]})
    assert shown.loc["a", "minus sft"] == "+0.100 (+0.050 to +0.200)" and shown.loc["b", "minus none"] == ""
    said = tables.said({"sft": table, "none": table.loc[["b"]]}, "a")
    assert said == ["a is better than sft: +0.100 (+0.050 to +0.200), p < 0.001"]
    assert "not distinguishable from none: +0.000 (-1.000 to +1.000), p = 0.900" in tables.said({"none": table}, "b")[0]


def test_all_methods_run_with_teacher_and_untouched_student(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def run_trial(p: Any, task: str, method: str, seed: int, folder: str, *, others: int) -> dict[str, Any]:
        made.append((task, method, seed, folder, others))
        return {}

    monkeypatch.setattr(trials, "run_trial", run_trial)
    p = load_profile("smoke", methods=["sft"], seeds=[3, 5], others=2)
    assert {m: len(found) for m, found in tables.run_methods(p, TASK, "there").items()} == {
        "teacher": 1,
        "none": 1,
        "sft": 2,
    }
    assert made[-1] == (TASK, "sft", 5, "there", 2)


def test_answers_are_tallied_over_questions_and_seeds() -> None:
    def judge(answer: dict[str, Any], row: str) -> str:
        return "asked" if not answer["too_long"] else row

    table = tables.tally(RUNS, TASK, ["a", "long", "c", "d"], judge, ("asked", "long", "never"))
    assert table.loc["semalign"].to_dict() == {"asked": 0.75, "long": 0.25, "never": 0.0}


def test_figures_draw_every_method_once() -> None:
    import matplotlib

    matplotlib.use("agg")
    assert [t.get_text() for t in tables.draw_scores(tables.scores(RUNS, TASK)).get_yticklabels()] == [
        "sft",
        "semalign",
    ]
    differences = tables.gains_in(RUNS, TASK, tables.groups(RUNS, TASK, "known"))
    legend = tables.draw_gains(differences, "gain").get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["sft", "semalign"]
    tables.draw_gains({}, "nothing to tell apart")
