"""Supervised examples: as text, as token ids with labels, as padded batches.

A *supervised position* is a position t whose next token is a label; h_k, h* and z are read there and nowhere else.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from semalign.lm.files import write_text

IGNORED = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True)
class Example:
    """One supervised example as text: the response, and only the response, is learned."""

    prompt: str
    response: str


@dataclass(frozen=True)
class TaskData:
    """A task's splits: ``train`` to learn from, ``align`` and ``extract`` as seed sets, ``validation`` to watch."""

    name: str
    train: tuple[Example, ...]
    align: tuple[Example, ...] = ()
    extract: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()


def save_task(data: TaskData, path: Path) -> None:
    """Write a task's splits as json."""
    write_text(path, json.dumps(asdict(data)))


def load_task(path: Path) -> TaskData:
    """What :func:`save_task` wrote.

    Raises:
        ValueError: the file is missing or is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content.pop("name")
        return TaskData(name, **{split: tuple(Example(**e) for e in examples) for split, examples in content.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"there is no task in {path}: run the notebook 00_models_and_data again") from None


@dataclass(frozen=True)
class Encoded:
    """Token ids (T,) and labels (T,), int64; labels are -100 outside the response."""

    input_ids: Tensor
    labels: Tensor


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int) -> list[Encoded]:
    """Tokenise prompt and response apart, join them, end the response with EOS, cut at ``max_length`` on the right.

    BOS goes in front where the tokenizer adds one by itself. An example whose prompt leaves no token of the response
    is left out, and a warning says how many were.

    Raises:
        ValueError: the tokenizer has no EOS token, or no example keeps a supervised position.
    """
    return [encoded for _, encoded in _kept(tokenizer, examples, max_length)]


def fitting(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int) -> list[Example]:
    """Those of the examples that :func:`encode` keeps, for what goes through them side by side."""
    return [example for example, _ in _kept(tokenizer, examples, max_length)]


def _kept(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[tuple[Example, Encoded]]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which ends every response: set tokenizer.eos_token")
    first = tokenizer("a")["input_ids"][:1]
    front = first if first == [tokenizer.bos_token_id] else []
    kept, longest = [], 0
    for example in examples:
        prompt = front + tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor(([IGNORED] * len(prompt) + response)[:max_length])
        if (labels[1:] != IGNORED).any():
            kept.append((example, Encoded(torch.tensor((prompt + response)[:max_length]), labels)))
        else:
            longest = max(longest, len(prompt))
    left_out = len(examples) - len(kept)
    said = f"{left_out} of {len(examples)} examples, with prompts of up to {longest} tokens,"
    if left_out and not kept:
        raise ValueError(f"{said} leave no response token within max_length={max_length}: raise max_length")
    if left_out:
        warnings.warn(f"{said} leave no response token within max_length={max_length} and are left out", stacklevel=3)
    return kept


def collate(encoded: Sequence[Encoded], pad_id: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Pad on the right: ``input_ids``, ``attention_mask``, ``labels``, each (B, T) int64, on ``device``."""
    columns = {
        "input_ids": ([e.input_ids for e in encoded], pad_id),
        "attention_mask": ([torch.ones_like(e.input_ids) for e in encoded], 0),
        "labels": ([e.labels for e in encoded], IGNORED),
    }
    pad = torch.nn.utils.rnn.pad_sequence
    return {n: pad(rows, batch_first=True, padding_value=fill).to(device) for n, (rows, fill) in columns.items()}


def mask_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The mask that a causal model needs for a batch: none where each row's padding is behind its tokens.

    No token looks at what is behind it. A mask costs: on a GPU every layer copies it for each of its heads and keeps
    the copy for the backward pass, a quarter of a gigabyte a layer for Llama-2 7B and 8 rows of 700 tokens.
    """
    mask = batch["attention_mask"]
    return None if bool((mask[:, 1:] <= mask[:, :-1]).all()) else mask


def supervised(labels: Tensor) -> Tensor:
    """Supervised positions (..., T) bool for labels (..., T): true at t where ``labels[t + 1]`` is a label."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[..., :-1] = labels[..., 1:] != IGNORED
    return mask


def by_length(data: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Examples in batches of at most ``batch_tokens`` padded tokens, longest first: memory peaks at the start."""
    batch: list[int] = []
    for i in sorted(range(len(data)), key=lambda i: -len(data[i].input_ids)):
        if batch and (len(batch) + 1) * len(data[batch[0]].input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch
