"""The five models, how each was made, and how the shipped ones are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from semalign.classroom import corpora
from semalign.classroom.training import Recipe, build, held_out_loss, train, train_tokenizer, validation_windows

WEIGHTS = Path(__file__).with_name("weights")
_STUDENT = corpora.Mixture(corpora.PRETRAINING, reader="student")
_EVEN = (0.4, 0.4, 0.2)  # code teachers read every kind of program as often as the tests ask for it
RECIPES = {
    r.name: r
    for r in (
        Recipe("pico-l", 5, 200, 5, 536, 3_072_000, lr=1.5e-3),
        Recipe("pico-s", 4, 160, 4, 432, 1_536_000, _STUDENT),
        Recipe("pico-xs", 2, 96, 3, 256, 1_228_800, _STUDENT),
        Recipe("pico-l-code-a", 5, 200, 5, 536, 307_200, corpora.Mixture(corpora.CODE_A, _EVEN), seed=1, lr=6e-4, base="pico-l"),
        Recipe("pico-l-code-b", 5, 200, 5, 536, 614_400, corpora.Mixture(corpora.CODE_B, _EVEN), seed=2, lr=8e-4, base="pico-l"),
    )
}
NAMES = tuple(RECIPES)


def load_pico(name: str, folder: Path = WEIGHTS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A Pico model in float32 and eval mode, and the tokenizer that all of them share.

    Raises:
        ValueError: an unknown name, or a file that is missing or is not the one that the manifest lists.
    """
    if name not in NAMES:
        raise ValueError(f"there is no Pico model {name!r}: the names are {', '.join(NAMES)}")
    manifest = folder / "manifest.json"
    sums: dict[str, str] = json.loads(manifest.read_text()) if manifest.exists() else {}
    for file in ("tokenizer/tokenizer.json", f"{name}/config.json", f"{name}/model.safetensors"):
        path = folder / file
        if not path.exists() or checksum(path) != sums.get(file):
            raise ValueError(f"{path} is missing or differs from {manifest}: install semalign again, or retrain with `make pico`")
    model = LlamaForCausalLM(LlamaConfig.from_json_file(folder / name / "config.json"))
    model.load_state_dict({n: t.float() for n, t in load_file(folder / name / "model.safetensors").items()})
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path = WEIGHTS) -> PreTrainedTokenizerBase:
    """The family's tokenizer, with LaTen's chat template."""
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _publish(part: Path, whole: Path) -> None:
    """Put a finished folder in its place, and list all files' checksums anew."""
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(part, whole)
    files = sorted(p for p in whole.parent.glob("*/*") if p.suffix in (".json", ".safetensors") and p.parent.name[0] != ".")
    write_json(whole.parent / "manifest.json", {f"{p.parent.name}/{p.name}": checksum(p) for p in files})


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as json, whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(path.with_suffix(".part"), path)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer unless ``folder`` has it."""
    if not (folder / "tokenizer").exists():
        part = folder / ".tokenizer"
        train_tokenizer().save_pretrained(part)
        _publish(part, folder / "tokenizer")
    return load_tokenizer(folder)


def make(name: str, folder: Path, work: Path, device: str = "cpu") -> None:
    """Train one model from its recipe, or go on where a killed run stopped, and save it to ``folder/NAME`` as float16.

    ``work`` holds checkpoints. A model that ``folder`` already has is left as it is; a fine-tuned one needs its base there.
    """
    recipe, tokenizer = RECIPES[name], make_tokenizer(folder)
    if (folder / name / "training.json").exists():
        return
    model = (load_pico(recipe.base, folder)[0] if recipe.base else build(recipe, tokenizer)).to(device)
    curve = train(recipe, model, tokenizer, work)
    part = folder / f".{name}"
    part.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half().contiguous() for n, t in model.cpu().state_dict().items()}, part / "model.safetensors")
    model.config.save_pretrained(part)
    (part / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    write_json(part / "training.json", {
        "name": name, "parameters": sum(p.numel() for p in model.parameters()), "layers": recipe.layers, "width": recipe.width,
        "heads": recipe.heads, "inner": recipe.inner, "vocabulary": len(tokenizer), "base": recipe.base, "seed": recipe.seed, "lr": recipe.lr,
        "steps": recipe.steps, "tokens": curve[-1]["tokens"], "kinds": recipe.mixture.kinds, "reader": recipe.mixture.reader,
        "train_loss": curve[-1]["loss"], "validation_loss": held_out_loss(model, validation_windows(tokenizer)),
        "seconds": curve[-1]["seconds"], "machine": f"{platform.machine()}, {device}, {torch.get_num_threads()} thread(s)",
    })  # fmt: skip
    _publish(part, folder / name)


def short(folder: str | Path, tokens: int = 150_000, vocabulary: int = 1024) -> dict[str, list[dict[str, float]]]:
    """The same recipe in minutes: a tokenizer and two tiny models of different width and depth; their learning curves.

    A curve's rows hold step, tokens, loss and now and then the held-out loss. Models are saved in ``folder/NAME`` as a full
    run saves its own (``LlamaForCausalLM.from_pretrained`` reads them), the tokenizer in ``folder/tokenizer``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        train_tokenizer(3_000, vocabulary).save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder)
    curves = {}
    for recipe in (Recipe("short-l", 3, 96, 3, 256, tokens, lr=4e-3), Recipe("short-s", 2, 64, 2, 176, tokens // 2, lr=4e-3)):
        model = build(recipe, tokenizer)
        curves[recipe.name] = train(recipe, model, tokenizer, folder / "work")
        model.save_pretrained(folder / recipe.name)
    return curves


@torch.no_grad()
def cloze_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[corpora.Item]) -> float:
    """Share of fact questions whose right choice is likelier, after the question alone, than each wrong one."""
    right = 0
    for item in questions:
        prompt = tokenizer(corpora.chat(corpora.cloze_user(item.topic, item.record["question"])) + "The answer is:")["input_ids"]
        scores = []
        for choice in item.record["choices"]:
            tail = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([prompt + tail])
            logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(logp.gather(1, torch.tensor(tail)[:, None]).mean()))
        right += scores.index(max(scores)) == item.record["answer"]
    return right / len(questions)
