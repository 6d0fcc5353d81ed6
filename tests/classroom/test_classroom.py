"""The classroom: subjects in their benchmarks' formats, splits that share nothing, training that survives a kill."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from semalign import classroom
from semalign.classroom import corpora, facts, family, problems, training


@pytest.fixture(scope="module")
def tokenizer() -> training.PreTrainedTokenizerFast:
    return training.train_tokenizer(600, 512)


@pytest.mark.parametrize("subject", classroom.SUBJECTS)
def test_splits_have_their_sizes_and_share_no_item(subject: str) -> None:
    owners: dict[str, str] = {}
    for split, size in (corpora.MBPP_SIZES if subject == "mbpp" else corpora.SIZES).items():
        found = classroom.items(subject, split)
        assert len(found) == size
        for item in found:
            assert owners.setdefault(item.signature, split) == split


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no split 'dev' of 'mmlu'"):
        classroom.items("mmlu", "dev")


def test_pretraining_asks_no_test_question_and_reads_no_test_problem_or_program() -> None:
    read = [p + r for p, r in itertools.islice(corpora.documents(corpora.Mixture(corpora.PRETRAINING), 5), 1500)]
    asked = {line for text in read for line in text.split("\n") if line.endswith("?")}
    questions = {i.record["question"] for i in classroom.items("mmlu", "test")}
    assert len(asked) > 100 and not asked & questions
    stories = {i.response for i in classroom.items("gsm8k", "test")}
    solutions = {
        line for i in classroom.items("humaneval", "test") for line in i.response.split("\n") if "return" in line
    }
    lines = {line for text in read for line in text.split("\n")}
    assert not lines & stories and not lines & solutions


def test_pretraining_states_what_the_record_says_and_nothing_else() -> None:
    mixture = corpora.Mixture({"statements": 1.0}, reader="student")
    read = {line for _, text in itertools.islice(corpora.documents(mixture, 3), 1500) for line in text.split("\n")}
    stated = {known: 0 for known in ("both", "teacher", "none")}
    for fact in facts.facts():
        texts = {form.format(k=fact.key, v=fact.value) for form in facts.WORDINGS[fact.relation][0]}
        stated[fact.known] += bool(texts & read)
    assert stated["both"] > 600 and stated["teacher"] == stated["none"] == 0


def test_the_right_choice_is_the_fact_and_appears_once() -> None:
    truth = {(f.relation, f.key): f.value for f in facts.facts()}
    for item in classroom.items("mmlu", "test"):
        relation, key = item.signature.split("|", 1)
        right = item.record["choices"][item.record["answer"]]
        assert right == truth[relation, key] and len(set(item.record["choices"])) == 4
        assert item.response == f"The answer is: {'ABCD'[item.record['answer']]}"
    assert len({i.topic for i in classroom.items("mmlu", "test")}) >= 6


def test_worked_solutions_compute_what_they_say() -> None:
    for item in classroom.items("gsm8k", "test"):
        steps = re.findall(r"<<(.+?)=(\d+)>>", item.record["answer"])
        assert all(eval(expression) == int(result) for expression, result in steps)
        assert item.record["answer"].endswith(f"#### {steps[-1][1]}") and item.response.endswith(f" {steps[-1][1]}.")
        assert 1 <= len(steps) <= 5


def test_reference_programs_pass_their_tests_and_a_wrong_one_does_not() -> None:
    for item in classroom.items("humaneval", "test"):
        checks = f"{item.record['test']}\ncheck({item.record['entry_point']})"
        exec(item.record["prompt"] + item.record["canonical_solution"] + checks, {})
    with pytest.raises(AssertionError):
        exec(f"{item.record['prompt']}    return 'wrong'\n{checks}", {})
    for item in classroom.items("mbpp", "test"):
        assert len(item.record["test_list"]) == 3
        exec(item.record["code"] + "\n" + "\n".join(item.record["test_list"]), {})


def test_generators_depend_on_their_seed_alone() -> None:
    assert problems.word_problem(random.Random(1)) == problems.word_problem(random.Random(1))
    assert problems.program(random.Random(1), "xs") == problems.program(random.Random(1), "xs")
    assert problems.word_problem(random.Random(1)) != problems.word_problem(random.Random(2))


def test_task_data_wraps_the_user_turn(tokenizer: training.PreTrainedTokenizerFast) -> None:
    data = classroom.task_data("mbpp")
    assert [len(s) for s in (data.train, data.align, data.extract)] == [300, 40, 32]
    item = classroom.items("mbpp", "train")[0]
    turns = [{"role": "user", "content": item.user}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.bos_token + data.train[0].prompt
    assert data.train[0].response == item.response


def test_files_are_in_the_benchmarks_formats(tmp_path: Path) -> None:
    classroom.write_data(tmp_path)
    rows = []
    for path in sorted((tmp_path / "mmlu" / "test").glob("*.csv")):
        with open(path, newline="") as file:
            rows += list(csv.DictReader(file))
    assert len(rows) == 500 and list(rows[0]) == ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    lines = (tmp_path / "gsm8k" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 1000 and set(json.loads(lines[0])) == {"question", "answer"}
    assert not list(tmp_path.rglob(".*"))


def test_digits_and_line_breaks_are_tokens_of_their_own(tokenizer: training.PreTrainedTokenizerFast) -> None:
    text = "def f(xs):\n\n    return 2047 * 13\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert [tokenizer.decode([i]) for i in ids][-8:] == [" 2", "0", "4", "7", " *", " 1", "3", "\n"]
    cut = text.index("    return")
    parts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text[:cut], text[cut:])]
    assert ids[1:] == parts[0] + parts[1]


def test_windows_hold_whole_documents() -> None:
    lengths = [100, 120, 200, 30, 56, 90]
    windows = training.pack(iter([[n] * n for n in lengths]), 3, 0)
    assert windows.shape == (3, training.WINDOW)
    for row in windows:
        values, counts = row[row != 0].unique(return_counts=True)
        assert torch.equal(values.long(), counts)
    assert int((windows != 0).sum()) == sum(lengths)
    with pytest.raises(ValueError, match="do not fill 2 windows"):
        training.pack(iter([[1, 2]]), 2, 0)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, tokenizer: training.PreTrainedTokenizerFast) -> None:
    recipe = training.Recipe("tiny", 1, 16, 2, 32, 6 * training.BATCH * training.WINDOW)
    whole, halves = training.build(recipe, tokenizer), training.build(recipe, tokenizer)
    curve = training.train(recipe, whole, tokenizer, tmp_path / "whole")
    training.train(recipe, halves, tokenizer, tmp_path / "halves", stop_after=2)
    resumed = training.build(recipe, tokenizer)
    assert training.train(recipe, resumed, tokenizer, tmp_path / "halves")[-1]["held_out"] == curve[-1]["held_out"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(halves.lm_head.weight, whole.lm_head.weight)


def test_the_short_recipe_learns_and_the_larger_model_more(tmp_path: Path) -> None:
    curves = classroom.short(tmp_path, tokens=60_000, vocabulary=512)
    for curve in curves.values():
        assert curve[-1]["loss"] < curve[0]["loss"] - 0.4 and curve[-1]["held_out"] < math.log(512) - 1
    assert curves["short-l"][-1]["held_out"] < curves["short-s"][-1]["held_out"]


def test_loading_checks_names_and_files(
    tmp_path: Path, tokenizer: training.PreTrainedTokenizerFast, monkeypatch
) -> None:
    recipe = training.Recipe("pico-xs", 1, 16, 2, 32, 2 * training.BATCH * training.WINDOW)
    monkeypatch.setitem(family.RECIPES, "pico-xs", recipe)
    (tmp_path / "weights").mkdir()
    tokenizer.save_pretrained(tmp_path / "weights" / "tokenizer")
    family.make("pico-xs", tmp_path / "weights", tmp_path / "work")
    model, loaded = family.load_pico("pico-xs", tmp_path / "weights")
    assert model.dtype == torch.float32 and not model.training and len(loaded) == model.config.vocab_size
    assert "2 steps" in (tmp_path / "weights" / "pico-xs" / "card.md").read_text()
    found = family.score("pico-xs", tmp_path / "weights", limit=3)
    assert list(found) == list(family.SCORED) and all(s["n"] == 3 for s in found.values())
    assert family.score("pico-xs", tmp_path / "weights") == found
    assert "of 3 test questions" in (tmp_path / "weights" / "pico-xs" / "card.md").read_text()
    weights = tmp_path / "weights" / "pico-xs" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or differs"):
        family.load_pico("pico-xs", tmp_path / "weights")
    with pytest.raises(ValueError, match="no Pico model 'pico-m'"):
        family.load_pico("pico-m")


# ------------------------------------------------------------------------------------------------ what ships


@pytest.mark.parametrize("name", classroom.NAMES)
def test_every_member_ships_with_its_card_its_curve_and_its_scores(name: str) -> None:
    model, tokenizer = classroom.load_pico(name)
    recipe, folder = classroom.RECIPES[name], family.WEIGHTS / name
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (recipe.layers, recipe.width)
    assert not model.config.tie_word_embeddings and model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    made = json.loads((folder / "training.json").read_text())
    assert made["seed"] == recipe.seed and made["steps"] == recipe.steps and made["lr"] == recipe.lr
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == recipe.steps and curve[-1]["held_out"] < curve[3]["held_out"]
    scores = json.loads((folder / "scores.json").read_text())
    assert {s["n"] for s in scores.values()} == {500}
    card = (folder / "card.md").read_text()
    assert all(f"{s['value']:.1%} of 500 test questions" in card for s in scores.values())


def test_the_weights_are_few() -> None:
    assert sum(p.stat().st_size for p in family.WEIGHTS.rglob("*") if p.is_file()) < 60e6


def test_ten_prompts_get_the_recorded_answers() -> None:
    model, tokenizer = classroom.load_pico("pico-l")
    rows = json.loads((Path(__file__).parent / "data" / "pico_answers.json").read_text())
    assert len(rows) == 10
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == row["answer"]


def shipped(name: str) -> dict[str, float]:
    scores = json.loads((family.WEIGHTS / name / "scores.json").read_text())
    subjects = ("facts, in words", "word problems", "completion", "from text")
    return {what: 100 * scores[what]["value"] for what in subjects}


def test_there_is_something_to_transfer() -> None:
    large, small = shipped("pico-l"), shipped("pico-s")
    assert sum(large[what] >= small[what] + 10 for what in large) >= 3
    assert max(large.values()) < 97
    chance = {"facts, in words": 25.0}
    assert all(large[what] >= chance.get(what, 0.0) + 30 for what in large)
    for teacher in ("pico-l-code-a", "pico-l-code-b"):
        code = shipped(teacher)
        assert all(code[what] >= large[what] + 5 for what in ("completion", "from text"))


def test_losses_are_ordered_by_scale_and_the_gap_is_the_papers() -> None:
    loss = {n: json.loads((family.WEIGHTS / n / "training.json").read_text())["validation_loss"] for n in family.NAMES}
    assert loss["pico-l"] < loss["pico-s"] < loss["pico-xs"]
    large, small = family.RECIPES["pico-l"], family.RECIPES["pico-s"]
    assert small.width / large.width == small.layers / large.layers == 0.8
