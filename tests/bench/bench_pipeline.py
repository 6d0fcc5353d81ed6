"""A job and a kernel as forks of a run, against processes of their own; and debiased CKA against its definition.

    python tests/bench/bench_pipeline.py [--quick]

Of a job the imports that every trial needs; of a chapter notebook 02 of the smoke profile whole, through papermill and
its kernel; each in wall seconds, the best of some. Beside them stands how long the process takes that is forked from,
once a run. Of CKA: seconds on 2,000 states, and the difference. The numbers go to ``results/bench/pipeline.json``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch

from semalign.pipeline import forks
from semalign.report import save_metrics
from semalign.study.analysis import linear_cka

JOB = "from semalign.study import tables"


def wall(words: list[str], folder: str, repeats: int) -> float:
    """The best of some runs, in seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - start)
    return best


def u_centred(states: torch.Tensor) -> torch.Tensor:
    """The kernel of states without its diagonal, centred: what debiased CKA is defined by."""
    centred = states.double() - states.double().mean(0)
    k, n = (centred @ centred.T).fill_diagonal_(0), len(states)
    k = k - k.sum(0) / (n - 2) - k.sum(1, keepdim=True) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    return k.fill_diagonal_(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run each")
    repeats = 1 if parser.parse_args().quick else 3
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.py").write_text(JOB)
        job = [sys.executable, "-m", "job"]
        chapter = [sys.executable, "-m", "semalign.pipeline", "notebook", "02_importance", "smoke", "--results", folder]
        subprocess.run([*chapter[:4], "00_models_and_data", *chapter[5:]], cwd=ROOT, check=True, capture_output=True)
        as_fork = [[*forks.command(sys.executable, words[2]), *words[3:]] for words in (job, chapter)]
        found["a job's imports, own process (s)"] = wall(job, folder, repeats)
        found["a chapter, own processes (s)"] = wall(chapter, str(ROOT), repeats)
        start = time.perf_counter()
        with forks.forking():
            while not os.path.exists(os.environ[forks.ADDRESS]):
                time.sleep(0.05)
            wall(as_fork[0], folder, 1)
            found["until the first fork is there (s)"] = time.perf_counter() - start
            found["a job's imports, fork (s)"] = wall(as_fork[0], folder, repeats)
            found["a chapter, forks (s)"] = wall(as_fork[1], str(ROOT), repeats)
    for what in ("a job's imports", "a chapter"):
        own = next(v for k, v in found.items() if k.startswith(f"{what}, own"))
        found[f"{what}: own process over fork"] = own / found[f"{what}, fork{'s' * (what == 'a chapter')} (s)"]
    x, y = (torch.randn(2000, 128, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    start = time.perf_counter()
    k, l = u_centred(x), u_centred(y)  # noqa: E741
    expected = float((k * l).sum() / (k.norm() * l.norm()))
    middle = time.perf_counter()
    ours = linear_cka(x, y, unbiased=True)
    found["debiased CKA of 2,000 states: definition over ours"] = (middle - start) / (time.perf_counter() - middle)
    found["debiased CKA: largest difference"] = abs(ours - expected)
    for name, value in found.items():
        print(f"{name:52} {value:10.3g}")
    save_metrics(ROOT / "results/bench/pipeline.json", found, seeds=[0, 1], profile="smoke")


if __name__ == "__main__":
    main()
