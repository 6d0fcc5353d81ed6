"""MMLU: four-choice questions over 57 subjects."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semalign.benchmarks.files import DataError, Row, read_text
from semalign.benchmarks.registry import Benchmark, wrap

LETTERS = "ABCD"
COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
OPENING = "The answer is:"
_ANSWERS = {**{letter: i for i, letter in enumerate(LETTERS)}, **{str(i): i for i in range(4)}}


def user(row: Row, *, cloze: bool = False) -> str:
    """The question and its choices; ``cloze`` leaves the choices out."""
    about = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
    choices = "" if cloze else "".join(f"\n{a}. {c}" for a, c in zip(LETTERS, row["choices"], strict=True))
    return f"{about}\n\n{row['question'].strip()}{choices}\nAnswer:"


def columns(row: Row) -> dict[str, str]:
    """The paper's prompt without choices."""
    return {"paper_cloze": wrap(user(row, cloze=True)) + OPENING}


def check(row: Row) -> None:
    """Raises ValueError unless there are four choices and an answer 0-3; a subject may be left out."""
    if len(row["choices"]) != 4 or row["answer"] not in range(4):
        raise ValueError(f"needs 4 choices and an answer 0-3, not {len(row['choices'])} and {row['answer']!r}")
    if row.get("subject") is None:
        row["subject"] = "general knowledge"


def judge(row: Row, answers: Sequence[tuple[str, float]], protocol: str) -> dict[str, Any]:
    """The likeliest choice, and the likeliest by byte of its text, which long choices of a cloze need."""
    scores = [score for _, score in answers]
    by_byte = [score / len(choice.encode()) for choice, score in answers]
    prediction, per_byte = scores.index(max(scores)), by_byte.index(max(by_byte))
    return {
        "subject": row["subject"], "answer": row["answer"],
        "prediction": prediction, "correct": float(prediction == row["answer"]),
        "prediction_per_byte": per_byte, "correct_per_byte": float(per_byte == row["answer"]),
    }  # fmt: skip


def read(folder: Path | None, split: str) -> tuple[str, list[Row]]:
    """A csv file a subject, ``mmlu/SPLIT/SUBJECT_SPLIT.csv``, with the header of ``COLUMNS`` or the original's none.

    The original calls its validation split ``val``.

    Raises:
        DataError: there is no question, or a line without exactly its columns or without an answer 0-3 or A-D.
    """
    assert folder is not None, "MMLU is on the hub"
    names = (split, "val") if split == "validation" else (split,)
    place = next((p for name in names if (p := folder / "mmlu" / name).is_dir()), folder / "mmlu" / split)
    rows: list[Row] = []
    for path in sorted(place.glob("*.csv")):
        if not path.name.startswith("."):  # what other systems keep beside a file
            rows += _read_subject(path, path.stem.removesuffix(f"_{split}").removesuffix(f"_{place.name}"))
    if not rows:
        raise DataError(f"{place} has no csv file with a question; check SEMALIGN_DATA")
    return str(place), rows


def _read_subject(path: Path, subject: str) -> list[Row]:
    rows: list[Row] = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            where = f"{path}:{reader.line_num}"
            if not header:
                header = [cell.strip() for cell in cells]
                if not (len(cells) == len(COLUMNS) and header[-1] in LETTERS and header[-1]):
                    if missing := [c for c in COLUMNS if c not in header]:
                        raise DataError(f"{path} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
                    continue
                header = list(COLUMNS)  # the original files have none: this line is a question
            record = dict(zip(header, cells, strict=False))
            answer = record.get("answer", "").strip()
            if len(cells) != len(header) or answer not in _ANSWERS:
                raise DataError(
                    f"{where} needs {len(header)} fields and an answer 0-3 or A-D, "
                    f"not {len(cells)} fields and {answer!r}: quote a text that holds a comma"
                )
            rows.append({
                "id": f"{subject}_{reader.line_num}", "subject": subject, "question": record["question"],
                "choices": [record[f"choice{i}"] for i in range(4)], "answer": _ANSWERS[answer],
            })  # fmt: skip
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is not csv ({error}): correct the line") from None
    return rows


BENCHMARK = Benchmark(
    title="four-choice questions",
    protocols={
        "paper": {"doc_to_text": "paper", "doc_to_choice": ["A", "B", "C", "D"]},
        "paper-cloze": {"doc_to_text": "paper_cloze", "doc_to_choice": "choices"},
        "chat": {"doc_to_choice": ["A", "B", "C", "D"]},
        "harness": {"doc_to_text": "user", "doc_to_choice": ["A", "B", "C", "D"]},
        "harness-cloze": {"doc_to_text": "Question: {{question.strip()}}\nAnswer:", "doc_to_choice": "choices"},
    },
    fields={"question": str, "choices": list, "answer": int, "subject": str},
    optional=("subject",),
    user=user,
    opening=OPENING,
    response=lambda row: f" {LETTERS[row['answer']]}",
    judge=judge,
    check=check,
    columns=columns,
    hub=("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe"),
    read=read,
    parts=("dev", "validation"),
)
