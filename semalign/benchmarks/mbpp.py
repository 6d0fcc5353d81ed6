"""MBPP: programs from a sentence."""

from __future__ import annotations

from semalign.benchmarks.registry import Benchmark

BENCHMARK = Benchmark(title="programs from a sentence", protocols=("paper", "chat", "harness"), programs=True)
