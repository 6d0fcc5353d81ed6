"""A copy of the working tree in which notebooks can be broken, and the command line called in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from semalign.pipeline.notebooks import ROOT

LEFT_OUT = shutil.ignore_patterns(
    ".venv", "results", ".git", ".snakemake", "__pycache__", ".*_cache", "*.egg-info", "build", "weights"
)


def copy_to(root: Path) -> Path:
    """The working tree at ``root``, without its results; the weights are a link."""
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    if (ROOT / "semalign/classroom/weights").exists():
        (root / "semalign/classroom/weights").symlink_to(ROOT / "semalign/classroom/weights")
    return root


def command(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m semalign.pipeline WORDS`` in a copy, with what it prints in one string."""
    settings = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "semalign.pipeline", *words],
        cwd=root, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
