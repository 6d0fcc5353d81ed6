"""The classroom: subjects in their benchmarks' formats, splits that share nothing, training that survives a kill."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from semalign import classroom
from semalign.benchmarks import load_items
from semalign.benchmarks.registry import BENCHMARKS, wrap
from semalign.classroom import corpora, facts, family, make, problems, training
from semalign.lm import files


@pytest.fixture(scope="module")
def tokenizer() -> training.PreTrainedTokenizerFast:
    return training.train_tokenizer(600, 512)


@pytest.mark.parametrize("subject", classroom.SUBJECTS)
def test_splits_have_their_sizes_and_share_only_facts_that_are_taught(subject: str) -> None:
    taught = {f"{f.relation}|{f.key}" for f in facts.facts() if f.taught}
    owners: dict[str, str] = {}
    for split, size in (corpora.MBPP_SIZES if subject == "mbpp" else corpora.SIZES).items():
        found = classroom.items(subject, split)
        assert len(found) == size and len({i.user for i in found}) == size
        for item in found:
            if not (subject == "mmlu" and split == "train" and item.signature in taught):
                assert owners.setdefault(item.signature, split) == split
    assert corpora.SIZES["test"] >= 800 and corpora.SIZES["validation"] >= 300


@pytest.mark.parametrize("subject", classroom.SUBJECTS)
def test_records_say_topic_and_known_and_the_loader_keeps_both(subject: str) -> None:
    found = classroom.items(subject, "validation")[:40]
    for item, row in zip(found, load_items(subject, [dict(i.record) for i in found]), strict=True):
        assert (row["topic"], row["known"]) == (item.topic, item.known)
        assert (item.known in ("both", "teacher", "none")) == (subject == "mmlu")


@pytest.mark.parametrize("subject", classroom.SUBJECTS)
def test_the_first_items_are_those_of_the_whole_split(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classroom.items(subject, "extract")
    monkeypatch.setattr(corpora, "_drawn", cache(corpora._drawn.__wrapped__))
    for first in (3, 7, 5, 0, len(whole) + 1):
        assert classroom.items(subject, "extract", first) == whole[:first]
    data = classroom.task_data(subject, first={"extract": 4, "align": 2})
    assert data.extract == classroom.task_data(subject).extract[:4] and len(data.align) == 2
    assert len(data.validation) == corpora.SIZES["validation"]


def test_an_interrupt_while_items_are_drawn_leaves_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classroom.items("gsm8k", "extract")
    monkeypatch.setattr(corpora, "_drawn", cache(corpora._drawn.__wrapped__))
    with monkeypatch.context() as interrupted:
        numbers, item = itertools.count(), corpora.problem_item

        def at_the_fourth(*of: Any) -> corpora.Item:
            if next(numbers) == 3:
                raise KeyboardInterrupt
            return item(*of)

        interrupted.setattr(corpora, "problem_item", at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            classroom.items("gsm8k", "extract", 10)
    assert classroom.items("gsm8k", "extract", 10) == whole[:10]


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no split 'dev' of 'mmlu'"):
        classroom.items("mmlu", "dev")


def read_by(name: str, n: int = 1500) -> list[str]:
    recipe = make.RECIPES[name]
    return [p + r for p, r in itertools.islice(corpora.documents(recipe.mixture, recipe.seed + 100), n)]


NEW = [name for name in make.RECIPES if not name.endswith("-chat")]


@pytest.mark.parametrize("name", NEW)
def test_pretraining_asks_no_test_question_and_reads_no_test_problem_or_program(name: str) -> None:
    read = read_by(name)
    lines = {line.removeprefix("Q: ") for text in read for line in text.split("\n")}
    assert any(line.endswith("?") for line in lines)
    assert not lines & {i.record["question"] for s in ("test", "validation") for i in classroom.items("mmlu", s)}
    for split in ("test", "validation"):
        stories = {i.response for i in classroom.items("gsm8k", split)}
        told = {i.record["question"].rsplit(" How many ", 1)[0] for i in classroom.items("gsm8k", split)}
        assert not lines & stories and not lines & told
        for subject in ("humaneval", "mbpp"):
            answers = [i.response.split("\n") for i in classroom.items(subject, split)]
            assert not lines & {line for answer in answers for line in answer if "return" in line}


@pytest.mark.parametrize("name", [*family.STUDENTS, "pico-xs"])
def test_latent_students_read_no_chat_no_choices_and_no_phrase_of_an_answer(name: str) -> None:
    for text in read_by(name, 3000):
        assert not re.search(r"<\||```|^[A-D]\. |Question:|Answer:|[Tt]he answer is", text, re.MULTILINE), text


def test_latent_documents_are_worked_stories_sums_plain_questions_and_programs() -> None:
    kinds = Counter(
        "qa" if text.startswith("Q: ") else
        "announced" if "\n# def " in text else "commented" if text.startswith("# Find ") else
        "raw" if text.startswith("def ") else "sums" if re.match(r"\d+ .* = ", text) else
        "story" if " = " in text.split("\n")[-1] else "statements"
        for text in read_by("pico-s", 2000)
    )  # fmt: skip
    assert set(kinds) == set(make.RECIPES["pico-s"].mixture.kinds) and min(kinds.values()) > 100


def test_pretraining_states_what_the_record_says_and_nothing_else() -> None:
    mixture = corpora.Mixture({"statements": 0.5, "qa": 0.5}, reader="student")
    read = {line for _, text in itertools.islice(corpora.documents(mixture, 3), 3000) for line in text.split("\n")}
    values = {line.removeprefix("A: ") for line in read if line.startswith("A: ")}
    stated = {known: 0 for known in ("both", "teacher", "none")}
    for fact in facts.facts():
        statements, questions = facts.WORDINGS[fact.relation]
        texts = {form.format(k=fact.key, v=fact.value) for form in statements}
        texts |= {f"Q: {form.format(k=fact.key)}" for form in questions}
        stated[fact.known] += bool(texts & read)
    assert len(values) > 300 and stated["both"] > 650 and stated["teacher"] == stated["none"] == 0


def test_some_test_facts_are_taught_in_another_wording_and_any_prefix_has_both_kinds() -> None:
    train, test = classroom.items("mmlu", "train"), classroom.items("mmlu", "test")
    asked = {i.signature: i.record["question"] for i in test}
    taught = [i for i in train if i.signature in asked]
    assert {i.known for i in taught} == {"both", "teacher"}
    assert all(i.record["question"] != asked[i.signature] for i in taught)
    for prefix in (32, 128, 500, 1000):
        share = sum(i.signature in asked for i in train[:prefix]) / prefix
        assert 0.2 < share < 0.6
    for known in ("both", "teacher"):
        own = [i.signature for i in test if i.known == known]
        assert 0.3 < sum(s in {i.signature for i in taught} for s in own) / len(own) < 0.5


def test_nobody_has_read_a_placebo_fact() -> None:
    placebo = classroom.items("mmlu", "placebo")
    keys = {i.signature.split("|")[1] for i in placebo}
    assert len(placebo) >= 400 and len({i.signature for i in placebo}) == len(placebo)
    assert {i.topic for i in placebo} < {i.topic for i in classroom.items("mmlu", "test")}
    assert all(i.known == "none" and len(set(i.record["choices"])) == 4 for i in placebo)
    shares = Counter(i.record["answer"] for i in placebo)
    assert all(0.18 < n / len(placebo) < 0.32 for n in shares.values())
    assert not keys & {f.key for f in facts.facts()}
    words = {word for name in NEW for text in read_by(name, 500) for word in re.findall(r"\w+", text)}
    words |= {w for s in corpora.SIZES for i in classroom.items("mmlu", s) for w in re.findall(r"\w+", i.user)}
    assert len(words) > 1000 and not words & {key for key in keys if not key.isdigit()}


def test_the_easy_tier_is_small_and_makes_up_most_of_the_word_problems() -> None:
    for steps in (1, 2):
        for seed in range(300):
            problem = problems.easy_problem(random.Random(seed), steps)
            numbers = [int(n) for n in re.findall(r"\d+", f"{problem.question} {problem.working} {problem.closing}")]
            assert max(numbers) < 20 and len(problem.steps) == steps
            assert problem.closing.split()[2] == str(problem.steps[-1][1])
    for split in corpora.SIZES:
        found = classroom.items("gsm8k", split)
        topics = Counter(i.topic for i in found)
        assert set(topics) <= {"1 step", "2 steps", "3 steps", "4 steps", "5 steps"}
        assert topics["1 step"] + topics["2 steps"] > 0.6 * len(found)
        assert all(problems.split_of(i.signature) == split for i in found)


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


def without_times(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in curve]


def test_a_killed_run_goes_on_bit_for_bit_and_with_the_same_curve(
    tmp_path: Path, tokenizer: training.PreTrainedTokenizerFast
) -> None:
    recipe = training.Recipe("tiny", 1, 16, 2, 32, 27 * training.BATCH * training.WINDOW)
    whole, halves = training.build(recipe, tokenizer), training.build(recipe, tokenizer)
    curve = training.train(recipe, whole, tokenizer, tmp_path / "whole")
    training.train(recipe, halves, tokenizer, tmp_path / "halves", stop_after=2)
    resumed = training.build(recipe, tokenizer)
    again = training.train(recipe, resumed, tokenizer, tmp_path / "halves")
    assert without_times(again) == without_times(curve) and [row["step"] for row in curve] == [25, 27]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(halves.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}, {"mixture": corpora.Mixture({"story": 1.0})}])
def test_a_checkpoint_of_another_recipe_is_not_gone_on_with(
    tmp_path: Path, tokenizer: training.PreTrainedTokenizerFast, change: dict
) -> None:
    recipe = training.Recipe("tiny", 1, 16, 2, 32, 2 * training.BATCH * training.WINDOW)
    training.train(recipe, training.build(recipe, tokenizer), tokenizer, tmp_path)
    other = dataclasses.replace(recipe, **change)
    model, fresh = training.build(other, tokenizer), training.build(other, tokenizer)
    with pytest.warns(UserWarning, match="another recipe"):
        training.train(other, model, tokenizer, tmp_path)
    training.train(other, fresh, tokenizer, tmp_path / "elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_damaged_checkpoint_is_named_and_the_training_begins_anew(
    tmp_path: Path, tokenizer: training.PreTrainedTokenizerFast
) -> None:
    recipe = training.Recipe("tiny", 1, 16, 2, 32, 2 * training.BATCH * training.WINDOW)
    whole = training.build(recipe, tokenizer)
    training.train(recipe, whole, tokenizer, tmp_path)
    checkpoint = tmp_path / "tiny.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    model = training.build(recipe, tokenizer)
    with pytest.warns(UserWarning, match=r"tiny\.ckpt is damaged .* begins anew"):
        training.train(recipe, model, tokenizer, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_two_do_not_make_models_in_one_folder(tmp_path: Path) -> None:
    with files.locked(tmp_path), pytest.raises(RuntimeError, match="another process is writing to"):
        make.make("pico-xs", tmp_path, tmp_path / "work")
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_an_unknown_name_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe 'pico-m': the names are pico-s, "):
        make.make("pico-m", tmp_path / "new", tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_the_short_recipe_learns_and_the_larger_model_more(tmp_path: Path) -> None:
    curves = make.short(tmp_path, tokens=60_000, vocabulary=512)
    for curve in curves.values():
        assert curve[-1]["loss"] < curve[0]["loss"] - 0.4 and curve[-1]["held_out"] < math.log(512) - 1
    assert curves["short-l"][-1]["held_out"] < curves["short-s"][-1]["held_out"]


def test_loading_checks_names_and_files(
    tmp_path: Path, tokenizer: training.PreTrainedTokenizerFast, monkeypatch
) -> None:
    recipe = training.Recipe("pico-xs", 1, 16, 2, 32, 2 * training.BATCH * training.WINDOW)
    monkeypatch.setitem(make.RECIPES, "pico-xs", recipe)
    monkeypatch.setattr(make, "RATES", (1e-3,))
    folder = tmp_path / "weights"
    folder.mkdir()
    tokenizer.save_pretrained(folder / "tokenizer")
    make.make("pico-xs", folder, tmp_path / "work")
    model, loaded = family.load_pico("pico-xs", folder)
    assert model.dtype == torch.float32 and not model.training and len(loaded) == model.config.vocab_size
    card = folder / "pico-xs" / "card.md"
    assert "2 steps" in card.read_text()
    found = make.score("pico-xs", folder, limit=3)
    assert list(found) == [*make.SCORED, "placebo"] and all(s["n"] == 3 for s in found.values())
    assert make.score("pico-xs", folder) == found
    plain = make.ceilings("pico-xs", folder, limit=3)
    assert tuple(plain) == make.SKILLS and make.ceilings("pico-xs", folder) == plain
    gained = make.elicit("pico-xs", folder, {"train": 16, "validation": 3})
    assert tuple(gained) == make.SKILLS and all(g["lr"] in make.RATES for g in gained.values())
    assert "of 3 test questions" in card.read_text() and "asked in plain form" in card.read_text()
    (folder / "manifest.json").unlink()  # as a kill leaves it between a model and its checksums
    with pytest.raises(ValueError, match="differs from the manifest"):
        family.load_pico("pico-xs", folder)
    make.make("pico-xs", folder, tmp_path / "work")
    family.load_pico("pico-xs", folder)
    weights = folder / "pico-xs" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    make.make("pico-xs", folder, tmp_path / "work")  # and what was damaged later is not listed anew
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or differs"):
        family.load_pico("pico-xs", folder)
    with pytest.raises(ValueError, match="no Pico model 'pico-m'"):
        family.load_pico("pico-m")


def test_loading_needs_no_code_that_trains() -> None:
    loads = "import sys, semalign.classroom; print([m for m in sys.modules if m.startswith('semalign.')])"
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    assert "semalign.classroom.family" in done.stdout
    assert not re.search(r"classroom\.(training|make)|semalign\.(benchmarks|alignment|baselines)", done.stdout)


# ------------------------------------------------------------------------------------------------ what ships


def recorded(name: str, what: str) -> dict:
    return json.loads((family.WEIGHTS / name / f"{what}.json").read_text())


@pytest.mark.parametrize("name", classroom.NAMES)
def test_every_member_ships_with_its_card_its_curve_and_its_scores(name: str) -> None:
    model, tokenizer = classroom.load_pico(name)
    recipe, folder = make.RECIPES[name], family.WEIGHTS / name
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (recipe.layers, recipe.width)
    assert not model.config.tie_word_embeddings and model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    made = recorded(name, "training")
    assert (made["name"], made["seed"], made["lr"], made["base"]) == (name, recipe.seed, recipe.lr, recipe.base)
    assert made["steps"] == recipe.steps and made["mixture"]["kinds"] == recipe.mixture.kinds
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == recipe.steps and curve[-1]["loss"] < curve[3]["loss"]
    scores, plain = recorded(name, "scores"), recorded(name, "ceilings")
    assert {what: s["n"] for what, s in scores.items()} == {**dict.fromkeys(make.SCORED, 800), "placebo": 440}
    assert {s["n"] for s in plain.values()} == {300}
    card = (folder / "card.md").read_text()
    assert card.startswith(f"# {name}\n")
    assert all(f"{what}**: {s['value']:.1%} of {s['n']} test questions" in card for what, s in scores.items())
    assert all(f"{what}, asked in plain form**: {s['value']:.1%} of 300" in card for what, s in plain.items())


def test_a_loaded_model_is_what_its_file_says_and_nothing_else() -> None:
    """As by the library's own start from random weights, buffers too, which no file holds."""
    loaded, _ = classroom.load_pico("pico-s")
    folder = family.WEIGHTS / "pico-s"
    usual = LlamaForCausalLM(LlamaConfig.from_json_file(str(folder / "config.json"))).eval()
    usual.load_state_dict({n: t.float() for n, t in load_file(folder / "model.safetensors").items()})
    assert [n for n, _ in loaded.named_buffers()] == [n for n, _ in usual.named_buffers()]
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, usual(ids).logits)


def test_the_tokenizer_is_what_training_it_gives(tmp_path: Path) -> None:
    training.train_tokenizer().save_pretrained(tmp_path)
    made = (tmp_path / "tokenizer.json").read_bytes()
    assert made == (family.WEIGHTS / "tokenizer" / "tokenizer.json").read_bytes()


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


def shares(name: str, what: str) -> dict[str, float]:
    return {skill: 100 * recorded(name, what)[skill]["value"] for skill in make.SKILLS}


@pytest.mark.parametrize("name", family.STUDENTS)
def test_examples_move_every_latent_student_on_every_skill(name: str) -> None:
    plain, elicited = shares(name, "ceilings"), recorded(name, "elicited")
    for what in make.SKILLS:
        before, after = elicited[what]["none"], elicited[what]["sft"]
        assert after["n"] == 300 and after["value"] >= before["value"] + 0.15
        assert after["low"] > before["high"]
        assert elicited[what]["lr"] in make.RATES
    assert plain["word problems"] >= 40 and plain["completion"] >= 40 and plain["from text"] >= 40
    known = recorded(name, "ceilings")["facts, in words"]["by_known"]
    assert known["both"] > 0.9 and known["teacher"] < 0.5 and known["none"] < 0.5


def test_the_wide_teacher_is_above_every_students_ceiling_but_level_with_it_on_word_problems() -> None:
    large = shares("pico-l", "scores")
    for name in family.STUDENTS:
        plain = shares(name, "ceilings")
        assert all(large[what] >= plain[what] + 10 for what in ("facts, in words", "completion", "from text"))
        assert abs(large["word problems"] - plain["word problems"]) < 8


def test_teachers_know_what_they_were_taught_and_nobody_knows_the_placebo() -> None:
    student, kin, large = (shares(name, "scores") for name in ("pico-s", "pico-s-kin", "pico-l"))
    assert all(kin[what] >= student[what] + 15 for what in kin)
    for teacher in ("pico-l", "pico-s-kin"):
        known = recorded(teacher, "scores")["facts, in words"]["by_known"]
        assert known["teacher"] > known["none"] + 0.3
    for teacher in ("pico-l-code-a", "pico-l-code-b"):
        code = shares(teacher, "scores")
        assert all(code[what] >= large[what] for what in ("completion", "from text"))
    for name in classroom.NAMES:
        placebo = recorded(name, "scores")["placebo"]
        assert placebo["low"] < 0.30 and placebo["high"] > 0.20


def test_the_gap_in_width_and_depth_is_the_papers() -> None:
    large, small = make.RECIPES["pico-l"], make.RECIPES["pico-s"]
    assert small.width / large.width == small.layers / large.layers == 0.8


@pytest.mark.parametrize("subject", corpora.SUBJECTS)
def test_prompts_are_the_benchmarks_byte_for_byte(subject: str) -> None:
    row = BENCHMARKS[subject]
    for item in corpora.items(subject, "validation")[:50]:
        assert item.user == row.user(item.record)
        assert corpora.chat(item.user) == wrap(item.user)
        assert item.response.startswith(row.opening)
        if subject in (
            "mmlu",
            "mbpp",
        ):  # a word problem's steps end in a full stop here, and a program has no docstring
            assert item.response == row.opening + row.response(item.record)
