"""The search: equal, seeded, different draws that can all be trained, and a control that drops the states alone."""

from __future__ import annotations

import dataclasses

import pytest

from semalign.alignment import transfer
from semalign.models import load_pair
from semalign.profiles import load_profile
from semalign.study import search
from semalign.study.trials import questions, splits
from semalign.training.config import TransferConfig


@pytest.mark.parametrize("family", search.SPACES)
def test_draws_are_different_seeded_and_grow_at_the_end(family: str) -> None:
    found = search.draws(family, 20)
    assert len(found) == 20 and all(found.count(one) == 1 for one in found)
    assert search.draws(family, 7) == found[:7]
    assert search.draws(family, 20, seed=1) != found
    for one in found:
        assert dataclasses.replace(TransferConfig(), **search.config(one))


def test_the_size_of_a_family_is_the_number_of_its_possible_configurations() -> None:
    assert {family: search.size(family) for family in search.SPACES} == {"labels": 40, "logits": 96, "states": 39_744}
    assert len(search.draws("labels", 40)) == 40
    with pytest.raises(ValueError, match="fewer than 41"):
        search.draws("labels", 41)


def test_only_the_third_family_reads_states() -> None:
    weights = {f: {search.config(one)["layer_weight"] for one in search.draws(f, 20)} for f in search.SPACES}
    assert weights["labels"] == weights["logits"] == {0.0}
    assert min(weights["states"]) >= 0.1  # less would be called states and be none
    assert {search.config(one)["output_loss"] for one in search.draws("labels", 20)} == {"ce"}
    assert "ce" not in {search.config(one)["output_loss"] for one in search.draws("logits", 20)}


def test_without_states_changes_the_layer_term_alone() -> None:
    for one in search.draws("states", 5):
        changes = search.config(one)
        left = search.without_states(changes)
        assert {k for k in changes if changes[k] != left[k]} == {"layer_weight"} and left["layer_weight"] == 0.0


def test_what_does_not_go_together_is_not_drawn() -> None:
    found = [search.config(one) for one in search.draws("states", 200)]
    assert not any(c.get("projection") and c["layer_loss"] == "fisher" for c in found)
    labels = [search.config(one) for one in search.draws("labels", 30)]
    assert not any(c.get("adapters") and c.get("trained") == "layer" for c in labels)


def test_where_one_card_is_too_small_no_draw_trains_all_layers_whole() -> None:
    def whole(of: list[dict[str, search.Changes]]) -> list[bool]:
        settings = [search.config(one) for one in of]
        return [c["layers"] == "all" and c.get("trained") == "layer" for c in settings]

    assert any(whole(search.draws("states", 40)))
    assert not any(whole(search.draws("states", 40, whole_layers=False)))
    # one in three trains whole layers, and in two of three settings of the layers all of them
    assert search.size("states", whole_layers=False) == search.size("states") * 7 // 9
    assert search.size("labels", whole_layers=False) == 36 and search.size("logits", whole_layers=False) == 80


def test_more_than_there_are_and_unknown_families_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 1000 configurations"):
        search.draws("labels", 1000)
    with pytest.raises(ValueError, match="unknown family 'magic': the families are labels, logits, states"):
        search.draws("magic", 1)


def test_every_setting_of_the_states_trains() -> None:
    """Each ingredient's settings in turn, the others at their first: none is refused by the trainer."""
    p = load_profile("smoke", sizes={"train": 4, "align": 2, "extract": 2, "validation": 1, "test": 1})
    pair, data = load_pair(p), splits(p, "mmlu")
    base = TransferConfig(epochs=1, batch=4, micro_batch=4, max_length=320)
    space = search.SPACES["states"]
    first = {ingredient: choices[0] for ingredient, choices in space.items()}
    for ingredient in set(space) - {"rate", "states"}:
        for choice in space[ingredient][1:]:
            one = {**first, ingredient: choice}
            assert search.possible(one)
            assert transfer(pair, data, dataclasses.replace(base, **search.config(one))).trained


@pytest.mark.parametrize("task", ["gsm8k", "mmlu", "humaneval", "mbpp"])
def test_tokens_and_answers_are_of_the_same_questions(task: str) -> None:
    """The reference answers that a chosen configuration is read on belong to the questions that it is asked."""
    p = load_profile("smoke", sizes={"test": 60})
    asked, read = questions(p, task), splits(p, task, "test").validation
    assert len(asked) == len(read) == 60
    for row, example in zip(asked, read, strict=True):
        said = row.get("question") or row.get("text") or row["prompt"]
        assert said.strip() in example.prompt
