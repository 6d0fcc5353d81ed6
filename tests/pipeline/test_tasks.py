"""A pair of one's own, on some of the tasks: a yaml file anywhere, whole runs, and what is left out of the book."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from working_copy import command, copy_to

from semalign.pipeline import ORDER
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
    content |= {"tasks": [task], "search": {"draws": 1}, "allow_code_execution": False, "others": 0}
    mine = tmp_path / "my pair.yaml"
    mine.write_text(yaml.safe_dump(content))
    root = copy_to(tmp_path / "copy")
    done = command(root, "run", str(mine), "--cores", "1")
    assert done.returncode == 0, done.stdout
    assert {p.stem for p in (root / "results/my pair/metrics").glob("*.json")} == set(ORDER) - absent
    page = (root / "results/my pair/book/_build/html/book/left_out.html").read_text()
    assert all(word in page for word in ("which this profile leaves out", "a task whose answers are programs"))
