"""GSM8K: word problems, judged by the number at the end of a worked solution.

The value is the last number of the text (Open-Instruct) under ``paper`` and ``chat``, and lm-evaluation-harness's
strict match under ``harness``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from semalign.benchmarks.answers import NUMBER, last_number, number
from semalign.benchmarks.files import Row
from semalign.benchmarks.registry import Benchmark, read_split

_STATED = re.compile(rf"(?:####|answer\s+is:?)\s*[*_`\"(]*({NUMBER.pattern})", re.IGNORECASE)
# the filters and the metric of lm-evaluation-harness's gsm8k.yaml, version 3
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def stated_number(text: str) -> Decimal | None:
    """The number after ``####`` or "the answer is", GSM8K's and Open-Instruct's own formats; the first such."""
    match = _STATED.search(text)
    return number(match.group(1)) if match else None


def harness_number(text: str, *, strict: bool) -> str | None:
    """What lm-evaluation-harness's filter ``strict-match`` or ``flexible-extract`` takes for the answer."""
    match = _STRICT.search(text) if strict else next(reversed([*_FLEXIBLE.finditer(text)]), None)
    return match.group(match.lastindex or 0).strip() if match else None


def harness_form(text: str) -> str:
    """What lm-evaluation-harness's metric compares, character by character: 7 and 7.0 differ."""
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def gold(answer: str) -> Decimal:
    """The number behind ``####`` in a GSM8K answer.

    Raises:
        ValueError: there is none.
    """
    behind = number(answer.rsplit("####", 1)[-1]) if "####" in answer else None
    if behind is None:
        raise ValueError(f"needs an answer that ends with '#### NUMBER', not {answer[-60:]!r}")
    return behind


def check(row: Row) -> None:
    """Raises ValueError where the answer does not end with its number."""
    gold(row["answer"])


def response(row: Row) -> str:
    """The solution as LaTen writes it: one line, without the calculator's annotations."""
    steps = " ".join(re.sub(r"<<.*?>>", "", row["answer"].rsplit("####", 1)[0]).split())
    return f" {steps} So the answer is {gold(row['answer'])}."


def judge(row: Row, answers: Sequence[str], protocol: str) -> dict[str, Any]:
    """Two readings of one text; the first of them decides."""
    text, right = answers[0], gold(row["answer"])
    said: dict[str, tuple[Any, bool]] = {}  # a reading's name: the number, and whether it is right
    if protocol == "harness":
        for name, strict in (("strict", True), ("flexible", False)):
            taken = harness_number(text, strict=strict)
            form = None if taken is None else harness_form(taken)
            said[name] = (form, form == harness_form(row["answer"]))
    else:
        for name, value in (("flexible", last_number(text)), ("stated", stated_number(text))):
            said[name] = (value, value == right)
    record: dict[str, Any] = {"answer": str(right)}
    for name, (value, is_right) in said.items():
        record |= {name: None if value is None else str(value), f"correct_{name}": float(is_right)}
    decisive = next(iter(said))
    return {**record, "prediction": record[decisive], "correct": record[f"correct_{decisive}"]}


BENCHMARK = Benchmark(
    title="word problems",
    protocols={
        "paper": {"doc_to_text": "paper", "generation_kwargs": {"max_gen_toks": 512, "until": ["<|user|>"]}},
        "chat": {"generation_kwargs": {"max_gen_toks": 512, "until": ["<|im_end|>"]}},
        "harness": {
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "generation_kwargs": {"max_gen_toks": 256, "until": ["Question:", "</s>", "<|im_end|>"]},
        },
    },
    fields={"question": str, "answer": str},
    user=lambda row: f"Answer the following question.\n\nQuestion: {row['question'].strip()}",
    opening="Answer:",
    response=response,
    judge=judge,
    check=check,
    hub=("openai/gsm8k", "main", "740312add88f781978c0658806c59bc2815b9866"),
    read=partial(read_split, "gsm8k"),
    laten="gsm",
)
