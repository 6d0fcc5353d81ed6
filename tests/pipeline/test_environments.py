"""Hostile environments: another user, another locale, a space in the path, no git, no tools, no entry for the user.

A small part of the suite runs there in a process of its own. Where an environment cannot be had, one sentence says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import working_copy
import yaml

from semalign.pipeline.notebooks import ROOT

PART = [
    "tests/test_profiles.py", "tests/lm/test_files.py", "tests/test_report.py",
    "tests/benchmarks/test_sandbox.py::test_outcomes_keep_the_order_and_say_why",
]  # fmt: skip
"""Fast, and between them: files, locks, provenance with git, profiles by path, programs in the sandbox."""
NOBODY, WITHOUT_ENTRY = 65534, 54321


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own is its owner's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _part(root: Path, *before: str, **environment: str) -> str:
    """What the part of the suite prints in ``root``; it has to pass."""
    ours = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    settings = {**os.environ, **ours, **environment}
    words = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *PART]
    done = subprocess.run(words, cwd=root, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@cache
def _as(uid: int) -> list[str]:
    """The command before another one that runs it as an ordinary user, who may read this installation."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if not shutil.which("setpriv"):
        pytest.skip("setpriv, by which root becomes another user, is not installed")
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    reads = [*user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # an installation of root's own
    starts = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import pytest']))"
    for before in (user, reads):
        if subprocess.run([*before, sys.executable, "-c", starts], capture_output=True).returncode == 0:
            return before
    pytest.skip(f"no other user can read the interpreter {sys.executable}")


def test_an_ordinary_user(room: Path) -> None:
    before = _as(NOBODY)
    root = working_copy.copy_to(room / "copy")
    own = room / "own"
    own.mkdir()
    for path in (own, root, *root.rglob("*")):
        if not path.is_symlink():
            os.chown(path, NOBODY, NOBODY)
    _part(root, *before, HOME=str(own), TMPDIR=str(own))


def test_a_user_without_an_entry_who_may_write_neither_the_repository_nor_home(room: Path) -> None:
    before = _as(WITHOUT_ENTRY)
    root = working_copy.copy_to(room / "copy")
    own = room / "own"
    own.mkdir()
    os.chown(own, WITHOUT_ENTRY, WITHOUT_ENTRY)
    _part(root, *before, HOME="/nonexistent", TMPDIR=str(own))


def test_an_archive_without_git_in_a_path_with_a_space_in_the_c_locale_with_junk_in_the_users_settings(
    room: Path,
) -> None:
    git = shutil.which("git")
    if not git or not (ROOT / ".git").exists():
        pytest.skip("there is no git repository here to make an archive of")
    archive, root, empty, junk = room / "all.tar", room / "my archive", room / "bin", str(room / "junk")
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    settings = {"MPLBACKEND": "none.such", "IPYTHONDIR": junk, "JUPYTER_PATH": junk}
    subprocess.run([git, "-C", str(ROOT), "archive", "-o", str(archive), "HEAD"], check=True)
    with tarfile.open(archive) as packed:
        packed.extractall(root, filter="data")
    empty.mkdir()
    for name in ("unshare", "setpriv", "mount", "mkdir", "ln", "sh"):
        if place := shutil.which(name):
            (empty / name).symlink_to(place)
    _part(root, PATH=str(empty), PYTHONPATH=f"{root}{os.pathsep}{junk}", **locale, **settings)


def test_the_conda_route_resolves_to_the_versions_of_the_lock(tmp_path: Path) -> None:
    """By what is installed here, of the lock's versions: pip reads what each of the packages itself asks for."""
    root = working_copy.copy_to(tmp_path / "copy")
    text = (root / "environment.yml").read_text()
    (wanted,) = (part["pip"] for part in yaml.safe_load(text)["dependencies"] if isinstance(part, dict))
    (root / "wanted.txt").write_text("\n".join(wanted))  # as conda hands it to pip
    (weights,) = re.findall(r"python -m pip install (--no-deps .*?)\s+#", text)
    dry = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"]
    for words in (["--requirement", "wanted.txt"], weights.split()):
        done = subprocess.run([*dry, *words], cwd=root, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
        news = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
        assert news in ([], ["Would install semalign-0.1.0"])


def test_without_tools_the_command_line_refuses_others_programs_in_one_sentence(room: Path) -> None:
    code = "from semalign.benchmarks import sandbox; sandbox.require_level('namespace')"
    settings = {**os.environ, "PATH": str(room), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, text=True, capture_output=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and "neither bwrap nor unshare is on the PATH: install bubblewrap" in last
