"""A run that lies in the repository: its answers and losses, for its tables; its trials whole, for it to go on.

Of answers and losses there is one file a task, with all trials that trained on it. An answer is a bit; what was read of
a reference answer is a number of 16 bits, with three digits. Questions and predictions are left out: a question is
known by its place.

Trials whole are one archive. A run that finds it takes what belongs to its settings and code, and makes the rest: hours
on one machine are minutes on the next, and a run that was stopped goes on elsewhere.

Code changes, and what took hours is not made again for a helper that moved. :func:`verify` makes a trial of each method
again instead: where its numbers are those that were kept, the kept ones go by the code of now as well.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from semalign.lm.files import read_json, write_bytes, write_json
from semalign.methods import REGISTRY
from semalign.profiles import Profile
from semalign.study import trials

READ = ("loss", "right", "kl", "agree")
"""What is read of each watched example."""
APART = 1e-6
"""Numbers of a trial that was made again may differ by this: they are sums in another order on another machine."""


def version_of(methods: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """The version of the code and data that the trials of some methods on some tasks have their numbers from."""
    keys = [trials.code_key(m, tuple(tasks)) for m in methods if m != trials.TEACHER]
    return {
        "code": hashlib.sha256(json.dumps(keys).encode()).hexdigest(), "methods": list(methods), "tasks": list(tasks),
    }  # fmt: skip


def is_current(version: Mapping[str, Any]) -> bool:
    """Whether the code of now is what :func:`version_of` was asked about; methods that came later do not count."""
    methods = version.get("methods", [])
    known = all(m in REGISTRY for m in methods)
    return bool(methods) and known and version_of(methods, version["tasks"]) == dict(version)


def codes_of(p: Profile) -> dict[str, dict[str, str]]:
    """By method the versions of a profile's trials, by the tasks that they ask: all, one alone, those of the search."""
    asked = {tuple(p.tasks), tuple(p.search.tasks), *((task,) for task in p.tasks)} - {()}
    methods = (trials.TEACHER, *dict.fromkeys(("none", *p.methods)))
    return {m: {" ".join(tasks): trials.code_key(m, tasks) for tasks in sorted(asked)} for m in methods}


def verify(
    p: Profile, codes: Mapping[str, Mapping[str, str]], made: Path, folder: Path, pool: Executor
) -> dict[str, float]:
    """Make kept trials again by the code of now: of each method whose code has changed, one on each task of the search.

    They are the first student's, and ask the other tasks too where the profile does. Where they all have the kept
    answers, and losses within :data:`APART`, the method keeps its numbers: its versions of now go into
    :data:`semalign.study.trials.VERIFIED` as those that were kept.

    Args:
        p: the profile.
        codes: what :func:`codes_of` said when its trials were kept; see :func:`codes_path`.
        made: a folder with the kept trials.
        folder: where those of now go; a call that was stopped goes on from it.
        pool: what makes trials side by side.

    Returns:
        By trial, as ``TASK/METHOD``, how far apart its numbers are; empty where no code has changed.

    Raises:
        RuntimeError: some differ, after the others were noted; the message names them.
    """
    now = codes_of(p)
    changed = [m for m in now if m in codes and codes[m] != now[m]]
    there = [(task, m) for m in changed for task in p.search.tasks if (made / _name(p, task, m)).exists()]
    waiting = {f"{task}/{m}": pool.submit(_made_again, p, task, m, made, folder) for task, m in there}
    apart = {name: one.result() for name, one in waiting.items()}
    alike = {m for _, m in there} - {m for task, m in there if apart[f"{task}/{m}"] > APART}
    other, same = [m for m in changed if m not in alike], dict[str, str]()
    for m in codes.keys() & now.keys() - set(other):
        same |= {trials.own_code(m, tuple(tasks.split())): key for tasks, key in codes[m].items()}
    if changed:
        before = read_json(trials.VERIFIED)["apart"] if trials.VERIFIED.exists() else {}
        write_json(trials.VERIFIED, {"same": same, "apart": {**before, **apart}}, indent=1)
    if other:
        raise RuntimeError(
            f"by this code the numbers of {', '.join(other)} differ from those that were kept: make them again with "
            f"make book PROFILE={p.name}, or take back what changed them"
        )
    return apart


def verified() -> str:
    """What is known of kept trials that other code than that of now has made; empty where it was none."""
    if not trials.VERIFIED.exists():
        return ""
    apart = read_json(trials.VERIFIED)["apart"]
    return f"Later code made {len(apart)} of the kept trials again: {told(apart)}."


def told(apart: Mapping[str, float]) -> str:
    """What :func:`verify` found, in words."""
    alike = [a for a in apart.values() if a <= APART]
    largest = max(alike, default=0.0)
    losses = f"losses that differ by {largest:.0e} nats or less" if largest else "the same losses"
    return f"{len(alike)} with the same answers and {losses}"


def codes_path(archive: Path) -> Path:
    """Where the versions of the trials in an archive are: a file beside it, whose ``codes`` they are."""
    return archive.with_name(f"{archive.name.partition('.')[0]}.json")


def _name(p: Profile, task: str, method: str) -> str:
    return f"{task}/{method}-{p.seeds[0]}.json"


def _made_again(p: Profile, task: str, method: str, made: Path, folder: Path) -> float:
    """How far apart the numbers of a kept trial and of the same by the code of now are; 1 where an answer differs."""
    before = read_json(made / _name(p, task, method))
    now = trials.run_trial(p, task, method, p.seeds[0], folder, others=p.others)
    if now["answers"] != before["answers"]:
        return 1.0
    pairs = (zip(now["validation"][what], before["validation"][what], strict=True) for what in READ)
    return max(abs(a - b) for pair in pairs for a, b in pair)


def keep_items(made: Iterable[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write the answers and losses of trials to ``folder/TASK.npz``, a file for each task that was trained on.

    Args:
        made: what :func:`semalign.study.trials.run_trial` returns, all of one run.

    Raises:
        ValueError: two trials of a task have the same method, variant and seed.
    """
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for trial in made:
        named = by_task.setdefault(trial["task"], {})
        name = json.dumps([trial["method"], trial["variant"], trial["seed"]])
        if name in named:
            raise ValueError(f"two trials of {trial['task']} are called {name}: keep one of them")
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


def pack_trials(folder: str | Path, archive: str | Path) -> int:
    """Keep all trials below ``folder`` in one archive, a damaged one left out; returns how many there are."""
    root, buffer, packed = Path(folder), io.BytesIO(), 0
    # The answers to the same questions stand side by side, and hardly take more room than one trial's.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(root.rglob("*.json"), key=lambda p: (p.parent, p.name)):
            try:
                whole = {"key", "answers", "validation"} <= read_json(path).keys()
            except ValueError:
                continue
            if whole:
                content = path.read_bytes()
                entry = tarfile.TarInfo(path.relative_to(root).as_posix())
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                packed += 1
    write_bytes(Path(archive), lzma.compress(buffer.getvalue(), preset=9))
    return packed


def pack_run(p: Profile, folder: str | Path, archive: Path) -> None:
    """Keep the trials of a profile's run below ``folder`` in ``archive``, and beside it the versions of their code.

    What :func:`verify` found to differ is forgotten: the run has made it again.
    """
    pack_trials(folder, archive)
    write_json(codes_path(archive), {"codes": codes_of(p)}, indent=1)
    if trials.VERIFIED.exists():
        known = read_json(trials.VERIFIED)
        alike = {name: apart for name, apart in known["apart"].items() if apart <= APART}
        write_json(trials.VERIFIED, {**known, "apart": alike}, indent=1)


def unpack_trials(archive: str | Path, folder: str | Path) -> int:
    """Write the trials of an archive below ``folder``, where there is no file of the name; returns how many.

    Raises:
        ValueError: the archive is damaged; the message has its path.
    """
    written = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(Path(archive).read_bytes())), mode="r:") as tar:
            for entry in tar:
                path = Path(folder, entry.name)
                content = tar.extractfile(entry)
                if content is None or ".." in Path(entry.name).parts or Path(entry.name).is_absolute():
                    raise tarfile.TarError(f"it holds {entry.name}")
                if not path.exists():
                    write_bytes(path, content.read())
                    written += 1
    except (lzma.LZMAError, tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({error}): take it from the repository again") from None
    return written
