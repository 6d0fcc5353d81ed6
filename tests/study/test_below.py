"""Below the layer: equal budgets by their numbers, parts that add up, a pairing with a known answer, chosen weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contributions import turned
from tiny import FAMILIES, Letters, tiny_llama, toy_data
from torch import Tensor

from semalign.contributions import contributions
from semalign.methods import REGISTRY
from semalign.models import Pair
from semalign.profiles import load_profile
from semalign.study import below, trials


def pair(load_teacher: Any, load_student: Any = tiny_llama) -> Pair:
    return Pair("tiny", load_teacher, load_student, Letters())  # type: ignore[arg-type]


def test_ways_differ_in_where_the_teacher_is_read_alone() -> None:
    states = [way for name, way in below.WAYS.items() if name != "labels"]
    assert all(way.settings["map"] == "logit" and way.settings["output_loss"] == "ce" for way in states)
    assert {way.like or way.method for way in below.WAYS.values()} == {"sft_layer"}
    assert all(REGISTRY[way.method].trains == "LoRA on layer k" for way in below.WAYS.values())


def test_every_way_has_as_many_supervised_numbers_where_heads_divide_the_width() -> None:
    numbers = {way: below.supervised_numbers(tiny_llama().config, way) for way in below.WAYS}
    assert numbers.pop("labels") == 0 and set(numbers.values()) == {32}


def test_a_model_whose_parts_do_not_add_up_keeps_the_ways_that_need_none() -> None:
    ways, why = below.ways_of(pair(FAMILIES["olmo2"]))
    assert list(ways) == ["labels", "layer", "attention", "MLP"] and "does not end in one o_proj" in why
    assert below.ways_of(pair(tiny_llama)) == (below.WAYS, "")


def test_nothing_remains_of_a_sublayer_without_its_parts() -> None:
    for model in (tiny_llama(num_key_value_heads=2), tiny_llama(attention_bias=True), FAMILIES["qwen3"]()):
        left = below.remainders(model, toy_data(1)[0])
        assert set(left) == {"attention", "mlp"} and max(left.values()) < 1e-5


def test_contributions_of_all_neurons_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def seen(*given: Tensor) -> Tensor:
        made.append(contributions(*given))
        return made[-1]

    monkeypatch.setattr(below, "contributions", seen)
    model, example = tiny_llama(2, intermediate_size=200), toy_data(1)[0]
    assert max(below.remainders(model, example).values()) < 1e-5
    assert sum(parts.shape[1] for parts in made) == 2 * (200 + model.config.num_attention_heads)
    assert max(parts.shape[1] for parts in made) == below.AT_ONCE


def test_heads_of_a_turned_copy_are_paired_with_themselves() -> None:
    found = below.pairings(pair(lambda: turned(tiny_llama(), [2, 0, 3, 1], [2, 0, 3, 1])), toy_data(6), (2, 2))
    assert found["heads"].partners == [2, 4, 1, 3]
    assert found["heads"].of_partners == pytest.approx(1, abs=1e-4) and found["heads"].of_all < 0.9
    assert found["neurons"].partners == [1, 2, 3, 4]


def test_the_trained_pair_is_that_of_labels_in_one_layer(tmp_path: Path) -> None:
    p = load_profile("smoke")
    data = replace(trials.splits(p, p.tasks[0]), name=p.tasks[0])
    tuned = p.changed(hyperparameters={"sft_layer": {"layers": [2]}})
    of = pair(lambda: tiny_llama(4), lambda: tiny_llama(3))
    assert below.layer_pair(tuned, of, data) == (2, 2)
    assert below.layer_pair(p.changed(layer=4), of, data) == (4, 3)


def test_weights_are_chosen_on_validation_examples_with_as_many_draws_for_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def trial(_p: Any, _task: str, way: str, *_: Any, layer: int, weight: float, watched: str) -> Any:
        assert layer == 2
        asked.append((way, weight, watched))
        return {"validation": {"right": [weight if way == "heads" else -weight] * 2}}

    monkeypatch.setattr(below, "trial", trial)
    p = load_profile("smoke", search={"draws": 12})
    chosen = below.weights(p, p.tasks[0], below.WAYS, tmp_path, 2)
    assert chosen == {"layer": 0.1, "attention": 0.1, "MLP": 0.1, "heads": 1.0, "neurons": 0.1, "other heads": 1.0}
    assert len(asked) == 5 * 3 and {watched for _, _, watched in asked} == {"validation"}
    asked.clear()
    assert (
        set(below.weights(load_profile("smoke"), p.tasks[0], below.WAYS, tmp_path, 2).values()) == {1.0} and not asked
    )


def test_there_are_three_trainings_where_the_search_has_as_many_draws() -> None:
    assert below.seeds_of(load_profile("smoke", seeds=[5])) == [5]
    assert below.seeds_of(load_profile("smoke", seeds=[5], search={"draws": 8})) == [5, 6, 7]


def test_a_way_is_one_training_a_student_and_seed(tmp_path: Path) -> None:
    one = load_profile("smoke", search={"tasks": ["mmlu"]}, sizes={"train": 4, "test": 4})
    p = one.changed(siblings=[one.student.model_copy(update={"seed": 4})], kin_teachers=[])
    values, cost = below.tokens(p, "mmlu", "heads", 1.0, tmp_path, 2)
    start = below.untouched(p, "mmlu", tmp_path)
    assert values.shape == (2, 1, 4) and start.shape == (2, 1, 4) and torch.isfinite(values).all()
    labels = below.trial(p, "mmlu", "labels", 0, tmp_path, layer=2)["cost"]
    assert cost["trainable_parameters"] == labels["trainable_parameters"] > 0
