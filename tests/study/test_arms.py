"""Arms of a comparison: the same students, steps and questions; what is judged are arms that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semalign.methods import REGISTRY
from semalign.methods.registry import own_options
from semalign.profiles import load_profile
from semalign.study import arms, causal, trials, version_two
from semalign.study.regimes import Way
from semalign.training.config import TransferConfig

SMOKE = load_profile("smoke")
COMPARED = {**causal.ARMS, **version_two.arms(SMOKE, 4, 128, 256)}


def test_an_arm_has_the_rate_of_what_it_is_like_and_its_own_settings_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, int, Any, int, int]] = []

    def trial(
        p: Any, task: str, method: str, seed: int, folder: Any, *, changes: Any, variant: str, **how: Any
    ) -> dict[str, Any]:
        seen.append((method, variant, seed, changes, p.sizes.train, p.student.seed))
        if how:
            assert how == {"split": None, "watched": "test"} and p.sizes.test == 4
            return {"validation": {"right": [0.25, 0.75]}}
        return {"answers": {task: [{"correct": method == "sft"}, {"correct": False}]}}

    monkeypatch.setattr(trials, "run_trial", trial)
    p = load_profile("smoke", batch_size=4, hyperparameters={"sft": {"lr": 0.5, "epochs": 9}}, seeds=[3, 4, 5])
    p = p.changed(siblings=[p.student.model_copy(update={"seed": 8})], kin_teachers=[])
    ways = {"one": Way("sft", {}, "sft"), "more": Way("sft", {"epochs": 7}, "sft")}
    right = arms.answered(p, "mmlu", ways, tmp_path, examples=8, steps=4)
    assert {name: tuple(of.shape) for name, of in right.items()} == {
        "untouched": (2, 1, 2), "one": (2, 2, 2), "more": (2, 2, 2)
    }  # fmt: skip
    assert {(seed, size, student) for _, _, seed, _, size, student in seen[2:]} == {
        (seed, 8, student) for seed in (3, 4) for student in (1, 8)
    }
    given = {variant: changes for _, variant, _, changes, _, _ in seen}
    assert given["one-0"] == {"lr": 0.5, "epochs": 2, "batch": 4} and given["more-1"]["epochs"] == 7
    e = arms.overall({"mmlu": right, "gsm8k": right}, {"gain": ("one", "untouched")})["gain"]
    assert e.mean == pytest.approx(0.5) and (e.students, e.seeds) == (2, 2)
    tokens = arms.answered(p, "mmlu", ways, tmp_path, examples=8, steps=4, measure="tokens")
    assert tokens["one"][0, 0].tolist() == [0.25, 0.75]


def test_all_arms_name_methods_settings_and_arms_that_there_are() -> None:
    known = set(TransferConfig.__dataclass_fields__)
    for way in COMPARED.values():
        assert set(way.settings) <= known | own_options(REGISTRY[way.method]) and way.like in ("", *REGISTRY)
    assert {one for both in causal.PAIRS.values() for one in both} <= set(causal.ARMS)
    assert {one for both in version_two.PAIRS.values() for one in both} <= set(version_two.arms(SMOKE, 4, 128, 256))
    alike = [way.like for name, way in causal.ARMS.items() if name != "twin"]
    assert set(alike) == {"sft_layer"}


def test_what_does_not_fit_into_memory_is_left_out_with_what_is_judged_by_it() -> None:
    small, large = version_two.arms(SMOKE, 4, 128, 256), version_two.arms(SMOKE, 32, 4096, 512)
    assert set(small) - set(large) == {version_two.FED}
    assert set(version_two.PAIRS) - set(version_two.pairs(large)) == {"teacher's inputs minus own"}
    steps = [small[name].settings["epochs"] for name in version_two.JOINT]
    assert steps[1] == 4 * steps[0]
