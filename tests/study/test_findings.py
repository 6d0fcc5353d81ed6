"""A chapter's finding: its numbers are those of the metrics, its words follow them, and what is absent is left out."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from semalign.pipeline.notebooks import KEPT_ELSEWHERE, ORDER
from semalign.study.findings import FINDINGS, finding


def e(mean: float, low: float, high: float, name: str = "mean") -> dict[str, float]:
    return {name: mean, "low": low, "high": high, "p": 0.5}


SCORES = {"teacher": e(0.8, 0.7, 0.9), "none": e(0.5, 0.4, 0.6)}
GAINS = {"none": {"semalign": e(0.011, -0.02, 0.04)}, "sft_layer": {"semalign": e(-0.03, -0.05, -0.01)}}
COMMON = {"primary": "answers", "scores": SCORES, "gains": GAINS}
SHAPES = {"teacher": {"parameters": 200, "layers": 5, "width": 160, "vocabulary": 2048}}
SHAPES["student"] = {"parameters": 120, "layers": 4, "width": 128, "vocabulary": 2048}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "00_models_and_data": ({"pair": SHAPES}, ["60 %", "4 layers against 5", "2,048"]),
    "01_semantics": (
        {
            "cosine_over_layers": {"output side": {"mean": 0.74}, "random": {"mean": 0.994}},
            "worst_self_transfer": 0.689,
        },
        ["0.994", "0.740", "Random bases do better", "0.689 at worst"],
    ),
    "02_importance": (
        {"distinct_choices": 3, "n_teacher": 5, "critical_layer": 2, "scores": {str(i): [1.0] for i in range(12)}},
        ["12 readings", "3 layers of 5", "names layer 2"],
    ),
    "03_pairing": (
        {"n_teacher": 5, "critical_layer": 4, "pair": [5, 4], "depths": [1, 2, 3, 5]},
        ["Student layer 4", "teacher layer 5", "though layer 4", "never reads 1 of"],
    ),
    "04_alignment": (
        {
            "cosine": {"semalign/0": {"before": 0.2, "after": 0.4}, "semalign/1": {"before": 0.2, "after": 0.5},
                       "random map/0": {"before": 0.0, "after": 0.3}},
            "against_sft_same_layer": {"semalign": e(-0.075, -0.083, -0.068, "difference")},
        },
        ["+0.250", "+0.300", "-7.5 points (-8.3 to -6.8)"],
    ),
    "04b_gates": (
        {"gates": {"positive control": {"passed": True, "value": 0.21}, "placebo": {"passed": False, "value": 0.1}}},
        ["1 of 2 gates", "not: placebo", "+21.0 points"],
    ),
    "05_mmlu": (
        {**COMMON, "arrived": {"teacher": {"semalign": e(0.02, -0.01, 0.05)}, "none": {"semalign": e(0.0, 0.0, 0.0)}}},
        ["only the teacher had read by +2.0 points", "nobody had read by +0.0", "+1.1 points (-2.0 to +4.0)"],
    ),
    "06_gsm8k": (
        {
            **COMMON,
            "why": {"none": {"right": 0.5, "another plan": 0.3}, "semalign": {"right": 0.6, "another plan": 0.3}},
        },
        ["60 % had another plan before", "75 % after", "labels in the same layer by -3.0"],
    ),
    "07_humaneval": (
        {
            **COMMON,
            "why": {
                "none": {"no program": 0.1, "unknown name": 0.2},
                "semalign": {"no program": 0.0, "unknown name": 0.1},
            },
        },
        ["30.0 % of the programs failed before", "10.0 % after"],
    ),
    "08_mbpp": (
        {**COMMON, "asserts": {"semalign": {"some hold": 7.0, "fail": 90.0}}},
        ["Of 90 programs that fail", "7 satisfy"],
    ),
    "09_fine_tuned_teachers": (
        {"fine_tuned_over_plain": {"humaneval": e(0.001, -0.002, 0.004), "mbpp": e(0.007, -0.003, 0.022)}},
        ["+0.1 points (-0.2 to +0.4) on humaneval", "+0.7 points (-0.3 to +2.2) on mbpp"],
    ),
    "10_similarity": (
        {
            "share_on_diagonal": 0.5,
            "summary": {"semalign": {"largest change": 0.006}},
            "least_change_without_states": 0.019,
        },
        ["50 %", "0.006", "0.019"],
    ),
    "11_ablations": (
        {
            "table": {
                "paper: as in the paper": e(-0.05, -0.06, -0.04, "difference"),
                "map: logit": e(0.02, 0.01, 0.03, "difference"),
                "map: tight": e(-0.02, -0.03, -0.01, "difference"), "layer: 2": e(0.0, -0.01, 0.01, "difference"),
                "no teacher: all layers": e(0.2, 0.1, 0.3, "difference"),
            }
        },
        ["-5.0 points (-6.0 to -4.0)", "3 other settings", "1 lie above", "1 below"],
    ),
    "12_controls": (
        {"planted": {"before": 0.008, "the paper's": 0.02, "residual, logit map": 0.0004, "KL alone": 0.0014}},
        ["0.0080 nats", "0.0200", "0.0004", "0.0014"],
    ),
    "12b_students": (
        {
            "verdicts": {"mmlu": {"taught": True, "by states": True}, "gsm8k": {"taught": True, "by states": False}},
            "differences": {"mmlu / twin": e(0.01, 0.0, 0.02), "gsm8k / twin": e(-0.01, -0.02, 0.0)},
            "gains": {
                "mmlu / seeking": e(0.4, 0.3, 0.5), "gsm8k / seeking": e(0.2, 0.1, 0.3),
                "mmlu / laten": e(0.5, 0.4, 0.6), "gsm8k / laten": e(0.0, -0.1, 0.1),
            },
        },
        [
            "on 2 of 2 tasks", "states on 1", "+1.0 points (+0.0 to +2.0) on mmlu",
            "Of 2 methods 1 gain on every task, and the most `seeking` does: +30.0 points",
        ],
    ),
    "13_rivals": (
        {"differing": {"laten": 47104, "laten_released": 0}, "moved": 9.5e-6},
        ["0 weights", "47,104", "9.5e-06"],
    ),
    "13b_regimes": (
        {
            "added": {"a": e(0.1, 0.05, 0.2), "b": e(-0.1, -0.2, -0.05), "c": e(0.0, -0.1, 0.1)},
            "overall": {
                "states and labels, layer k / kin": e(0.02, 0.01, 0.03),
                "states and labels, layer k / wide": e(0.0, -0.01, 0.01),
                "states first, then labels / kin": e(0.12, 0.1, 0.14),
                "states first, then labels / kin minus wide": e(0.15, 0.1, 0.2),
            },
        },
        [
            "Of 3 cells", "1 lie above", "1 below", "add +2.0 points (+1.0 to +3.0) between kin, +0.0 points",
            "A warm-up by states adds +12.0 points (+10.0 to +14.0) between kin, a difference of +15.0 points",
        ],
    ),
    "14_search": (
        {
            "wins": ["mmlu"], "caused_by_states": [], "leads": {"mmlu": {}, "gsm8k": {}},
            "leads_over_tasks": {"best of labels": e(0.01, 0.0, 0.02), "best of logits": e(-0.01, -0.02, 0.0)},
        },
        ["on 1 of 2 tasks", "states on 0", "labels by +1.0", "logits by -1.0"],
    ),
    "16_below_the_layer": (
        {
            "differences": {
                "heads / layer": e(-0.004, -0.01, 0.002), "heads / labels": e(-0.006, -0.02, 0.008),
                "heads / other heads": e(0.001, -0.01, 0.01),
            },
            "pairing": {"heads": {"of_partners": 0.024, "of_all": -0.0001}},
        },
        ["layer by -0.4 points (-1.0 to +0.2)", "alone by -0.6", "heads' by +0.1", "0.024", "-0.000"],
    ),
    "17_causal": (
        {
            "terms": {"0.0": {"causal": 0.3}, "1.0": {"causal": 0.0}},
            "differences": {
                "both minus labels": e(0.01, -0.01, 0.03), "both minus semantic": e(0.0, -0.02, 0.02),
                "both minus scrambled": e(-0.02, -0.04, 0.0),
            },
        },
        ["labels in the same layer +1.0 points (-1.0 to +3.0)", "others' swaps -2.0", "at 100 % of a planted change"],
    ),
    "18_pairing_from_outputs": (
        {
            "agreement": {"lens": 0.25, "lens, mapped": 0.5, "swap": 0.75},
            "against_depth": {
                "lens": e(0.01, -0.01, 0.03), "lens, mapped": e(0.0, -0.02, 0.02), "swap": e(-0.01, -0.02, 0.0),
            },
            "alone": {
                "lens": e(-0.1, -0.2, -0.05), "lens, mapped": e(0.0, -0.02, 0.02), "swap": e(-0.01, -0.02, 0.0),
            },
            "control": e(0.6, 0.5, 0.7),
        },
        ["25 % (lens)", "75 % (swap)", "+1.0 points (-1.0 to +3.0) (lens)", "is -10.0 points",
         "in reverse by +60.0 points"],
    ),
    "19_larger_gaps": (
        {
            "largest": "teacher → smaller",
            "at_largest": {
                "states": e(0.1, 0.05, 0.15), "logits": e(0.12, 0.07, 0.17), "labels": e(0.11, 0.06, 0.16)
            },
            "trend": {"states / width": e(-0.5, -0.9, -0.1)},
        },
        ["teacher → smaller", "states gain +10.0 points", "labels alone +11.0", "by -5 % (-9 to -1)"],
    ),
    "20_version_two": (
        {
            "differences": {
                "geometry minus KL alone": e(0.01, -0.01, 0.03), "curvature minus KL alone": e(-0.02, -0.04, 0.0),
                "frontier minus joint": e(0.03, 0.01, 0.05),
            },
            "spread_of_metrics": 0.012,
        },
        ["geometry adds +1.0 points (-1.0 to +3.0)", "curvature -2.0", "is 1.2 points", "frontier makes +3.0"],
    ),
    "21_second_family": (
        {
            "families": {
                "one": {"cosine": {"random": {"mean": 0.994, "min": 0.99}, "output side": {"mean": 0.74, "max": 0.8}}},
                "two": {"cosine": {"random": {"mean": 0.999, "min": 0.7}, "output side": {"mean": 0.5, "max": 0.8}}},
            }
        },
        ["0.994 against 0.740 in one", "0.999 against 0.500 in two", "in 1 of the 2 looked at"],
    ),
    "22_two_vocabularies": (
        {
            "planted": {
                "left": {"untouched": 5.4, "one vocabulary": 0.04, "shared tokens": 0.1, "other positions": 5.3}
            },
            "overlap": {"Gemma to SmolLM2": {"share": 0.94, "of the student's positions that meet one": 0.98}},
        },
        ["5.400 nats away", "leave 0.040", "shared tokens 0.100", "94 % of SmolLM2's tokens", "98 % of the positions"],
    ),
    "15_paper_against_ours": (
        {"counts": {"this run": {"reproduced": 3, "contradicted": 1, "undecided": 0}, "full run": {"reproduced": 9}}},
        ["Of 4 claims: 3 reproduced, 1 contradicted."],
    ),
}  # fmt: skip


def test_every_chapter_that_a_profile_speaks_to_has_one() -> None:
    assert list(FINDINGS) == list(CASES) == [name for name in ORDER if name not in KEPT_ELSEWHERE]


@pytest.mark.parametrize("chapter", CASES)
def test_the_numbers_of_the_sentence_are_those_of_the_metrics(chapter: str) -> None:
    metrics, parts = CASES[chapter]
    said = finding(chapter, metrics)
    assert not [part for part in parts if part not in said], said
    assert said.endswith(".") and re.search(r"\d", said)


def paths(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    own = [at] if at else []
    return own + [p for k, v in tree.items() for p in paths(v, (*at, k))] if isinstance(tree, dict) else own


@pytest.mark.parametrize("chapter", CASES)
def test_whatever_number_is_missing_the_rest_is_said_or_nothing_is(chapter: str) -> None:
    metrics, _ = CASES[chapter]
    whole = finding(chapter, metrics)
    for path in paths(metrics):
        for gone in (True, False):  # taken out, or None as where there is no number
            less = copy.deepcopy(metrics)
            *above, last = path
            at = less
            for name in above:
                at = at[name]
            if gone:
                del at[last]
            else:
                at[last] = None
            said = finding(chapter, less)
            assert "None" not in said and "nan" not in said and (said == "" or said.endswith(".")), (path, said)
    assert finding(chapter, {}) == "" and whole


def test_data_have_the_names_that_their_reader_knows() -> None:
    named = finding("12b_students", CASES["12b_students"][0], {"gsm8k": "Pico word problems", "mbpp": "not here"})
    assert named == finding("12b_students", CASES["12b_students"][0]).replace("gsm8k", "Pico word problems")
    assert "Pico word problems" in named and "not here" not in named


def test_words_follow_the_numbers() -> None:
    turned = copy.deepcopy(CASES["01_semantics"][0])
    turned["cosine_over_layers"]["random"]["mean"] = 0.1
    assert "Random bases do worse" in finding("01_semantics", turned)
    assert "which is the critical one" in finding("03_pairing", {**CASES["03_pairing"][0], "critical_layer": 5})
    passed = {"gates": {"placebo": {"passed": True, "value": 0.0}}}
    assert finding("04b_gates", passed) == "1 of 1 gates are passed."
    assert "answer tokens" in finding("05_mmlu", {**COMMON, "primary": "tokens"})
    assert finding("05_mmlu", {**COMMON, "primary": "loss"}) == "" and finding("90_cost", COMMON) == ""
