"""A pair of one's own, on some of the tasks: a yaml file anywhere, whole runs, and what is left out of the book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from working_copy import command

from semalign.pipeline import ORDER
from semalign.pipeline.notebooks import ROOT
from semalign.profiles import FOLDER

OF_PROGRAMS = {"07_humaneval", "08_mbpp", "09_fine_tuned_teachers"}


def profile_of(task: str, *, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The smoke profile on one task, without the models that are ``left_out``."""
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content |= {"tasks": [task], "search": {"draws": 1}, "regimes": {"examples": [4], "steps": 2}, "others": 0}
    return {key: value for key, value in content.items() if key not in left_out} | {"allow_code_execution": False}


def whole_run(tmp_path: Path, content: dict[str, Any], until: str) -> tuple[Path, set[str]]:
    """The folder of the results, and the chapters that have numbers there."""
    mine, results = tmp_path / "my pair.yaml", tmp_path / "my results"
    mine.write_text(yaml.safe_dump(content))
    done = command(ROOT, "run", str(mine), "--cores", "1", "--until", until, "--results", str(results))
    assert done.returncode == 0, done.stdout
    return results, {p.stem for p in (results / "metrics").glob("*.json")}


def test_a_profile_of_one_task_becomes_a_book_that_names_what_is_left_out(tmp_path: Path) -> None:
    results, made = whole_run(tmp_path, profile_of("mmlu"), "book")
    assert made == set(ORDER) - OF_PROGRAMS - {"06_gsm8k"}
    page = (results / "book/_build/html/book/left_out.html").read_text()
    assert all(word in page for word in ("which this profile leaves out", "a task whose answers are programs"))


def test_a_profile_of_one_pair_and_nothing_else_runs_whole(tmp_path: Path) -> None:
    content = profile_of("gsm8k", left_out=("kin_teachers", "smaller_student", "fine_tuned_teachers"))
    _, made = whole_run(tmp_path, content, "notebooks")
    assert made == set(ORDER) - OF_PROGRAMS - {"05_mmlu"}
