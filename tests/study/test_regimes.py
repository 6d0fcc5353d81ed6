"""The map of regimes: equal steps for every number of examples, a training for every student, teachers where asked."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from semalign.profiles import ProfileError, load_profile
from semalign.study import regimes
from semalign.study.analysis import Estimate


@pytest.mark.parametrize("examples", [1, 8, 32, 128, 240, 500, 1000])
def test_every_number_of_examples_has_about_the_same_steps_in_two_epochs_or_more(examples: int) -> None:
    p = load_profile("smoke", batch_size=4)
    given = regimes.budget(p, examples, 120)
    steps = given["epochs"] * math.ceil(examples / given["batch"])
    assert given["epochs"] >= 2 and 105 <= steps <= 140
    assert regimes.budget(p.changed(batch_size=64), examples, 120) == given
    if examples <= 128:
        assert given["batch"] == 4 and regimes.budget(p.changed(batch_size=2), examples, 120)["batch"] == 2


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


def test_each_task_of_the_map_has_its_own_numbers_of_examples() -> None:
    p = load_profile("smoke", regimes={"examples": [8, 4], "tasks": ["mmlu"], "again": {"gsm8k": [16]}})
    assert p.regimes.counts == {"mmlu": [4, 8], "gsm8k": [16]}
    assert [{n for _, _, n in regimes.cells(p, task)} for task in p.regimes.counts] == [{4, 8}, {16}]
    with pytest.raises(ProfileError, match=r"regimes\.again: 'gsm' is not one of"):
        load_profile("smoke", regimes={"again": {"gsm": [16]}})
    assert p.changed(regimes={"again": {"gsm8k": []}}).regimes.counts == {"mmlu": [4, 8]}


def test_the_map_draws_every_way_at_its_gain_in_points_and_tells_ways_apart_without_colour() -> None:
    def e(mean: float) -> Estimate:
        return Estimate(mean, mean - 0.01, mean + 0.02, 0.5, 0.01, 9.0, 1, 3)

    gains = {("mmlu", "latent", "kin", way, n): e(0.01 * n) for way in regimes.WAYS for n in (4, 8)}
    gains |= {("gsm8k", "latent", "kin", way, 16): e(-0.1) for way in regimes.WAYS}
    figure = regimes.draw_map(gains, {"mmlu": "Pico facts", "gsm8k": "Pico word problems"})
    above, below = figure.axes
    assert above.get_title() == "Pico facts, latent: kin teacher" and below.get_title().startswith("Pico word problems")
    assert [t.get_text() for t in above.get_xticklabels()] == ["4", "8"]
    lines = [c.lines[0] for c in above.containers]
    assert [c.get_label() for c in above.containers] == list(regimes.WAYS)
    assert all(line.get_ydata() == pytest.approx([4.0, 8.0]) for line in lines)
    assert len({line.get_marker() for line in lines}) == len(lines)
    assert {line.get_linestyle() for line, way in zip(lines, regimes.WAYS, strict=True) if "states" in way} == {"-"}
    ends = above.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert ends == pytest.approx([3.0, 6.0])
    plt.close(figure)
