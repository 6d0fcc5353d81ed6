"""What several benchmarks read out of a generated text: a number, or the program in it; and pass@k."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from semalign.benchmarks.sandbox.judging import Task

CODE = "Here is the completed function:\n\n\n```python\n"
"""How an answer begins that is a program."""
# A minus is a sign where no operand stands before it: "5-3" holds 5 and 3.
NUMBER = re.compile(
    r"(?:(?<![\w).%])[-−])?(?:[$€£]\s?[-−]?)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
# A line that opens or closes a block of code: ```python, ``` Python, ```py, ``` and so on.
_FENCE = re.compile(r"^[ \t]*`{3,}[ \t]*([\w+.-]*)[ \t]*\r?(?:\n|\Z)", re.MULTILINE)
_END = re.compile(r"\r?\n```|\[DONE\]")
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]*(?:\([^)]*\)|[^\n#;]*)", re.MULTILINE)


def number(text: str) -> Decimal | None:
    """The value of one written number: ``$1,234.50``, ``-3``, ``.5``; ``None`` where it is not one."""
    digits = re.sub(r"[,$€£\s]", "", text.strip().replace("−", "-")).removesuffix(".")
    return Decimal(digits) if re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", digits) else None


def last_number(text: str) -> Decimal | None:
    """The last number of the text."""
    numbers = NUMBER.findall(text)
    return number(numbers[-1]) if numbers else None


def code_of(text: str) -> str:
    """The code of an answer whose prompt has opened a block of code, or that opens one (once more) at its beginning.

    It ends with its block, or with MBPP's ``[DONE]``. Of several blocks it is the first, if that one names a language;
    else the first that defines a function, the first that names a language, or the first that is not empty.
    """
    fences = list(_FENCE.finditer(text)) if text.lstrip().startswith("```") else []
    if fences:
        ends = [fence.start() for fence in fences[1:]] + [len(text)]
        blocks = [(fence[1], text[fence.end() : end]) for fence, end in zip(fences, ends, strict=True)]
        wanted = [body for language, body in blocks[:1] if language]
        wanted += [body for _, body in blocks if re.search(r"^(?:async )?def ", body, re.MULTILINE)]
        wanted += [body for language, body in blocks if language] + [body for _, body in blocks if body.strip()]
        text = next(iter(wanted), "")
    return _END.split(text, maxsplit=1)[0]


def hoisted(head: str, code: str) -> str:
    """``head`` and then ``code``, whose ``from __future__`` imports go first, where alone they may stand."""
    futures = "".join(f"{line.strip()}\n" for line in _FUTURE.findall(code))
    return futures + head + (_FUTURE.sub("pass", code) if futures else code)


def program(task: str, doc: dict[str, Any], generation: str) -> str:
    """The complete program, solution and tests, that decides one answer to a benchmark of programs.

    The solution is compiled by itself, so that it cannot reach into the tests by an open string or bracket, and its
    ``from __future__`` imports are its own.
    """
    return judged(task, doc, generation).whole


def judged(task: str, doc: dict[str, Any], generation: str) -> Task:
    """One answer to a benchmark of programs, with what judges it.

    Raises:
        ValueError: the answers of this benchmark are not programs.
    """
    from semalign.benchmarks.registry import benchmark  # whose rows import this module

    row = benchmark(task)
    if row.solution is None or row.tests is None:
        raise ValueError(f"the answers of {task} are not programs: judge them by its own row")
    code, tests = row.solution(doc, code_of(generation)), "\n".join(row.tests(doc))
    return Task(
        solution=code, tests=tests, head=row.head(doc) if row.head else "", inside=bool(row.inside and row.inside(doc)),
        names=tuple(row.names(doc)) if row.names else (),
        whole=f"exec(compile({code!r}, '<solution>', 'exec'), globals())\n{tests}",
    )  # fmt: skip


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from ``correct`` of ``n`` samples: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}: draw more, or choose a smaller k")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
