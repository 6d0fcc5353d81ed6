"""The notebooks in git: clean, short of cell, parametrised, and described. Running them is test_pipeline's part."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import nbformat
import pytest

from semalign.pipeline.book import OPEN
from semalign.pipeline.notebooks import ORDER, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = """\
profile = "smoke"  # of notebooks/profiles, or the path of a yaml file
results = None  # where files go; None is results/PROFILE
changes = {}  # values of the profile that are to differ"""
CALLS = {"semantic_bases", "semantic_map", "decompose", "layer_attribution", "critical_pair", "depth_pairs", "transfer"}
"""The paper's own steps."""
of_every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_the_order_names_every_notebook() -> None:
    assert [p.stem for p in NOTEBOOKS] == sorted(ORDER)
    assert all(set(chapter.reads) <= set(ORDER) for chapter in ORDER.values())


@of_every_notebook
def test_outputs_are_not_committed(path: Path) -> None:
    assert all(not c.outputs and c.execution_count is None for c in code_cells(path))


@of_every_notebook
def test_opens_with_a_title_and_parameters(path: Path) -> None:
    """The three lines with which it can be opened by itself: the smoke profile, its own results, no change."""
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    first = code_cells(path)[0]
    assert first.metadata.get("tags") == ["parameters", "remove-cell"] and first.source == PARAMETERS
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert "p, results = report.opened(profile, results, changes)" in code_cells(path)[1].source
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@of_every_notebook
def test_nothing_takes_the_names_of_the_parameters(path: Path) -> None:
    """What a page says of its profile and changes at its end is what it was given at its start."""
    for cell in code_cells(path)[2:]:
        for statement in ast.walk(ast.parse(cell.source)):
            if isinstance(statement, ast.Assign | ast.AugAssign | ast.For):
                names = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                assert not {n.id for n in names} & {"profile", "changes"}, f"{path.stem}: {cell.source}"


@of_every_notebook
def test_no_module_is_found_by_its_name(path: Path) -> None:
    """Architectures call their layers differently: where they are is the package's to know."""
    assert not [c.source for c in code_cells(path) if ".layers." in c.source]


def test_cells_are_short_and_define_nothing_large() -> None:
    lengths = []
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            lengths.append(len(cell.source.splitlines()))
            for node in ast.walk(ast.parse(cell.source)):
                assert not isinstance(node, ast.ClassDef), f"{path.stem} defines a class"
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno is not None and node.end_lineno - node.lineno < 10, (
                        f"{path.stem}: {node.name}"
                    )
    assert max(lengths) <= 30
    assert statistics.median(lengths) <= 6
    assert statistics.quantiles(lengths, n=10)[-1] <= 17


@of_every_notebook
def test_open_cells_are_the_papers_calls_and_short(path: Path) -> None:
    for cell in code_cells(path):
        if OPEN in cell.metadata.get("tags", []):
            called = {n.attr for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Attribute)}
            called |= {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)}
            assert called & CALLS and len(cell.source.splitlines()) <= 8


@of_every_notebook
def test_figures_have_a_caption_a_name_and_an_alternative_text(path: Path) -> None:
    for cell in code_cells(path):
        if "plt.subplots" in cell.source or ".draw_" in cell.source or ".plot" in cell.source:
            described = cell.metadata.get("mystnb", {})
            assert len(described["figure"]["caption"]) > 40 and described["figure"]["name"]
            assert len(described["image"]["alt"]) > 40


def test_no_two_figures_have_one_name() -> None:
    """A page's link would lead to either; Sphinx refuses the second."""
    described = [c.metadata.get("mystnb", {}) for path in NOTEBOOKS for c in code_cells(path)]
    names = [d["figure"]["name"] for d in described if "figure" in d]
    assert len(names) > 20 and sorted(names) == sorted(set(names))
