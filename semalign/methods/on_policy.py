"""On-policy distillation: the teacher judges what the student itself writes (GKD by logits, OPRD by states)."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from semalign import alignment
from semalign.lm.examples import IGNORED, Encoded, Example, TaskData, encode, fitting
from semalign.lm.parts import Model, head_weight
from semalign.methods.registry import Method
from semalign.methods.seeking import to_lora
from semalign.methods.seq_kd import write
from semalign.models import Pair
from semalign.training.config import TransferConfig, TransferResult


def gkd(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, new_tokens: int = 128, own_share: float = 1.0
) -> TransferResult:
    """Generalised knowledge distillation (GKD, Agarwal et al., ICLR 2024): JSD, beta 1/2, on the student's own texts.

    See :func:`train_on_policy`. With ``own_share`` (the paper's lambda) below 1 the other examples are read as they
    are, and only then does a response count.
    """
    judged = {
        "layers": "all",
        "layer_weight": 0.0,
        "output_loss": "jsd",
        "output_weight": 1.0,
        "label_weight": 0.0,
        "projection": None,
    }
    return train_on_policy(pair, data, config or TransferConfig(), judged, new_tokens, own_share)


def oprd(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, new_tokens: int = 128, own_share: float = 1.0
) -> TransferResult:
    """On-policy states (OPRD, arXiv 2606.06021): |h_k - h_T|^2 / D, a mean over all layers' streams, and no logits.

    See :func:`train_on_policy`. OPRD's models have one shape. Of another depth, the depth rule pairs layers; of another
    width, the target is M h_T with the logit map M (ours: M fits the heads, so that it is meant for last layers).
    """
    widths = [_width(load()) for load in (pair.load_student, pair.load_teacher)]
    judged = {
        "layers": "all", "teacher_layers": None, "interface": "stream", "layer_loss": "mean_square", "projection": None,
        "map": None if widths[0] == widths[1] else "logit", "layer_weight": 1.0, "output_loss": "none",
        "label_weight": 0.0,
    }  # fmt: skip
    return train_on_policy(pair, data, config or TransferConfig(), judged, new_tokens, own_share)


def _width(model: Model) -> int:
    return head_weight(model).shape[1]


def train_on_policy(
    pair: Pair, data: TaskData, config: TransferConfig, judged: Mapping[str, Any], new_tokens: int, own_share: float
) -> TransferResult:
    """An epoch is a round: the student continues the training prompts, the teacher judges them, the student learns.

    They take turns in memory, never two at once, so that a round loads the student four times and the teacher once.
    Texts are sampled at temperature 1, up to ``new_tokens`` and without an EOS where none was written; a draw by
    ``own_share`` keeps the rest of the examples as they are. Adapters go on from round to round: they start at the
    rank-r factors of what was learned. The rate falls from round to round where it is to fall linearly, and the
    optimizer's moments begin anew. A run in ``folder`` resumes within its round.

    Args:
        judged: what the configuration has to say of the objective, whatever else it says.

    Raises:
        ValueError: as :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    if not data.train:
        raise ValueError(f"task {data.name} has no training examples: give it at least one")
    start, config = time.perf_counter(), replace(config, schedule="joint", trained="lora", **judged)
    learned: dict[str, Tensor] = {}
    log: list[dict[str, Any]] = []
    cost: dict[str, float] = {}

    def load() -> PreTrainedModel:
        student = pair.load_student()
        student.load_state_dict(learned, strict=False)
        return student.eval()

    moving = replace(pair, load_student=load)
    examples = fitting(pair.tokenizer, data.train, max_length=config.max_length)
    given = encode(pair.tokenizer, examples, max_length=config.max_length)
    watched = encode(pair.tokenizer, data.validation, max_length=config.max_length)
    for number in range(1, config.epochs + 1):
        seed = config.seed + 100_003 * (number - 1)
        student = load()
        texts = continued(student, pair.tokenizer, examples, new_tokens, config.max_length, seed)
        del student
        gc.collect()
        own = np.random.default_rng((seed, 1)).random(len(texts)) < own_share
        texts = [text if mine else example for text, example, mine in zip(texts, given, own, strict=True)]
        falls = config.lr_schedule == "linear"
        one = replace(
            config, epochs=1, seed=seed, lr_schedule="constant", cache_folder=None,
            lr=config.lr * (1 - (number - 1) / config.epochs) if falls else config.lr,
            adapters=_factors(pair.load_student(), learned, config) if learned else config.adapters,
            folder=Path(config.folder) / f"round_{number}" if config.folder else None,
        )  # fmt: skip
        # Supervision of texts that nobody meets again does not stay.
        with tempfile.TemporaryDirectory() as scratch, alignment.workplace(one) as folder:
            encoded = texts + watched
            layers, supervision, vocabulary = alignment.supervise(moving, data, encoded, one, Path(scratch))
            student = load()
            terms = alignment.objective_of(one, student, encoded, supervision, layers, vocabulary)
            result = alignment.fit(student, encoded, len(texts), one, layers, supervision, terms, folder)
        learned = {name: result.student.get_parameter(name).detach().cpu().clone() for name in result.trained}
        done = max((r["step"] for r in log if "step" in r), default=0)
        read = sum(len(e.input_ids) for e in texts)
        log.append({"split": "generation", "round": number, "own": int(own.sum()), "tokens": read})
        log += [{**r, "step": r["step"] + done, "epoch": number} for r in result.log if number == 1 or r["step"]]
        for name, value in {**result.cost, "student_tokens": result.cost["student_tokens"] + read}.items():
            grows = name.endswith("_s") or name in ("teacher_tokens", "student_tokens")
            cost[name] = cost.get(name, 0.0) + value if grows else value
        if number < config.epochs:
            del result, student, terms
            gc.collect()
    cost["wall_s"] = time.perf_counter() - start
    return TransferResult(result.student, result.trained, cost, log, layers)


def continued(
    student: Model, tokenizer: Any, examples: Sequence[Example], new_tokens: int, max_length: int, seed: int
) -> list[Encoded]:
    """Each example's prompt with a response that the student samples; what it wrote are the labels, EOS as it came."""
    prompts = encode(tokenizer, [Example(e.prompt, "") for e in examples], max_length=max_length)
    texts = []
    for prompt, written in zip(prompts, write(student, tokenizer, prompts, new_tokens, seed=seed), strict=True):
        ids = torch.cat([prompt.input_ids[:-1], torch.tensor(written)])[:max_length]
        inside = torch.arange(len(ids)) < len(prompt.input_ids) - 1
        texts.append(Encoded(ids, ids.masked_fill(inside, IGNORED)))
    return texts


def _factors(base: Model, learned: Mapping[str, Tensor], config: TransferConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA factors by module of what ``learned`` adds to the base: B carries the size, as at an ordinary start."""
    scale, factors = config.lora_alpha / config.lora_rank, {}
    for name, weight in learned.items():
        before = base.get_parameter(name).detach().cpu()
        delta = (weight.float() - before.float()) / scale
        b, a = to_lora(delta, min(config.lora_rank, *delta.shape))
        missing = config.lora_rank - b.shape[1]  # of a matrix narrower than the rank
        factors[name.removesuffix(".weight")] = (
            torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
        )  # fmt: skip
    return factors


METHODS = {
    "gkd": Method(
        "JSD on the student's own texts", gkd, "train", "LoRA on all layers", "top-k logits", False,
        colour="#445577",
    ),
    "oprd": Method(
        "states on the student's own texts", oprd, "train", "LoRA on all layers", "states of all layers", False,
        colour="#99aa44",
    ),
}  # fmt: skip
