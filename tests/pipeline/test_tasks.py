"""A pair of one's own, on some of the tasks: a yaml file anywhere, whole runs, and what is left out of the book."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from semalign.pipeline import ORDER
from semalign.pipeline.book import build_book
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
    script = Path(__file__).with_name("chapters_here.py")
    done = subprocess.run(
        [sys.executable, str(script), str(mine), str(results)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert {p.stem for p in (results / "metrics").glob("*.json")} == set(ORDER) - absent
    page = (build_book(str(mine), results).parent / "book/left_out.html").read_text()
    assert all(word in page for word in ("which this profile leaves out", "a task whose answers are programs"))
