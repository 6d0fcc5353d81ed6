"""Questions: from the hub, from a folder with the originals' files, from a package, or from memory.

A source is ``"hub"``, a folder, or a list of rows in the benchmark's format; ``None`` is the folder that the
environment variable ``SEMALIGN_DATA`` names, or else the hub. What a benchmark's files look like stands in its own
file. Splits to learn from never touch a test split.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semalign.benchmarks.files import DataError, Row, folder_of, read_jsonl, split_file, typed
from semalign.benchmarks.overlap import contamination, overlap
from semalign.benchmarks.registry import benchmark, wrap
from semalign.lm.examples import Example, TaskData

__all__ = [
    "DataError", "Row", "contamination", "examples", "load_items", "overlap", "read_jsonl", "sample", "task_data",
]  # fmt: skip

WATCHED = 10  # one in so many examples to learn from is kept to validate on, where there is no split for it


def load_items(task: str, source: str | Path | Sequence[Row] | None = None, split: str = "test") -> list[Row]:
    """The questions of one split in the benchmark's format; every row also gets an ``id`` (and MMLU's a ``subject``).

    Raises:
        ValueError: an unknown task.
        DataError: the source lacks the split, or a row is malformed.
    """
    asked = benchmark(task)
    source = _default() if source is None else source
    if not isinstance(source, str | Path):
        where, given = "the given rows", list(source)
    elif str(source) == "hub" and asked.hub is not None:
        where, given = f"{asked.hub[0]} on the hub", _from_hub(asked.hub, split)
    elif asked.read is None:
        raise DataError(f"{task} is read from rows in memory alone: give them as its source")
    else:
        where, given = asked.read(None if str(source) == "hub" else folder_of(source), split)
    rows = []
    for i, row in enumerate(given):
        if not isinstance(row, dict):
            said = f"question {i + 1} is {type(row).__name__} and not a row of named fields"
            raise DataError(f"{where}: {said}: write it as one")
        row = dict(row)
        wrong = typed(row, asked.fields, asked.optional)
        if not wrong and asked.check is not None:
            try:
                asked.check(row)
            except ValueError as error:
                wrong = str(error)
        if wrong:
            raise DataError(f"{where}: question {i + 1} {wrong}")
        row["id"] = str(row.get("task_id", row.get("id", i)))
        rows.append(row)
    if not rows:
        raise DataError(f"{where}: the split {split!r} of {task} is empty: check SEMALIGN_DATA")
    return rows


def sample(items: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """``limit`` seeded items in their order, in proportion to subjects where they have any; all for ``None``."""
    if limit is None or limit >= len(items):
        return list(items)
    rng = random.Random(seed)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[item.get("subject", "")].append(i)
    # every index gets its place within its subject, in [0, 1); the first `limit` places are a proportional sample
    places = []
    for members in groups.values():
        rng.shuffle(members)
        places += [((rank + rng.random()) / len(members), i) for rank, i in enumerate(members)]
    return [items[i] for i in sorted(i for _, i in sorted(places)[:limit])]


def task_data(task: str, source: str | Path | None = None, seed: int = 0) -> TaskData:
    """Splits to learn from, in the sizes of the benchmark's row; the rest validates, and at least a tenth does.

    A folder with LaTen's chat files is read as it is; it has no validation split, which is then drawn by ``seed`` from
    the train split. Otherwise the benchmark's parts are shuffled by ``seed`` and dealt out. A benchmark without such
    parts learns from another's (HumanEval from MBPP's), in its own sizes.

    Raises:
        DataError: the parts hold fewer than two questions a split, or a split of LaTen's is empty.
    """
    asked = benchmark(task)
    source = _default() if source is None else source
    folder = None if str(source) == "hub" else folder_of(source) / "laten" / (asked.laten or task)
    if folder is not None and folder.is_dir():
        return _from_laten(task, folder, seed)
    lender = asked.learns_from or task
    parts = benchmark(lender).parts
    pool = [row for part in parts for row in load_items(lender, source, part)]
    random.Random(f"{task} {seed}").shuffle(pool)
    if len(pool) < 2 * len(asked.sizes):
        raise DataError(
            f"{source}: {' and '.join(parts)} of {lender} hold {len(pool)} questions, too few to deal out: give at "
            f"least {2 * len(asked.sizes)}"
        )
    cut: dict[str, tuple[Example, ...]] = {}
    start = 0
    for name, size in asked.sizes.items():
        most = len(pool) - start - max(1, len(pool) // WATCHED) if name == "train" else len(pool) // 4
        end = start + min(size, most)
        cut[name], start = tuple(_example(lender, row) for row in pool[start:end]), end
    rest = tuple(_example(lender, row) for row in pool[start:])
    return TaskData(task, cut["train"], cut["align"], cut["extract"], rest)


def examples(task: str, source: str | Path | Sequence[Row] | None = None, split: str = "test") -> tuple[Example, ...]:
    """The questions of a split with their reference answers, as chat text; only to be measured on, where it is a test.

    Raises:
        DataError: as :func:`load_items`, or a HumanEval row has no ``canonical_solution``.
    """
    return tuple(_example(task, row) for row in load_items(task, source, split))


def prompts(task: str, row: Row) -> dict[str, str]:
    """The columns that protocols name: ``user``, ``paper``, and the benchmark's further ones."""
    asked = benchmark(task)
    user = asked.user(row)
    return {
        "user": user,
        "paper": wrap(user) + asked.opening,
        **(asked.columns(row) if asked.columns else {}),
    }


def as_datasets(task: str, items: list[Row], **_: Any) -> dict[str, Any]:
    """What lm-evaluation-harness's ``custom_dataset`` calls: the items and their prompts as the test split."""
    from datasets import Dataset

    fields = [name for name in benchmark(task).fields if name != "task_id"]  # of whatever type; the id is a text
    return {
        "test": Dataset.from_list(
            [{name: row.get(name) for name in fields} | {"id": row["id"]} | prompts(task, row) for row in items]
        )
    }


def _default() -> str:
    return os.environ.get("SEMALIGN_DATA") or "hub"


def _example(task: str, row: Row) -> Example:
    asked = benchmark(task)
    return Example(wrap(asked.user(row)), asked.opening + asked.response(row))


def _from_hub(place: tuple[str, str, str], split: str) -> list[Row]:
    from datasets import load_dataset

    name, config, revision = place
    try:
        return [dict(row) for row in load_dataset(name, config, split=split, revision=revision)]
    except Exception as error:  # the hub raises whatever its transport does
        raise DataError(
            f"{name} ({split}) could not be had from the hub ({type(error).__name__}: {error}); name a folder with the "
            "original files in SEMALIGN_DATA"
        ) from error


def _from_laten(task: str, folder: Path, seed: int) -> TaskData:
    def split(name: str) -> Path:
        return split_file(folder, f"{folder.name}_{name}_split.jsonl")

    train, align, extract = (_chat_examples(split(name)) for name in ("train", "align", "extract"))
    if split("validation").is_file():
        return TaskData(task, train, align, extract, _chat_examples(split("validation")))
    if len(train) < 2:
        raise DataError(f"{split('train')} holds 1 example, too few to validate on one of them: give more")
    watched = set(random.Random(f"{task} {seed}").sample(range(len(train)), max(1, len(train) // WATCHED)))
    kept = tuple(example for i, example in enumerate(train) if i not in watched)
    return TaskData(task, kept, align, extract, tuple(train[i] for i in sorted(watched)))


def _chat_examples(path: Path) -> tuple[Example, ...]:
    read = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            user, assistant = (message["content"] for message in row["messages"])
        except (KeyError, TypeError, ValueError):
            user = assistant = None
        if not isinstance(user, str) or not isinstance(assistant, str):
            raise DataError(f"{path}: example {number} needs messages with one user and one assistant turn")
        read.append(Example(wrap(user), assistant))
    if not read:
        raise DataError(f"{path} holds no example: give at least one")
    return tuple(read)
