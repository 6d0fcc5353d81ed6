"""A few families of the zoo, and the table that the book shows of all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zoo

KEPT: dict[str, Any] = json.loads(zoo.JSON.read_text(encoding="utf-8"))
YES, NO = zoo.WORKS, zoo.REFUSED
SAMPLE = {  # attribution, sublayers, maps, transfer, LaTen
    "llama": [YES, YES, YES, YES, YES],
    "gpt2": [YES, YES, YES, YES, NO],
    "falcon": [YES, NO, YES, YES, NO],
    "gpt_neo": [YES, YES, YES, YES, NO],
    "olmo": [YES, YES, YES, YES, NO],
    "mamba": [YES, NO, YES, YES, NO],
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_works_or_is_refused_as_the_table_says(name: str) -> None:
    row = zoo.try_family(name)
    assert [row[step]["word"] for step in zoo.STEPS] == SAMPLE[name], row
    assert [KEPT["families"][name][step]["word"] for step in zoo.STEPS] == SAMPLE[name]
    assert [row[step].get("note", "") for step in zoo.STEPS] == [
        KEPT["families"][name][step].get("note", "") for step in zoo.STEPS
    ]


def test_no_family_ends_in_anything_but_a_sentence() -> None:
    built = {name: row for name, row in KEPT["families"].items() if row["built"]}
    assert len(built) > 80
    for name, row in built.items():
        for step in zoo.STEPS:
            assert row[step]["word"] in (YES, NO), (name, step, row[step])
            if row[step]["word"] == NO:
                said = row[step]["said"]
                assert "\n" not in said and any(mark in said for mark in (": ", "; ", ", so ")), (name, step, said)


def test_every_family_that_ships_is_in_the_table_or_left_out() -> None:
    kept, left = zoo.families()
    assert KEPT["transformers"] == zoo.transformers.__version__, "make zoo"
    assert (list(KEPT["families"]), KEPT["left_out"]) == (kept, left)


def test_the_page_shows_the_kept_table() -> None:
    page = zoo.PAGE.read_text(encoding="utf-8")
    assert zoo.with_table(page, KEPT["families"]) == page, "make zoo"


def test_what_is_not_a_refusal_is_obscure(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(error: Exception) -> Any:
        def step(_name: str, _at: str) -> str:
            raise error

        monkeypatch.setitem(zoo.RUNS, "maps", step)
        return zoo.one_step("maps", "llama", "mlp")["word"]

    assert of(ValueError("raised by a test and not by the package")) == zoo.OBSCURE
    assert of(KeyError("x")) == zoo.OBSCURE
    monkeypatch.setitem(zoo.RUNS, "maps", lambda _n, _a: zoo.decoder_layers(zoo.torch.nn.Linear(1, 1)) and "")
    assert zoo.one_step("maps", "llama", "mlp")["word"] == zoo.OBSCURE  # no model at all: an AttributeError
