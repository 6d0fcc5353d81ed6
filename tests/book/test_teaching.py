"""What the prose pages tell a reader to type: parameters, targets and a profile that exist."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pages
import pytest
import yaml

from semalign.pipeline.notebooks import missing
from semalign.profiles import FOLDER, load_profile

PAGES = ("teaching", "rerun", "method", "frame", "your_pair", "exercises", "citing")
TEACHING = pages.text("teaching")


def parameters(notebook: str) -> set[str]:
    cells = nbformat.read(pages.ROOT / notebook, as_version=4).cells
    (given,) = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    return set(re.findall(r"^(\w+) =", given, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_targets_and_parameters_that_exist(page: str) -> None:
    blocks = pages.code(pages.text(page), "bash")
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    makefile = (pages.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) +\??:?=", makefile, re.MULTILINE))
    for line in lines:
        command = line.split("#")[0].split()
        if command[:1] == ["make"]:
            assert {word for word in command[1:] if "=" not in word} <= targets
            assert {word.split("=")[0] for word in command[1:] if "=" in word} <= variables
        if command and command[0].endswith("papermill"):
            assert set(re.findall(r"-p (\w+)", line)) <= parameters(command[1])


def test_every_chapter_of_a_plan_is_linked_from_it() -> None:
    plans = {"Plan A: how the method works": ["00", "01", "02", "03"]}
    plans["Plan B: does it work, and how would we know?"] = ["04", "04b", "12", "15"]
    for plan, chapters in plans.items():
        linked = set(re.findall(r"notebooks/(\d+b?)_\w+\.ipynb", pages.section(TEACHING, plan)))
        assert set(chapters) <= linked


@pytest.mark.parametrize("plan", ["Plan A: how the method works", "Plan B: does it work, and how would we know?"])
def test_a_plan_fills_ninety_minutes_without_a_gap(plan: str) -> None:
    spans = [row[0].split(" to ") for row in pages.rows(pages.section(TEACHING, plan))[1:]]
    ends = [0, *(int(end) for _, end in spans)]
    assert [int(start) for start, _ in spans] == ends[:-1] and ends[-1] == 90


def test_the_profile_without_programs_is_the_classrooms_and_executes_nothing(tmp_path: Path) -> None:
    (block,) = pages.code(TEACHING, "yaml")
    (tmp_path / "mine.yaml").write_text(block)
    p = load_profile(tmp_path / "mine.yaml")
    assert p.code_tasks == [] and not p.allow_code_execution
    assert set(missing(p)) == {"07_humaneval", "08_mbpp", "09_fine_tuned_teachers"}
    ours, theirs = yaml.safe_load(block), yaml.safe_load((FOLDER / "classroom.yaml").read_text())
    differ = {"description", "tasks", "search"}
    assert {k: v for k, v in ours.items() if k not in differ} == {k: theirs[k] for k in ours if k not in differ}
    assert {**ours["search"], "tasks": theirs["search"]["tasks"]} == theirs["search"]
