"""How long a newcomer waits for ``make setup``.

    python tests/bench/bench_setup.py [--quick]

It runs in a copy of this checkout that has no environment, with the caches of pip and uv as they are found here, so
that a first call on a machine takes longer by its downloads. With ``--quick``, and where installing fails as without a
network, one sentence says so and nothing is measured. The number goes to ``results/bench/setup.json``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from semalign.report import save_metrics

LEFT = (".git", ".venv", "results", ".snakemake", "__pycache__", ".*_cache")  # what no newcomer has


def measure() -> dict[str, float] | str:
    """Wall seconds of ``make setup`` in a copy of this checkout; where it fails, the last it said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, Path(folder, "copy"), ignore=shutil.ignore_patterns(*LEFT))
        words = ["make", "setup", f"PYTHON={sys.executable}"]
        start = time.perf_counter()
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("make: ***")]
        return said[-1].strip() if said else f"make ended with status {done.returncode}"
    return {"make setup (s)": seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure nothing: it cannot be made shorter")
    if parser.parse_args(argv).quick:
        print("the time of make setup is not measured: with --quick nothing is installed")
        return
    found = measure()
    if isinstance(found, str):
        print(f"the time of make setup is not measured: installing fails here ({found})")
        return
    for name, value in found.items():
        print(f"{name:52} {value:10.3g}")
    save_metrics(ROOT / "results/bench/setup.json", found, seeds=[], profile="")


if __name__ == "__main__":
    main()
