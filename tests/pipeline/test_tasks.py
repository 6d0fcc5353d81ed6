"""A pair of one's own, on some of the tasks: a yaml file anywhere, whole runs, and what is left out of the book."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from working_copy import command

from semalign.pipeline import ORDER
from semalign.pipeline.notebooks import ROOT
from semalign.profiles import FOLDER


@pytest.mark.parametrize(
    ("task", "absent"),
    [
        ("gsm8k", {"05_mmlu", "07_humaneval", "08_mbpp", "09_fine_tuned_teachers"}),
        ("mmlu", {"06_gsm8k", "07_humaneval", "08_mbpp", "09_fine_tuned_teachers"}),
    ],
)
def test_a_profile_of_one_task_runs_whole(tmp_path: Path, task: str, absent: set[str]) -> None:
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content |= {
        "tasks": [task],
        "search": {"draws": 1},
        "regimes": {"examples": [4], "steps": 2},
        "allow_code_execution": False,
        "others": 0,
    }
    mine, results = tmp_path / "my pair.yaml", tmp_path / "my results"
    mine.write_text(yaml.safe_dump(content))
    until = "book" if task == "mmlu" else "notebooks"  # one book is enough to see what it says of what is left out
    done = command(ROOT, "run", str(mine), "--cores", "1", "--until", until, "--results", str(results))
    assert done.returncode == 0, done.stdout
    assert {p.stem for p in (results / "metrics").glob("*.json")} == set(ORDER) - absent
    if until == "book":
        page = (results / "book/_build/html/book/left_out.html").read_text()
        assert all(word in page for word in ("which this profile leaves out", "a task whose answers are programs"))
