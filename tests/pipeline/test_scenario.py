"""The smoke profile from a failing notebook to the built book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from working_copy import command, copy_to

from semalign.lm.files import read_json
from semalign.pipeline import ORDER
from semalign.planning.work import WORK, beside_tables
from semalign.profiles import Random, load_profile
from semalign.report import load_metrics


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_to(tmp_path_factory.mktemp("a repository") / "my copy")  # a path with spaces


def edit(path: Path, cell: int, source: str) -> str:
    notebook = nbformat.read(path, as_version=4)
    before: str = notebook.cells[cell].source
    notebook.cells[cell].source = source
    nbformat.write(notebook, path)
    return before


def times(root: Path) -> dict[str, int]:
    return {p.stem: p.stat().st_mtime_ns for p in (root / "results/smoke/metrics").glob("*.json")}


def test_smoke_profile_from_a_failing_notebook_to_the_book(copy: Path) -> None:
    """A failing notebook names itself and keeps its traceback; the next call resumes there; a third runs nothing."""
    broken = copy / "notebooks/03_pairing.ipynb"
    at = next(i for i, c in reversed(list(enumerate(nbformat.read(broken, 4).cells))) if c.cell_type == "code")
    source = edit(broken, at, "raise ArithmeticError('the planted error')")
    failed = command(copy, "run", "smoke", "--cores", "1")
    assert failed.returncode != 0
    assert "notebook 03_pairing failed in cell" in failed.stdout, failed.stdout
    assert "ArithmeticError: the planted error" in failed.stdout
    kept = (copy / "results/smoke/notebooks/03_pairing.ipynb").read_text()
    assert "ArithmeticError" in kept and "Traceback" in kept
    first = times(copy)
    assert first and "03_pairing" not in first

    edit(broken, at, source)
    whole = command(copy, "run", "smoke", "--cores", "2")
    assert whole.returncode == 0, whole.stdout
    second = times(copy)
    assert set(second) == set(ORDER)
    assert {n: second[n] for n in first} == first, "a finished notebook was run again"
    index = copy / "results/smoke/book/_build/html/index.html"
    assert str(index) in whole.stdout and index.exists()

    idle = command(copy, "run", "smoke", "--cores", "1")
    assert idle.returncode == 0 and times(copy) == second
    assert "cell 1/" not in idle.stdout


def test_every_page_says_how_it_was_made(copy: Path) -> None:
    html = copy / "results/smoke/book/_build/html"
    if not html.exists():
        pytest.fail("the scenario test above builds the book")
    for name in ORDER:
        page = (html / "notebooks" / f"{name}.html").read_text()
        assert "How this page was made" in page
        for word in ("commit", "profile", "seeds", "torch", "smoke"):
            assert word in page.lower(), f"{name} does not say its {word}"
        _, provenance = load_metrics(copy / "results/smoke/metrics" / f"{name}.json")
        assert provenance["profile"] == "smoke"


def test_what_the_plan_counts_is_what_was_trained(copy: Path) -> None:
    """By the trials that the chapters left; towards equal partners, or by equal settings, they share one."""
    p, artefacts = load_profile("smoke"), copy / "results/smoke/artefacts"
    assert isinstance(p.student, Random)
    work = beside_tables(p, p.student.config.num_hidden_layers, WORK)
    planned = {name: sum(w.trainings for w in of if not w.teacher) for name, of in work.items()}

    def trained(folder: str) -> list[dict[str, Any]]:
        found = [read_json(path) for task in p.tasks for path in (artefacts / folder / task).glob("*.json")]
        return [trial for trial in found if trial["layers"]]

    folders = {
        "11_ablations": "ablations", "13b_regimes": "regimes", "16_below_the_layer": "below", "17_causal": "causal",
        "18_pairing_from_outputs": "lenses", "19_larger_gaps": "gaps", "20_version_two": "version_two",
    }  # fmt: skip
    shared = {"11_ablations", "18_pairing_from_outputs"}
    for name, folder in folders.items():
        made = len(trained(folder))
        assert made <= planned[name] <= (1.25 * made if name in shared else made), name
    trials = trained("trials")
    of_search = [t for t in trials if t["variant"].startswith(("final", "labels", "logits", "states"))]
    assert len(of_search) == planned["14_search"]
    assert len([t for t in trials if t["variant"] in p.fine_tuned_teachers]) == planned["09_fine_tuned_teachers"]
    beside = [t for t in trials if not t["variant"] and t["method"] not in p.methods]
    assert len(beside) == planned["12b_students"]
