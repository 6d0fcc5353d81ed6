"""Why an answer is wrong: worked solutions, exceptions and asserts whose diagnosis is known."""

from __future__ import annotations

import pytest

from semalign.benchmarks import sandbox
from semalign.study.answers import PROGRAMS, WORKING, annotated, asserts_held, diagnose, fate, ran, steps, worked

ANSWER = "Ann packs 12 * 5 = <<12*5=60>>60 pens.\nThen 60 + 7 = <<60+7=67>>67.\n#### 67"


def test_steps_are_read_in_one_spelling() -> None:
    assert steps("12 * 5 = 60. 60 + 7 = 67. So the answer is 67.") == [("5*12", 60.0), ("7+60", 67.0)]
    assert steps("5×12=60") == steps("12 * 5 = $60") == [("5*12", 60.0)]
    assert steps("She pays $1,200 - $200.50 = $999.50") == [("1200-200.5", 999.5)]
    assert steps("(3 + 4) * 2 = 14") == [("(3+4)*2", 14.0)]
    assert steps("20 - 5 = −15") == [("20-5", -15.0)]
    assert steps("The answer is 67, x = 3 and 12 pens") == []


def test_annotations_are_the_reference() -> None:
    assert annotated(ANSWER) == [("5*12", 60.0), ("7+60", 67.0)]
    assert annotated("Half of 48/2 = <<48/2=24>>24, and 25% is <<24*.25=6>>6.\n#### 6") == [
        ("48/2", 24.0),
        ("0.25*24", 6.0),
    ]
    assert annotated("no working\n#### 3") == []


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("12 * 5 = 50. 50 + 7 = 57. So the answer is 57.", "slip"),
        ("5 * 12 = 60. 60 + 7 = 68. So the answer is 68.", "slip"),
        ("12 + 5 = 17. 17 + 7 = 24. So the answer is 24.", "another plan"),
        ("12 * 5 = 60. 60 - 7 = 53. So the answer is 53.", "another plan"),
        ("12 * 5 = 60. So the answer is 60.", "unfinished"),
        ("12 * 5 = 60. 60 + 7 = 67. So the answer is 6.", "unfinished"),
        ("I do not know: 4.", "no working"),
        ("", "no working"),
    ],
)
def test_the_first_step_that_differs_decides(response: str, wanted: str) -> None:
    assert diagnose(response, ANSWER, False) == wanted
    assert diagnose(response, ANSWER, True) == "right"
    assert wanted in WORKING


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("passed", "passed"),
        ("stopped: AssertionError:", "wrong value"),
        ("stopped: NameError: name 'ys' is not defined", "unknown name"),
        ("stopped: SyntaxError: '(' was never closed (<solution>, line 2)", "no program"),
        ("stopped: IndentationError: unexpected indent (<solution>, line 3)", "no program"),
        ("stopped: TypeError: 'int' object is not iterable", "error"),
        ("timed out", "time or output"),
        ("too much output", "time or output"),
        ("stopped: refused: open ('/etc/passwd',)", "stopped"),
        ("stopped: hello", "stopped"),
        ("ended early", "stopped"),
    ],
)
def test_the_sandbox_says_why_a_program_failed(reason: str, wanted: str) -> None:
    assert fate(reason) == wanted
    assert wanted in PROGRAMS


def test_every_assert_is_run_by_itself() -> None:
    row = {"test_list": ["assert double(0) == 0", "assert double(2) == 4", "assert double(3) == 6"]}
    bodies = ["return x * 2", "return x * x", "return x + 3", "return y", "return ("]
    held = asserts_held([row] * 5, [f"def double(x):\n    {body}" for body in bodies], "rlimits")
    assert held == [[True] * 3, [True, True, False], [False, False, True], [False] * 3, [False] * 3]


def test_the_words_are_those_of_the_sandbox_itself() -> None:
    programs = ["assert 1 == 2", "print(ys)", "compile('return (', '<solution>', 'exec')", "1 / 0", "pass"]
    found = [fate(o.reason) for o in sandbox.run_programs(programs)]
    assert found == ["wrong value", "unknown name", "no program", "error", "passed"]


def test_what_was_not_asked_is_not_judged() -> None:
    said = {"too_long": True, "response": "", "prediction": "stopped: NameError: x", "correct": 0.0}
    assert worked(said, {"answer": ANSWER}) == ran(said, {}) == "not asked"
    asked = {**said, "too_long": False}
    assert (worked(asked, {"answer": ANSWER}), ran(asked, {})) == ("no working", "unknown name")
