"""What every benchmark owes: a row that says what it asks and how an answer is judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. ``programs``: its answers are programs, which have to be run."""

    title: str
    protocols: tuple[str, ...]
    programs: bool = False
