"""The benchmarks, real and classroom, through one door: :func:`evaluate`.

lm-evaluation-harness builds the requests from a benchmark's row and asks the model, with any of its backends; answers
are read and programs run here, and what became of every single question is kept.
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
from semalign.benchmarks.data import DataError, Row, as_datasets, load_items, overlap, sample, task_data
from semalign.benchmarks.registry import BENCHMARKS, benchmark
from semalign.benchmarks.sandbox.judging import judge

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "DataError",
    "Evaluation",
    "Score",
    "evaluate",
    "load_items",
    "overlap",
    "task_data",
]

PROTOCOLS = {task: tuple(row.protocols) for task, row in BENCHMARKS.items()}
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
        task: a name of ``BENCHMARKS``.
        data: see :func:`semalign.benchmarks.data.load_items`.
        protocol: one of the row's. ``paper``: LaTen's chat wrapper with the user turns of its training data, which are
            Open-Instruct's (arXiv 2306.04751), and the beginning of the answer. ``chat``: the same turns in the
            tokenizer's own chat template. ``harness``: lm-evaluation-harness's prompts.
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
    if benchmark(task).programs:
        _run_code(records, items, task, isolation)
    return Evaluation(records, _score(records, samples if benchmark(task).programs else None))


def _check(
    tokenizer: PreTrainedTokenizerBase, task: str, protocol: str, samples: int, allowed: bool, isolation: str
) -> None:
    asked = benchmark(task)
    if protocol not in asked.protocols:
        raise ValueError(f"unknown protocol {protocol!r} for {task}; it has {', '.join(asked.protocols)}")
    if protocol == "chat" and not tokenizer.chat_template:
        raise ValueError("the protocol 'chat' needs a tokenizer with a chat template; take 'paper' or 'harness'")
    if samples < 1 or (samples > 1 and not asked.programs):
        raise ValueError(f"{task} takes {'at least 1 sample' if asked.programs else '1 sample'}, not {samples}")
    if asked.programs:
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
    from lm_eval.api.task import ConfigurableTask

    definition: Any = ConfigurableTask(config=_definition(task, protocol, items))
    if definition.OUTPUT_TYPE == "generate_until":
        options = dict(definition.config.generation_kwargs)
        options["max_gen_toks"] = min(options["max_gen_toks"], max_new_tokens or options["max_gen_toks"])
        definition.set_config("generation_kwargs", options | (SAMPLING if samples > 1 else {}))
        definition.set_config("repeats", samples)
    torch.manual_seed(seed)
    name = definition.config.task
    loaded: Any = {"tasks": {name: definition}, "groups": {}, "group_map": {}}
    results: Any = evaluator.evaluate(lm, loaded, bootstrap_iters=0, apply_chat_template=protocol == "chat")
    return sorted(results["samples"][name], key=lambda s: s["doc_id"])


def _definition(task: str, protocol: str, items: list[Row]) -> dict[str, Any]:
    """A task of lm-evaluation-harness, zero-shot; its metric is a stand-in, answers are read here."""
    row = benchmark(task)
    settings = dict(row.protocols[protocol])
    if protocol == "chat":
        settings = {"doc_to_text": "user", "gen_prefix": row.opening, **settings}
    if "generation_kwargs" in settings:
        settings["generation_kwargs"] = {"do_sample": False, **settings["generation_kwargs"]}
        kind, metric = "generate_until", {"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}
    else:
        kind, metric = "multiple_choice", {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    return {
        "task": f"semalign_{task}_{protocol}", "custom_dataset": as_datasets, "test_split": "test", "num_fewshot": 0,
        "output_type": kind, "doc_to_target": "answer" if kind == "multiple_choice" else "id",
        "metric_list": [metric], "metadata": {"task": task, "items": items}, **settings,
    }  # fmt: skip


def _record(lm: Any, item: Row, asked: dict[str, Any], task: str, protocol: str) -> dict[str, Any]:
    """What was asked and answered. ``correct`` is set later where programs decide; a prompt that is too long has 0."""
    prompt = asked["arguments"][0][0]
    tokens = len(lm.tok_encode(prompt))
    record: dict[str, Any] = {"task": task, "protocol": protocol, "id": item["id"], "prompt_tokens": tokens}
    given: list[Any]
    if "generation_kwargs" in benchmark(task).protocols[protocol]:
        given = list(asked["resps"][0])
        # other backends than ours cut a prompt where it leaves no room for the longest answer
        room = getattr(lm, "room", asked["arguments"][0][1]["max_gen_toks"])
        record |= {"responses": given, "too_long": tokens + room > lm.max_length, "correct": 0.0}
    else:
        scores = [float(response[0][0]) for response in asked["resps"]]
        given = list(zip([choice for _, choice in asked["arguments"]], scores, strict=True))
        record["scores"] = scores
        record["too_long"] = max(len(lm.tok_encode(p + c)) for p, c in asked["arguments"]) > lm.max_length
    reading = benchmark(task).judge
    record |= reading(item, given, protocol) if reading else {}
    if record["too_long"]:
        record |= {name: 0.0 for name in record if name.startswith("correct")}
    return record


def _run_code(records: list[dict[str, Any]], items: list[Row], task: str, isolation: str) -> None:
    """Run every answer. Other people's models are judged apart; ours write no cheats, and a box serves many of them."""
    asked = [(item, text) for record, item in zip(records, items, strict=True) for text in record["responses"]]
    if isolation == "namespace":
        tasks = [answers.judged(task, item, text) for item, text in asked]
        outcomes = iter(judge(tasks, timeout_s=TIMEOUT_S, isolation=isolation))
    else:
        programs = [answers.program(task, item, text) for item, text in asked]
        outcomes = iter(sandbox.run_programs(programs, timeout_s=TIMEOUT_S, isolation=isolation))
    for record in records:
        of_record = [next(outcomes) for _ in record["responses"]]
        record["passed"] = [o.passed and not record["too_long"] for o in of_record]
        record["reasons"] = [o.reason for o in of_record]
        record["prediction"] = record["reasons"][0]
        record["correct"] = sum(record["passed"]) / len(of_record)
        record["judged"] = of_record[0].judged
        record["isolation"] = sandbox.active_level()


def _score(records: list[dict[str, Any]], samples: int | None) -> Score:
    """The mean; ``samples`` programs a question, None where answers are no programs."""
    values = np.array([r["correct"] for r in records])
    n = len(values)
    readings = [name for name in records[0] if name.startswith("correct_")]
    other = {name.removeprefix("correct_"): float(np.mean([r[name] for r in records])) for name in readings}
    if samples is not None:
        passed = [sum(r["passed"]) for r in records]
        ks = [k for k in (1, 10, 100) if k <= samples]
        other |= {f"pass@{k}": float(np.mean([answers.pass_at_k(samples, c, k) for c in passed])) for k in ks}
    return Score(
        value=float(values.mean()), stderr=float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        interval=wilson(float(values.mean()), n), n=n, step=1 / (n * (samples or 1)),
        too_long=sum(r["too_long"] for r in records), other=other,
    )  # fmt: skip


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of ``n`` questions: unlike the normal one it is not empty at 0 and 1."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (max(0.0, middle - half), min(1.0, middle + half))
