"""CKA of two stacks of layers against the textbook's double loop; and a trial against the sum of its parts.

    python tests/bench/bench_study.py [--quick]

The stacks have SmolLM2-135M's width and as many layers, on random states; the loop centres and multiplies both sides
anew for every pair of layers, as the definition of linear CKA is written down, and the two results have to agree. The
trial is one of the smoke profile, whose models are so small that what stays beside its parts is what any trial pays:
the reference answers read by student and teacher, the key, the file. Of repeats the least seconds. The numbers go to
``results/bench/study.json``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch
from torch import Tensor

from semalign import classroom
from semalign.methods import REGISTRY
from semalign.methods.registry import run
from semalign.models import load_pair
from semalign.profiles import load_profile
from semalign.report import save_metrics
from semalign.study import trials
from semalign.study.analysis import cka_matrix

LAYERS, TOKENS, WIDTH = 30, 400, 576
TASK, METHOD, SEED = "gsm8k", "semalign", 0
CLOSE = 1e-6


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its wall seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def stack(layers: int, seed: int) -> list[Tensor]:
    """States (TOKENS, WIDTH) of each layer: a random walk, so that near layers are alike as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(layers, TOKENS, WIDTH, generator=generator).cumsum(0))


def textbook(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """<K, L> / (|K| |L|) of the centred Gram matrices, pair by pair in float64."""

    def gram(states: Tensor) -> Tensor:
        centred = states.double() - states.double().mean(0)
        return centred @ centred.T

    found = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            k, l = gram(x), gram(y)  # noqa: E741 - the usual names of the two kernels
            found[i, j] = (k * l).sum() / (k.norm() * l.norm())
    return found


def measure_cka(layers: int, repeats: int) -> dict[str, float]:
    """Seconds of both ways on two stacks.

    Raises:
        AssertionError: their results differ by more than ``CLOSE``.
    """
    rows, columns = stack(layers, 0), stack(layers, 1)
    cka_matrix(rows[:2], columns[:2])  # the first products of a process pay for its threads
    ours, theirs = [timed(lambda: cka_matrix(rows, columns)) for _ in range(3)], []
    for _ in range(repeats):
        theirs.append(timed(lambda: textbook(rows, columns)))
    gap = float((ours[0][0] - theirs[0][0]).abs().max())
    assert gap <= CLOSE, f"cka_matrix is {gap:.1e} away from the definition of CKA"
    mine, other = (min(seconds for _, seconds in side) for side in (ours, theirs))
    return {
        "layers": layers,
        "CKA of two stacks, ours (s)": mine,
        "CKA of two stacks, double loop (s)": other,
        "CKA of two stacks: double loop over ours": other / mine,
        "CKA of two stacks: largest difference": gap,
    }


def measure_trial(repeats: int) -> dict[str, float]:
    """Seconds of a trial, of its parts in the same process, and of what is beside these.

    Every trial has a folder of its own, so that none is read from a file and each asks the teacher, as the first trial
    on a task does. The student is loaded within the training, and so is not counted twice.
    """
    p = load_profile("smoke")
    splits = ("test", trials.PLACEBO) if p.data == "classroom" and classroom.has(TASK, trials.PLACEBO) else ("test",)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            trials.run_trial(p, TASK, METHOD, SEED, folder)

    def parts() -> dict[str, float]:
        (pair, data), load = timed(lambda: (load_pair(p), trials.splits(p, TASK)))
        config = replace(trials.config_of(p, SEED), watch=False)  # as a trial does: nobody reads its log
        given = trials.hyperparameters(p, METHOD, TASK)
        result, train = timed(lambda: run(REGISTRY[METHOD], pair, data, config, given))
        _, answer = timed(lambda: [trials.answer(p, pair, result.student, TASK, split=s) for s in splits])
        return {"load": load, "train": train, "answer": answer}

    whole()  # imports, compiled code and the key of the code belong to no trial
    gc.freeze()  # as every run does after its imports: see semalign.report.opened
    spent, found = [], []
    for _ in range(repeats):  # in turn, so that other work on the machine meets both alike
        spent.append(timed(whole)[1])
        found.append(parts())
    least = {name: min(f[name] for f in found) for name in found[0]}
    trial, together = min(spent), sum(least.values())
    return {
        "a trial (s)": trial,
        **{f"a trial's part: {name} (s)": seconds for name, seconds in least.items()},
        "a trial: beside its parts (s)": trial - together,
        "a trial: over the sum of its parts": trial / together,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer layers, fewer repeats")
    quick = parser.parse_args(argv).quick
    found = measure_cka(8 if quick else LAYERS, 1 if quick else 2) | measure_trial(2 if quick else 7)
    for name, value in found.items():
        print(f"{name:52} {value:10.3g}")
    save_metrics(ROOT / "results/bench/study.json", found, seeds=[0, 1], profile="smoke")
    return found


if __name__ == "__main__":
    main()
