"""A docstring that Sphinx cannot read is a warning, and so an error, by the settings that every book is built with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import ROOT


def build(folder: Path, docstring: str) -> str:
    """What Sphinx says of a function with this docstring under the book's settings, with warnings as errors."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]
    kept = {k: v for k, v in config["config"].items() if k.startswith(("autodoc", "napoleon", "nitpick", "add_module"))}
    extensions = ["myst_parser", *(e for e in config["extra_extensions"] if e.startswith(("sphinx.ext.", "semalign.")))]
    lines = [f"{name} = {value!r}" for name, value in {"extensions": extensions, **kept}.items()]
    (folder / "conf.py").write_text("\n".join(lines) + "\n")
    (folder / "documented.py").write_text(f'def f(x):\n    """One.\n\n    {docstring}\n    """\n')
    page = "# Reference\n\n```{eval-rst}\n.. automodule:: documented\n   :members:\n```\n"
    (folder / "index.md").write_text(page)
    command = [sys.executable, "-m", "sphinx", "-b", "dummy", "-q", "-n", "-W", "--keep-going", folder, folder / "out"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert bool(done.returncode) == bool(done.stdout.strip()), done.stdout
    return done.stdout


@pytest.mark.parametrize("sound", ["See :func:`~documented.f`.", "Args:\n        x: a ``|length|``, and |another|."])
def test_a_sound_docstring_is_read_in_silence(tmp_path: Path, sound: str) -> None:
    assert build(tmp_path, sound) == ""


@pytest.mark.parametrize("fault", ["See :func:`semalign.nowhere`.", "Args:\n        x: *an open word."])
def test_a_faulty_docstring_is_found(tmp_path: Path, fault: str) -> None:
    assert "WARNING" in build(tmp_path, fault)
