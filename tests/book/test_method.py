"""The method's page: the algorithm's calls exist, the tables are the defaults, the example's numbers are recomputed."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields

import pages
import pytest
import torch
import yaml
from torch import Tensor

from semalign import attribution, pairing, semantics
from semalign.semantics import recompose, semantic_bases, semantic_map
from semalign.training.config import TransferConfig

PAGE = pages.text("method")
NO_HYPERPARAMETER = {"folder", "cache_folder", "checkpoint_every", "watch"}
"""Where files go, and what a log has."""


def test_the_algorithm_has_twelve_lines_and_its_calls_exist() -> None:
    algorithm = pages.section(PAGE, "The algorithm").split("```")[1]
    assert re.findall(r"^(\d+)\. ", algorithm, re.MULTILINE) == [str(n) for n in range(1, 13)]
    calls = re.findall(r"`(\w+)`", algorithm)
    assert len(calls) == 6
    for call in calls:
        assert any(inspect.isfunction(getattr(m, call, None)) for m in (attribution, pairing, semantics)), call


def test_the_table_of_tasks_is_the_papers() -> None:
    found = pages.rows(pages.section(PAGE, "Hyperparameters"))
    head, *rows = found[: next(i for i, row in enumerate(found) if row[-1] == "field")]
    paper = yaml.safe_load((pages.BOOK / "paper_settings.yaml").read_text())
    shown = {task.lower(): {row[0]: float(row[at]) for row in rows} for at, task in enumerate(head[1:], start=1)}
    assert shown == paper["by_task"]


def test_the_table_of_settings_is_the_whole_configuration_with_its_defaults() -> None:
    found = pages.rows(pages.section(PAGE, "Hyperparameters"))
    start = next(i for i, row in enumerate(found) if row[-1] == "field")
    shown = {}
    for row in found[start + 1 :]:
        name, value = re.fullmatch(r"`(\w+)` = (.+)", row[-1]).groups()  # type: ignore[union-attr]
        shown[name] = value
    defaults = {f.name: f.default for f in fields(TransferConfig) if f.name not in NO_HYPERPARAMETER}
    assert shown == {n: ", ".join(v) if isinstance(v, tuple) else str(v) for n, v in defaults.items()}
    paper = yaml.safe_load((pages.BOOK / "paper_settings.yaml").read_text())["everywhere"]
    rows = {re.match(r"`(\w+)`", row[-1])[1]: row for row in found[start + 1 :]}  # type: ignore[index]
    assert {name: int(rows[name][1]) for name in paper} == paper


@pytest.mark.parametrize(
    ("ours", "field"), [("examples of a step", "batch"), ("longest example, in tokens", "max_length")]
)
def test_what_a_row_says_of_ours_is_its_value(ours: str, field: str) -> None:
    row = next(row for row in pages.rows(PAGE) if row[0] == ours)
    assert row[2].startswith(str(getattr(TransferConfig(), field)))


def vector(values: Tensor) -> str:
    """A vector as the page writes it: two digits at most."""
    return "(" + ", ".join(f"{round(float(v), 2) + 0:g}" for v in values) + ")"  # + 0: no negative zero


def test_the_numbers_of_the_worked_example() -> None:
    """Every number with a point on the page's example is one that the package computes here, and each is there."""
    bases = torch.tensor([[1, 0, 0.6], [0, 1, 0.8]], dtype=torch.float64)
    head = torch.linalg.pinv(bases)  # m x D; its own bases are the ones that were given
    teacher, frame = torch.eye(3, dtype=torch.float64), bases @ bases.T
    assert torch.allclose(semantic_bases(head), bases)
    matrix = semantic_map(teacher, head)
    assert torch.allclose(matrix, bases)

    h = torch.tensor([3.0, 0, 4], dtype=torch.float64)
    a, target = h / h.norm(), recompose(h, matrix)
    r = torch.tensor([1.0, 0], dtype=torch.float64)
    again = recompose(r, semantic_map(head, head))
    cosine = float(torch.cosine_similarity(r, again, dim=0))
    values, vectors = torch.linalg.eigh(frame)
    spread = float(values.std(correction=0) / values.mean())
    control = torch.tensor([[math.cos(t), math.sin(t)] for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)])

    said = [
        f"h = {vector(h)}$, of length {h.norm():.0f}",
        f"coordinates are $a = {vector(a)}$",
        f"h^* = {a[0]:.1f}\\, s_1 + {a[2]:.1f}\\, s_3 = {vector(target)}",
        f"with the state ${vector(r)}$",
        f"coordinates are ${vector(bases.T @ r)}$",
        f"give ${vector(again)}$",
        f"a cosine of {cosine:.3f}",
        f"{math.degrees(math.acos(cosine)):.1f} degrees off",
        "{} & {} \\\\ {} & {}".format(*(f"{v:.2f}" for v in frame.flatten().tolist())),
        f"eigenvalues {values[1]:.0f} (along $s_3$) and {values[0]:.0f} (across it)",
        f"which is 1/{1 / spread:.0f} here: {1 / math.hypot(1, spread):.3f}",
        f"rows ${vector(head[0])}$, ${vector(head[1])}$ and ${vector(head[2])}$",
        f"logits $W h = {vector(head @ r)}$",
        f"logits $W h^* = {vector(head @ again)}$",
        f"{float((control.T @ control)[0, 0]):.1f}\\, I",
    ]
    example = " ".join(pages.section(PAGE, "A worked example").split())
    for words in said:
        assert words in example, words
    given = ["(0.6, 0.8)", "0.6, 0.8"]
    numbers = set(re.findall(r"-?\d+\.\d+", " ".join(said + given)))
    assert set(re.findall(r"-?\d+\.\d+", example)) <= numbers
    assert torch.allclose(vectors[:, 1].abs(), bases[:, 2])
    assert torch.allclose(head @ again, bases.T @ r), "a recomposed state has its own coordinates as logits"
    assert torch.allclose(semantic_map(head, head, kind="logit") @ r, r)
    assert torch.allclose(control.T @ control, 1.5 * torch.eye(2), atol=1e-6)
