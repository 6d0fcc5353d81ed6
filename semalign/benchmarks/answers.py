"""Reading answers: the number in a worked solution, and the program in a generated text."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

# A minus is a sign where no operand stands before it: "5-3" holds 5 and 3.
NUMBER = re.compile(
    r"(?:(?<![\w).%])[-−])?(?:[$€£]\s?[-−]?)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_STRICT = re.compile(rf"(?:####|answer\s+is:?)\s*[*_`\"(]*({NUMBER.pattern})", re.IGNORECASE)


def number(text: str) -> Decimal | None:
    """The value of one written number: ``$1,234.50``, ``-3``, ``.5``; ``None`` where it is not one."""
    digits = re.sub(r"[,$€£\s]", "", text.strip().replace("−", "-")).removesuffix(".")
    return Decimal(digits) if re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", digits) else None


def strict_number(text: str) -> Decimal | None:
    """The number after ``####`` or "the answer is", GSM8K's and Open-Instruct's own formats; the first such."""
    found = _STRICT.search(text)
    return number(found.group(1)) if found else None


def flexible_number(text: str) -> Decimal | None:
    """The last number of the text."""
    found = NUMBER.findall(text)
    return number(found[-1]) if found else None


def gsm8k_gold(answer: str) -> Decimal:
    """The number behind ``####`` in a GSM8K answer.

    Raises:
        ValueError: there is none.
    """
    gold = number(answer.rsplit("####", 1)[-1]) if "####" in answer else None
    if gold is None:
        raise ValueError(f"a GSM8K answer ends with '#### NUMBER', this one does not: {answer[-60:]!r}")
    return gold


def program(task: str, doc: dict[str, Any], generation: str) -> str:
    """The complete program, solution and tests, that decides one HumanEval or MBPP generation.

    The solution alone has to compile first, so that it cannot reach into the tests by an open string or bracket.
    """
    code = generation.split("```python\n", 1)[-1] if generation.lstrip().startswith("```") else generation
    code = code.split("\n```", 1)[0].split("[DONE]", 1)[0]
    if task == "mbpp":
        tests = [doc.get("test_setup_code", ""), *doc["test_list"]]
    else:
        tests = [doc["test"], f"check({doc['entry_point']})"]
        head = re.split(rf"^def {re.escape(doc['entry_point'])}\b", doc["prompt"], maxsplit=1, flags=re.MULTILINE)[0]
        whole = re.search(rf"^(async )?def {re.escape(doc['entry_point'])}\b", code, re.MULTILINE)
        code = (head if whole else doc["prompt"]) + code
    return "\n".join([f"compile({code!r}, '<solution>', 'exec')", code, *tests])


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from ``correct`` of ``n`` samples: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
