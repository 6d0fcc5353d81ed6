"""The map of regimes: equal steps for every number of examples, a training for every student, teachers where asked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from semalign.profiles import load_profile
from semalign.study import regimes


@pytest.mark.parametrize("examples", [1, 8, 32, 128, 240, 500, 1000])
def test_every_number_of_examples_has_about_the_same_steps_in_two_epochs_or_more(examples: int) -> None:
    given = regimes.budget(examples, 120)
    steps = given["epochs"] * math.ceil(examples / given["batch"])
    assert given["epochs"] >= 2 and 105 <= steps <= 140


def test_what_asks_no_teacher_has_one_cell_for_all_kinds() -> None:
    p = load_profile("smoke")
    cells = list(regimes.cells(p, "mmlu"))
    assert len(cells) == len(set(cells))
    kinds = {way: {kind for kind, w, _ in cells if w == way} for way in regimes.WAYS}
    assert kinds["labels"] == kinds["labels, layer k"] == {"wide"}
    assert all(
        kinds[w] == {"wide", "kin"} for w in ("logits", "states and labels, layer k", "states first, then labels")
    )
    assert regimes.kinds_of(p.changed(kin_teachers=[])) == ["wide"]


def test_a_cell_trains_every_student_with_its_own_teacher(tmp_path: Path) -> None:
    one = load_profile("smoke", sizes={"test": 12, "validation": 2}, max_new_tokens=2)
    sibling, kin = (one.student.model_copy(update={"seed": seed}) for seed in (4, 6))
    p = one.changed(siblings=[sibling], kin_teachers=[*one.kin_teachers, kin])
    trained = {
        kind: regimes.cell(p, "mmlu", "states and labels, layer k", 4, kind, tmp_path) for kind in ("wide", "kin")
    }
    answered = regimes.right(trained["wide"], "mmlu")
    assert answered.shape == (2, 1, 12)  # students, seeds, questions
    losses = {kind: [one[0]["validation"]["kl"] for one in of] for kind, of in trained.items()}
    assert losses["wide"][0] != losses["wide"][1] and losses["wide"] != losses["kin"]
    at = regimes.known(trained["wide"], "mmlu")
    said = [a["known"] for a in trained["wide"][0][0]["answers"]["mmlu"]]
    assert at["latent"] == [i for i, s in enumerate(said) if s == "both"] and set(at) == {"latent", "absent"}
    start = regimes.right(regimes.untouched(p, "mmlu", tmp_path), "mmlu")
    assert start.shape == answered.shape and torch.isfinite(start).all()
