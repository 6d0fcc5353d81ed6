"""Reading numbers and programs out of generated texts."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pytest

from semalign.benchmarks import sandbox
from semalign.benchmarks.answers import code_of, last_number, number, pass_at_k, program
from semalign.benchmarks.data import load_items
from semalign.benchmarks.gsm8k import BENCHMARK, gold, stated_number

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


@pytest.mark.parametrize(("text", "stated", "last"), NUMBERS)
def test_numbers_are_read(text: str, stated: str | None, last: str | None) -> None:
    assert stated_number(text) == (None if stated is None else Decimal(stated))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_values_are_compared_not_digits() -> None:
    assert (
        number("1,000.00") == Decimal(1000)
        and number("18.") == 18
        and number("abc") is None
        and number("1.2.3") is None
    )


def test_gold_is_behind_the_hashes() -> None:
    assert gold("2 #### 3\n#### 1,024") == 1024
    for bad in ("the answer is 3", "#### none"):
        with pytest.raises(ValueError, match="#### NUMBER"):
            gold(bad)


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


BODY = "def f(x):\n    return x + 1\n"
FENCED = [
    BODY,
    f"```python\n{BODY}```",
    f"```\n{BODY}```\nIt adds one.",
    f"```Python\n{BODY}```",
    f"``` python \r\n{BODY}".replace("\n", "\r\n").replace("\r\r", "\r"),
    f"\n```py\n{BODY}\n```\n```python\nf(1)\n```",
    f"```\nHere it is, once more:\n```python\n{BODY}```",
    f"```\n```\n{BODY}```",
    f"{BODY}\r\n```\r\nprose (",
    f"\n\n```PYTHON3\r\n{BODY}",
    f"```\n{BODY}```\nCall it:\n```python\nf(2)\n```",
]


@pytest.mark.parametrize("text", FENCED)
def test_a_block_of_code_may_be_opened_once_more(text: str) -> None:
    code = code_of(text)
    assert code.replace("\r\n", "\n").strip() == BODY.strip()
    assert sandbox.run_programs([program("mbpp", MBPP, text)])[0].passed


def test_a_body_in_a_plain_block_and_an_empty_answer() -> None:
    assert code_of("```\n    return 3\n```") == "    return 3\n"
    assert code_of("```") == code_of("") == code_of("```python\n") == ""
    assert code_of("x = '''```'''\ny = 1\n```\nprose") == "x = '''```'''\ny = 1"


FUTURE = "from __future__ import annotations\n\n"


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("mbpp", f"{FUTURE}def f(x: Unknown) -> Unknown:\n    return x + 1\n"),
        ("mbpp", f'"""Adds."""\n{FUTURE}def f(x: Unknown):\n    return x + 1\n'),
        ("humaneval", f"{FUTURE}def f(xs: Unknown) -> int:\n    return sum(helper(x) for x in xs)\n"),
        ("humaneval", "from __future__ import (\n    annotations,\n)\n\ndef f(xs: Unknown):\n    return sum(xs)\n"),
        ("humaneval", "from __future__ import annotations  # typing\r\n\r\ndef f(xs: Unknown):\r\n    return sum(xs)"),
    ],
)
def test_imports_from_the_future_survive_what_is_put_around_them(task: str, text: str) -> None:
    doc = {"humaneval": HUMANEVAL, "mbpp": MBPP}[task]
    assert sandbox.run_programs([program(task, doc, text)])[0].reason == "passed"


TRICKY = [
    "#### 42", "####42", "#### $42", "The answer is 42", "so 42. #### 42.", "#### 42.0", "#### -42", "#### 4,2",
    "####  42", "#### 7 #### 42", "#### 42 #### 7", "#### 42 eggs", "#### .", "42", "it is $42", "42.", "-42",
    "7 and 42%", "", "#### 042", "#### 1,000", "#### 1000.", "a #### 1,000,", "1000", "1,000 eggs", "$1,000.",
    "#### 1000.00", "so 1,000.\n\n#### 1,000",
]  # fmt: skip


def test_gsm8k_under_harness_is_lm_evaluation_harness() -> None:
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    definition = yaml.safe_load(path.read_text())
    metric = {k: v for k, v in definition["metric_list"][0].items() if k.startswith(("regexes", "ignore"))}
    filters = {
        one["name"]: {k: v for k, v in one["filter"][0].items() if k != "function"} for one in definition["filter_list"]
    }
    assert BENCHMARK.judge is not None
    for answer in ("40 + 2\n#### 42", "lots\n#### 1,000", "less\n#### -42"):
        for text in TRICKY:
            judged = BENCHMARK.judge({"answer": answer}, [text], "harness")
            for name, filter_name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
                taken = RegexFilter(**filters[filter_name]).apply([[text]], [{}])
                (said,) = next(iter(taken))
                right = exact_match_hf_evaluate(predictions=[said], references=[answer], **metric)["exact_match"]
                assert judged[f"correct_{name}"] == right, (answer, text, name)
            assert judged["correct"] == judged["correct_strict"]


def test_our_reading_has_a_name_of_its_own() -> None:
    assert BENCHMARK.judge is not None
    judged = BENCHMARK.judge({"answer": "#### 42"}, ["The answer is 42. Or 7?"], "paper")
    assert (judged["stated"], judged["flexible"], judged["correct"], judged["prediction"]) == ("42", "7", 0.0, "7")
    assert "strict" not in judged
