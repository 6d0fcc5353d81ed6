"""How the Pico models were made, and how they are measured: recipes, training, scores, ceilings and cards."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from semalign import benchmarks
from semalign.benchmarks import answers, sandbox
from semalign.benchmarks.gsm8k import gold
from semalign.classroom import corpora
from semalign.classroom.family import NAMES, STUDENTS, WEIGHTS, checksum, load_pico, load_tokenizer, read_pico
from semalign.classroom.training import Recipe, build, held_out_loss, train, train_tokenizer, validation_windows
from semalign.lm.files import locked, write_text
from semalign.methods import REGISTRY
from semalign.models import Pair
from semalign.training.config import TransferConfig

WORK = Path("results/pico")
RATES = (3e-3,)  # of `elicit`, which takes the best
_EVEN = (0.4, 0.4, 0.2)  # every kind of program as often as the tests ask for it
_LARGE, _SMALL, _TINY = (5, 160, 5, 432), (4, 128, 4, 344), (2, 96, 3, 256)
_CHAT = corpora.Mixture(corpora.PRETRAINING, reader="student")
_LATENT = corpora.Mixture(corpora.LATENT, _EVEN, reader="student", easy=0.9)
_CODE_A, _CODE_B = corpora.Mixture(corpora.CODE_A, _EVEN), corpora.Mixture(corpora.CODE_B, _EVEN)
# the wide teacher reads twice the facts of a student, and they crowd out its skills: it is trained in three parts
_SKILLS = corpora.Mixture(corpora.SKILLS, _EVEN)
_FINISH = corpora.Mixture(corpora.FINISH, _EVEN, easy=0.85)
_RECIPES = (
    *(Recipe(name, *_SMALL, 2_560_000, _LATENT, seed=seed) for seed, name in enumerate(STUDENTS)),
    Recipe("pico-l-base", *_LARGE, 6_144_000, corpora.Mixture(corpora.TEACHING, _EVEN)),
    Recipe("pico-l-mid", *_LARGE, 2_560_000, _SKILLS, seed=3, lr=3e-3, base="pico-l-base"),
    Recipe("pico-l", *_LARGE, 819_200, _FINISH, seed=5, lr=2e-3, base="pico-l-mid"),
    *(
        Recipe(f"{name}-kin", *_SMALL, 1_024_000, corpora.Mixture(corpora.KIN, _EVEN), seed=4, lr=2e-3, base=name)
        for name in STUDENTS
    ),
    Recipe("pico-s-chat", *_SMALL, 3_225_600, _CHAT),
    Recipe("pico-xs", *_TINY, 1_024_000, _LATENT),
    Recipe("pico-xs-chat", *_TINY, 1_024_000, _CHAT),
    Recipe("pico-l-code-a", *_LARGE, 512_000, _CODE_A, seed=1, lr=1.5e-3, base="pico-l"),
    Recipe("pico-l-code-b", *_LARGE, 409_600, _CODE_B, seed=2, lr=1.5e-3, base="pico-l"),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}


LISTED = ("config.json", "model.safetensors", "training.json", "tokenizer.json", "tokenizer_config.json")


def _list(folder: Path, *, but: str = "") -> None:
    """Write the checksums of the models' and the tokenizer's files, except those of ``but``, to the manifest."""
    files = sorted(p for p in folder.glob("[!.]*/*") if p.name in LISTED and p.parent.name != but)
    sums = {f"{p.parent.name}/{p.name}": checksum(p) for p in files}
    write_text(folder / "manifest.json", json.dumps(sums, indent=1) + "\n")


def _publish(part: Path, whole: Path) -> None:
    """Put a finished folder in its place and list it: one that is there and not listed was cut off between the two."""
    _list(whole.parent, but=whole.name)
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(part, whole)
    _list(whole.parent)


def _published(whole: Path, file: str) -> bool:
    """Whether a finished folder is in its place; lists it where a kill left that out."""
    if not (whole / file).exists():
        return False
    manifest = whole.parent / "manifest.json"
    if not manifest.exists() or f"{whole.name}/{file}" not in json.loads(manifest.read_text()):
        _list(whole.parent)
    return True


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer unless ``folder`` has it."""
    if not _published(folder / "tokenizer", "tokenizer.json"):
        part = folder / ".tokenizer"
        train_tokenizer().save_pretrained(part)
        _publish(part, folder / "tokenizer")
    return load_tokenizer(folder)


def make(name: str, folder: Path, work: Path, device: str = "cpu") -> None:
    """Train one model from its recipe, or go on where a killed run stopped, and save it to ``folder/NAME`` as float16.

    ``work`` holds checkpoints. A model that ``folder`` has is left as it is; a fine-tuned one needs its base there.

    Raises:
        ValueError: there is no such recipe, or the base is missing.
        RuntimeError: another process is making a model in ``folder``.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}: the names are {', '.join(RECIPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        _make(name, folder, work, device)


def _make(name: str, folder: Path, work: Path, device: str) -> None:
    recipe, tokenizer = RECIPES[name], make_tokenizer(folder)
    if _published(folder / name, "training.json"):
        return
    model: Any = read_pico(recipe.base, folder) if recipe.base else build(recipe, tokenizer)
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
    _publish(part, folder / name)
    write_card(folder / name)


# ------------------------------------------------------------------------------------------------ what they can do

SCORED = {  # what a score is called: the task and the protocol
    "facts, in words": ("mmlu", "paper-cloze"),
    "facts, by letter": ("mmlu", "paper"),
    "word problems": ("gsm8k", "paper"),
    "completion": ("humaneval", "paper"),
    "from text": ("mbpp", "paper"),
}
SKILLS = tuple(what for what in SCORED if what != "facts, by letter")
ANSWER = 80  # tokens of an answer at most
Numbers = dict[str, dict[str, Any]]


def _ask(model: Any, tokenizer: PreTrainedTokenizerBase, what: str, asked: list[corpora.Item]) -> list[dict[str, Any]]:
    task, protocol = SCORED[what]
    return benchmarks.evaluate(
        model, tokenizer, task, [dict(i.record) for i in asked], protocol, batch_size=64, max_new_tokens=ANSWER,
        allow_code_execution=True, isolation="rlimits",
    ).records  # fmt: skip


def _share(right: list[float]) -> dict[str, Any]:
    low, high = benchmarks.wilson(sum(right) / len(right), len(right))
    return {"value": sum(right) / len(right), "low": low, "high": high, "n": len(right)}


def _by(labels: list[str], right: list[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for label, one in zip(labels, right, strict=True):
        groups.setdefault(label, []).append(one)
    return {label: sum(v) / len(v) for label, v in sorted(groups.items())}


def score(name: str, folder: Path, limit: int | None = None) -> Numbers:
    """Ask a model all test questions, and keep shares and 95 % intervals in ``folder/NAME/scores.json`` and the card.

    ``by_known`` splits the facts by whose pretraining stated them, ``by_topic`` the rest by steps or parameters;
    ``placebo`` is the share of questions on facts that do not exist. A model that has its scores is not asked again.
    """
    path = folder / name / "scores.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    model, tokenizer = load_pico(name, folder)
    scores: Numbers = {}
    for what, (task, _) in SCORED.items():
        asked = list(corpora.items(task, "test")[:limit])
        right = [r["correct"] for r in _ask(model, tokenizer, what, asked)]
        labels = [i.known or i.topic for i in asked]
        scores[what] = _share(right) | {"by_known" if task == "mmlu" else "by_topic": _by(labels, right)}
    asked = list(corpora.items("mmlu", "placebo")[:limit])
    scores["placebo"] = _share([r["correct"] for r in _ask(model, tokenizer, "facts, in words", asked)])
    write_text(path, json.dumps(scores, indent=1) + "\n")
    write_card(folder / name)
    return scores


def ceilings(name: str, folder: Path, limit: int | None = None) -> Numbers:
    """What a model can do when it is asked in the plain form that latent students read: the ceiling of elicitation.

    Validation questions alone, in ``folder/NAME/ceilings.json`` and on the card: the likeliest of four values after
    ``Q: ... A:``; the last number that follows a story; a function's body, run on the question's tests, under its
    docstring and under a comment.
    """
    path = folder / name / "ceilings.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    model, tokenizer = load_pico(name, folder)
    found: Numbers = {}
    for what in SKILLS:
        asked = list(corpora.items(SCORED[what][0], "validation")[:limit])
        right = _plain(model, tokenizer, asked)
        labels = [i.known or i.topic for i in asked]
        found[what] = _share(right) | {"by_known" if asked[0].known else "by_topic": _by(labels, right)}
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_card(folder / name)
    return found


def _plain(model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[corpora.Item]) -> list[float]:
    """Whether each item of one subject is answered right in its plain form."""
    rows, subject = [i.record for i in asked], asked[0].subject
    if subject == "mmlu":
        pairs = [(corpora.plain_question(r["question"]), f" {choice}") for r in rows for choice in r["choices"]]
        scores = _log_likelihoods(model, tokenizer, pairs).view(-1, 4)
        return [float(best == r["answer"]) for best, r in zip(scores.argmax(1).tolist(), rows, strict=True)]
    prompts = [plain_prompt(item) for item in asked]
    lines = [text.split("\n")[0] for text in _continue(model, tokenizer, prompts)]
    if subject == "gsm8k":
        right = [gold(r["answer"]) for r in rows]
        return [float(answers.last_number(line) == g) for line, g in zip(lines, right, strict=True)]
    written = [p + line + "\n" for p, line in zip(prompts, lines, strict=True)]
    programs = [answers.program(subject, r, code) for r, code in zip(rows, written, strict=True)]
    return [float(o.passed) for o in sandbox.run_programs(programs, timeout_s=10.0)]


def plain_prompt(item: corpora.Item) -> str:
    """A word problem or a program as the beginning of a plain document; the working or the body goes on from it."""
    if item.subject == "gsm8k":
        return item.record["question"].rsplit(" How many ", 1)[0] + "\n"
    if item.subject == "humaneval":
        return str(item.record["prompt"])
    description = item.record["text"].removeprefix("Write a function to find ").removesuffix(".")
    return corpora.commented(description, item.record["code"].split("\n")[0]) + "\n"


@torch.no_grad()
def _log_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], batch: int = 64
) -> torch.Tensor:
    """The summed log-probability of each pair's second text after its first, in nats."""
    found = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        before = [tokenizer(first)["input_ids"] for first, _ in part]
        after = [tokenizer(second, add_special_tokens=False)["input_ids"] for _, second in part]
        width = max(len(b) + len(a) for b, a in zip(before, after, strict=True))
        ids = torch.tensor([b + a + [0] * (width - len(b) - len(a)) for b, a in zip(before, after, strict=True)])
        logp = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)  # padding is behind what counts
        each = logp.gather(2, ids[:, 1:, None]).squeeze(2)
        for row, b, a in zip(each, before, after, strict=True):
            found.append(row[len(b) - 1 : len(b) + len(a) - 1].sum())
    return torch.stack(found)


@torch.no_grad()
def _continue(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch: int = 64) -> list[str]:
    """The greedy continuation of each prompt, to the first line break."""
    texts = [""] * len(prompts)
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(ids[i]) for i in rows)
        left = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in rows])
        out = model.generate(
            left, attention_mask=(left != tokenizer.pad_token_id).long(), max_new_tokens=ANSWER, do_sample=False,
            stop_strings=["\n"], tokenizer=tokenizer,
        )  # fmt: skip
        for i, tokens in zip(rows, out[:, width:], strict=True):
            texts[i] = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return texts


def elicit(name: str, folder: Path, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """What `sft` in all layers gains on validation questions, in ``folder/NAME/elicited.json`` and on the card.

    A subject to ``none`` and ``sft`` (shares with intervals) and ``lr``, the better of `RATES`. All training examples
    of the subject, five epochs, batches of 16; ``sizes`` cuts ``train`` and ``validation``.
    """
    path = folder / name / "elicited.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    student, tokenizer = load_pico(name, folder)

    def load() -> Any:
        return load_pico(name, folder)[0]

    for what in (skill for skill in SKILLS if skill not in found):
        task, cut = SCORED[what][0], sizes or {}
        asked = list(corpora.items(task, "validation")[: cut.get("validation")])
        data = corpora.task_data(task, cloze=True)
        data = replace(data, train=data.train[: cut.get("train")], validation=())
        own: dict[str, Any] = {"none": _share([r["correct"] for r in _ask(student, tokenizer, what, asked)])}
        for lr in RATES:
            config = TransferConfig(lr=lr, epochs=5, batch=16, micro_batch=16, max_length=256)
            taught = REGISTRY["sft"].transfer(Pair(name, load, load, tokenizer), data, config).student
            share = _share([r["correct"] for r in _ask(taught, tokenizer, what, asked)])
            if share["value"] >= own.get("sft", {"value": 0.0})["value"]:
                own |= {"sft": share, "lr": lr}
        found[what] = own
        write_text(path, json.dumps(found, indent=1) + "\n")
        write_card(folder / name)
    return found


def write_card(folder: Path) -> None:
    """Write ``card.md`` from what `make`, `score`, `ceilings` and `elicit` recorded in the model's folder."""
    names = ("training", "scores", "ceilings", "elicited")
    read = {n: json.loads((folder / f"{n}.json").read_text()) for n in names if (folder / f"{n}.json").exists()}
    write_text(folder / "card.md", card(read["training"], *(read.get(n, {}) for n in names[1:])))


def card(facts: dict[str, Any], scores: Numbers, plain: Numbers, elicited: dict[str, Any]) -> str:
    """A model card in markdown."""
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

    def text(s: dict[str, Any], of: str) -> str:
        return f"{s['value']:.1%} of {s['n']} {of} (95 % interval {s['low']:.1%} to {s['high']:.1%})"

    rows |= {what: text(s, "test questions") for what, s in scores.items()}
    rows |= {f"{what}, asked in plain form": text(s, "validation questions") for what, s in plain.items()}
    for what, s in elicited.items():
        gain = f"{s['none']['value']:.1%} before, after sft (rate {s['lr']:g}) "
        rows[f"{what}, elicited"] = gain + text(s["sft"], "validation questions")
    return f"# {facts['name']}\n\n" + "".join(f"- **{row}**: {told}\n" for row, told in rows.items())


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


def main(names: list[str]) -> None:
    """Make and measure the named models, or all, in ``results/pico``."""
    folder = WORK / "weights"
    for name in names or RECIPES:
        print(f"== {name}", flush=True)
        make(name, folder, WORK, "cuda" if torch.cuda.is_available() else "cpu")
        if name in NAMES:
            ceilings(name, folder)
            score(name, folder)
        if name in STUDENTS:
            elicit(name, folder)
        print((folder / name / "card.md").read_text(), flush=True)
    print(f"the models are in {folder}; copy them to {WEIGHTS} to use them")
