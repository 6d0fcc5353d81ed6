"""Evaluation: the same answers as lm-evaluation-harness's own backend, right scores for known answers, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from tiny import tiny_llama
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from semalign.benchmarks import BENCHMARKS, PROTOCOLS, DataError, Evaluation, _ask, _quiet, evaluate, wilson
from semalign.benchmarks.data import load_items
from semalign.benchmarks.engine import SharedPrefixLM, _Room
from semalign.benchmarks.sandbox import SandboxError
from semalign.models import byte_tokenizer
from semalign.profiles import declared

MMLU = [
    {"subject": ["plants", "rocks"][i % 2], "question": f"Which is number {i} of the long list{' of lists' * (i % 5)}?",
     "choices": ["one", "twenty two", "three hundred and three", "4"], "answer": i % 4}
    for i in range(10)
]  # fmt: skip
GSM8K = [
    {"question": f"What is {i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
    for i in range(600, 606)
]
HUMANEVAL = [
    {"task_id": f"T/{i}", "prompt": f'import math\n\ndef add{i}(a):\n    """Add {i}."""\n', "entry_point": f"add{i}",
     "canonical_solution": f"    return a + {i}\n",
     "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n"}
    for i in range(4)
]  # fmt: skip
MBPP = [
    {"task_id": i, "text": f"Write a function to add {i}.", "code": f"def add(a):\r\n    return a + {i}",
     "test_list": [f"assert add(1) == {i + 1}"]}
    for i in range(4)
]  # fmt: skip
DATA: dict[str, list[dict[str, Any]]] = {"mmlu": MMLU, "gsm8k": GSM8K, "humaneval": HUMANEVAL, "mbpp": MBPP}
FREE = {"allow_code_execution": True, "isolation": "rlimits"}


class Known(LM):
    """A backend that knows every answer, or none."""

    max_length = 10_000

    def __init__(self, right: bool, texts: list[str] | None = None) -> None:
        super().__init__()
        self.right, self.texts, self.asked = right, texts or [], []

    def tok_encode(self, text: str) -> list[int]:
        return list(text.encode())

    def tokenizer_name(self) -> str:
        return "bytes"

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in history)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [r.args for r in requests]
        return [(0.0 if (r.idx == r.doc["answer"]) == self.right else -1.0, False) for r in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [r.args for r in requests]
        if self.texts:
            return [self.texts[i % len(self.texts)] for i in range(len(requests))]
        return [self.text(r.doc, r.args[0]) if self.right else "    return None" for r in requests]

    def text(self, doc: dict[str, Any], prompt: str) -> str:
        if "code" in doc:
            return f"{doc['code']}\n```\nThis adds."
        if "prompt" in doc:  # the whole function where a code block was opened, the body after the bare prompt
            return (
                doc["prompt"].split("import math\n\n")[1] + doc["canonical_solution"]
                if "```" in prompt
                else doc["canonical_solution"]
            )
        return f" They add up. #### {doc['answer'].split('#### ')[1]}"


CASES = [(task, protocol) for task, protocols in PROTOCOLS.items() for protocol in protocols]


@pytest.mark.parametrize(("task", "protocol"), CASES)
def test_known_answers_get_their_score(task: str, protocol: str) -> None:
    tokenizer = byte_tokenizer()
    records, score = evaluate(Known(True), tokenizer, task, DATA[task], protocol, **FREE)
    assert score.value == 1.0 and score.stderr == 0.0
    assert score.interval == pytest.approx((score.n / (score.n + 3.841459), 1.0))
    assert [r["id"] for r in records] == [str(d.get("task_id", i)) for i, d in enumerate(DATA[task])]
    assert all(r["protocol"] == protocol and r["task"] == task and r["correct"] == 1.0 for r in records)
    assert score.step == pytest.approx(1 / len(DATA[task])) and score.n == len(DATA[task])
    wrong = evaluate(Known(False), tokenizer, task, DATA[task], protocol, **FREE)
    assert wrong.score.value == 0.0
    assert isinstance(wrong, Evaluation) and json.loads(json.dumps(wrong.records)) == wrong.records


def test_prompts_are_those_of_the_protocols() -> None:
    tokenizer = byte_tokenizer()
    seen = {}
    for task, protocol in CASES:
        lm = Known(True)
        evaluate(lm, tokenizer, task, DATA[task][:1], protocol, **FREE)
        seen[task, protocol] = lm.asked
    wrapped = (
        "<|user|>\nThe following are multiple choice questions (with answers) about plants.\n\n"
        "Which is number 0 of the long list?\nA. one\nB. twenty two\nC. three hundred and three\nD. 4\nAnswer:"
        "\n\n<|assistant|>\nThe answer is:"
    )
    assert seen["mmlu", "paper"] == [(wrapped, f" {letter}") for letter in "ABCD"]
    assert [c for _, c in seen["mmlu", "paper-cloze"]] == [" one", " twenty two", " three hundred and three", " 4"]
    assert "A. one" not in seen["mmlu", "paper-cloze"][0][0]
    assert seen["mmlu", "harness-cloze"][0] == ("Question: Which is number 0 of the long list?\nAnswer:", " one")
    assert seen["mmlu", "harness"][0][0].endswith("D. 4\nAnswer:") and seen["mmlu", "harness"][0][0].startswith(
        "The foll"
    )
    assert (
        seen["mmlu", "chat"][0][0].startswith("[user]The following")
        and "[assistant]The answer is:" in seen["mmlu", "chat"][0][0]
    )
    assert seen["gsm8k", "paper"][0][0] == (
        "<|user|>\nAnswer the following question.\n\nQuestion: What is 600 + 600?\n\n<|assistant|>\nAnswer:"
    )
    assert seen["gsm8k", "harness"][0][0] == "Question: What is 600 + 600?\nAnswer:"
    code = "Here is the completed function:\n\n\n```python\n"
    assert seen["humaneval", "harness"][0][0] == HUMANEVAL[0]["prompt"]
    assert seen["humaneval", "harness"][0][1]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert seen["mbpp", "paper"][0][0] == (
        f"<|user|>\nComplete the following python function.\n\n\n{MBPP[0]['text']}\ndef add(a)\n\n<|assistant|>\n{code}"
    )
    assert seen["mbpp", "harness"][0][0].endswith("assert add(1) == 1\n[BEGIN]\n")
    assert seen["mbpp", "chat"][0][0].endswith(code)


def test_several_samples_give_the_unbiased_estimate() -> None:
    texts = [
        f"def add(a): return a + {i}" for i in (0, 9, 9, 9, 9)
    ] * 2  # each problem: 10 samples, problem 0 has 2 right
    lm = Known(True, texts)
    records, score = evaluate(lm, byte_tokenizer(), "mbpp", MBPP, samples=10, **FREE)
    assert lm.asked[0][1]["temperature"] == 0.1 and lm.asked[0][1]["do_sample"] is True
    assert [sum(r["passed"]) for r in records] == [2, 0, 0, 0]
    assert score.value == pytest.approx(0.05) and score.other == {"pass@1": pytest.approx(0.05), "pass@10": 0.25}
    assert score.step == pytest.approx(1 / 40)
    assert score.stderr == pytest.approx(np.std([0.2, 0, 0, 0], ddof=1) / 2)


def test_strict_and_flexible_numbers_are_both_kept() -> None:
    lm = Known(True, ["So the answer is 1,200. Or 7?"])
    assert evaluate(lm, byte_tokenizer(), "gsm8k", GSM8K[:1], "paper").score.value == 0.0
    records, score = evaluate(lm, byte_tokenizer(), "gsm8k", GSM8K[:1], "harness")
    assert score.value == 0.0 and score.other == {"strict": 0.0, "flexible": 0.0}  # no "#### 1200"
    assert records[0]["strict"] is None and records[0]["flexible"] == "7" and records[0]["answer"] == "1200"
    assert math.isnan(score.stderr)
    records, score = evaluate(lm, byte_tokenizer(), "gsm8k", GSM8K[:1], "chat")
    assert score.value == 0.0 and score.other == {"flexible": 0.0, "stated": 1.0} and records[0]["stated"] == "1200"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("protocol", ["harness", "harness-cloze", "paper-cloze"])
def test_shared_prefixes_change_no_likelihood(protocol: str, batch_size: int) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), max_position_embeddings=512)
    scores, widths = {}, []
    model.lm_head.register_forward_hook(lambda module, given, made: widths.append(made.shape[0] * made.shape[1]))
    items = load_items("mmlu", MMLU)
    with _quiet():
        for backend in (HFLM, SharedPrefixLM):
            widths.clear()
            lm = backend(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            asked = _ask(lm, items, "mmlu", protocol, 1, None, 0)
            scores[backend] = np.array([[r[0] for r in one["resps"]] for one in asked], dtype=float)
            greedy = [[r[0][1] for r in one["resps"]] for one in asked]
            assert not np.any(greedy)
    np.testing.assert_allclose(scores[SharedPrefixLM][..., 0], scores[HFLM][..., 0], atol=2e-4)
    longest = max(len(c) for m in MMLU for c in m["choices"]) if "cloze" in protocol else 1
    assert sum(widths) <= len(MMLU) * (1 + 4 * longest)  # one position a question, and those of the choices


def test_greedy_flag_and_logits_follow_the_model() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), max_position_embeddings=512)
    lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    context = tokenizer("Once upon")["input_ids"]
    made = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
    other = [*made[:2], (made[2] + 1) % 200]
    answers = lm._loglikelihood_tokens([(None, context, made), (None, context, other), (None, context, made[:1])])
    assert [greedy for _, greedy in answers] == [True, False, True]
    logits = model(torch.tensor([context + made])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    assert answers[0][0] == pytest.approx(logits[range(3), made].sum().item(), abs=1e-4)


def test_generation_is_the_models_own_whatever_the_batch() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), max_position_embeddings=512)
    found = [
        evaluate(model, tokenizer, "gsm8k", GSM8K, "harness", batch_size=b, max_new_tokens=12).records for b in (1, 4)
    ]
    assert found[0] == found[1]
    lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer)
    prompt = torch.tensor([lm.tok_encode(f"Question: {GSM8K[0]['question']}\nAnswer:")])
    made = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert found[0][0]["responses"] == [tokenizer.decode(made, skip_special_tokens=True)]


SHAPES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.5,
}  # fmt: skip
KEEPS: dict[str, dict[str, Any]] = {
    "all that came before": {"model_type": "llama"},
    "a window in two layers of three": {
        "model_type": "gemma3_text", "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "a state without keys": {"model_type": "mamba", "state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("kept", KEEPS)
def test_a_cache_with_room_gives_the_texts_of_the_librarys_own(kept: str) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES | KEEPS[kept])).eval()
    lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    prompts = ["abc", "What is one and one?", "Count: one, two,"]
    given = {"until": [], "max_gen_toks": 24, "do_sample": False}
    texts = lm.generate_until([types.SimpleNamespace(args=(prompt, dict(given))) for prompt in prompts])  # type: ignore[misc]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert text == lm.tok_decode(made[0, ids.shape[1] :].tolist())


def test_no_step_of_writing_copies_the_keys_that_were_there() -> None:
    layer, keys = _Room(6), torch.randn(2, 4, 6, 8)
    first, _ = layer.update(keys[:, :, :3], -keys[:, :, :3])
    for t in range(3, 6):
        so_far, values = layer.update(keys[:, :, t : t + 1], -keys[:, :, t : t + 1])
        assert so_far.data_ptr() == first.data_ptr() and layer.get_seq_length() == t + 1
    assert torch.equal(so_far, keys) and torch.equal(values, -keys)


class Writes(torch.nn.Module):
    """A stand-in for a model that writes to each prompt what ``answers`` has for it, a byte a token, and then EOS."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.inner, self.answers, self.read = tiny_llama(vocab=259, max_position_embeddings=512), answers, list[int]()
        self.tokenizer = byte_tokenizer()
        self.inner.register_forward_pre_hook(self.count, with_kwargs=True)
        self.inner.lm_head.register_forward_hook(self.write)

    def count(self, _module: Any, _args: Any, given: dict[str, Any]) -> None:
        self.read.append(given["input_ids"].shape[0])
        start = given["input_ids"].shape[1] > 1
        self.so_far = given["input_ids"] if start else torch.cat([self.so_far, given["input_ids"]], 1)

    def write(self, _module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(logits)
        for row, ids in enumerate(self.so_far.tolist()):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            prompt = next(p for p in self.answers if text.startswith(p))
            rest = self.answers[prompt][len(text) - len(prompt) :]
            made[row, -1, self.tokenizer(rest[0])["input_ids"][1] if rest else self.tokenizer.eos_token_id] = 1.0
        return made


def test_a_batch_ends_with_its_answers_and_long_ones_go_on_together() -> None:
    answers = {f"Question {i}:": "x" * n for i, n in enumerate((3, 30, 2, 5, 31, 4))}
    answers["Question 3:"] = "xxxxx STOP and what comes after it, for ever and ever"
    model = Writes(answers)
    lm = SharedPrefixLM(pretrained=model.inner, tokenizer=model.tokenizer, batch_size=2)

    def asked(**options: Any) -> tuple[list[str], list[int]]:
        model.read.clear()
        given = {"until": ["STOP"], "max_gen_toks": 40, "do_sample": False, **options}
        requests = [types.SimpleNamespace(args=(prompt, dict(given))) for prompt in answers]
        return lm.generate_until(requests), list(model.read)  # type: ignore[arg-type]

    texts, read = asked()
    assert texts == ["xxx", "x" * 30, "xx", "xxxxx ", "x" * 31, "xxxx"]
    # Of three batches of two, two have a long answer and pause at half of 40 tokens; the other ends with STOP and EOS.
    assert len(read) == 20 + len("xxxxx STOP") + 20 + (31 - 20 + 1) and set(read) == {2}
    short, _ = asked(max_gen_toks=10)
    assert short == ["xxx", "x" * 10, "xx", "xxxxx ", "x" * 10, "xxxx"]
    odd, _ = asked(max_gen_toks=31)
    assert odd == texts


@pytest.mark.parametrize("task", ["mmlu", "gsm8k"])
def test_a_prompt_that_does_not_fit_is_counted_and_not_cut(task: str) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), max_position_embeddings=300)
    long = {**DATA[task][0], "question": "Why? " * 80}
    shapes: list[int] = []
    model.model.register_forward_pre_hook(lambda m, a, kw: shapes.append(kw["input_ids"].shape[1]), with_kwargs=True)
    records, score = evaluate(model, tokenizer, task, [long, *DATA[task][1:3]], "harness", max_new_tokens=4)
    assert [r["too_long"] for r in records] == [True, False, False] and score.too_long == 1
    assert records[0]["correct"] == 0.0 and records[0]["prompt_tokens"] > 300 and max(shapes) < 300
    assert score.n == 3


def test_limit_draws_the_same_questions_for_a_seed() -> None:
    lm = Known(True)
    ids = [
        [r["id"] for r in evaluate(lm, byte_tokenizer(), "gsm8k", GSM8K, limit=3, seed=s).records] for s in (0, 0, 1, 5)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 3 and len({tuple(i) for i in ids}) > 1


def test_code_of_a_model_needs_permission() -> None:
    with pytest.raises(SandboxError, match="allow_code_execution"):
        evaluate(Known(True), byte_tokenizer(), "mbpp", MBPP)
    with pytest.raises(ValueError, match="isolation"):
        evaluate(Known(True), byte_tokenizer(), "mbpp", MBPP, allow_code_execution=True, isolation="none")


def test_bad_requests_are_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="unknown task 'triviaqa'; the tasks are gsm8k, humaneval, mbpp, mmlu"):
        evaluate(Known(True), tokenizer, "triviaqa")
    with pytest.raises(ValueError, match="unknown protocol 'cloze' for gsm8k"):
        evaluate(Known(True), tokenizer, "gsm8k", GSM8K, "cloze")
    with pytest.raises(ValueError, match="1 sample"):
        evaluate(Known(True), tokenizer, "gsm8k", GSM8K, samples=2)
    with pytest.raises(DataError, match="empty"):
        evaluate(Known(True), tokenizer, "gsm8k", [])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        evaluate(Known(True), tokenizer, "gsm8k", GSM8K, "chat")


def test_wilson_interval_covers_as_it_says() -> None:
    low, high = wilson(0.1, 100)
    for edge in (low, high):  # Wilson's edges are where the score test is just at its limit
        assert abs(0.1 - edge) / math.sqrt(edge * (1 - edge) / 100) == pytest.approx(1.959964, rel=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)


def answered(model: Any, tokenizer: Any, task: str) -> list[Any]:
    records = evaluate(model, tokenizer, task, DATA[task][:3], "harness", max_new_tokens=6, batch_size=2).records
    return [r.get("responses") or r["scores"] for r in records]


def tokenizer_ending_in(*special: tuple[str, int]) -> Any:
    tokenizer = byte_tokenizer()
    text = "<s> $A " + " ".join(name for name, _ in special)
    template = processors.TemplateProcessing(single=text, special_tokens=[("<s>", 1), *special])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.mark.parametrize("task", ["mmlu", "gsm8k"])
@pytest.mark.parametrize("ending", [[("</s>", 2)], [("</s>", 2), ("<pad>", 0)]])
def test_what_a_tokenizer_appends_is_not_asked(task: str, ending: list[tuple[str, int]]) -> None:
    model = tiny_llama(vocab=259, max_position_embeddings=512)
    assert answered(model, tokenizer_ending_in(*ending), task) == answered(model, byte_tokenizer(), task)


SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 3}, {"max_length": 5}, {"min_new_tokens": 12}, {"repetition_penalty": 9.0}, {"max_time": 0.0},
    {"no_repeat_ngram_size": 1}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "temperature": 3.0},
    {"suppress_tokens": list(range(3, 200))}, {"bad_words_ids": [[i] for i in range(3, 200)]},
    {"forced_eos_token_id": 2}, {"begin_suppress_tokens": list(range(200))},
]  # fmt: skip


def test_a_models_own_settings_do_not_leak_into_its_answers() -> None:
    model = tiny_llama(n_layers=1, vocab=259, max_position_embeddings=512)
    usual, plain = answered(model, byte_tokenizer(), "gsm8k"), model.generation_config
    for settings in SETTINGS:
        model.generation_config = kept = GenerationConfig(**{**plain.to_diff_dict(), **settings})
        assert answered(model, byte_tokenizer(), "gsm8k") == usual, settings
        assert model.generation_config is kept


def test_a_model_may_have_several_ends_of_its_own() -> None:
    model = tiny_llama(vocab=259, max_position_embeddings=512)
    first = answered(model, byte_tokenizer(), "gsm8k")[0][0]
    model.generation_config.eos_token_id = [2, byte_tokenizer()(first)["input_ids"][1]]
    assert answered(model, byte_tokenizer(), "gsm8k")[0][0] in ("", first[:1])


@pytest.mark.parametrize("task", ["mmlu", "gsm8k"])
@pytest.mark.parametrize("pad", ["[PAD]", None])
def test_a_padding_token_that_the_model_lacks_is_not_looked_up(task: str, pad: str | None) -> None:
    model = tiny_llama(vocab=259, max_position_embeddings=512)
    tokenizer = byte_tokenizer()
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
        assert tokenizer.pad_token_id == 259
    else:
        tokenizer.pad_token = None
    np.testing.assert_equal(answered(model, tokenizer, task), answered(model, byte_tokenizer(), task))


def test_tokens_that_the_model_lacks_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="they belong to different models"):
        answered(tiny_llama(vocab=97), byte_tokenizer(), "gsm8k")


FIFTH = '''
"""Capitals: one word each."""

from functools import partial

from semalign.benchmarks.registry import Benchmark, read_split

BENCHMARK = Benchmark(
    title="capitals",
    protocols={
        "paper": {"doc_to_text": "paper", "generation_kwargs": {"max_gen_toks": 8, "until": ["<|user|>"]}},
        "chat": {"generation_kwargs": {"max_gen_toks": 8, "until": ["<|im_end|>"]}},
    },
    fields={"country": str, "capital": str},
    user=lambda row: f"What is the capital of {row['country']}?",
    opening="It is",
    response=lambda row: f" {row['capital']}.",
    judge=lambda row, answers, protocol: {
        "prediction": answers[0].strip(), "answer": row["capital"], "correct": float(row["capital"] in answers[0]),
    },
    read=partial(read_split, "capitals"),
)
'''

ASK = """
import json
from semalign import benchmarks, profiles
from semalign.benchmarks import data, registry
from semalign.models import byte_tokenizer
from semalign.study import trials
from tiny import tiny_llama

records, score = benchmarks.evaluate(
    tiny_llama(vocab=259, max_position_embeddings=512), byte_tokenizer(), "capitals", "mine", "chat", max_new_tokens=4
)
task = data.task_data("capitals", "mine")
none = {"tasks": []}
profile = profiles.load_profile("smoke", tasks=["capitals"], data="benchmarks", search=none, regimes=none)
print(json.dumps([
    len(records), score.n, sorted(records[0]), list(benchmarks.PROTOCOLS["capitals"]), len(task.validation),
    task.train[0].response, profile.tasks, profile.code_tasks, len(trials.code_key("sft", ("capitals",))),
]))
"""


def test_a_new_benchmark_is_one_file(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    skip = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(root / "semalign", tmp_path / "semalign", ignore=skip)
    shutil.copytree(root / "notebooks" / "profiles", tmp_path / "notebooks" / "profiles")
    (tmp_path / "semalign" / "classroom" / "weights").symlink_to(root / "semalign" / "classroom" / "weights")
    (tmp_path / "semalign" / "benchmarks" / "capitals.py").write_text(FIFTH)
    for split, n in (("test", 3), ("train", 12)):
        path = tmp_path / "mine" / "capitals" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"country": f"{split}{i}", "capital": f"C{i}"}) + "\n" for i in range(n)))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root / 'tests'}", "SEMALIGN_DATA": "mine"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    keys = ["answer", "correct", "id", "prediction", "prompt_tokens", "protocol", "responses", "task", "too_long"]
    assert said[:5] == [3, 3, keys, ["paper", "chat"], 1]
    assert said[5].startswith("It is C") and said[6:] == [["capitals"], [], 64]


def test_every_row_says_what_plans_read_in_literals() -> None:
    for task, row in BENCHMARKS.items():
        known = declared("benchmarks")[task]
        assert known["title"] == row.title and known.get("programs", False) == row.programs
        assert known["protocols"] == row.protocols and tuple(row.protocols) == PROTOCOLS[task]
