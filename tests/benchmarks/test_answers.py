"""Reading numbers and programs out of generated texts."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations

import pytest

from semalign.benchmarks import sandbox
from semalign.benchmarks.answers import flexible_number, gsm8k_gold, number, pass_at_k, program, strict_number
from semalign.benchmarks.data import load_items

NUMBERS = [
    ("#### 18", "18", "18"),
    ("#### 1,234", "1234", "1234"),
    ("She has 3 + 4 = 7 eggs.\n#### 7", "7", "7"),
    ("So the answer is $1,234.50.", "1234.5", "1234.5"),
    ("the answer is: -5", "-5", "-5"),
    ("The answer is −5 degrees", "-5", "-5"),
    ("THE ANSWER IS **42**", "42", "42"),
    ("Answer: 5 and 7 make 12 apples, so the answer is 12 apples.", "12", "12"),
    ("The answer is -$3", "-3", "-3"),
    ("The answer is 20%. That leaves 80%.", "20", "80"),
    ("So the answer is 3. Question: what is 5-3?", "3", "3"),
    ("I paid 5-3", None, "3"),
    ("a loss of (-7)", None, "-7"),
    ("it costs .5 dollars", None, "0.5"),
    ("5km and 6kg", None, "6"),
    ("the answer is 10.0", "10", "10"),
    ("1,234,567 eggs", None, "1234567"),
    ("no number", None, None),
    ("", None, None),
    ("the answer is unknown", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS)
def test_numbers_are_read(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_number(text) == (None if strict is None else Decimal(strict))
    assert flexible_number(text) == (None if flexible is None else Decimal(flexible))


def test_values_are_compared_not_digits() -> None:
    assert (
        number("1,000.00") == Decimal(1000)
        and number("18.") == 18
        and number("abc") is None
        and number("1.2.3") is None
    )


def test_gold_is_behind_the_hashes() -> None:
    assert gsm8k_gold("2 #### 3\n#### 1,024") == 1024
    for bad in ("the answer is 3", "#### none"):
        with pytest.raises(ValueError, match="#### NUMBER"):
            gsm8k_gold(bad)


HUMANEVAL = {
    "prompt": 'from typing import List\n\ndef helper(x): return x\n\ndef f(xs: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}
MBPP = {"test_list": ["assert f(1) == 2", "assert f(2) == 3"], "test_setup_code": "import math"}
RIGHT = [
    ("humaneval", "    return sum(helper(x) for x in xs)\n"),
    ("humaneval", "def f(xs: List[int]) -> int:\n    return sum(map(helper, xs))\n```\nprose ("),
    ("humaneval", "```python\ndef f(xs):\n    return sum(xs)\n```"),
    ("humaneval", "from typing import List\n\n\ndef f(xs):\n    return sum(xs)"),
    ("mbpp", "def f(x):\r\n    return x + 1\r\n"),
    ("mbpp", "def f(x):\n    return x + 1\n```\nThis function (adds"),
    ("mbpp", "def f(x):\n    return x + 1\n[DONE] def"),
]
WRONG = [
    ("humaneval", "    return 4"),
    ("humaneval", ""),
    ("humaneval", "    return sum(xs"),
    ("humaneval", "    return 3\n'''"),
    ("humaneval", "    return 3\nimport sys; sys.exit(0)"),
    ("mbpp", ""),
    ("mbpp", "def f(x): return x + 1\nif 0: pass;\\"),
    ("mbpp", 'def f(x): return 2\nx = """'),
    ("mbpp", "def f(x): return x"),
    ("mbpp", "def f(x):\n    raise SystemExit"),
]


def test_programs_decide_generations() -> None:
    docs = {"humaneval": HUMANEVAL, "mbpp": MBPP}
    outcomes = sandbox.run_programs([program(task, docs[task], text) for task, text in RIGHT + WRONG], timeout_s=10)
    assert [o.passed for o in outcomes] == [True] * len(RIGHT) + [False] * len(WRONG), outcomes


def test_pass_at_k_is_the_chance_that_k_draws_hold_a_right_one() -> None:
    for right in range(6):
        draws = list(combinations([i < right for i in range(5)], 2))
        assert pass_at_k(5, right, 2) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="at least 6"):
        pass_at_k(5, 1, 6)


def test_canonical_solutions_of_humaneval_all_pass() -> None:
    items = load_items("humaneval", "hub")
    programs = [program("humaneval", item, item["canonical_solution"]) for item in items]
    outcomes = sandbox.run_programs(programs, timeout_s=20)
    assert len(outcomes) == 164 and [i["id"] for i, o in zip(items, outcomes, strict=True) if not o.passed] == []
