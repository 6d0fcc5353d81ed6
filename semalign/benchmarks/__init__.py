"""The four benchmarks, real and classroom, through one door: :func:`evaluate`.

lm-evaluation-harness builds the requests from the task definitions in ``tasks/`` and asks the model, with any of its
backends; answers are read and programs run here, and what became of every single question is kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from semalign.benchmarks import answers, sandbox
from semalign.benchmarks.data import TASKS, DataError, Row, load_items, overlap, sample, task_data

__all__ = ["PROTOCOLS", "DataError", "Evaluation", "Score", "evaluate", "load_items", "overlap", "task_data"]

PROTOCOLS = {
    "mmlu": ("paper", "paper-cloze", "chat", "harness", "harness-cloze"),
    "gsm8k": ("paper", "chat", "harness"),
    "humaneval": ("paper", "chat", "harness"),
    "mbpp": ("paper", "chat", "harness"),
}
CODE_TASKS = ("humaneval", "mbpp")
TIMEOUT_S = 10.0
SAMPLING = {"do_sample": True, "temperature": 0.1, "top_p": 0.95}  # Open-Instruct's, for several samples a problem


@dataclass(frozen=True)
class Score:
    """Accuracy or pass@1, in [0, 1], over ``n`` questions.

    ``stderr`` is the standard error of the mean over questions (nan for one question), ``interval`` Wilson's 95 %
    interval, ``step`` the smallest difference that two scores can have. ``too_long`` counts the questions whose prompt
    does not fit the model's context: they were not asked, and count as wrong. ``other`` holds further readings of the
    same answers, such as the strict and the flexible number of GSM8K, or pass@10.
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    n: int
    step: float
    too_long: int = 0
    other: dict[str, float] = field(default_factory=dict)


class Evaluation(NamedTuple):
    """``records``: one dictionary a question, in the order of the questions; ``score``: their mean."""

    records: list[dict[str, Any]]
    score: Score


def evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: str, data: str | Path | Sequence[Row] | None = None,
    protocol: str = "paper", limit: int | None = None, seed: int = 0, *, batch_size: int = 16, samples: int = 1,
    max_new_tokens: int | None = None, allow_code_execution: bool = False, isolation: str = "namespace",
) -> Evaluation:  # fmt: skip
    """Ask a model the questions of one benchmark.

    Args:
        model: a transformers causal LM, or an instance of one of lm-evaluation-harness's backends (vLLM ...).
        tokenizer: its tokenizer.
        task: ``mmlu``, ``gsm8k``, ``humaneval`` or ``mbpp``.
        data: see :func:`semalign.benchmarks.data.load_items`.
        protocol: one of ``PROTOCOLS[task]``; they are described in :mod:`semalign.benchmarks.prompts`. GSM8K's value is
            the last number (Open-Instruct) under ``paper`` and ``chat``, and the strict one under ``harness``.
        limit: how many questions, drawn by ``seed`` (MMLU's in proportion to the subjects); all for ``None``.
        seed: of the draw, and of sampling.
        batch_size: sequences in one forward pass.
        samples: generations a problem; 1 is greedy, more (code only) are drawn as Open-Instruct does.
        max_new_tokens: at most so many tokens an answer, where the protocol's own number is larger.
        allow_code_execution: run the generated programs; without it HumanEval and MBPP are refused.
        isolation: the least sandbox level for them, ``namespace`` or ``rlimits``.

    Raises:
        ValueError: an unknown task or protocol, a malformed source (``DataError``), a chat protocol for a tokenizer
            without a chat template, or several samples of a task without programs.
        SandboxError: programs may not be run, or the machine isolates them less than asked.
    """
    _check(tokenizer, task, protocol, samples, allow_code_execution, isolation)
    items = sample(load_items(task, data), limit, seed)
    with _quiet():
        lm = _backend(model, tokenizer, batch_size)
        asked = _ask(lm, items, task, protocol, samples, max_new_tokens, seed)
    records = [_record(lm, item, one, task, protocol) for item, one in zip(items, asked, strict=True)]
    if task in CODE_TASKS:
        _run_code(records, items, task, isolation)
    return Evaluation(records, _score(records, task, samples))


def _check(
    tokenizer: PreTrainedTokenizerBase, task: str, protocol: str, samples: int, allowed: bool, isolation: str
) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if protocol not in PROTOCOLS[task]:
        raise ValueError(f"unknown protocol {protocol!r} for {task}; it has {', '.join(PROTOCOLS[task])}")
    if protocol == "chat" and not tokenizer.chat_template:
        raise ValueError("the protocol 'chat' needs a tokenizer with a chat template; take 'paper' or 'harness'")
    if samples < 1 or (samples > 1 and task not in CODE_TASKS):
        raise ValueError(f"{task} takes {'at least 1 sample' if task in CODE_TASKS else '1 sample'}, not {samples}")
    if task in CODE_TASKS:
        if not allowed:
            raise sandbox.SandboxError(
                f"{task} runs programs that a model wrote: set allow_code_execution: true in the profile to allow it"
            )
        level = sandbox.require_level(isolation)
        logging.getLogger(__name__).info("programs run at the level %s (%s)", level, sandbox.active_tool() or "no tool")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without lm-evaluation-harness's notes about models that are held in memory."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _backend(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.api.model import LM

    from semalign.benchmarks.engine import SharedPrefixLM

    if isinstance(model, LM):
        return model
    return SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _ask(
    lm: Any, items: list[Row], task: str, protocol: str, samples: int, max_new_tokens: int | None, seed: int
) -> list[dict[str, Any]]:
    """lm-evaluation-harness's own samples: the arguments and the responses of every question, in order."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    name = f"semalign_{task}_{protocol}"
    folder = Path(__file__).parent / "tasks"
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata={"task": task, "items": items})
    loaded = manager.load([name])
    definition: Any = loaded["tasks"][name]
    if definition.OUTPUT_TYPE == "generate_until":
        options = dict(definition.config.generation_kwargs)
        options["max_gen_toks"] = min(options["max_gen_toks"], max_new_tokens or options["max_gen_toks"])
        definition.set_config("generation_kwargs", options | (SAMPLING if samples > 1 else {}))
        definition.set_config("repeats", samples)
    torch.manual_seed(seed)
    chat = protocol == "chat"
    results: Any = evaluator.evaluate(lm, loaded, bootstrap_iters=0, apply_chat_template=chat)
    return sorted(results["samples"][name], key=lambda s: s["doc_id"])


def _record(lm: Any, item: Row, asked: dict[str, Any], task: str, protocol: str) -> dict[str, Any]:
    """What was asked and answered; ``correct`` is 0 or 1, and set later where programs decide."""
    prompt = asked["arguments"][0][0]
    tokens = len(lm.tok_encode(prompt))
    record: dict[str, Any] = {"task": task, "protocol": protocol, "id": item["id"], "prompt_tokens": tokens}
    if task == "mmlu":
        scores = [float(response[0][0]) for response in asked["resps"]]
        sizes = [len(continuation.encode()) for _, continuation in asked["arguments"]]
        record |= {"subject": item["subject"], "answer": item["answer"], "scores": scores}
        record["too_long"] = max(len(lm.tok_encode(p + c)) for p, c in asked["arguments"]) > lm.max_length
        record["prediction"] = int(np.argmax(scores))
        record["prediction_per_byte"] = int(np.argmax(np.array(scores) / sizes))
        record["correct"] = float(not record["too_long"] and record["prediction"] == item["answer"])
        return record
    responses = list(asked["resps"][0])
    # other backends than ours cut a prompt where it leaves no room for the longest answer
    room = getattr(lm, "room", asked["arguments"][0][1]["max_gen_toks"])
    record |= {"responses": responses, "too_long": tokens + room > lm.max_length, "correct": 0.0}
    if task == "gsm8k":
        gold = answers.gsm8k_gold(item["answer"])
        read = {"strict": answers.strict_number(responses[0]), "flexible": answers.flexible_number(responses[0])}
        for name, value in read.items():
            record[name] = None if value is None else str(value)
            record[f"correct_{name}"] = float(value == gold and not record["too_long"])
        decisive = "strict" if protocol == "harness" else "flexible"
        record |= {"answer": str(gold), "correct": record[f"correct_{decisive}"]}
    return record


def _run_code(records: list[dict[str, Any]], items: list[Row], task: str, isolation: str) -> None:
    programs = [
        answers.program(task, item, text)
        for record, item in zip(records, items, strict=True)
        for text in record["responses"]
    ]
    outcomes = iter(sandbox.run_programs(programs, timeout_s=TIMEOUT_S, isolation=isolation))
    for record in records:
        own = [next(outcomes) for _ in record["responses"]]
        record["passed"] = [o.passed and not record["too_long"] for o in own]
        record["reasons"] = [o.reason for o in own]
        record["correct"] = sum(record["passed"]) / len(own)
        record["isolation"] = sandbox.active_level()


def _score(records: list[dict[str, Any]], task: str, samples: int) -> Score:
    values = np.array([r["correct"] for r in records])
    n = len(values)
    other: dict[str, float] = {}
    if task == "mmlu":
        right = [r["prediction_per_byte"] == r["answer"] and not r["too_long"] for r in records]
        other["per_byte"] = float(np.mean(right))
    if task == "gsm8k":
        other = {name: float(np.mean([r[f"correct_{name}"] for r in records])) for name in ("strict", "flexible")}
    if task in CODE_TASKS:
        passed = [sum(r["passed"]) for r in records]
        ks = [k for k in (1, 10, 100) if k <= samples]
        other = {f"pass@{k}": float(np.mean([answers.pass_at_k(samples, c, k) for c in passed])) for k in ks}
    return Score(
        value=float(values.mean()), stderr=float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        interval=wilson(float(values.mean()), n), n=n, step=1 / (n * samples),
        too_long=sum(r["too_long"] for r in records), other=other,
    )  # fmt: skip


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of ``n`` questions: unlike the normal one it is not empty at 0 and 1."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (max(0.0, middle - half), min(1.0, middle + half))
