"""The exercises: twelve of three kinds, one at least for each chapter of the method, and solutions that run."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pages
import pytest
import yaml

PAGE = pages.text("exercises")
TITLES = re.findall(r"^## (\d+\. .+)$", PAGE, re.MULTILINE)
of_every_exercise = pytest.mark.parametrize("title", TITLES)


def test_there_are_twelve_of_three_kinds_and_one_for_each_chapter_of_the_method() -> None:
    assert [int(title.split(".")[0]) for title in TITLES] == list(range(1, 13))
    kinds = Counter(re.findall(r"^\*(Pencil|Code|Experiment), (?:after|with) \[\]", PAGE, re.MULTILINE))
    assert kinds == {"Pencil": 4, "Code": 4, "Experiment": 4}
    asked = " ".join(re.findall(r"^\*(?:Pencil|Code|Experiment), .+", PAGE, re.MULTILINE))
    toc = yaml.safe_load((pages.ROOT / "_toc.yml").read_text())
    method = next(part for part in toc["parts"] if part["caption"] == "The method")
    chapters = [c["file"] for c in method["chapters"] if c["file"].startswith("notebooks/")]
    assert chapters and not [name for name in chapters if f"../{name}.ipynb" not in asked]


@of_every_exercise
def test_a_solution_is_folded_and_states_its_answer(title: str) -> None:
    question, solution = pages.section(PAGE, title).split(":::{admonition} Solution\n:class: dropdown\n")
    assert "```" not in question and solution.rstrip().endswith(":::")
    (block,) = pages.code(solution)
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block)))


@of_every_exercise
def test_a_solution_runs_by_itself(title: str) -> None:
    (block,) = pages.code(pages.section(PAGE, title))
    exec(compile(block, f"exercise {title}", "exec"), {"__name__": "exercise"})
