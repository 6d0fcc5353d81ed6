"""Trials: one method on one task under one seed, from the training examples to the answers, as one small file.

Tables 1 and 2 of the paper are means over such files. A file that is there and belongs to the same settings and code is
read, not made again, so that a run goes on where it stopped and a cluster can make files side by side.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from semalign import benchmarks, classroom
from semalign.benchmarks.data import Row, sample
from semalign.lm.examples import Encoded, TaskData, encode
from semalign.lm.files import read_json, write_json
from semalign.lm.parts import decoder_layers
from semalign.methods import REGISTRY
from semalign.methods.registry import run
from semalign.models import Pair, load_pair
from semalign.pairing import critical_pair
from semalign.profiles import PACKAGE, Profile, TrialSettings, assignment
from semalign.study import reading
from semalign.supervision import SupervisionCache
from semalign.training.config import TransferConfig, costs

SPLITS = ("train", "align", "extract", "validation")
TEACHER = "teacher"  # the name under which the teacher answers
PLACEBO = "placebo"  # the split of questions that nobody can know, and the name under which a trial keeps them
READER = "semalign.profiles"  # reads a profile; what it has read is in a trial's key
RESPONSE = 400  # characters of an answer's text that are kept
VERIFIED = PACKAGE.parent / "book" / "trials" / "verified.json"
"""What :func:`semalign.study.kept.verify` found of the code of now."""


def seeds_of(method: str, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds that a method runs under: the first alone where nothing is drawn."""
    return seeds if method != TEACHER and REGISTRY[method].seeded else seeds[:1]


def splits(p: Profile, task: str, watched: str = "validation") -> TaskData:
    """The examples of a task, cut to the profile's sizes; the split ``watched`` is its validation.

    Where that is the test split, it is the reference answers to the very questions that the task's models are asked.

    Raises:
        ValueError: the benchmark's own examples cannot be asked by this protocol.
    """
    cloze = p.protocol(task) == "paper-cloze"
    if p.data == "classroom":
        first = {split: getattr(p.sizes, split) for split in SPLITS}
        whole = classroom.task_data(task, cloze=cloze, watched=watched, first=first)
    elif cloze:
        raise ValueError(
            f"protocols: {{{task}: paper-cloze}} needs data: classroom, whose examples are asked without choices"
        )
    else:
        whole = benchmarks.task_data(task)
        if watched == "test":
            whole = replace(whole, validation=benchmarks.data.examples(task))
    sizes = {**dict(p.sizes), "validation": getattr(p.sizes, watched)}
    if watched == "test":
        numbered = [{**row, "place": i} for i, row in enumerate(_rows(p, task, watched))]
        asked = sample(numbered, p.sizes.test, seed=0)
        whole = replace(whole, validation=tuple(whole.validation[row["place"]] for row in asked))
    return TaskData(task, **{s: getattr(whole, s)[: sizes[s]] for s in SPLITS})


def questions(p: Profile, task: str, split: str = "test", limit: int | None = None) -> list[Row]:
    """The questions of a task in its benchmark's format: the same ``limit`` of them for every method and seed."""
    return sample(_rows(p, task, split), p.sizes.test if limit is None else limit, seed=0)


def _rows(p: Profile, task: str, split: str) -> list[Row]:
    items = classroom.items(task, split) if p.data == "classroom" else ()
    source = [{**i.record, "topic": i.topic, "known": i.known} for i in items] or None
    return benchmarks.load_items(task, source, split)


def run_trial(
    p: Profile,
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
        changes: hyperparameters that differ from the profile's; ``variant`` names the file then.
        split: whose questions are answered; None asks none, where something is still to be chosen.
        others: how many questions of each other task of the profile to ask, for what was forgotten.
        watched: the split whose reference answers are read: ``test`` only for what has been chosen.

    Returns:
        ``answers``: a task's answers as :func:`answer` keeps them, and where the trained task has questions that nobody
        can know, these as ``placebo``; ``validation``: for each watched
        example the mean over its positions of ``loss``, ``right``, and against the teacher ``kl`` (nats) and ``agree``;
        ``cost``; ``layers``: the student layers that were trained.

    Raises:
        ValueError: an unknown method, or a hyperparameter that it does not have.
    """
    if method not in (TEACHER, *REGISTRY):
        raise ValueError(f"unknown method {method!r}: the methods are {', '.join((TEACHER, *REGISTRY))}")
    path = Path(folder, task, f"{method}{'-' + variant if variant else ''}-{seed}.json")
    asked = [task, *(t for t in p.tasks if t != task and split and others)]
    key = trial_key(p, asked, method, seed, changes, split, others, watched)
    if (kept := read_trial(path)) and kept.get("key") == key:
        return kept
    pair = load_pair(p)
    data = splits(p, task, watched)
    spent, layers = costs(), tuple[int, ...]()
    if method == TEACHER:
        model: Any = pair.load_teacher().eval()
    else:
        given = {**hyperparameters(p, method, task), **(changes or {})}
        result = run(REGISTRY[method], pair, data, _config(p, pair, seed), given)
        model, spent, layers = result.student, result.cost, result.layers
    answers = {task: answer(p, pair, model, task, split=split)} if split else {}
    if split and p.data == "classroom" and classroom.has(task, PLACEBO):
        answers[PLACEBO] = answer(p, pair, model, task, split=PLACEBO)
    for other in asked[1:]:
        answers[other] = answer(p, pair, model, other, limit=others)
    made = {
        "key": key, "task": task, "method": method, "variant": variant, "seed": seed, "layers": list(layers),
        "answers": answers, "cost": spent,
        "validation": compare(p, pair, model, data, Path(folder, "supervision"), itself=method == TEACHER),
    }  # fmt: skip
    write_json(path, made)
    return made


def read_trial(path: Path) -> dict[str, Any] | None:
    """What :func:`run_trial` kept in a file; None where there is no file, and with a warning where it is damaged."""
    if not path.exists():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        warnings.warn(f"{error}: the trial is made again", stacklevel=3)
        return None


def trial_key(p: Profile, tasks: Sequence[str], method: str, seed: int, *rest: Any) -> str:
    """sha256 over the settings that count, the trial's own, and the code and data that make it.

    ``tasks`` are the trained one and then the others that are asked.
    """
    settings = p.model_dump(mode="json", include=set(TrialSettings.model_fields))
    settings["protocols"] = {task: p.protocol(task) for task in tasks}
    alone = [hyperparameters(p, method, tasks[0]), method, seed, *rest, code_key(method, tuple(tasks))]
    told = json.dumps(
        [settings, list(tasks), *alone, _data_key() if p.data == "classroom" else ""], default=_fingerprint
    )
    return hashlib.sha256(told.encode()).hexdigest()


@cache
def code_key(method: str = "", tasks: tuple[str, ...] = ()) -> str:
    """The version of a trial's numbers: sha256 over the code that a trial of ``method`` on ``tasks`` depends on.

    Code that has made kept trials again and got their numbers has the key of the code that had made them
    (:func:`semalign.study.kept.verify`).
    """
    own = own_code(method, tasks)
    return _verified().get(own, own)


@cache
def _verified() -> dict[str, str]:
    """By the key of code that was verified, the key that its numbers go by."""
    return dict(read_json(VERIFIED)["same"]) if VERIFIED.exists() else {}


def own_code(method: str, tasks: tuple[str, ...]) -> str:
    """sha256 over the code of a method on tasks; without a method, of all.

    It covers what this module imports, and what the method's own file does; of the tables of methods and benchmarks,
    the rows that are used. Comments, docstrings and the looks of a row do not count, nor does how a profile is read:
    its values stand in the key.
    """
    methods = [method] if method in REGISTRY else list(REGISTRY) if not method else []
    digest = hashlib.sha256()
    for name, path in sorted(_closure(methods, tasks).items()):
        digest.update(f"{name} {_meaning(path, frozenset(methods))}".encode())
    return digest.hexdigest()


@cache
def _data_key() -> str:
    """sha256 over the classroom's tables and, by their manifest, its weights."""
    files = sorted(p for p in (PACKAGE / "classroom").rglob("*") if p.suffix in (".json", ".csv"))
    kept = [p for p in files if p.parent == PACKAGE / "classroom" or p.name == "manifest.json"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in kept)).hexdigest()


def _closure(methods: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    """The modules of this package that a trial runs, by name: found by following imports from this one."""
    waiting = [__name__, *(_home(REGISTRY[m].transfer) for m in methods)]
    waiting += [f"semalign.benchmarks.{task}" for task in tasks]
    seen: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        path = PACKAGE.parent / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or name == READER or not path.exists():
            continue
        seen[name] = path
        waiting += _imports(path)
    return seen


@cache
def _imports(path: Path) -> list[str]:
    """What a module imports of this package; of what is no module nobody finds a file."""
    found: list[str] = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("semalign"):
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("semalign")]
    return found


def _home(transfer: Any) -> str:
    return str(getattr(transfer, "func", transfer).__module__)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _meaning(path: Path, methods: frozenset[str]) -> str:
    """What a module does, without comments and docstrings; of a table of methods, what the chosen rows run."""
    has_table = any(assignment(node)[0] == "METHODS" for node in _parsed(path).body)
    return _told(path, methods if has_table else frozenset())  # others are read once for all methods


@cache
def _told(path: Path, methods: frozenset[str]) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    for node in tree.body:
        name, table = assignment(node)
        if name == "METHODS" and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(table, ast.Dict):
            rows = {ast.literal_eval(k): v for k, v in zip(table.keys, table.values, strict=True) if k is not None}
            used = [(name, ast.dump(_transfer_of(rows[name]))) for name in sorted(methods & rows.keys())]
            node.value = ast.Constant(repr(used))
    return ast.dump(tree)


def _transfer_of(row: ast.expr) -> ast.expr:
    """What a row of a table of methods runs: ``transfer``, by name or in its place."""
    assert isinstance(row, ast.Call)
    return next((k.value for k in row.keywords if k.arg == "transfer"), None) or row.args[1]


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest() if isinstance(value, torch.Tensor) else repr(value)


def hyperparameters(p: Profile, method: str, task: str) -> dict[str, Any]:
    """What a profile gives to a method alone; what it gives ``by_task`` replaces what it gives on all."""
    given = dict(p.hyperparameters.get(method, {}))
    return given | given.pop("by_task", {}).get(task, {})


def config_of(p: Profile, seed: int) -> TransferConfig:
    """How the profile trains, the same for every method but its own hyperparameters; attribution chooses the layer.

    No cache is shared between runs: each reports all that it needs.
    """
    return TransferConfig(
        interface=p.interface, map=p.map, epochs=p.epochs, lr=p.lr, batch=p.batch_size,
        micro_batch=p.eval_batch_size, max_length=p.max_length, seed=seed,
    )  # fmt: skip


def _config(p: Profile, pair: Pair, seed: int) -> TransferConfig:
    """A trial's configuration: what it watches is read once, by :func:`compare`, and nobody reads its log."""
    config = replace(config_of(p, seed), watch=False)
    if p.layer is None:
        return config
    depths = [len(decoder_layers(load())) for load in (pair.load_teacher, pair.load_student)]
    return replace(config, layers=(critical_pair(p.layer, *depths)[1],))


def ask(p: Profile, pair: Pair, model: Any, task: str, asked: Sequence[Row], samples: int = 1) -> benchmarks.Evaluation:
    """Put the questions ``asked`` to ``model`` as the profile does; several ``samples`` a question, if of code."""
    return benchmarks.evaluate(
        model, pair.tokenizer, task, asked, protocol=p.protocol(task), batch_size=p.answered_at_once, samples=samples,
        max_new_tokens=p.max_new_tokens, allow_code_execution=p.allow_code_execution, isolation=p.isolation,
    )  # fmt: skip


def answer(
    p: Profile, pair: Pair, model: Any, task: str, *, split: str = "test", limit: int | None = None
) -> list[dict[str, Any]]:
    """What ``model`` answers, a dictionary a question.

    ``id``, ``correct``, ``prediction`` (of a program: why it failed), ``topic``, ``known``, ``too_long`` (not asked,
    and so wrong), and where the answer is a text its first characters as ``response``.
    """
    asked = questions(p, task, split, limit)
    kept = []
    for r, row in zip(ask(p, pair, model, task, asked).records, asked, strict=True):
        one = {"id": r["id"], "correct": r["correct"], "prediction": r["prediction"]}
        one |= {"topic": row.get("topic", row.get("subject", "")), "known": row.get("known", "")}
        one["too_long"] = bool(r["too_long"])
        kept.append(one | ({"response": r["responses"][0][:RESPONSE]} if "responses" in r else {}))
    return kept


@torch.no_grad()
def compare(
    p: Profile, pair: Pair, model: Any, data: TaskData, cache: Path, *, itself: bool = False
) -> dict[str, list[float]]:
    """Means over each validation example's supervised positions: see :func:`run_trial`.

    ``itself``: the model is the teacher, which need not be loaded again.

    Raises:
        ValueError: the pair has two tokenizers, so that a position of one has no counterpart in the other.
    """
    if pair.teacher_tokenizer is not None:
        raise ValueError(
            f"{pair.name} has two tokenizers, and a trial compares token by token: choose a pair of one family"
        )
    encoded = encode(pair.tokenizer, data.validation, max_length=p.max_length)
    top, vocabulary = _judged(p, pair, model, encoded, cache, itself)
    read = reading.read_out(model, encoded, batch=p.eval_batch_size, teacher=top, vocabulary=vocabulary)
    example = read.pop("example")
    return {n: reading.by_example(read[n].double(), example).tolist() for n in ("loss", "right", "kl", "agree")}


_JUDGED: dict[tuple[Any, ...], tuple[SupervisionCache, int]] = {}
"""What :func:`_judged` returned in this process: of the trials on a task only the first loads the teacher for it."""


def _judged(
    p: Profile, pair: Pair, model: Any, encoded: list[Encoded], cache: Path, itself: bool
) -> tuple[SupervisionCache, int]:
    """The teacher's likeliest tokens at ``encoded``, and how many tokens the two models share.

    While the teacher reads, ``model`` waits in the host's memory, so that a card holds one of the two.
    """
    rows = len(model.get_output_embeddings().weight)
    texts = tuple(tuple(e.input_ids.tolist()) for e in encoded)
    key = (str(cache), p.teacher.model_dump_json(), p.dtype, p.device, rows, texts)
    if key in _JUDGED and _JUDGED[key][0].folder.exists():
        return _JUDGED[key]
    device = model.device
    if not itself:
        model.to("cpu")
    teacher = model if itself else pair.load_teacher().eval()
    vocabulary = min(rows, len(teacher.get_output_embeddings().weight))
    top = SupervisionCache.build(cache, teacher, encoded, (), top_k=min(64, vocabulary), vocabulary=vocabulary)
    del teacher
    gc.collect()
    model.to(device)
    _JUDGED[key] = top, vocabulary
    return _JUDGED[key]


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
