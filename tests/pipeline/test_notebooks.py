"""The notebooks in git: clean, short of cell, parametrised, and described. Running them is test_pipeline's part."""

from __future__ import annotations

import ast
import os
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest

from semalign.pipeline.address import COLAB, colab_cell, write_cells
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
    """Those of the chapter; where the repository has an address there is one for Colab as well."""
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if c.cell_type == "code" and COLAB not in c.metadata.get("tags", [])]


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


def test_the_notebooks_have_the_cell_of_the_repositorys_address(tmp_path: Path) -> None:
    """If this fails, the address in _config.yml was changed and `make address` not called."""
    folder = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    assert write_cells(ROOT / "_config.yml", folder) == []


def test_with_an_address_every_notebook_gets_a_cell_for_colab_and_without_one_loses_it(tmp_path: Path) -> None:
    folder, config = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks"), tmp_path / "_config.yml"
    config.write_text("repository: {url: 'https://example.org/owner/name', branch: trunk}")
    before = {path.name: nbformat.read(path, as_version=4) for path in folder.glob("*.ipynb")}
    assert len(write_cells(config, folder)) == len(NOTEBOOKS) and write_cells(config, folder) == []
    cells = nbformat.read(folder / NOTEBOOKS[0].name, as_version=4).cells
    nbformat.validate(nbformat.read(folder / NOTEBOOKS[0].name, as_version=4))
    assert "https://example.org/owner/name" in cells[1].source and "remove-cell" in cells[1].metadata.tags
    assert cells[2].source == PARAMETERS and cells[0].source.startswith("# ")
    config.write_text("repository: {url: ''}")
    assert len(write_cells(config, folder)) == len(NOTEBOOKS) and colab_cell(config) == ""
    assert {path.name: nbformat.read(path, as_version=4) for path in folder.glob("*.ipynb")} == before
    for wrong in ("git@example.org:owner/name", "example.org/name", 'https://example.org/"quoted'):
        config.write_text(f"repository: {{url: '{wrong}'}}")
        with pytest.raises(ValueError, match=r"^repository\.url .* give one as https://host/owner/name$"):
            write_cells(config, folder)


def test_on_colab_the_cell_fetches_and_installs_and_elsewhere_it_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ran, at = tmp_path / "_config.yml", list[list[str]](), list[str]()
    config.write_text("repository: {url: 'https://example.org/owner/name', branch: trunk}")
    cell = colab_cell(config).replace("/content/", f"{tmp_path}/").replace("/tmp/locked", f"{tmp_path}/locked")

    def run(command: list[str], check: bool) -> None:
        assert check
        ran.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()
            shutil.copy(ROOT / "requirements.lock", command[-1])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "chdir", at.append)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(cell, {})
    assert not ran and not at
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    for _ in range(2):  # again after the restart
        exec(cell, {})
    book = f"{tmp_path}/semalign-book"
    assert [c[0] for c in ran] == ["git", sys.executable] and ran[0][-2:] == ["https://example.org/owner/name", book]
    assert "trunk" in ran[0] and ran[1][-2:] == ["-e", book] and at == [f"{book}/notebooks"] * 2 and sys.path[0] == book
    kept, locked = (tmp_path / "locked.txt").read_text(), (ROOT / "requirements.lock").read_text()
    assert "torch==" in locked and "\ntorch==" not in kept and len(kept.splitlines()) == len(
        locked.splitlines()
    ) - 1  # fmt: skip


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
