"""Why an answer is wrong: the steps of a worked solution, the fate of a program, the asserts that it satisfies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from semalign.benchmarks import sandbox
from semalign.benchmarks.answers import program

_NUMBER = r"[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?"
_TERM = rf"\(?\s*{_NUMBER}\s*\)?"
_STEP = re.compile(rf"({_TERM}(?:\s*[-+*/×÷−]\s*{_TERM})+)\s*=\s*([-−]?\s*{_NUMBER})")

WORKING = ("right", "slip", "another plan", "unfinished", "no working", "not asked")
"""What can become of a worked solution: see :func:`diagnose`."""

PROGRAMS = ("passed", "wrong value", "unknown name", "error", "no program", "time or output", "stopped", "not asked")
"""What can become of a program: see :func:`fate`."""

_FATES = {
    "AssertionError": "wrong value",
    "NameError": "unknown name", "UnboundLocalError": "unknown name",
    "ImportError": "unknown name", "ModuleNotFoundError": "unknown name",
    "SyntaxError": "no program", "IndentationError": "no program", "TabError": "no program",
}  # fmt: skip


def steps(text: str) -> list[tuple[str, float]]:
    """The steps ``a + b = c`` of a worked solution, in order: (expression in one spelling, the result it is given).

    Currency, separators of thousands and spaces do not count, nor the order of the terms of one sum or one product.
    """
    return [(_spelling(expression), _value(result)) for expression, result in _STEP.findall(text)]


def annotated(answer: str) -> list[tuple[str, float]]:
    """The steps that a GSM8K answer annotates, ``<<a+b=c>>``; none where it annotates none."""
    return steps(" ; ".join(re.findall(r"<<(.*?)>>", answer)))


def _value(number: str) -> float:
    digits = re.sub(r"[^\d.%-]", "", number.replace("−", "-"))
    return float(digits.removesuffix("%")) / (100 if digits.endswith("%") else 1)


def _spelling(expression: str) -> str:
    expression = re.sub(r"[\s$€£,]", "", expression).replace("×", "*").replace("÷", "/").replace("−", "-")
    for sign in "+*":
        terms = expression.strip("()").split(sign)
        if all(re.fullmatch(_NUMBER, term) for term in terms):
            return sign.join(f"{value:g}" for value in sorted(map(_value, terms)))
    return re.sub(_NUMBER, lambda number: f"{_value(number[0]):g}", expression)


def diagnose(response: str, answer: str, correct: bool) -> str:
    """What a worked solution comes to, one of ``WORKING``, by its first step that is not one of the annotated ones.

    ``slip``: the step's expression is annotated and its result is another. ``another plan``: its expression is not
    annotated, which an equally good plan's need not be; so only wrong answers are looked at. ``unfinished``: what is
    written is as annotated, and the answer is wrong all the same. ``no working``: no step can be read.
    """
    if correct:
        return "right"
    written, reference = steps(response), annotated(answer)
    if not written:
        return "no working"
    results = dict(reference)
    for expression, result in written:
        if expression not in results:
            return "another plan"
        if abs(results[expression] - result) > 1e-6:
            return "slip"
    return "unfinished"


def fate(reason: str) -> str:
    """What became of a program, one of ``PROGRAMS``, by what the sandbox says: its exception, or how it ended."""
    if reason == "passed":
        return "passed"
    if reason in ("timed out", "too much output"):
        return "time or output"
    error = re.match(r"stopped: (\w+(?:Error|Exception|Iteration|Warning))\b", reason)
    return _FATES.get(error[1], "error") if error else "stopped"


def worked(answer: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What became of a trial's answer to a word problem, one of ``WORKING``."""
    if answer["too_long"]:
        return "not asked"
    return diagnose(answer["response"], row["answer"], answer["correct"] > 0)


def ran(answer: Mapping[str, Any], _row: Mapping[str, Any]) -> str:
    """What became of a trial's program, one of ``PROGRAMS``."""
    return "not asked" if answer["too_long"] else fate(answer["prediction"])


def asserts_held(rows: Sequence[Mapping[str, Any]], responses: Sequence[str], isolation: str) -> list[list[bool]]:
    """Which of its MBPP question's asserts each response satisfies, every assert run by itself in the sandbox.

    Raises:
        SandboxError: the machine isolates programs less than ``isolation``.
    """
    asked = [{**row, "test_list": [one]} for row in rows for one in row["test_list"]]
    texts = [text for row, text in zip(rows, responses, strict=True) for _ in row["test_list"]]
    programs = [program("mbpp", one, text) for one, text in zip(asked, texts, strict=True)]
    outcomes = iter(sandbox.run_programs(programs, isolation=isolation))
    return [[next(outcomes).passed for _ in row["test_list"]] for row in rows]
