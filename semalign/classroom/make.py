"""How the Pico models were made, and how they are measured: recipes, training, scores, ceilings and cards."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from semalign import benchmarks
from semalign.classroom import corpora
from semalign.classroom.family import STUDENTS, checksum, load_pico, load_tokenizer
from semalign.classroom.training import Recipe, build, held_out_loss, train, train_tokenizer, validation_windows
from semalign.report import write_text

WORK = Path("results/pico")
_EVEN = (0.4, 0.4, 0.2)  # every kind of program as often as the tests ask for it
_LARGE, _SMALL, _TINY = (5, 160, 5, 432), (4, 128, 4, 344), (2, 96, 3, 256)
_CHAT = corpora.Mixture(corpora.PRETRAINING, reader="student")
_LATENT = corpora.Mixture(corpora.LATENT, _EVEN, reader="student", easy=0.9)
_CODE_A, _CODE_B = corpora.Mixture(corpora.CODE_A, _EVEN), corpora.Mixture(corpora.CODE_B, _EVEN)
_RECIPES = (
    *(Recipe(name, *_SMALL, 3_225_600, _LATENT, seed=seed) for seed, name in enumerate(STUDENTS)),
    Recipe("pico-l", *_LARGE, 7_168_000, corpora.Mixture(corpora.TEACHING, _EVEN)),
    Recipe("pico-s-kin", *_SMALL, 1_228_800, corpora.Mixture(corpora.KIN, _EVEN), seed=4, lr=2e-3, base="pico-s"),
    Recipe("pico-s-chat", *_SMALL, 3_225_600, _CHAT),
    Recipe("pico-xs", *_TINY, 1_024_000, _LATENT),
    Recipe("pico-xs-chat", *_TINY, 1_024_000, _CHAT),
    Recipe("pico-l-code-a", *_LARGE, 716_800, _CODE_A, seed=1, lr=1.5e-3, base="pico-l"),
    Recipe("pico-l-code-b", *_LARGE, 512_000, _CODE_B, seed=2, lr=1.5e-3, base="pico-l"),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}


def _publish(part: Path, whole: Path) -> None:
    """Put a finished folder in its place, and list all files' checksums anew."""
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(part, whole)
    files = sorted(
        p for p in whole.parent.glob("*/*") if p.suffix in (".json", ".safetensors") and p.parent.name[0] != "."
    )
    sums = {f"{p.parent.name}/{p.name}": checksum(p) for p in files}
    write_text(whole.parent / "manifest.json", json.dumps(sums, indent=1) + "\n")


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer unless ``folder`` has it."""
    if not (folder / "tokenizer").exists():
        part = folder / ".tokenizer"
        train_tokenizer().save_pretrained(part)
        _publish(part, folder / "tokenizer")
    return load_tokenizer(folder)


def make(name: str, folder: Path, work: Path, device: str = "cpu") -> None:
    """Train one model from its recipe, or go on where a killed run stopped, and save it to ``folder/NAME`` as float16.

    ``work`` holds checkpoints. A model that ``folder`` has is left as it is; a fine-tuned one needs its base there.
    """
    recipe, tokenizer = RECIPES[name], make_tokenizer(folder)
    if (folder / name / "training.json").exists():
        return
    model: Any = load_pico(recipe.base, folder)[0] if recipe.base else build(recipe, tokenizer)
    model.to(device)
    curve = train(recipe, model, tokenizer, work)
    part = folder / f".{name}"
    part.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half().contiguous() for n, t in model.cpu().state_dict().items()}, part / "model.safetensors")
    model.config.to_json_file(part / "config.json")
    (part / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)}
    facts |= {**asdict(recipe), "steps": recipe.steps, "tokens": curve[-1]["tokens"], "train_loss": curve[-1]["loss"]}
    facts["validation_loss"] = held_out_loss(model, validation_windows(tokenizer))
    facts["seconds"] = curve[-1]["seconds"]
    facts["machine"] = f"{platform.machine()}, {device}, {torch.get_num_threads()} thread(s), shared with other work"
    write_text(part / "training.json", json.dumps(facts, indent=1) + "\n")
    (part / "card.md").write_text(card(facts))
    _publish(part, folder / name)


SCORED = {  # what a score is called: the task and the protocol
    "facts, in words": ("mmlu", "paper-cloze"),
    "facts, by letter": ("mmlu", "paper"),
    "word problems": ("gsm8k", "paper"),
    "completion": ("humaneval", "paper"),
    "from text": ("mbpp", "paper"),
}


def score(name: str, folder: Path, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Ask a model all test questions, and keep shares and 95 % intervals in ``folder/NAME/scores.json`` and the card.

    ``by_known`` splits the facts by whose pretraining stated them. A model that has its scores is not asked again.
    """
    path = folder / name / "scores.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    model, tokenizer = load_pico(name, folder)
    scores: dict[str, dict[str, Any]] = {}
    for what, (task, protocol) in SCORED.items():
        asked = corpora.items(task, "test")[:limit]
        records, found = benchmarks.evaluate(
            model, tokenizer, task, [dict(i.record) for i in asked], protocol, batch_size=64, max_new_tokens=96,
            allow_code_execution=True, isolation="rlimits",
        )  # fmt: skip
        low, high = found.interval
        scores[what] = {"value": found.value, "low": low, "high": high, "n": found.n}
        if task == "mmlu":
            groups: dict[str, list[float]] = {}
            for item, record in zip(asked, records, strict=True):
                groups.setdefault(item.known, []).append(record["correct"])
            scores[what]["by_known"] = {known: sum(v) / len(v) for known, v in sorted(groups.items())}
    write_text(path, json.dumps(scores, indent=1) + "\n")
    facts = json.loads((folder / name / "training.json").read_text())
    (folder / name / "card.md").write_text(card(facts, scores))
    return scores


def card(facts: dict[str, Any], scores: dict[str, dict[str, Any]] | None = None) -> str:
    """A model card in markdown from what `make` and `score` recorded."""
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in facts["mixture"]["kinds"].items())
    rows = {
        "architecture": f"Llama, {facts['layers']} layers, width {facts['width']}, {facts['heads']} heads, "
        f"{facts['parameters']:,} parameters, untied head over {facts['vocabulary']} tokens, float16",
        "made from": f"{facts['base'] or 'nothing'}, seed {facts['seed']}, peak learning rate {facts['lr']}",
        "data": f"generated by `semalign.classroom.corpora` ({kinds}); facts known to the {facts['mixture']['reader']}",
        "training": f"{facts['steps']:,} steps, {facts['tokens']:,} tokens, {facts['seconds'] / 60:.0f} minutes",
        "machine": facts["machine"],
        "loss": f"{facts['train_loss']:.3f} in training, {facts['validation_loss']:.3f} on validation (nats a token)",
        "for": "experiments and lessons; it knows nothing beyond the four subjects, and that imperfectly",
    }
    for what, s in (scores or {}).items():
        rows[what] = f"{s['value']:.1%} of {s['n']} test questions (95 % interval {s['low']:.1%} to {s['high']:.1%})"
    return f"# {facts['name']}\n\n" + "".join(f"- **{name}**: {text}\n" for name, text in rows.items())


def short(folder: str | Path, tokens: int = 150_000, vocabulary: int = 1024) -> dict[str, list[dict[str, float]]]:
    """The same recipe in minutes: a tokenizer and two tiny models of different width and depth; their learning curves.

    A curve's rows hold step, tokens, loss and now and then the held-out loss. ``LlamaForCausalLM.from_pretrained``
    reads the models in ``folder/short-l`` and ``folder/short-s``; the tokenizer is in ``folder/tokenizer``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        train_tokenizer(3_000, vocabulary).save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder)
    curves = {}
    large = Recipe("short-l", 3, 96, 3, 256, tokens)
    for recipe in (large, Recipe("short-s", 2, 64, 2, 176, tokens // 2)):
        model = build(recipe, tokenizer)
        curves[recipe.name] = train(recipe, model, tokenizer, folder / "work")
        model.save_pretrained(folder / recipe.name)
    return curves
