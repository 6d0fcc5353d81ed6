"""CONTRIBUTING.md: one screen, seven rules, and nothing in it that is not there."""

from __future__ import annotations

import re

import pages

PAGE = (pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_it_is_one_screen_with_seven_rules() -> None:
    assert len(PAGE.splitlines()) <= 60
    assert re.findall(r"^(\d)\. ", pages.section(PAGE, "The rules"), re.MULTILINE) == list("1234567")


def test_what_it_names_is_there() -> None:
    examples = {"book/name.md", "notebooks/NN_name.ipynb"}
    named = set(re.findall(r"`([\w./]+/[\w./]*|\w+\.(?:py|md|yml))`", PAGE)) - examples
    homes = (pages.ROOT, pages.ROOT / "semalign", pages.ROOT / "semalign/benchmarks")
    assert len(named) > 20 and not [path for path in named if not any((home / path).exists() for home in homes)]


def test_every_folder_of_tests_is_told() -> None:
    told = set(re.findall(r"`tests/(\w+)`", pages.section(PAGE, "Which tests run what")))
    folders = {p.name for p in (pages.ROOT / "tests").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert told == folders


def test_its_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", PAGE)) <= targets
