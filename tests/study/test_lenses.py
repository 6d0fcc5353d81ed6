"""Pairing from outputs: readings against their definition, known partners, swaps against a plain forward pass."""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, tiny_llama, toy_data
from torch import Tensor, nn
from torch.nn import functional as F

from semalign.lm.examples import collate, supervised
from semalign.lm.parts import decoder, decoder_layers, final_norm
from semalign.methods.fdd import lens
from semalign.models import Pair
from semalign.pairing import depth_pairs
from semalign.profiles import load_profile
from semalign.study import lenses, reading, tables

FITTED, HELD = toy_data(40, seed=1), toy_data(6, seed=2)


def pair_of(teacher: nn.Module, student: nn.Module) -> Pair:
    return Pair("tiny", lambda: teacher, lambda: student, None)  # type: ignore[arg-type, return-value]


def test_the_divergence_of_readings_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = tiny_llama(4, 48, vocab=101), tiny_llama(3, 32, seed=1)
    states = [reading.layer_outputs(model, HELD) for model in (teacher, student)]
    read_teacher, read_student = (torch.no_grad()(lens(model)) for model in (teacher, student))
    found = lenses.lens_divergence(*states, read_teacher, read_student, 97)  # type: ignore[call-arg, misc, arg-type]
    for depth, h_t in enumerate(states[0]):
        for k, h_s in enumerate(states[1]):
            p, q = read_teacher(h_t)[:, :97].log_softmax(-1), read_student(h_s).log_softmax(-1)
            expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
            assert found[depth, k].item() == pytest.approx(expected.item(), rel=1e-4)
    monkeypatch.setattr(lenses, "LOGITS", 7 * 97 * 5)  # some positions at once
    again = lenses.lens_divergence(*states, read_teacher, read_student, 97)  # type: ignore[call-arg, misc, arg-type]
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)
    assert found[-1, -1] != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_its_own_teacher_pairs_with_itself(family: str) -> None:
    model = FAMILIES[family]()
    near = lenses.nearness(pair_of(model, model), FITTED, HELD)
    depth = len(decoder_layers(model))
    chosen = lenses.partners(near)
    for name in (*lenses.OUTPUTS, "CKA", "depth rule"):
        assert chosen[name] == list(range(1, depth + 1)), name
    assert near["lens"].diagonal().abs().max() < 1e-5 and near["CKA"].diagonal().abs().max() < 1e-5
    assert set(chosen) == set(lenses.PARTNERS) and near["swap"].shape == (depth, depth)


@pytest.mark.parametrize("depths", [(4, 2), (2, 4)])
def test_partners_keep_the_order_with_the_least_total_whichever_model_is_deeper(depths: tuple[int, int]) -> None:
    near = lenses.nearness(pair_of(tiny_llama(depths[0], 48), tiny_llama(depths[1], seed=1)), FITTED, HELD)
    chosen = lenses.partners(near, seed=3)
    for name in lenses.OUTPUTS:
        assert near[name].shape == depths and near[name].isfinite().all()

        def total(layers: tuple[int, ...], values: Tensor = near[name]) -> float:
            return sum(values[own - 1, k].item() for k, own in enumerate(layers))

        orders = combinations_with_replacement(range(1, depths[0] + 1), depths[1])
        assert total(tuple(chosen[name])) == pytest.approx(min(map(total, orders)))
        assert chosen[name] == sorted(chosen[name])
    assert chosen["depth rule"] == depth_pairs(*depths) and len(chosen["random"]) == depths[1]


def test_a_divergence_over_many_positions_is_that_of_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    head = 0.3 * torch.randn(1024, 64, generator=draw)
    teacher, student = ([torch.randn(900, 64, generator=draw) for _ in range(n)] for n in (3, 2))
    found = lenses.lens_divergence(teacher, student, lambda h: h @ head.T, lambda h: h @ head.T, 1024)
    logp, logq = ([(h.double() @ head.double().T).log_softmax(-1) for h in states] for states in (teacher, student))
    wanted = torch.stack([torch.stack([(a.exp() * (a - b)).sum(-1).mean() for b in logq]) for a in logp])
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_maps_of_one_teacher_layer_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[int] = []
    fit = lenses.ridge_maps
    monkeypatch.setattr(lenses, "ridge_maps", lambda of, to: layers.append(len(of)) or fit(of, to))
    teacher, student = tiny_llama(4, 48), tiny_llama(2, seed=1)
    near = lenses.nearness(pair_of(teacher, student), FITTED, HELD)
    assert layers == [1] * 4
    whole = fit(reading.layer_outputs(teacher, FITTED), reading.layer_outputs(student, FITTED))
    states = reading.layer_outputs(teacher, HELD)
    at = [supervised(e.labels) for e in HELD]
    final = lenses._reader(teacher)(states[-1][torch.cat(at)]).log_softmax(-1)
    assert torch.allclose(near["swap"], lenses.swap_effect(student, HELD, states, whole, final), atol=1e-6)


def test_an_affine_map_between_layers_is_found_and_leaves_no_divergence() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = [torch.randn(300, 12, generator=draw) for _ in range(2)]
    matrix, constant = torch.randn(8, 12, generator=draw), torch.randn(8, generator=draw)
    student = [teacher[0] @ matrix.T + constant, torch.randn(300, 8, generator=draw)]
    maps = lenses.ridge_maps(teacher, student, ridge=1e-7)
    assert maps.shape == (2, 2, 8, 13)
    torch.testing.assert_close(maps[0, 0], torch.cat([matrix, constant[:, None]], 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lenses.apply(maps[0, 0], teacher[0]), student[0], rtol=1e-3, atol=1e-3)
    head = torch.randn(20, 8, generator=draw)
    found = lenses.mapped_divergence(teacher, student, maps, lambda h: h @ head.T)
    assert found[0, 0] < 1e-4 < 0.1 < found[1, 0] and found[:, 1].min() > 0.1
    stronger = lenses.ridge_maps(teacher, student, ridge=1.0)
    assert stronger[0, 0].norm() < maps[0, 0].norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_swap_is_the_layers_above_on_the_mapped_state(family: str) -> None:
    model, teacher = FAMILIES[family](), tiny_llama(2, 24, seed=5)
    states, depth = reading.layer_outputs(teacher, HELD), len(decoder_layers(model))
    maps = lenses.ridge_maps(reading.layer_outputs(teacher, FITTED), reading.layer_outputs(model, FITTED))
    answering = torch.cat([supervised(e.labels) for e in HELD])
    read = lens(model)
    logp = lens(teacher)(states[-1][answering])[:, :97].log_softmax(-1)
    found = lenses.swap_effect(model, HELD, states, maps, logp)
    before = reading.layer_outputs(model, HELD)[-1][answering]

    def divergence(final: Tensor) -> float:
        return F.kl_div(read(final).log_softmax(-1), logp, log_target=True, reduction="batchmean").item()

    for at in range(2):  # in the last layer's place nothing is left but the norm and the head
        last = lenses.apply(maps[at, depth - 1], states[at])[answering]
        assert found[at, -1].item() == pytest.approx(divergence(last) - divergence(before), abs=1e-4)
    own = torch.stack([torch.cat([torch.eye(32), torch.zeros(32, 1)], 1)] * depth)[None].expand(depth, -1, -1, -1)
    still = lenses.swap_effect(model, HELD, reading.layer_outputs(model, HELD), own, logp)
    assert still.diagonal().abs().max() < 1e-5, "a layer's own state in its own place changes nothing"


@torch.no_grad()
def test_a_swap_is_gone_afterwards() -> None:
    model = tiny_llama(3)
    batch = collate(HELD, 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    before = decoder(model)(ids, attention_mask=mask).last_hidden_state
    given = torch.randn(*ids.shape, 32)
    with lenses.swapped(model, 3, given):
        inside = decoder(model)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(inside, final_norm(model)(given))
    assert torch.equal(decoder(model)(ids, attention_mask=mask).last_hidden_state, before)


def test_layers_read_at_other_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4, 5\] states: read both models on the same examples"):
        lenses.ridge_maps([torch.ones(4, 2)], [torch.ones(5, 2)])


def test_students_are_trained_towards_their_partners_and_equal_ones_once(tmp_path: Path) -> None:
    p = load_profile("smoke", sizes={"test": 6, "validation": 3}, max_new_tokens=2)
    tuned, alone = lenses.SETTINGS

    def taught(setting: str, layers: list[int]) -> dict[str, Tensor]:
        found = lenses.taught(p, "mmlu", setting, [layers], tmp_path)
        assert found[0][0]["layers"] == [1, 2, 3]
        return {m: tables.pooled({"mmlu": found}, m) for m in ("answers", "loss") if setting == tuned or m == "loss"}

    one, same, other, none = (taught(tuned, layers) for layers in ([1, 2, 4], [1, 2, 4], [4, 2, 1], []))
    assert one["answers"].shape == (1, 1, 6) and torch.equal(one["loss"], same["loss"])
    assert not torch.equal(one["loss"], other["loss"]) and not torch.equal(one["loss"], none["loss"])
    assert not torch.equal(taught(alone, [1, 2, 4])["loss"], one["loss"])
    assert len(list((tmp_path / "mmlu").glob("*.json"))) == 4
