"""A kept run: what lies in the repository gives the tables of the page that shows it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from semalign.lm.files import write_json
from semalign.pipeline.__main__ import finished_trials
from semalign.pipeline.notebooks import ORDER
from semalign.profiles import load_profile
from semalign.report import BOOK, load_metrics
from semalign.study import analysis, trials
from semalign.study.kept import READ, keep_items, kept_items

METHODS = {"teacher": [0], "none": [0], "sft": [0, 1, 2], "semalign": [0, 1, 2]}
ENDS = ("mean", "low", "high")
Trial = dict[str, Any]


def synthetic(task: str, method: str, seed: int, variant: str = "", questions: int = 31, examples: int = 17) -> Trial:
    rng = random.Random(f"{task} {method} {seed} {variant}")
    asked = {"mmlu": questions, "gsm8k": 5} if questions else {}
    answers = {t: [{"id": f"{i}", "correct": rng.random() < 0.4} for i in range(n)] for t, n in asked.items()}
    validation = {what: [rng.random() * 3 for _ in range(examples)] for what in READ}
    who = {"key": "k", "task": task, "method": method, "variant": variant, "seed": seed, "layers": [1], "cost": {}}
    return {**who, "answers": answers, "validation": validation}


@pytest.fixture
def run() -> list[Trial]:
    whole = [synthetic(t, m, s) for t in ("gsm8k", "mmlu") for m, seeds in METHODS.items() for s in seeds]
    searched = [synthetic("mmlu", "semalign", 0, f"states{i}", questions=0, examples=9) for i in range(3)]
    return [*whole, *searched]


def tables(run: list[Trial]) -> dict[str, dict[str, list[float]]]:
    """Three tables of the page on the full run, over the trials of one task: scores, gains by answers and by loss."""
    of_mmlu = {
        m: [t for t in run if (t["task"], t["method"], t["variant"]) == ("mmlu", m, "")] for m in METHODS
    }  # fmt: skip
    right = {m: trials.right(found, "mmlu") for m, found in of_mmlu.items()}
    loss = {m: trials.measured(found, "mmlu", "loss") for m, found in of_mmlu.items()}
    return {
        "scores": {m: list(analysis.over_seeds_and_items(r)) for m, r in right.items()},
        "gains": {m: list(analysis.over_seeds_and_items(right[m] - right["none"])) for m in ("sft", "semalign")},
        "finer": {m: list(analysis.over_seeds_and_items(loss[m] - loss["none"])) for m in ("sft", "semalign")},
        "closeness": {m: [float(trials.seen(found, "kl").mean())] for m, found in of_mmlu.items()},
    }


def test_the_tables_of_a_run_come_back_from_its_kept_items(run: list[Trial], tmp_path: Path) -> None:
    paths = keep_items(run, tmp_path)
    assert [path.name for path in paths] == ["gsm8k.npz", "mmlu.npz"]
    again = kept_items(tmp_path)
    made, read = tables(run), tables(again)
    for exact in ("scores", "gains"):
        assert made[exact] == read[exact]
    for rounded in ("finer", "closeness"):
        for method, row in made[rounded].items():
            assert read[rounded][method] == pytest.approx(row, rel=2e-3, abs=2e-3)


def test_the_tables_of_the_kept_run_are_made_again_from_its_items() -> None:
    """Scores and gains of every method to the last bit, losses as float16 has them, and the students' differences."""
    items = kept_items(BOOK / "full_run" / "items")
    numbers = {path.stem: load_metrics(path)[0] for path in (BOOK / "full_run").glob("*.json")}
    seeds, decisive = (load_metrics(BOOK / "full_run" / f"{n}.json")[1]["seeds"] for n in ("05_mmlu", "12b_students"))

    def of(task: str, method: str, variant: str, seeds: list[int]) -> list[Trial]:
        found = {t["seed"]: t for t in items if (t["task"], t["method"], t["variant"]) == (task, method, variant)}
        return [found[seed] for seed in trials.seeds_of(method, seeds)]

    again, kept = {}, {}
    for name, task in ((name, chapter.of_task) for name, chapter in ORDER.items() if chapter.of_task):
        start = of(task, "none", "", seeds)
        for method, score in numbers[name]["scores"].items():
            made = of(task, method, "", seeds)
            right = trials.right(made, task)
            again[task, method] = list(analysis.over_seeds_and_items(right))[:3]
            kept[task, method] = [score[n] for n in ENDS]
            if method in numbers[name]["gains"]["none"]:
                gain = numbers[name]["gains"]["none"][method]
                again[task, method, "gain"] = list(analysis.over_seeds_and_items(right - trials.right(start, task)))[:3]
                kept[task, method, "gain"] = [gain[n] for n in ENDS]
                finer = trials.measured(made, task, "loss") - trials.measured(start, task, "loss")
                assert float(finer.mean()) == pytest.approx(numbers[name]["finer"]["none"][method]["mean"], abs=2e-3)
    students = ["", "sibling1", "sibling2"]
    for label, e in numbers["12b_students"]["differences"].items():
        task, other = label.split(" / ")
        ours, theirs = (
            torch.stack([trials.right(of(task, m, v, decisive), task) for v in students])
            for m in ("semalign_tuned", other)
        )
        again[label,] = list(analysis.over_seeds_and_items(ours - theirs))[:3]
        kept[label,] = [e[n] for n in ENDS]
    assert len(again) > 100
    for key, row in again.items():
        assert row == pytest.approx(kept[key], abs=1e-9), key


def test_each_trial_keeps_its_own_questions_and_examples(run: list[Trial], tmp_path: Path) -> None:
    keep_items(run, tmp_path)
    names = ("task", "method", "variant", "seed")
    again = {tuple(t[n] for n in names): t for t in kept_items(tmp_path)}
    assert len(again) == len(run)
    for trial in run:
        read = again[tuple(trial[n] for n in names)]
        told = {t: [{"correct": a["correct"]} for a in rows] for t, rows in trial["answers"].items()}
        assert read["answers"] == told
        for what in READ:
            assert read["validation"][what] == pytest.approx(trial["validation"][what], rel=1e-3, abs=1e-4)


def test_a_run_of_full_size_takes_kilobytes_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    many = [synthetic("mmlu", f"m{i}", seed, questions=300, examples=200) for i in range(15) for seed in range(3)]
    (path,) = keep_items(many, tmp_path)
    assert path.stat().st_size < 100_000
    (again,) = keep_items(many, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_two_trials_of_one_name_and_damaged_files_are_refused(run: list[Trial], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two trials of gsm8k are called"):
        keep_items([*run, run[0]], tmp_path)
    (tmp_path / "mmlu.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"mmlu\.npz is damaged"):
        kept_items(tmp_path)
    assert kept_items(tmp_path / "nowhere") == []


def test_only_the_profiles_own_trials_are_kept(tmp_path: Path) -> None:
    p = load_profile("smoke", seeds=[0, 1])
    for method, seed, variant in (("sft", 0, ""), ("sft", 7, ""), ("ted", 0, ""), ("semalign", 9, "final-x")):
        (tmp_path / "mmlu").mkdir(exist_ok=True)
        trial = synthetic("mmlu", method, seed, variant)
        write_json(tmp_path / "mmlu" / f"{method}{variant}-{seed}.json", trial)
    kept = sorted((t["method"], t["seed"]) for t in finished_trials(p, tmp_path))
    assert kept == [("semalign", 9), ("sft", 0)]
