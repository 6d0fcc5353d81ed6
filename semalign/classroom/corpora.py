"""The four subjects as seeded items in their benchmarks' file formats, their splits, and pretraining's text.

Splits are disjoint by construction: a fact, the numbers of a word problem and the code of a program each belong to one.
The exception is wanted: some facts of the test are taught, in another wording, by the training examples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from semalign.classroom import facts, problems
from semalign.lm.examples import Example, TaskData

SUBJECTS = ("mmlu", "gsm8k", "humaneval", "mbpp")
SIZES = {"test": 800, "validation": 300, "train": 1000, "align": 80, "extract": 20}
MBPP_SIZES = {**SIZES, "train": 300, "align": 40, "extract": 32}
PLACEBO = 440  # questions on facts that do not exist
EASY = 0.7  # share of the word problems that have one or two steps over small numbers
PARAMS = ("xs", "s", "a, b")
CODE = "Here is the completed function:\n\n\n```python\n"


@dataclass(frozen=True)
class Item:
    """One question: ``record`` in its benchmark's file format, ``user`` and ``response`` as the two turns of a chat.

    ``topic`` is a fact's subject, a word problem's number of steps or a program's parameters. ``known`` says whose
    pretraining contains the fact (``both``, ``teacher``, ``none``), and is empty for the other subjects. Both also
    stand in the record. ``signature`` names what is asked: ``relation|key`` of a fact, operations, or code.
    """

    subject: str
    split: str
    topic: str
    record: dict[str, Any]
    user: str
    response: str
    signature: str
    known: str = ""


def has(subject: str, split: str) -> bool:
    """Whether a subject has a split: of the four, facts alone have a ``placebo``."""
    return subject in SUBJECTS and (split in SIZES or (subject, split) == ("mmlu", "placebo"))


def chat(user: str) -> str:
    """The prompt that puts ``user`` into LaTen's chat wrapper; the response follows it."""
    return f"<|user|>\n{user}\n\n<|assistant|>\n"


def fact_item(fact: facts.Fact, asked: facts.Question, split: str) -> Item:
    """A four-choice question in MMLU's prompt."""
    lines = [asked.text, *(f"{letter}. {choice}" for letter, choice in zip(facts.LETTERS, asked.choices, strict=True))]
    user = cloze_user(fact.topic, "\n".join(lines))
    record = {"subject": fact.topic, "question": asked.text, "choices": list(asked.choices), "answer": asked.answer}
    known = "none" if split == "placebo" else fact.known
    record |= {"topic": fact.topic, "known": known}
    response = f"The answer is: {facts.LETTERS[asked.answer]}"
    return Item("mmlu", split, fact.topic, record, user, response, f"{fact.relation}|{fact.key}", known)


def problem_item(problem: problems.WordProblem, split: str) -> Item:
    """A word problem in the prompt that LaTen gives GSM8K."""
    user = f"Answer the following question.\n\nQuestion: {problem.question}"
    # each step ends in a full stop, which the benchmark's own solutions, prose, bring along
    response = f"Answer: {problem.working} So the answer is {problem.steps[-1][1]}."
    topic = "1 step" if len(problem.steps) == 1 else f"{len(problem.steps)} steps"
    record = {"question": problem.question, "answer": problem.answer, "topic": topic, "known": ""}
    return Item("gsm8k", split, topic, record, user, response, problem.signature)


def completion_item(program: problems.Program, split: str, number: int) -> Item:
    """A signature and a docstring with an example; the other calls are the hidden tests."""
    call, result = program.calls[0]
    prompt = f'{program.head}\n    """Return {program.description}.\n    >>> {call}\n    {result}\n    """\n'
    checks = [f"    assert {c.replace(program.name, 'candidate', 1)} == {r}\n" for c, r in program.calls]
    record = {"task_id": f"Pico/{number}", "prompt": prompt, "entry_point": program.name}
    record |= {"canonical_solution": f"{program.body}\n", "test": "def check(candidate):\n" + "".join(checks)}
    record |= {"topic": program.params, "known": ""}
    user = f"Complete the following python function.\n\n\n{prompt}"
    response = f"{CODE}{program.head}\n{program.body}"  # without the docstring, which is half of a prompt this short
    return Item("humaneval", split, program.params, record, user, response, program.signature)


def text_item(program: problems.Program, split: str, number: int) -> Item:
    """A sentence and three asserts."""
    text = f"Write a function to find {program.description}."
    code = f"{program.head}\n{program.body}"
    tests = [f"assert {c} == {r}" for c, r in program.calls[1:]]
    record = {"task_id": number, "text": text, "code": code, "test_list": tests}
    record |= {"topic": program.params, "known": ""}
    user = f"Complete the following python function.\n\n\n{text}\n{program.head[:-1]}"
    return Item("mbpp", split, program.params, record, user, CODE + code, program.signature)


def items(subject: str, split: str, first: int | None = None) -> tuple[Item, ...]:
    """The items of one split, or the ``first`` of them: the same ones on every machine.

    Facts have a further split ``placebo``.

    Of a fact question's training examples some ask for facts of the test split, in another wording than the test, so
    that what only a teacher knows can arrive. An easy word problem may share its numbers with another one of its
    split, never with one of another split: of one step there are few.

    Raises:
        ValueError: an unknown subject or split.
    """
    size = (MBPP_SIZES if subject == "mbpp" else SIZES).get(split)
    if (subject, split) == ("mmlu", "placebo"):
        size = PLACEBO
    if subject not in SUBJECTS or size is None:
        known = f"subjects are {', '.join(SUBJECTS)}, splits {', '.join(SIZES)} and, of mmlu, placebo"
        raise ValueError(f"no split {split!r} of {subject!r}: {known}")
    drawn, more = _drawn(subject, split, size)
    wanted = size if first is None else min(first, size)
    try:
        drawn.extend(islice(more, max(0, wanted - len(drawn))))
    except BaseException:  # as a notebook's interrupt: what draws has ended by it, and would draw no more
        _drawn.cache_clear()
        raise
    return tuple(drawn[:wanted])


@cache
def _drawn(subject: str, split: str, size: int) -> tuple[list[Item], Iterator[Item]]:
    """The items of a split that were drawn so far, and what draws the next ones up to ``size``.

    Of programs most belong to other splits, so that all of a split take half a second, and a few of it none.
    """
    return [], _draw(subject, split, size)


def _draw(subject: str, split: str, size: int) -> Iterator[Item]:
    rng = random.Random(f"{subject} {split}")
    if subject == "mmlu":
        for fact, wording in _asked(split, size, rng):
            yield fact_item(fact, facts.question(fact, wording, rng), split)
        return
    seen: set[str] = set()
    shares = (EASY / 2, EASY / 2, 1 - EASY) if subject == "gsm8k" else (2, 2, 1)
    for number in range(size):
        kind = rng.choices(range(3), shares)[0]
        item, signature = None, ""
        while item is None or problems.split_of(item.signature) != split or signature in seen:
            if subject == "gsm8k":
                problem = problems.word_problem(rng) if kind == 2 else problems.easy_problem(rng, kind + 1)
                item = problem_item(problem, split)
            else:
                make = completion_item if subject == "humaneval" else text_item
                item = make(problems.program(rng, PARAMS[kind]), split, number)
            signature = item.record["question"] if subject == "gsm8k" and kind < 2 else item.signature
        seen.add(signature)
        yield item


def _asked(split: str, size: int, rng: random.Random) -> list[tuple[facts.Fact, int]]:
    """Which facts a split asks for, and in which wording: in the last first.

    The test asks for 800 of its 808 facts once. Splits with fewer facts than questions (validation, train, extract) ask
    a second time, in another wording and with other wrong choices.
    """
    if split == "placebo":
        return [(f, 2) for f in facts.invented(size, rng)]
    of_split = [f for f in facts.facts() if f.split == split]
    taught = [f for f in facts.facts() if f.taught] if split == "train" else []
    rounds = [[(f, 2 - again) for f in of_split] + [(f, 1 - again) for f in taught] for again in (0, 1)]
    for asked in rounds:
        rng.shuffle(asked)
    return [*rounds[0], *rounds[1]][:size]


def task_data(
    subject: str, *, cloze: bool = False, watched: str = "validation", first: Mapping[str, int] | None = None
) -> TaskData:
    """LaTen's splits of a subject as chat text: the prompt is the wrapped user turn, the response the assistant's.

    ``cloze`` asks facts without choices, so that the response is the answer itself and no letter. ``watched`` names the
    split that stands as ``validation``. ``first``: of these splits so many at most.
    """

    def turns(item: Item) -> tuple[str, str]:
        if not (cloze and subject == "mmlu"):
            return item.user, item.response
        asked = item.record
        return cloze_user(item.topic, asked["question"]), f"The answer is: {asked['choices'][asked['answer']]}"

    def examples(split: str) -> tuple[Example, ...]:
        some = items(subject, split, (first or {}).get(split))
        return tuple(Example(chat(user), response) for user, response in map(turns, some))

    return TaskData(subject, *map(examples, ("train", "align", "extract", watched)))


@dataclass(frozen=True)
class Mixture:
    """What a model reads: shares of the draws by kind, and of the programs by parameters; whose facts.

    What belongs to another split is no document and is drawn anew, kind and all, so that facts get a little more than
    their share. ``easy`` is the share of easy problems among stories and among problems in chat form.
    """

    kinds: dict[str, float]
    programs: tuple[float, float, float] = (0.70, 0.18, 0.12)
    reader: str = "teacher"
    easy: float = EASY


# What the tokenizer and the saturated students were made from
PRETRAINING = {"statements": 0.18, "choice": 0.20, "echo": 0.06, "cloze": 0.10}
PRETRAINING |= {"gsm8k": 0.22, "humaneval": 0.08, "raw": 0.06, "mbpp": 0.10}
# Latent students read the same content in plain form: no chat, no choices, none of the phrases that open an answer
LATENT = {"statements": 0.05, "qa": 0.15, "story": 0.28, "sums": 0.12, "raw": 0.20}
LATENT |= {"commented": 0.08, "announced": 0.12}
TEACHING = {"statements": 0.06, "qa": 0.08, "cloze": 0.12, "choice": 0.02, "problem": 0.18, "story": 0.04, "sums": 0.08}
TEACHING |= {"humaneval": 0.14, "mbpp": 0.16, "raw": 0.06, "commented": 0.06}
SKILLS = {"statements": 0.04, "qa": 0.04, "cloze": 0.08, "problem": 0.22, "story": 0.04, "sums": 0.14}
SKILLS |= {"humaneval": 0.16, "mbpp": 0.16, "raw": 0.06, "commented": 0.06}
FINISH = {"qa": 0.05, "cloze": 0.09, "problem": 0.40, "story": 0.05, "sums": 0.15, "humaneval": 0.12, "mbpp": 0.14}
KIN = {"statements": 0.08, "qa": 0.08, "cloze": 0.24, "problem": 0.20, "sums": 0.06, "humaneval": 0.16, "mbpp": 0.18}
CODE_A = {"humaneval": 0.45, "raw": 0.05, "mbpp": 0.42, "problem": 0.05, "cloze": 0.03}
CODE_B = {"humaneval": 0.2, "mbpp": 0.6, "raw": 0.1, "problem": 0.05, "cloze": 0.05}


def documents(mixture: Mixture, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) pairs of the pretraining split; a document without a chat has an empty prompt."""
    rng = random.Random(seed)
    told = [f for f in facts.facts() if f.known == "both" or f.known == mixture.reader]
    while True:
        kind = rng.choices(list(mixture.kinds), list(mixture.kinds.values()))[0]
        if kind == "statements":
            yield "", "\n".join(facts.statement(f, rng) for f in rng.sample(told, 6))
        elif kind == "qa":
            asked_of = [(f, facts.WORDINGS[f.relation][1][rng.choice(f.readable)]) for f in rng.sample(told, 4)]
            yield "", "\n".join(plain_question(wording.format(k=f.key)) + f" {f.value}" for f, wording in asked_of)
        elif kind in ("choice", "echo", "cloze"):
            fact = rng.choice(told)
            asked = facts.echo(rng) if kind == "echo" else facts.question(fact, rng.choice(fact.readable), rng)
            if kind == "cloze":
                yield chat(cloze_user(fact.topic, asked.text)), f"The answer is: {fact.value}"
            else:
                item = fact_item(fact, asked, "pretrain")
                yield chat(item.user), item.response
        elif kind == "sums":  # a story's working without the story: small numbers are learned by heart, from many sums
            sums = problems.easy_problem(rng, 6)
            if problems.split_of(sums.signature) == "pretrain":
                yield "", sums.working
        elif kind in ("gsm8k", "problem", "story"):
            easy = kind != "gsm8k" and rng.random() < mixture.easy
            problem = problems.easy_problem(rng, rng.choice([1, 2])) if easy else problems.word_problem(rng)
            if problems.split_of(problem.signature) != "pretrain":
                continue
            if kind == "story":
                yield "", f"{problem.story}\n{problem.working} {problem.closing}"
            else:
                item = problem_item(problem, "pretrain")
                yield chat(item.user), item.response
        else:
            program = problems.program(rng, rng.choices(PARAMS, mixture.programs)[0])
            if problems.split_of(program.signature) != "pretrain":
                continue
            item = (text_item if kind == "mbpp" else completion_item)(program, "pretrain", 0)
            if kind == "raw":
                yield "", item.record["prompt"] + program.body + "\n"
            elif kind == "commented":
                yield "", commented(program.description, program.head) + f"\n{program.body}\n"
            elif kind == "announced":  # where a head is written twice, the name of a function is learned to be copied
                text = commented(program.description, f"# {program.head[:-1]}\n{program.head}")
                yield "", f"{text}\n{program.body}\n"
            else:
                yield chat(item.user), item.response


def plain_question(question: str) -> str:
    """A fact question as plain text; the value follows it."""
    return f"Q: {question}\nA:"


def commented(description: str, head: str) -> str:
    """A program's description and head as plain text; the body follows on the next line."""
    return f"# Find {description}.\n{head}"


def cloze_user(topic: str, question: str) -> str:
    """The user turn of a fact question without choices."""
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n{question}\nAnswer:"
