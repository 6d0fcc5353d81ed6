"""Every docstring is markup that Sphinx reads without a warning: found here in seconds, and not after a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import ROOT

from semalign.pipeline import pages


def build(folder: Path, written: dict[str, str]) -> str:
    """What Sphinx says of some pages under the book's settings for docstrings, with warnings as errors."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]
    kept = {k: v for k, v in config["config"].items() if k.startswith(("autodoc", "napoleon", "nitpick", "add_module"))}
    extensions = ["myst_parser", *(e for e in config["extra_extensions"] if e.startswith(("sphinx.ext.", "semalign.")))]
    lines = [f"{name} = {value!r}" for name, value in {"extensions": extensions, **kept}.items()]
    (folder / "conf.py").write_text("\n".join(lines) + "\n")
    tree = "# Reference\n\n```{toctree}\n" + "\n".join(written) + "\n```\n"
    for name, text in {"index": tree, **written}.items():
        (folder / f"{name}.md").write_text(text)
    command = [sys.executable, "-m", "sphinx", "-b", "dummy", "-q", "-n", "-W", "--keep-going", folder, folder / "out"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert bool(done.returncode) == bool(done.stdout.strip()), done.stdout
    return done.stdout


def test_the_reference_builds_without_a_warning(tmp_path: Path) -> None:
    assert build(tmp_path, pages.api_pages()) == ""


@pytest.mark.parametrize("fault", ["See :func:`semalign.nowhere`.", "Args:\n        x: *an open word."])
def test_a_faulty_docstring_is_found(tmp_path: Path, fault: str) -> None:
    (tmp_path / "faulty.py").write_text(f'def f(x):\n    """One.\n\n    {fault}\n    """\n')
    page = "# Faulty\n\n```{eval-rst}\n.. automodule:: faulty\n   :members:\n```\n"
    assert "WARNING" in build(tmp_path, {"faulty_page": page})
