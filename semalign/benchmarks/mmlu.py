"""MMLU: four-choice questions."""

from __future__ import annotations

from semalign.benchmarks.registry import Benchmark

BENCHMARK = Benchmark(
    title="four-choice questions",
    protocols=("paper", "paper-cloze", "chat", "harness", "harness-cloze"),
    programs=False,
)
