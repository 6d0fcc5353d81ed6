"""HUMANEVAL: programs from a signature."""

from __future__ import annotations

from semalign.benchmarks.registry import Benchmark

BENCHMARK = Benchmark(title="programs from a signature", protocols=("paper", "chat", "harness"), programs=True)
