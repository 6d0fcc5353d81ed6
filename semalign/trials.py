"""Trials: one method on one task under one seed, from the training examples to the answers, as one small file.

Tables 1 and 2 of the paper are means over such files. A file that is there and belongs to the same settings and code is
read, not made again, so that a run goes on where it stopped and a cluster can make files side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from semalign import analysis, benchmarks, classroom
from semalign.alignment import DivergedError, TransferConfig, costs
from semalign.baselines import REGISTRY
from semalign.benchmarks.data import Row, sample
from semalign.models import Pair, decoder_layers, load_pair
from semalign.pairing import critical_pair
from semalign.report import write_text
from semalign.supervision import SupervisionCache, TaskData, encode

SPLITS = ("train", "align", "extract", "validation")
USED = (
    "teacher", "student", "data", "sizes", "max_length", "batch_size", "eval_batch_size", "device", "dtype", "layer",
    "interface", "map", "lr", "lrs", "epochs", "allow_code_execution", "max_new_tokens",
    "mmlu_protocol",
)  # fmt: skip
CODE = (
    "alignment",
    "analysis",
    "attribution",
    "models",
    "pairing",
    "semantics",
    "supervision",
    "trials",
)  # and three folders
TEACHER = "teacher"  # the name under which the teacher answers
UNTUNED = (TEACHER, "none", "laten", "laten_released")  # nothing trains, or at a rate of the method's own
Settings = Mapping[str, Any]
"""A profile's values by name, as a notebook has them; those in ``USED`` are read."""


def seeds_of(method: str, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds that a method runs under: the first alone where nothing is drawn, as in ``teacher`` and ``none``."""
    return seeds[:1] if method in (TEACHER, "none") else seeds


def splits(settings: Settings, task: str, watched: str = "validation") -> TaskData:
    """The examples of a task, cut to the profile's sizes; the split ``watched`` is its validation."""
    cloze = settings["mmlu_protocol"] == "paper-cloze"
    if settings["data"] == "classroom":
        whole = classroom.task_data(task, cloze=cloze, watched=watched)
    elif cloze:
        raise ValueError("mmlu_protocol: paper-cloze needs data: classroom, whose examples are asked without choices")
    else:
        whole = benchmarks.task_data(task)
        if watched == "test":
            whole = replace(whole, validation=benchmarks.data.examples(task))
    sizes = {**settings["sizes"], "validation": settings["sizes"][watched]}
    return TaskData(task, **{s: getattr(whole, s)[: sizes[s]] for s in SPLITS})


def questions(settings: Settings, task: str, split: str = "test", limit: int | None = None) -> list[Row]:
    """The questions of a task in its benchmark's format: the same ``limit`` of them for every method and seed."""
    limit = settings["sizes"]["test"] if limit is None else limit
    source = [dict(i.record) for i in classroom.items(task, split)] if settings["data"] == "classroom" else None
    return sample(benchmarks.load_items(task, source, split), limit, seed=0)


def run_trial(
    settings: Settings,
    task: str,
    method: str,
    seed: int,
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    split: str | None = "test",
    others: int = 0,
    variant: str = "",
    watched: str = "validation",
) -> dict[str, Any]:
    """Train by ``method`` on ``task``, answer its questions, compare with the teacher, and keep it all in ``folder``.

    Args:
        method: a name of the registry, or ``teacher``.
        changes: fields of ``TransferConfig`` that differ from the profile's; ``variant`` names the file then.
        split: whose questions are answered; None asks none, where something is still to be chosen.
        others: how many questions of each other task of the profile to ask, for what was forgotten.
        watched: the split whose reference answers are read: ``test`` only for what has been chosen.

    Returns:
        ``answers``: a task's (id, correct, prediction) a question; ``validation``: for each watched example the mean
        over its positions of ``loss``, ``right``, and against the teacher ``kl`` (nats) and ``agree``; ``cost``.

    Raises:
        ValueError: an unknown method.
    """
    if method not in (TEACHER, *REGISTRY):
        raise ValueError(f"unknown method {method!r}: the methods are {', '.join((TEACHER, *REGISTRY))}")
    path = Path(folder, task, f"{method}{'-' + variant if variant else ''}-{seed}.json")
    key = trial_key(settings, task, method, seed, changes, split, others, watched)
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return dict(found)
    pair = load_pair({name: settings[name] for name in ("teacher", "student", "device", "dtype")})
    data = splits(settings, task, watched)
    spent = costs()
    if method == TEACHER:
        model: Any = pair.load_teacher().eval()
    else:
        config = _config(settings, pair, method, seed)
        result = REGISTRY[method].transfer(pair, data, replace(config, **(changes or {})))
        model, spent = result.student, result.cost
    answers = {task: answer(settings, pair, model, task, split=split)} if split else {}
    for other in settings["tasks"] if others else ():
        if other != task:
            answers[other] = answer(settings, pair, model, other, limit=others)
    found = {
        "key": key, "task": task, "method": method, "variant": variant, "seed": seed, "answers": answers,
        "validation": compare(settings, pair, model, data, Path(folder, "supervision")), "cost": spent,
    }  # fmt: skip
    write_text(path, json.dumps(found) + "\n")
    return found


def trial_key(settings: Settings, task: str, method: str, seed: int, *rest: Any) -> str:
    """sha256 over the settings that count, the trial's own, and the code that makes it."""
    used = {name: settings.get(name) for name in USED if name != "lrs"} | {"lr": rate(settings, method)}
    own = json.dumps([used, task, method, seed, *rest, code_key()], sort_keys=True, default=_fingerprint)
    return hashlib.sha256(own.encode()).hexdigest()


def code_key() -> str:
    """sha256 over the code and the classroom's data that a trial depends on: the version that its numbers belong to."""
    here = Path(__file__).parent
    folders = (p for name in ("baselines", "benchmarks", "classroom") for p in (here / name).rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for path in [*(here / f"{name}.py" for name in CODE), *sorted(folders)]:
        if path.suffix in (".py", ".yaml", ".json", ".csv"):  # the weights' checksums stand in a json file
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest() if isinstance(value, torch.Tensor) else repr(value)


def rate(settings: Settings, method: str) -> float:
    """The learning rate of a method: its own where one was chosen for it, else the profile's."""
    own: Mapping[str, float] = settings.get("lrs") or {}
    return own.get(method, settings["lr"])


def grid(
    settings: Settings, rates: Sequence[float], folder: str | Path
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Every method of the profile at every rate, on every task, under the first seed: method to rate to task to score.

    The score is the share of the answers' tokens that are predicted on validation examples; None where the training
    broke off. No test question is asked. ``UNTUNED`` methods are left out.
    """
    seed, settings = settings["seeds"][0], {**settings, "lrs": {}}

    def score(method: str, lr: float, task: str) -> float | None:
        changes, variant = {"lr": lr}, f"{lr:g}"
        try:
            found = run_trial(settings, task, method, seed, folder, changes=changes, split=None, variant=variant)
        except DivergedError:
            return None
        return float(seen([found], "right").mean())

    tuned = [method for method in settings["methods"] if method not in UNTUNED]
    return {m: {f"{lr:g}": {t: score(m, lr, t) for t in settings["tasks"]} for lr in rates} for m in tuned}


def choose_rate(scores: Mapping[str, Mapping[str, float | None]]) -> float:
    """The rate with the highest mean score over tasks, of those at which every task was trained to its end.

    Raises:
        ValueError: there is none.
    """
    means = {r: sum(filter(None, s.values())) / len(s) for r, s in scores.items() if None not in s.values()}
    if not means:
        raise ValueError(f"training broke off at every rate of {', '.join(scores)}: try lower ones")
    return float(max(sorted(means, key=float), key=lambda r: means[r]))  # of equals the lowest


def _config(settings: Settings, pair: Pair, method: str, seed: int) -> TransferConfig:
    """The same for every method but its rate. No cache is shared between runs: each reports all that it needs."""
    layers = None
    if settings.get("layer") is not None:
        depths = [len(decoder_layers(load())) for load in (pair.load_teacher, pair.load_student)]
        layers = (critical_pair(settings["layer"], *depths)[1],)
    return TransferConfig(
        layers=layers, interface=settings["interface"], map=settings["map"], epochs=settings["epochs"],
        lr=rate(settings, method), batch=settings["batch_size"], micro_batch=settings["eval_batch_size"],
        max_length=settings["max_length"], seed=seed,
    )  # fmt: skip


def answer(
    settings: Settings, pair: Pair, model: Any, task: str, *, split: str = "test", limit: int | None = None
) -> list[dict[str, Any]]:
    """What ``model`` answers: ``id``, ``correct`` and ``prediction`` of each question (programs: why it failed)."""
    local = settings["data"] == "classroom"  # models of ours write no hostile programs: limits are enough for them
    records, _ = benchmarks.evaluate(
        model, pair.tokenizer, task, questions(settings, task, split, limit),
        protocol=settings["mmlu_protocol"] if task == "mmlu" else "paper", batch_size=settings["eval_batch_size"],
        max_new_tokens=settings.get("max_new_tokens"), allow_code_execution=settings["allow_code_execution"],
        isolation="rlimits" if local else "namespace",
    )  # fmt: skip
    names = {"mmlu": "prediction", "gsm8k": "flexible"}
    return [
        {"id": r["id"], "correct": r["correct"], "prediction": r[names[task]] if task in names else r["reasons"][0]}
        for r in records
    ]


@torch.no_grad()
def compare(settings: Settings, pair: Pair, model: Any, data: TaskData, cache: Path) -> dict[str, list[float]]:
    """Means over each validation example's supervised positions: see :func:`run_trial`."""
    encoded = encode(pair.tokenizer, data.validation, max_length=settings["max_length"])
    vocabulary = len(model.get_output_embeddings().weight)
    teacher = pair.load_teacher().eval()
    vocabulary = min(vocabulary, len(teacher.get_output_embeddings().weight))
    top = SupervisionCache.build(cache, teacher, encoded, (), top_k=min(64, vocabulary), vocabulary=vocabulary)
    del teacher
    read = analysis.read_out(model, encoded, batch=settings["eval_batch_size"], teacher=top, vocabulary=vocabulary)
    example = read.pop("example")
    return {n: analysis.by_example(read[n].double(), example).tolist() for n in ("loss", "right", "kl", "agree")}


def right(trials: Sequence[Mapping[str, Any]], task: str) -> torch.Tensor:
    """Correct (1.0) or not, (trials, questions), of trials that answered the same questions."""
    return torch.tensor([[a["correct"] for a in t["answers"][task]] for t in trials], dtype=torch.float64)


def seen(trials: Sequence[Mapping[str, Any]], what: str) -> torch.Tensor:
    """``loss``, ``right``, ``kl`` or ``agree``, (trials, examples), of trials that watched the same examples."""
    return torch.tensor([t["validation"][what] for t in trials], dtype=torch.float64)


def measured(trials: Sequence[Mapping[str, Any]], task: str, metric: str) -> torch.Tensor:
    """(trials, items), more is better: ``answers`` right, answer ``tokens`` predicted, or the negative ``loss``."""
    if metric == "answers":
        return right(trials, task)
    return seen(trials, "right") if metric == "tokens" else -seen(trials, "loss")
