"""A pair of one's own on one task: a yaml file anywhere, a whole run, and what is left out of the book."""

from __future__ import annotations

from pathlib import Path

import yaml
from working_copy import command

from semalign.pipeline import ORDER
from semalign.pipeline.notebooks import ROOT
from semalign.profiles import FOLDER

OF_OTHERS = ("kin_teachers", "smaller_student", "fine_tuned_teachers")
OF_PROGRAMS = {"07_humaneval", "08_mbpp", "09_fine_tuned_teachers"}


def test_one_pair_on_one_task_becomes_a_book_that_names_what_is_left_out(tmp_path: Path) -> None:
    """Without kin, a smaller student and fine-tuned teachers, on a task without programs, from a file of one's own."""
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content |= {"tasks": ["gsm8k"], "search": {"draws": 1}, "regimes": {"examples": [4], "steps": 2}, "others": 0}
    content |= {"allow_code_execution": False}
    for who, layers in (("teacher", 3), ("student", 2)):  # fewer than in the scenario: layers are what chapters train
        content[who]["config"]["num_hidden_layers"] = layers
    mine, results = tmp_path / "my pair.yaml", tmp_path / "my results"
    alone = {key: value for key, value in content.items() if key not in OF_OTHERS}
    mine.write_text(yaml.safe_dump(alone))
    done = command(ROOT, "run", str(mine), "--cores", "1", "--results", str(results))
    assert done.returncode == 0, done.stdout
    assert {p.stem for p in (results / "metrics").glob("*.json")} == set(ORDER) - OF_PROGRAMS - {"05_mmlu"}
    page = (results / "book/_build/html/book/left_out.html").read_text()
    assert all(word in page for word in ("which this profile leaves out", "a task whose answers are programs"))
