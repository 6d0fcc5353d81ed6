"""Tuning: equal seeded draws, each method its own ingredients, a range that widens, and no question asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semalign.methods import REGISTRY
from semalign.profiles import load_profile
from semalign.study import trials, tuning


def test_draws_lie_in_their_ranges_and_more_of_them_begin_with_the_same() -> None:
    for method in tuning.tuned_methods(list(REGISTRY)):
        many = tuning.draws(method, 24, depth=4)
        assert tuning.draws(method, 5, depth=4) == many[:5] and len(many) == 24
        assert all(1e-5 <= one["lr"] <= 1e-2 for one in many)
        assert min(one["lr"] for one in many) < 1e-4 and max(one["lr"] for one in many) > 1e-3
        assert {one["epochs"] for one in many} == {e for e in tuning.EPOCHS if e >= REGISTRY[method].least_epochs}
    assert all(set(one) == {"lr", "epochs"} for one in tuning.draws("sft", 3, 4))
    assert {one["layers"][0] for one in tuning.draws("sft_layer", 24, 4)} == {1, 2, 3, 4}
    assert {one["layer_weight"] for one in tuning.draws("semalign_tuned", 24, 4)} == set(tuning.WEIGHTS)


def test_what_is_printed_is_not_tuned_and_a_control_follows_what_it_controls() -> None:
    tuned = tuning.tuned_methods(list(REGISTRY))
    assert {"sft", "sft_layer", "semalign_tuned", "seeking"} <= set(tuned)
    assert not {"none", "semalign", "twin", "scrambled_tokens", "random_target", "laten"} & set(tuned)
    assert {REGISTRY[m].follows for m in ("twin", "scrambled_tokens", "random_target")} == {"semalign_tuned"}


def test_the_best_draw_is_chosen_without_a_question_and_a_broken_one_never(tmp_path: Path) -> None:
    p = load_profile("smoke", sizes={"train": 4, "validation": 3})
    found = tuning.tune(p, "sft_layer", tmp_path, n=3)
    files = [json.loads(path.read_text()) for path in tmp_path.glob("gsm8k/*.json")]
    assert all(one["answers"] == {} for one in files)
    asked = [{k: v for k, v in one.items() if k != "score"} for one in found["draws"]]
    assert all(one in asked for one in tuning.draws("sft_layer", 3, 3))
    best = max(float(trials.seen([one], "right").mean()) for one in files)
    assert found["draws"][0]["score"] == pytest.approx(best)
    broken = [{"lr": 1e-3, "score": None}, {"lr": 1e-4, "score": 0.1}]
    assert tuning._best("sft", broken)["lr"] == 1e-4
    with pytest.raises(ValueError, match="broke off in every one of 1 draws"):
        tuning._best("sft", broken[:1])


def test_a_choice_at_the_end_of_the_range_widens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def score(_p: Any, _method: str, one: dict[str, Any], _folder: Any) -> float:
        tried.append(one["lr"])
        return float(one["lr"])  # the higher the better

    monkeypatch.setattr(tuning, "_score", score)
    found = tuning.tune(load_profile("smoke"), "sft", tmp_path, n=24)
    assert found["rates"][1] > 1e-2 and found["chosen"]["lr"] == max(tried) > 1e-2
    assert 24 < len(tried) <= 24 + tuning.WIDENINGS * tuning.FURTHER
