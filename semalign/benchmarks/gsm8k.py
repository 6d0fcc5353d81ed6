"""GSM8K: word problems."""

from __future__ import annotations

from semalign.benchmarks.registry import Benchmark

BENCHMARK = Benchmark(title="word problems", protocols=("paper", "chat", "harness"), programs=False)
