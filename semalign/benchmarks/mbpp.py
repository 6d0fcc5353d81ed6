"""MBPP: programs from a sentence, judged by three asserts."""

from __future__ import annotations

import re
from pathlib import Path

from semalign.benchmarks.answers import CODE
from semalign.benchmarks.files import DataError, Row, read_jsonl, split_file
from semalign.benchmarks.registry import Benchmark

SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
"""First and last ``task_id``."""


def user(row: Row) -> str:
    """The sentence, and the reference solution up to its first colon, which is the signature."""
    return f"Complete the following python function.\n\n\n{row['text']}\n{row['code'].split(':')[0]}"


def read(folder: Path | None, split: str) -> tuple[str, list[Row]]:
    """A split's own ``mbpp/SPLIT.jsonl``, else its part of the original ``mbpp/mbpp.jsonl``.

    Raises:
        DataError: a file is absent or malformed, or MBPP has no such split.
    """
    assert folder is not None, "MBPP is on the hub"
    path = split_file(folder / "mbpp", f"{split}.jsonl")
    if path.is_file():
        return str(path), read_jsonl(path)
    if split not in SPLITS:
        raise DataError(f"MBPP has no split {split!r}; it has {', '.join(SPLITS)}")
    path, (low, high) = split_file(folder / "mbpp", "mbpp.jsonl"), SPLITS[split]
    rows = []
    for row in read_jsonl(path):
        number = str(row.get("task_id"))
        if not number.isdecimal():
            raise DataError(f"{path}: a question needs a whole number as its task_id, not {row.get('task_id')!r:.60}")
        rows += [row] if low <= int(number) <= high else []
    return str(path), rows


def names(row: Row) -> list[str]:
    """The functions of the reference solution that the tests call; one of them is called ``sum``."""
    made = re.findall(r"^def (\w+)", row.get("code") or "", re.MULTILINE)
    return [name for name in dict.fromkeys(made) if re.search(rf"\b{name}\b", "\n".join(row["test_list"]))]


def inside(row: Row) -> bool:
    """Whether the reference solution defines a class, whose objects the tests then hold: they cannot cross."""
    return bool(re.search(r"^class ", row.get("code") or "", re.MULTILINE))


BENCHMARK = Benchmark(
    title="programs from a sentence",
    programs=True,
    protocols={
        "paper": {"doc_to_text": "paper", "generation_kwargs": {"max_gen_toks": 512, "until": ["\n```", "<|user|>"]}},
        "chat": {"generation_kwargs": {"max_gen_toks": 512, "until": ["\n```", "<|im_end|>"]}},
        "harness": {
            "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} Your code should pass "
            "these tests:\n\n{{test_list[:3] | join('\n')}}\n[BEGIN]\n",
            "generation_kwargs": {"max_gen_toks": 256, "until": ["[DONE]"]},
        },
    },
    fields={"task_id": (int, str), "text": str, "code": str, "test_list": list, "test_setup_code": str},
    optional=("test_setup_code",),
    user=user,
    opening=CODE,
    response=lambda row: str(row["code"]),
    solution=lambda row, code: code,
    tests=lambda row: [row.get("test_setup_code") or "", *row["test_list"]],
    names=names,
    inside=inside,
    hub=("google-research-datasets/mbpp", "full", "4bb6404fdc6cacfda99d4ac4205087b89d32030c"),
    read=read,
    parts=("train", "validation"),
    sizes={"extract": 32, "align": 40, "train": 300},
)
