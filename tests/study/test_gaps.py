"""Larger gaps: who teaches whom, gains as shares of a ceiling, and the slope of a line through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semalign.profiles import load_profile
from semalign.study import gaps, tables
from semalign.study.analysis import over_seeds_and_items


def drawn(mean: float, seed: int, n: int = 400) -> torch.Tensor:
    return (torch.rand(1, 1, n, generator=torch.Generator().manual_seed(seed)) < mean).double()


def test_a_share_is_the_ratio_of_the_mean_gains_with_the_jackknifes_error() -> None:
    before, ceiling, values = drawn(0.2, 0), drawn(0.7, 1), drawn(0.5, 2)
    share = gaps.shares(values, before, ceiling)
    assert share is not None and share.shape == values.shape
    ratio = (values - before).mean() / (ceiling - before).mean()
    found = over_seeds_and_items(share)
    assert found.mean == pytest.approx(float(ratio))
    n = values.shape[-1]
    without = torch.stack(
        [
            torch.cat([(v - before)[0, 0, :i], (v - before)[0, 0, i + 1 :]]).mean()
            for i in range(n)
            for v in (values, ceiling)
        ]
    ).unflatten(0, (n, 2))
    jackknife = (without[:, 0] / without[:, 1]).var(correction=0).mul(n - 1).sqrt()
    assert found.error == pytest.approx(float(jackknife), rel=0.02)
    of_itself = gaps.shares(ceiling, before, ceiling)
    assert of_itself is not None and of_itself.mean() == pytest.approx(1) and of_itself.std() < 1e-12


def test_there_is_no_share_of_a_ceiling_that_does_not_move() -> None:
    before = drawn(0.5, 0)
    assert gaps.shares(drawn(0.9, 1), before, drawn(0.5, 2)) is None
    assert gaps.shares(drawn(0.9, 1), before, before) is None


def test_the_slope_of_a_line_is_found_with_an_interval_over_questions() -> None:
    distances = {"near": 0.0, "middle": 0.2, "far": 0.6, "unknown": 0.9}
    noise = torch.randn(4, 2, 1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean(-1, keepdim=True)
    lines: dict[str, torch.Tensor | None] = {
        n: 1 - 0.5 * x + e for (n, x), e in zip(distances.items(), noise, strict=True)
    }
    lines["unknown"] = None
    found = gaps.slope(lines, distances)
    assert found is not None and found.mean == pytest.approx(-0.5) and found.low < -0.5 < found.high
    assert gaps.slope(lines, dict.fromkeys(distances, 0.2)) is None
    assert gaps.slope({"near": lines["near"]}, distances) is None and gaps.slope({}, distances) is None


def test_the_ladder_is_what_a_profile_names() -> None:
    here = {rung.name: rung for rung in gaps.rungs(load_profile("classroom"))}
    assert list(here) == [
        "kin → student", "teacher → student", "code-a → student", "code-b → student", "teacher → smaller",
        "teacher → smaller, saturated",
    ]  # fmt: skip
    assert gaps.called(here["teacher → smaller, saturated"].students[0]) == "pico-xs-chat"
    full = gaps.rungs(load_profile("classroom-full"))
    assert [len(r.students) for r in full] == [3, 3, 3, 3, 1, 1] and all(
        len(r.teachers) == len(r.students) for r in full
    )
    assert len(gaps.rungs(load_profile("llama2"))) == 3  # no kin, no smaller student
    assert gaps.called(load_profile("llama2").teacher) == "meta-llama--Llama-2-13b-chat-hf"


def test_whole_layers_are_a_ceiling_where_a_profile_has_room_for_them() -> None:
    assert gaps.ceilings(load_profile("classroom")) == ["labels", gaps.WHOLE]
    assert gaps.ceilings(load_profile("llama2")) == ["labels"]


def test_what_asks_no_teacher_is_one_training_on_every_rung(tmp_path: Path) -> None:
    p = load_profile("smoke", sizes={"test": 6, "validation": 3}, max_new_tokens=2)
    rungs = {rung.name: rung for rung in gaps.rungs(p)}
    kin, wide = rungs["kin → student"], rungs["teacher → student"]
    made = {
        (r.name, way): gaps.trained(p, "mmlu", r, way, tmp_path)
        for r in (kin, wide)
        for way in ("none", "teacher", "labels", "states", gaps.WHOLE)
    }
    losses = {key: tables.pooled({"mmlu": found}, "loss") for key, found in made.items()}
    for way in ("none", "labels", gaps.WHOLE):
        assert torch.equal(losses[kin.name, way], losses[wide.name, way])
    for way in ("teacher", "states"):
        assert not torch.equal(losses[kin.name, way], losses[wide.name, way])
    assert len(list((tmp_path / "mmlu").glob("*.json"))) == 3 + 2 * 2
    apart = gaps.gap(p, wide, {"untouched": losses[wide.name, "none"], "teacher": losses[wide.name, "teacher"]})
    assert apart["width"] == pytest.approx(1 / 3) and apart["depth"] == pytest.approx(1 / 4)
    near = gaps.gap(p, kin, {"untouched": losses[kin.name, "none"], "teacher": losses[kin.name, "none"]})
    assert near == {"width": 0.0, "depth": 0.0, "loss": 0.0}
