"""What every benchmark owes: one row that says what it asks, where its questions come from, and how it is judged."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semalign.benchmarks.files import DataError, Row, read_jsonl, split_file
from semalign.profiles import declared

SIZES = {"extract": 20, "align": 80, "train": 1000}
"""LaTen's splits, in the order in which they are dealt out."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; everything that is asked, read or judged of it is here. Every prompt is zero-shot.

    Attributes:
        title: what it asks, in words; like ``protocols`` and ``programs`` a literal, because plans of a run read the
            source and do not import it.
        protocols: how each protocol asks, as settings of lm-evaluation-harness's task; ``generation_kwargs`` where the
            answer is a text, ``doc_to_choice`` where continuations are scored. ``doc_to_text`` may name a column:
            ``user`` (the user's turn), ``paper`` (that in LaTen's chat wrapper, with the beginning of the answer), or
            one of ``columns``. A protocol ``chat`` asks the user's turn in the tokenizer's own template.
        fields: what a row needs, with types (``list``: of texts). ``optional``: those of them that may be absent.
        user: the question as the user asks it.
        opening: how the answer begins; the model goes on from here.
        response: the reference answer after its opening.
        judge: ``(row, answers, protocol)`` to the entries of a record: ``answer``, ``prediction``, ``correct`` in
            [0, 1], and other readings as ``correct_NAME``. The answers are texts, or (continuation, log-probability)
            pairs. None where ``programs`` decide.
        programs: the answers are programs, which have to be run.
        solution: ``(row, text)`` to the program that an answer stands for; ``tests``: the lines that judge it;
            ``head``: what they need of the question; ``names``: functions of the solution that may be called
            as built-in ones are; ``inside``: whether tests and solution have to share a process.
        check: raises ValueError where a row cannot be asked, and fills in what may be left out.
        columns: further columns that ``protocols`` name.
        hub: dataset, configuration and revision; None where the hub is not asked.
        read: ``(folder, split)`` to (where, rows); a folder of None is the hub's place, where ``hub`` is None.
        parts: splits to learn from, none of them a test; ``sizes``: how many of them each of LaTen's splits takes.
        learns_from: the benchmark whose parts they are, where this one has none.
        laten: the folder of LaTen's chat files, where it is not the benchmark's name.
    """

    title: str
    protocols: Mapping[str, Mapping[str, Any]]
    fields: Mapping[str, Any]
    user: Callable[[Row], str]
    opening: str
    response: Callable[[Row], str]
    judge: Callable[[Row, Sequence[Any], str], dict[str, Any]] | None = None
    programs: bool = False
    solution: Callable[[Row, str], str] | None = None
    tests: Callable[[Row], list[str]] | None = None
    head: Callable[[Row], str] | None = None
    names: Callable[[Row], list[str]] | None = None
    inside: Callable[[Row], bool] | None = None
    optional: tuple[str, ...] = ()
    check: Callable[[Row], None] | None = None
    columns: Callable[[Row], dict[str, str]] | None = None
    hub: tuple[str, str, str] | None = None
    read: Callable[[Path | None, str], tuple[str, list[Row]]] | None = None
    parts: tuple[str, ...] = ("train",)
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)
    learns_from: str = ""
    laten: str = ""


def wrap(user: str) -> str:
    """The prompt that puts ``user`` into LaTen's chat wrapper; the answer follows it."""
    return f"<|user|>\n{user}\n\n<|assistant|>\n"


def read_split(task: str, folder: Path | None, split: str) -> tuple[str, list[Row]]:
    """Where a folder has a split, and its rows: ``TASK/SPLIT.jsonl``, gzipped or not. The ``read`` of most rows.

    Raises:
        DataError: the file is absent or malformed, or there is no folder.
    """
    if folder is None:
        raise DataError(f"{task} is not on the hub; name a folder with {task}/{split}.jsonl in SEMALIGN_DATA")
    path = split_file(folder / task, f"{split}.jsonl")
    return str(path), read_jsonl(path)


def benchmark(task: str) -> Benchmark:
    """The row of a task.

    Raises:
        ValueError: there is none.
    """
    if task not in BENCHMARKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[task]


# The rows are found by reading the folder's files, not by importing them all: the engine loads a model library.
BENCHMARKS: dict[str, Benchmark] = {
    name: importlib.import_module(f"semalign.benchmarks.{name}").BENCHMARK for name in declared("benchmarks")
}
"""Every ``BENCHMARK`` of every file of this folder, by the file's name."""
