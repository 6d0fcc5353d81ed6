"""Run a profile's chapters without kernels: the libraries are imported once, and each chapter runs in a fork.

``python chapters_here.py PROFILE RESULTS``: the cells, parameters and files are those of a run through papermill; what
the cells show is not kept. The tests of whole profiles take a quarter of the time that kernels need.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import nbformat
import seaborn  # noqa: F401 - what the chapters import is in memory before the first fork
from IPython.core.interactiveshell import InteractiveShell

from semalign.methods import REGISTRY  # noqa: F401
from semalign.pipeline.notebooks import NOTEBOOKS, chapters_of, preflight
from semalign.profiles import load_profile
from semalign.study import tables  # noqa: F401


def run_chapter(name: str, profile: str, results: Path) -> None:
    """Run the code cells of a chapter, and leave its metrics and a copy with parameters, as papermill does."""
    for folder in ("notebooks", "metrics", "artefacts"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    os.chdir(NOTEBOOKS)
    notebook = nbformat.read(f"{name}.ipynb", as_version=4)
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    given = nbformat.v4.new_code_cell(f"profile = {profile!r}\nresults = {str(results)!r}")
    given.metadata.tags = ["injected-parameters"]
    notebook.cells.insert(at + 1, given)
    notebook.metadata.papermill = {"duration": 0.0}
    shell = InteractiveShell.instance()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()
    nbformat.write(notebook, results / "notebooks" / f"{name}.ipynb")


def main(profile: str, results: Path) -> None:
    """Run every chapter of the profile; the first that fails ends the run with its name and traceback."""
    p = load_profile(profile)
    preflight(p)
    for name in chapters_of(p):
        sys.stdout.flush()
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_chapter(name, profile, results)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"chapter {name} failed")
        print(f"[{name}] {time.monotonic() - start:6.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
