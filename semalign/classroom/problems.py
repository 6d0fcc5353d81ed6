"""Seeded generators of word problems and of small Python programs, each with the signature that decides its split."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

from semalign.classroom.facts import TABLES

# (name, upper bound): a problem's numbers, or a program's code, fall into exactly one split
SPLITS = (("test", 0.12), ("validation", 0.18), ("train", 0.30), ("align", 0.34), ("extract", 0.36), ("pretrain", 1.0))
NAMES, THINGS, BOXES, FUNCTIONS, WORDS = (TABLES[n].split() for n in ("names", "things", "boxes", "functions", "words"))
# an operation is [phrases of one meaning, code]: {k} is a constant, {c} a letter, {} what the operation is applied to
KEEP, EACH, WHOLE, TEXT, MEASURE, COMBINE, NUMBER = (
    TABLES[name] for name in ("keep", "each", "whole", "text", "measure", "combine", "number")
)
LETTERS = "aeiotrn"


def split_of(signature: str) -> str:
    """The split that owns a signature."""
    share = int(sha256(signature.encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, bound in SPLITS if share < bound)


@dataclass(frozen=True)
class WordProblem:
    """A story and what it asks, worked steps as (expression, result), and the sentence that says the result."""

    story: str
    ask: str
    steps: tuple[tuple[str, int], ...]
    closing: str

    @property
    def question(self) -> str:
        """The story and what it asks."""
        return f"{self.story} {self.ask}"

    @property
    def signature(self) -> str:
        """The operations without the story."""
        return "; ".join(e for e, _ in self.steps)

    @property
    def answer(self) -> str:
        """GSM8K's answer: annotated steps, then '#### N'."""
        lines = [f"{e} = <<{e.replace(' ', '')}={r}>>{r}" for e, r in self.steps]
        return "\n".join([*lines, f"#### {self.steps[-1][1]}"])

    @property
    def working(self) -> str:
        """The steps in one line, as LaTen writes GSM8K's answers."""
        return " ".join(f"{e} = {r}." for e, r in self.steps)


def word_problem(rng: random.Random) -> WordProblem:
    """One to four steps over whole numbers, every intermediate result between 0 and 400."""
    name, friend = rng.sample(NAMES, 2)
    thing, box = rng.choice(THINGS), rng.choice(BOXES)
    steps: list[tuple[str, int]] = []
    if rng.random() < 0.35:
        a, b = rng.randint(2, 12), rng.randint(2, 9)
        opening = [f"{name} has {a} {box} with {b} {thing} each.", f"{name} fills {a} {box} with {b} {thing} in each."]
        text = rng.choice(opening)
        steps.append((f"{a} * {b}", a * b))
        total, left = a * b, rng.choice([0, 1, 1, 2, 2, 3])
    else:
        total, left = rng.randint(3, 60), rng.choice([1, 2, 2, 3, 3, 4])
        opening = [
            f"{name} has {total} {thing}.",
            f"{name} finds {total} {thing}.",
            f"There are {total} {thing} in a jar.",
        ]
        text = rng.choice(opening)
    ask, closing = f"How many {thing} are there now?", "There are {n} {thing} now."
    for position in range(left):
        kind = rng.choice(["more", "less", "gift", "times", "half", "share", "price", "rest"])
        n = rng.randint(2, 60)
        last = position == left - 1
        if kind == "less" and total > 4:
            n = rng.randint(2, total - 1)
            sentence = rng.choice([f"{name} loses {n} of them.", f"{name} sells {n} {thing}.", f"{n} of them break."])
            steps.append((f"{total} - {n}", total - n))
        elif kind == "times" and total <= 60:
            n = rng.randint(2, 6)
            word = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"}[n]
            sentence = rng.choice([f"Soon there are {word} as many.", f"{friend} makes it {word} as many."])
            steps.append((f"{total} * {n}", total * n))
        elif kind == "half" and total % 2 == 0 and total > 2:
            sentence = rng.choice([f"{name} gives half of them to {friend}.", "Half of them get lost."])
            steps.append((f"{total} / 2", total // 2))
        elif kind == "share" and last and total > 5:
            n = next((d for d in rng.sample(range(2, 10), 8) if total % d == 0), 1)
            if n == 1:
                n = rng.randint(2, 60)
                sentence = f"{friend} brings {n} more."
                steps.append((f"{total} + {n}", total + n))
            else:
                sentence, ask = f"{n} friends share them equally.", f"How many {thing} does each friend get?"
                closing = "Each friend gets {n} {thing}."
                steps.append((f"{total} / {n}", total // n))
        elif kind == "price" and last and total <= 60:
            n = rng.randint(2, 6)
            sentence, ask = f"{name} sells them all for {n} dollars each.", f"How many dollars does {name} get?"
            closing = f"{name} gets {{n}} dollars."
            steps.append((f"{total} * {n}", total * n))
        elif kind == "rest" and last and total < 90:
            n = total + rng.randint(2, 40)
            sentence, ask = f"{name} wants {n} {thing}.", f"How many {thing} are missing?"
            closing = "Now {n} {thing} are missing."
            steps.append((f"{n} - {total}", n - total))
        else:
            ways = [f"{name} gets {n} more.", f"{friend} brings {n} {thing}.", f"{name} buys {n} more {thing}."]
            sentence = rng.choice(ways)
            steps.append((f"{total} + {n}", total + n))
        text, total = f"{text} {sentence}", steps[-1][1]
    if not 0 <= total <= 400:
        return word_problem(rng)
    return WordProblem(text, ask, tuple(steps), closing.format(n=total, thing=thing))


def easy_problem(rng: random.Random, n_steps: int) -> WordProblem:
    """Steps of more, less and twice as many, every number between 2 and 19."""
    name, friend = rng.sample(NAMES, 2)
    thing, total = rng.choice(THINGS), rng.randint(2, 16)
    text = rng.choice([f"{name} has {total} {thing}.", f"{name} finds {total} {thing}."])
    steps: list[tuple[str, int]] = []
    for _ in range(n_steps):
        kinds = ["more"] * (total <= 17) + ["less"] * (total >= 4) + ["twice"] * (total <= 9)
        kind = rng.choice(kinds)
        if kind == "more":
            n = rng.randint(2, min(9, 19 - total))
            sentence = rng.choice([f"{name} gets {n} more.", f"{friend} brings {n} more.", f"{name} buys {n} more."])
            steps.append((f"{total} + {n}", total + n))
        elif kind == "less":
            n = rng.randint(2, min(9, total - 2))
            sentence = rng.choice([f"{name} loses {n} of them.", f"{name} sells {n} of them.", f"{n} of them break."])
            steps.append((f"{total} - {n}", total - n))
        else:
            sentence = rng.choice(["Soon there are twice as many.", f"{friend} makes it twice as many."])
            steps.append((f"{total} * 2", total * 2))
        text, total = f"{text} {sentence}", steps[-1][1]
    return WordProblem(text, f"How many {thing} are there now?", tuple(steps), f"There are {total} {thing} now.")


@dataclass(frozen=True)
class Program:
    """A function of one expression: its code is its signature."""

    name: str
    params: str
    expression: str
    description: str
    calls: tuple[tuple[str, str], ...]  # four (call, result) pairs as source text

    @property
    def head(self) -> str:
        """The line that opens the function."""
        return f"def {self.name}({self.params}):"

    @property
    def body(self) -> str:
        """The line that ends it."""
        return f"    return {self.expression}"

    @property
    def signature(self) -> str:
        """Parameters and expression: the program without its name and description."""
        return f"{self.params}: {self.expression}"


def _apply(operation: list[str], inner_text: str, inner_code: str, rng: random.Random) -> tuple[str, str]:
    k, c = str(rng.randint(2, 9)), rng.choice(LETTERS)
    phrase = rng.choice(operation[0].split("|")).replace("{k}", k).replace("{c}", c)
    code = operation[1].replace("{{}}", "[{}]").replace("{k}", k).replace("{c}", c)
    return f"{phrase} {inner_text}".strip(), code.replace("{}", inner_code)


def _list_program(rng: random.Random) -> tuple[str, str]:
    noun, condition = _apply(rng.choice(KEEP), "", "", rng) if rng.random() < 0.75 else ("numbers", "")
    text, each = f"the {noun} in xs", "x"
    if not condition or rng.random() < 0.75:
        text, each = _apply(rng.choice(EACH), text, "x", rng)
    inner = f"{each} for x in xs" + (f" if {condition}" if condition else "")
    return _apply(rng.choice(WHOLE), text, inner, rng)


def _text_program(rng: random.Random) -> tuple[str, str]:
    text, code = "s", "s"
    for operation in rng.sample(TEXT, rng.choice([1, 2, 2])):
        text, code = _apply(operation, text, f"({code})" if "*" in code else code, rng)
    if rng.random() < 0.5:
        text, code = _apply(rng.choice(MEASURE), text, f"({code})" if "*" in code else code, rng)
    return text, code


def _number_program(rng: random.Random) -> tuple[str, str]:
    text, code = rng.choice(COMBINE)
    for operation in [*rng.sample(NUMBER[:6], rng.choice([0, 1, 1])), rng.choice(NUMBER)]:
        text, code = _apply(operation, text, code, rng)
    return text, code


FAMILIES = {"xs": _list_program, "s": _text_program, "a, b": _number_program}


@lru_cache(maxsize=4096)  # most programs are met several times, on the way to one of another split
def _function(params: str, code: str) -> Any:
    """The function of a program, which is built from the tables above, never from a model."""
    return eval(f"lambda {params}: {code}")


def program(rng: random.Random, params: str) -> Program:
    """A program over ``xs`` (a list), ``s`` (a text) or ``a, b`` (two numbers), with four calls that were run."""
    text, code = FAMILIES[params](rng)
    name = rng.choice(FUNCTIONS)
    function = _function(params, code)
    calls: list[tuple[str, str]] = []
    for attempt in range(20):
        if params == "xs":
            arguments: tuple[Any, ...] = ([rng.randint(-9, 20) for _ in range(rng.randint(3, 5))],)
        else:
            arguments = (rng.choice(WORDS),) if params == "s" else (rng.randint(1, 30), rng.randint(1, 20))
        if len(calls) == 4:  # arguments are drawn all the same, so that what is drawn next does not depend on results
            continue
        result = repr(function(*arguments))
        if attempt >= 12 or result not in [r for _, r in calls]:  # equal results test little
            calls.append((f"{name}({', '.join(repr(a) for a in arguments)})", result))
    if any(len(result) > 48 for _, result in calls):
        return program(rng, params)
    return Program(name, params, code, text, tuple(calls))
