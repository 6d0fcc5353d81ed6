"""Trials: the file of a run holds what the run did, is made once, and is made again when anything in it changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from semalign import alignment
from semalign.lm.files import read_json, write_json
from semalign.models import load_pair
from semalign.profiles import Profile, ProfileError, load_profile
from semalign.study import kept, tables, trials


def settings(**changes: Any) -> Profile:
    sizes = {"train": 4, "align": 2, "extract": 2, "validation": 3, "test": 3}
    return load_profile("smoke", sizes=sizes, max_new_tokens=4).changed(**changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trials")
    yield folder, trials.run_trial(settings(), "gsm8k", "sft", 0, folder, others=2)


def test_a_trial_answers_its_own_questions_and_some_of_the_others(made: tuple[Path, dict[str, Any]]) -> None:
    folder, found = made
    assert {t: len(a) for t, a in found["answers"].items()} == {"gsm8k": 3, "mmlu": 2, "humaneval": 2, "mbpp": 2}
    kept = {"id", "correct", "prediction", "topic", "known", "too_long"}
    assert all(set(a) - {"response"} == kept for rows in found["answers"].values() for a in rows)
    assert {n: len(v) for n, v in found["validation"].items()} == {"loss": 3, "right": 3, "kl": 3, "agree": 3}
    assert trials.read_trial(folder / "gsm8k" / "sft-0.json") == found


def test_the_judge_is_loaded_once_a_task_and_while_the_student_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host stands for a card: what is looked at is when a student is told to leave it."""
    happened: list[str] = []
    pair, move = load_pair(settings()), PreTrainedModel.to

    def told(model: PreTrainedModel, *place: Any, **given: Any) -> PreTrainedModel:
        happened.append(f"{'teacher' if model.config.hidden_size == 48 else 'student'} to {place[0]}")
        return move(model, *place, **given)

    def load(who: str) -> Any:
        def loaded() -> PreTrainedModel:
            model = getattr(pair, f"load_{who}")()
            happened.append(f"{who} loaded")
            return model

        return loaded

    watched = replace(pair, load_teacher=load("teacher"), load_student=load("student"))
    monkeypatch.setattr(trials, "load_pair", lambda _: watched)
    monkeypatch.setattr(PreTrainedModel, "to", told)
    results = {}
    for method, seed in (("none", 0), ("sft", 0), ("sft", 1), ("teacher", 0)):
        happened.clear()
        trials.run_trial(settings(), "gsm8k", method, seed, tmp_path, split=None)
        results[method, seed] = [h for h in happened if h.endswith(" loaded") or h == "student to cpu"]
    at = results["none", 0].index("teacher loaded")
    assert results["none", 0][at - 1] == results["none", 0][at + 1] == "student to cpu"
    for key in (("sft", 0), ("sft", 1)):
        assert "student loaded" in results[key] and "teacher loaded" not in results[key]
    assert results["teacher", 0].count("teacher loaded") == 1
    shutil.rmtree(tmp_path / "supervision")  # of which nothing is remembered then
    assert "agree" in trials.run_trial(settings(), "gsm8k", "sft", 2, tmp_path, split=None)["validation"]


def test_a_trial_on_facts_is_also_asked_what_nobody_can_know(tmp_path: Path) -> None:
    untouched = trials.run_trial(settings(), "mmlu", "none", 0, tmp_path)
    assert set(untouched["answers"]) == {"mmlu", "placebo"}
    assert [a["known"] for a in untouched["answers"]["placebo"]] == ["none"] * 3
    told = {"answers": {**untouched["answers"], "gsm8k": untouched["answers"]["mmlu"]}}
    assert list(tables.forgotten({"none": [told], "sft": [told]}, "mmlu")) == ["gsm8k"]  # and no placebo


def test_a_trial_is_read_when_it_is_there_and_made_again_when_a_setting_changes(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = made

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr(alignment, "transfer", forbidden)
    assert trials.run_trial(settings(), "gsm8k", "sft", 0, folder, others=2) == found
    assert trials.run_trial(settings(methods=["none"]), "gsm8k", "sft", 0, folder, others=2) == found  # of no account
    for changes in ({"lr": 1e-4}, {"epochs": 2}, {"sizes": {"train": 3}}):
        with pytest.raises(AssertionError, match="it trained"):
            trials.run_trial(settings(**changes), "gsm8k", "sft", 0, folder, others=2)
    with pytest.raises(AssertionError, match="it trained"):
        trials.run_trial(settings(), "gsm8k", "sft", 0, folder, others=2, changes={"lr": 1e-4})


@pytest.mark.parametrize("damage", ["{", "", "\0\1\2", "[]", "changed"])
def test_a_damaged_trial_is_named_and_made_again(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    folder, found = made
    text = (folder / "gsm8k" / "sft-0.json").read_text()
    path = tmp_path / "gsm8k" / "sft-0.json"
    path.parent.mkdir()
    path.write_text(text.replace('"correct": ', '"correct": 9', 1) if damage == "changed" else damage)
    with pytest.warns(UserWarning, match=r"sft-0\.json is damaged .*: the trial is made again"):
        again = trials.run_trial(settings(), "gsm8k", "sft", 0, tmp_path, others=2)
    assert {**again, "cost": 0} == {**found, "cost": 0}
    assert trials.read_trial(path) == again and trials.read_trial(tmp_path / "none.json") is None


def test_what_a_method_has_of_its_own_counts_for_it_alone_and_on_a_task_for_that() -> None:
    given = settings(hyperparameters={"sft": {"lr": 1e-2, "by_task": {"gsm8k": {"lr": 1e-5, "epochs": 3}}}})
    assert trials.hyperparameters(given, "sft", "gsm8k") == {"lr": 1e-5, "epochs": 3}
    assert (
        trials.hyperparameters(given, "sft", "mmlu") == {"lr": 1e-2}
        and trials.hyperparameters(given, "semalign", "mmlu") == {}
    )
    key = trials.trial_key
    assert key(given, ["gsm8k"], "sft", 0) != key(settings(), ["gsm8k"], "sft", 0)
    assert key(given, ["gsm8k"], "semalign", 0) == key(settings(), ["gsm8k"], "semalign", 0)
    everywhere = settings(hyperparameters={"sft": {"lr": 1e-2}})
    assert key(given, ["mmlu"], "sft", 0) == key(everywhere, ["mmlu"], "sft", 0)
    with pytest.raises(ProfileError, match=r"hyperparameters\.sft\.by_task"):
        settings(hyperparameters={"sft": {"by_task": {"gsm": {}}}})


def test_hyperparameters_reach_the_method_and_wrong_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []

    def caught(_pair: Any, _data: Any, config: Any) -> None:
        configs.append(config)
        raise StopIteration

    monkeypatch.setattr(alignment, "transfer", caught)
    kept = settings(hyperparameters={"logit_kd": {"divergence": "jsd", "lora_rank": 2, "lr": 1e-2}})
    with pytest.raises(StopIteration):
        trials.run_trial(kept, "gsm8k", "logit_kd", 0, tmp_path)
    assert (configs[0].output_loss, configs[0].lora_rank, configs[0].lr) == ("jsd", 2, 1e-2)
    wrong = settings(hyperparameters={"sft": {"divergence": "jsd"}})
    with pytest.raises(ValueError, match=r"'supervised LoRA' has no hyperparameter 'divergence'; it has adapters"):
        trials.run_trial(wrong, "gsm8k", "sft", 0, tmp_path)


# ------------------------------------------------------------------------------------------------ what a key covers


def forget() -> None:
    """Nothing of the package's code is remembered."""
    for cached in (trials.code_key, trials._verified, trials._parsed, trials._imports, trials._told):
        cached.cache_clear()


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, from which the keys of this process are made."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    yield shutil.copytree(trials.PACKAGE, tmp_path / "semalign", ignore=ignored)
    forget()


def keys_after(package: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keys of three methods and two tasks by the code of a package, read anew."""
    patch.setattr(trials, "PACKAGE", package)
    forget()
    return {
        f"{m} {t}": trials.trial_key(settings(), [t], m, 0) for m in ("sft", "ted", "laten") for t in ("gsm8k", "mbpp")
    }


def test_a_key_covers_the_import_closure_of_its_method_and_nothing_else(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, before = copied / "methods", keys_after(copied, monkeypatch)

    def changed(path: Path, old: str, new: str) -> set[str]:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        now = keys_after(copied, monkeypatch)
        path.write_text(text)
        return {name for name in now if now[name] != before[name]}

    assert changed(methods / "ted.py", "import gc\n", "import gc  # a comment\n") == set()
    assert changed(methods / "ted.py", 'colour="#441166"', 'colour="#441167"') == set()
    assert changed(methods / "ted.py", "import gc\n", "import gc\nMORE = 1\n") == {"ted gsm8k", "ted mbpp"}
    assert changed(copied / "benchmarks/mbpp.py", "BENCHMARK =", "MORE = 1\nBENCHMARK =") == {
        "sft mbpp", "ted mbpp", "laten mbpp",
    }  # fmt: skip
    assert changed(copied / "training/loop.py", "DIVERGED = 10.0", "DIVERGED = 11.0") == {
        "sft gsm8k", "sft mbpp", "ted gsm8k", "ted mbpp",  # LaTen has a loop of its own
    }  # fmt: skip
    assert changed(copied / "pairing.py", "import random\n", "import random\nMORE = 1\n") == set(before)
    assert changed(copied / "report.py", "import math\n", "import math\nMORE = 1\n") == set()
    (methods / "mine.py").write_text("METHODS = {}\n")  # a new method
    assert keys_after(copied, monkeypatch) == before


def test_code_that_got_the_kept_numbers_has_their_key_and_other_code_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of sft and that of the teacher are said to have changed: one gives the kept numbers, one does not."""
    one = {"tasks": ["gsm8k"]}
    p = settings(**one, methods=["none", "sft"], others=2, search=one, regimes=one)
    for name in ("teacher", "sft"):
        trials.run_trial(p, "gsm8k", name, 0, tmp_path / "kept", others=2)
    path = tmp_path / "kept" / "gsm8k" / "teacher-0.json"
    before = read_json(path)
    before["answers"]["gsm8k"][1]["prediction"] = "another"
    write_json(path, before)
    monkeypatch.setattr(trials, "VERIFIED", tmp_path / "book" / "verified.json")
    forget()
    own, codes = trials.code_key("sft", ("gsm8k",)), kept.codes_of(p)
    older = {m: {tasks: f"older {m}" for tasks in keys} for m, keys in codes.items()}
    then = {**older, "none": codes["none"], "gone": {"gsm8k": "a method of then"}}
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(
            RuntimeError, match=r"^by this code the numbers of teacher differ .* PROFILE=smoke, or take"
        ):
            kept.verify(p, then, tmp_path / "kept", tmp_path / "now", pool)
        forget()
        assert trials.code_key("sft", ("gsm8k",)) == "older sft" != own
        assert trials.code_key("none", ("gsm8k",)) == codes["none"]["gsm8k"]
        assert trials.code_key("teacher", ("gsm8k",)) == codes["teacher"]["gsm8k"]
        assert "2 of the kept trials again: 1 with the same answers" in kept.verified()
        assert (
            kept.verify(p, {"sft": older["sft"]}, tmp_path / "kept", tmp_path / "now", pool) == {}
        )  # what was verified need not be again
        kept.pack_run(p, tmp_path / "now", tmp_path / "book" / "smoke.tar.xz")
        assert "1 of the kept trials again: 1 with the same answers" in kept.verified()  # the other was made again
    monkeypatch.undo()
    forget()


def test_how_many_questions_are_answered_at_once_changes_no_answer_and_no_key(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, pair, sizes = settings(answer_batch_size=2), load_pair(settings()), []
    real = trials.benchmarks.evaluate
    monkeypatch.setattr(
        trials.benchmarks, "evaluate", lambda *a, **k: sizes.append(k["batch_size"]) or real(*a, **k)
    )  # fmt: skip
    student = pair.load_student().eval()
    assert trials.answer(p, pair, student, "gsm8k") == trials.answer(settings(), pair, student, "gsm8k")
    assert sizes == [2, 4] and trials.config_of(p, 0).micro_batch == 4
    assert trials.trial_key(p, ["gsm8k"], "sft", 0) == trials.trial_key(settings(), ["gsm8k"], "sft", 0)


def test_the_teacher_agrees_with_itself(tmp_path: Path) -> None:
    found = trials.run_trial(settings(), "mmlu", trials.TEACHER, 0, tmp_path)
    assert found["validation"]["agree"] == [1.0] * 3
    assert max(found["validation"]["kl"]) < 1e-3  # its distribution is kept in float16
    assert set(found["cost"].values()) - {found["cost"]["peak_memory_bytes"]} == {0.0}


def test_the_answers_are_those_of_the_trained_student(tmp_path: Path) -> None:
    chosen = settings(lr=0.1, batch_size=4)
    trained = trials.run_trial(chosen, "mmlu", "sft", 0, tmp_path)
    plain = trials.run_trial(chosen, "mmlu", "none", 0, tmp_path)
    assert torch.tensor(trained["validation"]["loss"]).mean() < torch.tensor(plain["validation"]["loss"]).mean() - 0.3
    pair = load_pair(chosen)
    again = trials.answer(chosen, pair, pair.load_student().eval(), "mmlu")
    assert again == plain["answers"]["mmlu"]


def test_questions_are_the_same_for_everybody_and_follow_the_split() -> None:
    first, again = (trials.questions(settings(), "gsm8k") for _ in range(2))
    assert first == again and len(first) == 3
    held = {q["question"] for q in trials.questions(settings(), "gsm8k", "validation", limit=300)}
    assert not held & {q["question"] for q in trials.questions(settings(), "gsm8k", limit=500)}


def test_right_stacks_trials_of_the_same_questions(made: tuple[Path, dict[str, Any]]) -> None:
    assert trials.right([made[1], made[1]], "gsm8k").shape == (2, 3)


def test_an_unknown_method_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'magic': the methods are teacher, "):
        trials.run_trial(settings(), "gsm8k", "magic", 0, tmp_path)


def test_a_layer_of_the_profile_is_the_teachers() -> None:
    pair = load_pair(settings())
    for layer, k in ((1, 1), (2, 2), (4, 3)):  # 4 teacher and 3 student layers
        assert trials._config(settings(layer=layer), pair, 0).layers == (k,)


def test_only_what_draws_nothing_runs_under_one_seed() -> None:
    assert list(trials.seeds_of("sft", [3, 5])) == [3, 5]
    assert list(trials.seeds_of("none", [3, 5])) == list(trials.seeds_of(trials.TEACHER, [3, 5])) == [3]


def test_the_test_split_is_watched_on_request_alone(tmp_path: Path) -> None:
    chosen = settings(sizes={"test": 2})
    usual, final = (trials.splits(chosen, "gsm8k", watched) for watched in ("validation", "test"))
    assert (len(usual.validation), len(final.validation)) == (3, 2)
    assert usual.train == final.train
    asked = [q["question"] for q in trials.questions(chosen, "gsm8k", limit=None)]
    whole = trials.splits(chosen.changed(sizes={"test": None}), "gsm8k", "test").validation
    assert all(any(question in example.prompt for example in whole) for question in asked)
    assert not any(example in whole for example in usual.validation)
    paths = [trials.run_trial(chosen, "gsm8k", "none", 0, tmp_path, watched=w) for w in ("validation", "test")]
    assert [len(found["validation"]["loss"]) for found in paths] == [3, 2]


def test_every_metric_is_read_so_that_more_is_better() -> None:
    seen = {"loss": [1.0, 2.0], "right": [0.5, 0.7], "kl": [0.1, 0.2], "agree": [0.0, 1.0]}
    trial = {"answers": {"gsm8k": [{"correct": 1.0}, {"correct": 0.0}]}, "validation": seen}
    assert trials.measured([trial], "gsm8k", "answers").tolist() == [[1.0, 0.0]]
    assert trials.measured([trial], "gsm8k", "tokens").tolist() == [[0.5, 0.7]]
    assert trials.measured([trial, trial], "gsm8k", "loss").tolist() == [[-1.0, -2.0]] * 2
