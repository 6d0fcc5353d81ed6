"""Gates: passed where the instrument moves as it must, failed where not, and never silently absent."""

from __future__ import annotations

import json

import pytest
import torch

from semalign.study import gates
from semalign.study.analysis import Estimate


def gain(mean: float, half: float = 0.03) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 0.001, half / 2, 100.0, 3)


def test_the_positive_control_moves_all_tasks_but_one() -> None:
    moved = {"a": gain(0.3), "b": gain(0.2), "c": gain(0.16), "d": gain(0.0)}
    passed = gates.positive_control(moved)
    assert passed.passed and passed.value == 0.16 and "on 3 of 4 tasks" in passed.sentence
    assert not gates.positive_control({**moved, "c": gain(0.14)}).passed
    unsure = gates.positive_control({**moved, "c": gain(0.16, half=0.07)})
    assert not unsure.passed and unsure.value == 0.16 and unsure.sentence.startswith("FAILED")
    assert gates.positive_control({"a": gain(0.3), "b": gain(0.0)}).passed
    assert gates.positive_control({"a": gain(0.3)}).passed and not gates.positive_control({"a": gain(0.1)}).passed
    assert not gates.positive_control({}).passed


def test_the_placebo_stays_where_it_is() -> None:
    still = torch.tensor([[0.0, 1.0, -1.0, 0.0] * 25])
    assert gates.placebo(still).passed and gates.placebo(still).value == 0.0
    assert not gates.placebo(still + 0.06).passed and not gates.placebo(still - 0.06).passed
    for nothing in (None, still[:, :0]):
        gate = gates.placebo(nothing)
        assert (gate.passed, gate.value) == (False, None) and "not measured" in gate.sentence


def test_the_planted_kins_share_is_a_ratio_with_an_interval() -> None:
    torch.manual_seed(0)
    before = torch.rand(400).double() + 0.5
    after = 0.3 * before + 0.02 * torch.randn(1, 400).double()
    gate = gates.planted_kin(before, after)
    assert gate.passed and gate.value == pytest.approx(1 - float(after.mean() / before.mean()))
    again = [after[:, rows].mean() / before[rows].mean() for rows in torch.randint(400, (2000, 400))]
    spread = float(torch.stack(again).std())
    assert gate.low is not None and gate.high is not None
    assert gate.high - gate.low == pytest.approx(2 * 1.96 * spread, rel=0.25)
    assert not gates.planted_kin(before, (0.6 * before)[None]).passed
    assert "not measured" in gates.planted_kin(torch.zeros(9), torch.zeros(1, 9)).sentence


def test_gates_come_back_from_a_runs_metrics_and_absent_ones_are_not_passed() -> None:
    one = gates.placebo(torch.zeros(1, 9))
    kept = json.loads(json.dumps({"04b_gates": {"gates": gates.told({one.name: one})}}))
    read = gates.of_run(kept)
    assert list(read) == list(gates.NAMES) and read["placebo"] == one
    assert not read["planted kin"].passed and "made without the gate" in read["planted kin"].sentence
    assert not any(gate.passed for gate in gates.of_run({}).values())
