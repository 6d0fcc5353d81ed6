"""The notebooks in git: clean, short of cell, parametrised, and described. Running them is test_pipeline's part."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import nbformat
import papermill
import pytest

from semalign import pipeline
from semalign.profiles import load_profile, parameters

NOTEBOOKS = sorted((pipeline.ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_the_order_names_every_notebook() -> None:
    assert [p.stem for p in NOTEBOOKS] == sorted(pipeline.ORDER)
    assert all(set(before) <= set(pipeline.ORDER) for before in pipeline.ORDER.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_not_committed(path: Path) -> None:
    assert all(not c.outputs and c.execution_count is None for c in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_opens_with_a_title_and_parameters(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert code_cells(path)[0].metadata.get("tags") == ["parameters"]
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_the_smoke_profiles(path: Path) -> None:
    """A notebook opened by itself runs the smoke profile, and every parameter is a key of a profile."""
    declared = {k: ast.literal_eval(v["default"]) for k, v in papermill.inspect_notebook(str(path)).items()}
    expected = {**parameters(load_profile("smoke")), "profile": "smoke", "results": "../results/smoke"}
    assert declared == {k: expected[k] for k in declared}


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
    assert statistics.median(lengths) <= 8
    assert statistics.quantiles(lengths, n=10)[-1] <= 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_have_a_caption_a_name_and_an_alternative_text(path: Path) -> None:
    for cell in code_cells(path):
        if "plt.subplots" in cell.source or ".draw_" in cell.source or cell.source.startswith("draw_"):
            described = cell.metadata.get("mystnb", {})
            assert len(described["figure"]["caption"]) > 40 and described["figure"]["name"]
            assert len(described["image"]["alt"]) > 40
