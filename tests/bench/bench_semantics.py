"""Maps between vocabularies against the obvious alternative, pseudoinverses and m-vectors.

    python tests/bench/bench_semantics.py [--quick]

Every measurement has a process of its own, with random heads that have a decaying spectrum and a common mean. Memory is
what a call adds to the heads at its peak. The rate counts the flops that the formula needs and compares them with one
plain float32 product of the same heads, W_S'W_T: m D^2 for a symmetric Gram matrix, D^3 for its Cholesky factor and
inverse, 2 m D^2 for the rows of W G^-1, 2 m D_S D_T for the product of the two sides. ``cpu`` is processor time, which
other work on the machine disturbs less. The numbers go to ``results/bench/semantics.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from semalign.lm.files import write_text
from semalign.semantics import recompose, semantic_map

CASES = {  # m, D_T, D_S
    "medium": (16000, 2560, 2048),
    "SmolLM2 360M to 135M": (49152, 960, 576),
    "Llama-2 13B to 7B": (32000, 5120, 4096),
}
QUICK = {"medium": (4000, 640, 512), "SmolLM2 360M to 135M": (6144, 240, 144), "Llama-2 13B to 7B": (4000, 640, 512)}
GROWTH = [(m, 512) for m in (4000, 8000, 16000, 32000, 64000)] + [(8000, d) for d in (256, 1024, 2048)]


def head(m: int, width: int, seed: int) -> Tensor:
    """W (m, D) float32: column scales over one and a half decades, and a mean with half of the energy."""
    torch.manual_seed(seed)
    return torch.randn(m, width).mul_(torch.logspace(0, -1.5, width)).add_(0.3 * torch.randn(width))


def by_pinv(teacher: Tensor, student: Tensor, kind: str) -> Tensor:
    """The map as its definition is written down."""
    if kind == "logit":
        return torch.linalg.pinv(student) @ teacher
    bases = [torch.linalg.pinv(w) for w in (student, teacher)]
    s, t = (b / b.norm(dim=0) for b in bases)
    return s @ t.T


def flops(kind: str, m: int, d_t: int, d_s: int) -> float:
    """What the formula needs (see above); a solve with the Cholesky factor takes 2 D_S^2 D_T."""
    if kind == "logit":
        return m * d_s**2 + 2 * m * d_s * d_t + d_s**3 / 3 + 2 * d_s**2 * d_t
    return sum(3 * m * d**2 + d**3 for d in (d_t, d_s)) + 2 * m * d_s * d_t


def best(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Least wall and processor seconds of some calls."""
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"wall": min(wall), "cpu": min(cpu)}


def measure_map(kind: str, ours: bool, sizes: Sequence[int], repeats: int) -> dict[str, float]:
    """Seconds and extra peak bytes of one map, and the rate of a plain product of its heads before and after it."""
    m, d_t, d_s = sizes
    teacher, student = head(m, d_t, 0), head(m, d_s, 1)
    scale = 1024 if sys.platform == "linux" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    make = (lambda: semantic_map(teacher, student, kind=kind)) if ours else (lambda: by_pinv(teacher, student, kind))
    found = best(make, 1)
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    plain = best(lambda: student.T @ teacher, 3)
    if repeats > 1:
        found = {
            key: min(value, again)
            for (key, value), again in zip(found.items(), best(make, repeats - 1).values(), strict=True)
        }
    plain = {
        key: min(value, again)
        for (key, value), again in zip(plain.items(), best(lambda: student.T @ teacher, 3).values(), strict=True)
    }
    product = 2 * m * d_s * d_t
    return {
        **found,
        "extra_bytes": total - before,
        "total_bytes": total,
        "gflops_wall": flops(kind, *sizes) / found["wall"] / 1e9,
        "gflops_cpu": flops(kind, *sizes) / found["cpu"] / 1e9,
        "plain_gflops_wall": product / plain["wall"] / 1e9,
        "plain_gflops_cpu": product / plain["cpu"] / 1e9,
    }


def measure_recompose(sizes: Sequence[int], tokens: int) -> dict[str, float]:
    """Seconds a token by one matrix, and by coefficients over the vocabulary with the bases at hand."""
    m, d_t, d_s = sizes
    h, matrix = torch.randn(tokens, d_t), torch.randn(d_s, d_t)
    ours = best(lambda: recompose(h, matrix), 7)
    s_t, s_s = torch.randn(d_t, m), torch.randn(d_s, m)
    naive = best(lambda: (h / h.norm(dim=-1, keepdim=True)) @ s_t @ s_s.T, 3)
    return {
        "ours": ours["wall"] / tokens,
        "naive": naive["wall"] / tokens,
        "ours_cpu": ours["cpu"] / tokens,
        "naive_cpu": naive["cpu"] / tokens,
    }


def child(*task: Any) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, kind: str, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Ours and the alternative, one after the other, as a printed line and a record."""
    mine, other = child("map", kind, True, sizes, repeats), child("map", kind, False, sizes, max(1, repeats - 1))
    row = {
        "case": case,
        "kind": kind,
        "sizes": list(sizes),
        "ours": mine,
        "pinv": other,
        "times_faster": other["wall"] / mine["wall"],
        "times_faster_cpu": other["cpu"] / mine["cpu"],
        "memory_ratio": mine["extra_bytes"] / other["extra_bytes"],
    }
    print(
        f"{case:>22} {kind:>6} {mine['wall']:>8.2f} {other['wall']:>8.2f} {row['times_faster']:>7.1f} "
        f"{row['times_faster_cpu']:>7.1f} {mine['extra_bytes'] / 2**30:>7.2f} {other['extra_bytes'] / 2**30:>7.2f} "
        f"{mine['gflops_wall']:>8.1f} {mine['gflops_wall'] / mine['plain_gflops_wall']:>7.0%} "
        f"{mine['gflops_cpu'] / mine['plain_gflops_cpu']:>7.0%}",
        flush=True,
    )
    return row


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small heads, one repeat")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        what, *task = json.loads(arguments.child)
        print(json.dumps(measure_map(*task) if what == "map" else measure_recompose(*task)))
        return {}
    cases, repeats = (QUICK, 1) if arguments.quick else (CASES, 2)
    heading = (
        ("case", 22),
        ("kind", 6),
        ("ours s", 8),
        ("pinv s", 8),
        ("faster", 7),
        ("cpu", 7),
        ("ours GB", 7),
        ("pinv GB", 7),
    )
    print(" ".join(f"{name:>{size}}" for name, size in (*heading, ("GFLOP/s", 8), ("of mm", 7), ("cpu", 7))))
    *compared, largest = cases
    maps = [compare(case, kind, cases[case], repeats) for case in compared for kind in ("paper", "logit")]
    full = child("map", "paper", True, cases[largest], 1)
    print(
        f"{largest}, paper map: {full['wall']:.0f} s, {full['total_bytes'] / 2**30:.1f} GB with the heads, "
        f"{full['gflops_wall']:.1f} GFLOP/s, {full['gflops_wall'] / full['plain_gflops_wall']:.0%} of a plain "
        f"product's ({full['gflops_cpu'] / full['plain_gflops_cpu']:.0%} by processor time)"
    )
    states = {tokens: child("recompose", cases[largest], tokens) for tokens in (1, 256)}
    for tokens, found in states.items():
        print(
            f"recompose, {tokens} states at once: {found['ours'] * 1e3:.3f} ms a state, by m-vectors "
            f"{found['naive'] * 1e3:.3f} ms, {found['naive'] / found['ours']:.1f} times"
        )
    sizes = [(m // 8, d // 4) for m, d in GROWTH] if arguments.quick else GROWTH
    growth = [{"m": m, "D": d, **child("map", "paper", True, (m, d, d * 4 // 5), 1)} for m, d in sizes]
    for row in growth:
        print(f"m {row['m']:>6}  D {row['D']:>5}  {row['wall']:>7.2f} s  {row['extra_bytes'] / 2**30:>5.2f} GB")
    report = {
        "maps": maps,
        "llama2": full,
        "recompose": states,
        "growth": growth,
        "threads": torch.get_num_threads(),
        "quick": arguments.quick,
    }
    write_text(ROOT / "results" / "bench" / "semantics.json", json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
