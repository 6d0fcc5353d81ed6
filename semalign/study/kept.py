"""Every answer and loss of a run, small enough to lie in the repository: so that anyone can compute its tables again.

One file a task, with all trials that trained on it. An answer is a bit; what was read of a reference answer is a number
of 16 bits, with three digits. Questions and predictions are left out: a question is known by its place.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semalign.lm.files import write_bytes

READ = ("loss", "right", "kl", "agree")
"""What is read of each watched example."""


def keep_items(trials: Iterable[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write the answers and losses of trials to ``folder/TASK.npz``, a file for each task that was trained on.

    Args:
        trials: what :func:`semalign.study.trials.run_trial` returns, all of one run.

    Raises:
        ValueError: two trials of a task have the same method, variant and seed.
    """
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for trial in trials:
        named = by_task.setdefault(trial["task"], {})
        name = json.dumps([trial["method"], trial["variant"], trial["seed"]])
        if name in named:
            raise ValueError(f"two trials of {trial['task']} are called {name}")
        named[name] = trial
    return [_write(Path(folder, f"{task}.npz"), named) for task, named in sorted(by_task.items())]


def _write(path: Path, named: Mapping[str, Mapping[str, Any]]) -> Path:
    """One file: trials may have been asked different numbers of questions, so all stand one after another."""
    of_all = list(named.values())
    tasks = sorted({task for trial in of_all for task in trial["answers"]})
    correct = [a["correct"] for trial in of_all for task in tasks for a in trial["answers"].get(task, [])]
    arrays = {
        "trials": np.array(list(named)),
        "tasks": np.array(tasks, dtype=str),
        "questions": np.array([[len(t["answers"].get(task, [])) for task in tasks] for t in of_all], dtype=np.uint32),
        "answers": np.packbits(np.array(correct, dtype=bool)),
        "examples": np.array([len(trial["validation"]["loss"]) for trial in of_all], dtype=np.uint32),
    }
    for what in READ:
        values = [value for trial in of_all for value in trial["validation"][what]]
        arrays[what] = np.array(values, dtype=np.float16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())
    return path


def kept_items(folder: str | Path) -> list[dict[str, Any]]:
    """The trials of a folder that :func:`keep_items` wrote, as far as they were kept; none where there is no file.

    They have ``task``, ``method``, ``variant`` and ``seed``, of each answer ``correct``, and ``validation``, so that
    :func:`semalign.study.trials.right`, ``seen`` and ``measured`` read them as they read those of a run.

    Raises:
        ValueError: a file is damaged; the message has its path.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(Path(folder).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found += _read(path.stem, dict(arrays))
        except (OSError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): take it from the repository again") from None
    return found


def _read(task: str, arrays: Mapping[str, np.ndarray]) -> Iterable[dict[str, Any]]:
    questions, examples = arrays["questions"], arrays["examples"]
    correct = np.unpackbits(arrays["answers"], count=int(questions.sum())).astype(bool)
    of_each = iter(np.split(correct, np.cumsum(questions.ravel())[:-1]))
    read = {what: np.split(arrays[what].astype(float), np.cumsum(examples)[:-1]) for what in READ}
    for at, name in enumerate(arrays["trials"]):
        method, variant, seed = json.loads(str(name))
        answers = {str(t): [{"correct": bool(c)} for c in next(of_each)] for t in arrays["tasks"]}
        yield {
            "task": task, "method": method, "variant": variant, "seed": seed,
            "answers": {t: rows for t, rows in answers.items() if rows},
            "validation": {what: read[what][at].tolist() for what in READ},
        }  # fmt: skip
