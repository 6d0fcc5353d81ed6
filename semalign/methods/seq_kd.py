"""Sequence-level distillation: supervised fine-tuning on what the teacher answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from semalign.lm.examples import Example, TaskData, by_length, encode
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
    teacher = pair.load_teacher().eval()
    answers, tokens = generate(teacher, pair, data.train, new_tokens, config.max_length)
    del teacher
    gc.collect()
    ended = tuple(Example(e.prompt, a) for e, a in zip(data.train, answers, strict=True) if a is not None)
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
    answers: list[str | None] = [None] * len(examples)
    tokens, device = 0, next(teacher.parameters()).device
    for some in by_length(encoded, 4096):
        prompts = [encoded[i].input_ids[:-1] for i in some]  # without the empty response's EOS
        width = max(map(len, prompts))
        ids = torch.full((len(some), width), tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: all answers begin in the same column
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": tokenizer.eos_token_id}
        out = teacher.generate(  # type: ignore[operator]
            ids.to(device), attention_mask=mask.to(device), eos_token_id=tokenizer.eos_token_id, **settings
        )
        for i, written in zip(some, out[:, width:].cpu().tolist(), strict=True):
            length = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else None
            tokens += len(encoded[i].input_ids) + (new_tokens if length is None else length)
            if length is not None:
                answers[i] = tokenizer.decode(written[:length], skip_special_tokens=True)
    return answers, tokens


METHODS = {
    "seq_kd": Method(
        "SFT on the teacher's answers", transfer, "train", "LoRA on all layers", "its answers", False, colour="#cc8866"
    )
}  # fmt: skip
