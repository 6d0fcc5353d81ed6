"""Sequence-level distillation: supervised fine-tuning on what the teacher answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from semalign.lm.examples import Encoded, Example, TaskData, by_length, encode, fitting
from semalign.lm.parts import Model
from semalign.methods.registry import Method
from semalign.methods.settings import SFT
from semalign.models import Pair
from semalign.training.config import TransferConfig, TransferResult


def transfer(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, new_tokens: int = 128
) -> TransferResult:
    """SFT on the teacher's greedy answers to the training prompts (Kim and Rush 2016); the responses are not read.

    Answers that do not end within ``new_tokens`` are left out, as they would teach the student not to stop.

    Raises:
        ValueError: no answer ended.
    """
    config = config or TransferConfig()
    start = time.perf_counter()
    examples = fitting(pair.tokenizer, data.train, max_length=config.max_length)
    teacher = pair.load_teacher().eval()
    answers, tokens = generate(teacher, pair, examples, new_tokens, config.max_length)
    del teacher
    gc.collect()
    ended = tuple(Example(e.prompt, a) for e, a in zip(examples, answers, strict=True) if a is not None)
    if not ended:
        raise ValueError(f"none of the teacher's answers ends within {new_tokens} tokens: raise new_tokens")
    spent = time.perf_counter() - start
    result = SFT(pair, replace(data, train=ended), config)
    result.cost["wall_s"] += spent
    result.cost["teacher_tokens"] += tokens
    facts = {"split": "generation", "answers": len(ended), "unended": len(answers) - len(ended)}
    return replace(result, log=[facts, *result.log])


@torch.no_grad()
def generate(
    teacher: Model, pair: Pair, examples: Sequence[Example], new_tokens: int, max_length: int
) -> tuple[list[str | None], int]:
    """Greedy answers in order, None where one did not end, and how many tokens the teacher read and wrote."""
    tokenizer: Any = pair.tokenizer
    encoded = encode(tokenizer, [Example(e.prompt, "") for e in examples], max_length=max_length)
    answers: list[str | None] = []
    tokens = 0
    for prompt, ids in zip(encoded, write(teacher, tokenizer, encoded, new_tokens), strict=True):
        ended = ids[-1] == tokenizer.eos_token_id
        tokens += len(prompt.input_ids) + len(ids) - ended
        answers.append(tokenizer.decode(ids[:-1], skip_special_tokens=True) if ended else None)
    return answers, tokens


@torch.no_grad()
def write(
    model: Model, tokenizer: Any, prompts: Sequence[Encoded], new_tokens: int, *, seed: int | None = None
) -> list[list[int]]:
    """Token ids of a continuation of each prompt, up to and with EOS, or ``new_tokens`` of them where none comes.

    ``prompts`` are encoded with an empty response, whose EOS is left out. Greedy, or with a ``seed`` sampled from the
    model's own distribution.
    """
    texts: list[list[int]] = [[]] * len(prompts)
    device, eos = next(model.parameters()).device, tokenizer.eos_token_id
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # whatever the model's own settings say
    drawn = {"do_sample": False} if seed is None else plain
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for some in by_length(prompts, 4096):
            starts = [prompts[i].input_ids[:-1] for i in some]
            width = max(map(len, starts))
            ids = torch.full((len(some), width), eos)
            mask = torch.zeros_like(ids)
            for row, start in enumerate(starts):  # on the left: all continuations begin in the same column
                ids[row, width - len(start) :], mask[row, width - len(start) :] = start, 1
            settings = {**drawn, "max_new_tokens": new_tokens, "pad_token_id": eos, "eos_token_id": eos}
            out = model.generate(ids.to(device), attention_mask=mask.to(device), **settings)  # type: ignore[operator]
            for i, row in zip(some, out[:, width:].cpu().tolist(), strict=True):
                texts[i] = row[: row.index(eos) + 1] if eos in row else row
    return texts


METHODS = {
    "seq_kd": Method(
        "SFT on the teacher's answers", transfer, "train", "LoRA on all layers", "its answers", False, colour="#cc8866"
    )
}  # fmt: skip
