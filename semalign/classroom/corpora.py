"""The four subjects as seeded items in their benchmarks' file formats, their splits, and pretraining's text.

Splits are disjoint by construction: a fact, the numbers of a word problem and the code of a program each belong to one.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from semalign.classroom import facts, problems
from semalign.lm.examples import Example, TaskData
from semalign.lm.files import write_text

SUBJECTS = ("mmlu", "gsm8k", "humaneval", "mbpp")
SIZES = {"test": 500, "validation": 300, "train": 1000, "align": 80, "extract": 20}
MBPP_SIZES = {**SIZES, "train": 300, "align": 40, "extract": 32}
PARAMS = ("xs", "s", "a, b")
CODE = "Here is the completed function:\n\n\n```python\n"


@dataclass(frozen=True)
class Item:
    """One question: ``record`` in its benchmark's file format, ``user`` and ``response`` as the two turns of a chat.

    ``topic`` is a fact's subject, a word problem's number of steps or a program's parameters. ``known`` says whose
    pretraining contains the fact (``both``, ``teacher``, ``none``), and is empty for the other subjects.
    """

    subject: str
    split: str
    topic: str
    record: dict[str, Any]
    user: str
    response: str
    signature: str
    known: str = ""


def chat(user: str) -> str:
    """The prompt that puts ``user`` into LaTen's chat wrapper; the response follows it."""
    return f"<|user|>\n{user}\n\n<|assistant|>\n"


def fact_item(fact: facts.Fact, asked: facts.Question, split: str) -> Item:
    """A four-choice question in MMLU's prompt."""
    lines = [asked.text, *(f"{letter}. {choice}" for letter, choice in zip(facts.LETTERS, asked.choices, strict=True))]
    user = cloze_user(fact.topic, "\n".join(lines))
    record = {"subject": fact.topic, "question": asked.text, "choices": list(asked.choices), "answer": asked.answer}
    response = f"The answer is: {facts.LETTERS[asked.answer]}"
    return Item("mmlu", split, fact.topic, record, user, response, f"{fact.relation}|{fact.key}", fact.known)


def problem_item(problem: problems.WordProblem, split: str) -> Item:
    """A word problem in the prompt that LaTen gives GSM8K."""
    user = f"Answer the following question.\n\nQuestion: {problem.question}"
    response = f"Answer: {problem.working} So the answer is {problem.steps[-1][1]}."
    record = {"question": problem.question, "answer": problem.answer}
    return Item("gsm8k", split, f"{len(problem.steps)} steps", record, user, response, problem.signature)


def completion_item(program: problems.Program, split: str, number: int) -> Item:
    """A signature and a docstring with an example; the other calls are the hidden tests."""
    call, result = program.calls[0]
    prompt = f'{program.head}\n    """Return {program.description}.\n    >>> {call}\n    {result}\n    """\n'
    checks = [f"    assert {c.replace(program.name, 'candidate', 1)} == {r}\n" for c, r in program.calls]
    record = {"task_id": f"Pico/{number}", "prompt": prompt, "entry_point": program.name}
    record |= {"canonical_solution": f"{program.body}\n", "test": "def check(candidate):\n" + "".join(checks)}
    user = f"Complete the following python function.\n\n\n{prompt}"
    response = f"{CODE}{program.head}\n{program.body}"
    return Item("humaneval", split, program.params, record, user, response, program.signature)


def text_item(program: problems.Program, split: str, number: int) -> Item:
    """A sentence and three asserts."""
    text = f"Write a function to find {program.description}."
    code = f"{program.head}\n{program.body}"
    tests = [f"assert {c} == {r}" for c, r in program.calls[1:]]
    record = {"task_id": number, "text": text, "code": code, "test_list": tests}
    user = f"Complete the following python function.\n\n\n{text}\n{program.head[:-1]}"
    return Item("mbpp", split, program.params, record, user, CODE + code, program.signature)


@cache
def items(subject: str, split: str) -> tuple[Item, ...]:
    """The items of one split: the same ones on every machine. Raises ValueError for an unknown subject or split."""
    size = (MBPP_SIZES if subject == "mbpp" else SIZES).get(split)
    if subject not in SUBJECTS or size is None:
        known = f"subjects are {', '.join(SUBJECTS)}, splits {', '.join(SIZES)}"
        raise ValueError(f"no split {split!r} of {subject!r}: {known}")
    rng = random.Random(f"{subject} {split}")
    found: list[Item] = []
    if subject == "mmlu":
        pool = [f for f in facts.facts() if f.split == split]
        rng.shuffle(pool)
        found = [fact_item(f, facts.question(f, 2, rng), split) for f in pool]
        if len(found) < size:
            found += [fact_item(f, facts.question(f, 1, rng), split) for f in pool]
        return tuple(found[:size])
    seen: set[str] = set()
    while len(found) < size:
        if subject == "gsm8k":
            item = problem_item(problems.word_problem(rng), split)
        else:
            params = rng.choices(PARAMS, (2, 2, 1))[0]
            make = completion_item if subject == "humaneval" else text_item
            item = make(problems.program(rng, params), split, len(found))
        if problems.split_of(item.signature) == split and item.signature not in seen:
            seen.add(item.signature)
            found.append(item)
    return tuple(found)


def task_data(subject: str, *, cloze: bool = False, watched: str = "validation") -> TaskData:
    """LaTen's splits of a subject as chat text: the prompt is the wrapped user turn, the response the assistant's.

    ``cloze`` asks facts without choices, so that the response is the answer itself and no letter. ``watched`` names the
    split that stands as ``validation``.
    """

    def turns(item: Item) -> tuple[str, str]:
        if not (cloze and subject == "mmlu"):
            return item.user, item.response
        asked = item.record
        return cloze_user(item.topic, asked["question"]), f"The answer is: {asked['choices'][asked['answer']]}"

    def examples(split: str) -> tuple[Example, ...]:
        return tuple(Example(chat(user), response) for user, response in map(turns, items(subject, split)))

    return TaskData(subject, *map(examples, ("train", "align", "extract", watched)))


def write_data(folder: str | Path) -> Path:
    """Write every split in the benchmarks' own file formats: mmlu/SPLIT/TOPIC_SPLIT.csv, SUBJECT/SPLIT.jsonl."""
    folder = Path(folder)
    for subject in SUBJECTS:
        for split in SIZES:
            rows = items(subject, split)
            if subject != "mmlu":
                write_text(folder / subject / f"{split}.jsonl", "".join(json.dumps(i.record) + "\n" for i in rows))
                continue
            for topic in sorted({i.topic for i in rows}):
                buffer = io.StringIO()
                writer = csv.writer(buffer, lineterminator="\n")
                writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                own = [i.record for i in rows if i.topic == topic]
                writer.writerows([r["question"], *r["choices"], r["answer"]] for r in own)
                write_text(folder / "mmlu" / split / f"{topic.replace(' ', '_')}_{split}.csv", buffer.getvalue())
    return folder


@dataclass(frozen=True)
class Mixture:
    """What a model reads: shares of the documents by kind, and of the programs by parameters; whose facts."""

    kinds: dict[str, float]
    programs: tuple[float, float, float] = (0.70, 0.18, 0.12)
    reader: str = "teacher"


PRETRAINING = {"statements": 0.18, "choice": 0.20, "echo": 0.06, "cloze": 0.10}
PRETRAINING |= {"gsm8k": 0.22, "humaneval": 0.08, "raw": 0.06, "mbpp": 0.10}
SKILLS = {"gsm8k": 0.42, "humaneval": 0.14, "raw": 0.08, "mbpp": 0.18}
SKILLS |= {"statements": 0.08, "cloze": 0.07, "choice": 0.03}
CODE_A = {"humaneval": 0.45, "raw": 0.05, "mbpp": 0.42, "gsm8k": 0.05, "choice": 0.03}
CODE_B = {"humaneval": 0.2, "mbpp": 0.6, "raw": 0.1, "gsm8k": 0.05, "choice": 0.05}


def documents(mixture: Mixture, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) pairs of the pretraining split; a document without a chat has an empty prompt."""
    rng = random.Random(seed)
    told = [f for f in facts.facts() if f.known == "both" or f.known == mixture.reader]
    while True:
        kind = rng.choices(list(mixture.kinds), list(mixture.kinds.values()))[0]
        if kind == "statements":
            yield "", "\n".join(facts.statement(f, rng) for f in rng.sample(told, 6))
        elif kind in ("choice", "echo", "cloze"):
            fact = rng.choice(told)
            # an evaluated fact is never asked here in the wordings of its own questions
            wordings = {"pretrain": (0, 1, 2), "test": (0, 1)}.get(fact.split, (0,))
            asked = facts.echo(rng) if kind == "echo" else facts.question(fact, rng.choice(wordings), rng)
            item = fact_item(fact, asked, "pretrain")
            if kind == "cloze":
                yield chat(cloze_user(fact.topic, asked.text)), f"The answer is: {fact.value}"
            else:
                yield chat(item.user), item.response
        elif kind == "gsm8k":
            problem = problems.word_problem(rng)
            if problems.split_of(problem.signature) == "pretrain":
                item = problem_item(problem, "pretrain")
                yield chat(item.user), item.response
        else:
            program = problems.program(rng, rng.choices(PARAMS, mixture.programs)[0])
            if problems.split_of(program.signature) == "pretrain":
                item = (text_item if kind == "mbpp" else completion_item)(program, "pretrain", 0)
                if kind == "raw":
                    yield "", item.record["prompt"] + program.body + "\n"
                else:
                    yield chat(item.user), item.response


def cloze_user(topic: str, question: str) -> str:
    """The user turn of a fact question without choices."""
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n{question}\nAnswer:"
