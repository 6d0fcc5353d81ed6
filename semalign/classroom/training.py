"""How Pico is trained: a byte-pair tokenizer, packed windows, one loop for pretraining and fine-tuning.

A run is a function of its recipe: the windows are made before the first step, so that step i reads the same tokens
whether or not the run was interrupted.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from semalign.classroom import corpora
from semalign.lm.files import load_tensors, save_tensors, write_text

WINDOW = 256
BATCH = 4  # windows a step: small steps learn more from few tokens than large ones
PROMPT = 0.1  # weight of a prompt's tokens in the loss: much of a prompt is names and numbers drawn at random
INIT = 0.06  # standard deviation of the first weights; the usual 0.02 is for widths of thousands
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
# every line break and every digit is a token of its own, so that a prompt cut at either tokenises like the whole text
PIECES = r"\n| ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|[^\S\n]+(?!\S)|[^\S\n]+"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}"
    "{% else %}{{ '<|user|>\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """All that decides a model. ``base`` names the model that a fine-tuned one starts from."""

    name: str
    layers: int
    width: int
    heads: int
    inner: int
    tokens: int
    mixture: corpora.Mixture = field(default_factory=lambda: corpora.Mixture(corpora.PRETRAINING))
    seed: int = 0
    lr: float = 4e-3
    base: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of ``BATCH`` windows."""
        return self.tokens // (BATCH * WINDOW)


def train_tokenizer(n_documents: int = 30_000, vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-pair encoding learned from ``n_documents`` of pretraining text."""
    core = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    mixture = corpora.Mixture(corpora.PRETRAINING, programs=(0.4, 0.4, 0.2))
    core.train_from_iterator((p + r for p, r in islice(corpora.documents(mixture, 1), n_documents)), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerBase, pairs: Iterator[tuple[str, str]]) -> Iterator[list[int]]:
    """Token ids with BOS and EOS; prompt and response are tokenised apart, as in supervision."""
    core: Any = tokenizer.backend_tokenizer
    while chunk := list(islice(pairs, 256)):
        flat = core.encode_batch([text for pair in chunk for text in pair], add_special_tokens=False)
        for prompt, response in zip(flat[::2], flat[1::2], strict=True):
            yield [tokenizer.bos_token_id, *prompt.ids, *response.ids, tokenizer.eos_token_id]


def pack(stream: Iterator[list[int]], n_windows: int, pad: int) -> Tensor:
    """Whole documents into windows (n_windows, WINDOW) int16: each takes the waiting documents that still fit."""
    windows = np.full((n_windows, WINDOW), pad, dtype=np.int16)
    waiting: list[list[int]] = []
    for row in windows:
        used = 0
        while len(waiting) < 48:
            document = next(stream, None)
            if document is None:
                break
            waiting.append(document[:WINDOW])
        for document in list(waiting):
            if used + len(document) <= WINDOW:
                row[used : used + len(document)] = document
                used += len(document)
                waiting.remove(document)
        if used == 0:
            raise ValueError(f"the documents do not fill {n_windows} windows of {WINDOW} tokens: give more documents")
    return torch.from_numpy(windows)


def in_prompt(ids: Tensor) -> Tensor:
    """Which tokens of windows (B, T) a user says, bool: the last of <s>, <|user|> and <|assistant|> was <|user|>."""
    bos, user, assistant = (SPECIAL.index(token) for token in ("<s>", "<|user|>", "<|assistant|>"))
    marks = (ids == bos) | (ids == user) | (ids == assistant)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(marks, places, 0).cummax(1).values
    return ids.gather(1, last) == user


def next_token_loss(model: Any, windows: Tensor, prompt: float = PROMPT) -> Tensor:
    """Mean cross-entropy over windows (B, T), in nats a token; a prompt's tokens weigh ``prompt``, padding nothing."""
    ids = windows.long().to(model.device)
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    weight = (torch.where(in_prompt(ids), prompt, 1.0) * (ids != model.config.pad_token_id))[:, 1:].flatten()
    return (each * weight).sum() / weight.sum()


@torch.no_grad()
def held_out_loss(model: Any, windows: Tensor) -> float:
    """Mean loss over the responses in windows (n, T), in nats a token."""
    return float(torch.stack([next_token_loss(model, w, prompt=0.0) for w in windows.split(BATCH)]).mean())


def validation_windows(tokenizer: PreTrainedTokenizerBase, n_windows: int = 64) -> Tensor:
    """Windows (n, T) of validation items of every subject in turn, the same for every model."""
    rows = zip(*(corpora.items(s, "validation") for s in corpora.SUBJECTS), strict=True)
    pairs = ((corpora.chat(i.user), i.response) for row in rows for i in row)
    return pack(encode_documents(tokenizer, pairs), n_windows, int(tokenizer.pad_token_id))


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The untrained model of a recipe: Llama with an untied head, and weights of the size that its width asks for."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=INIT,
    ))  # fmt: skip


def _load(checkpoint: Path, key: str, device: torch.device) -> dict[str, Any] | None:
    """What a checkpoint holds, or None, with a warning, where it is damaged or of another recipe."""
    if not checkpoint.exists():
        return None
    try:
        state: dict[str, Any] = load_tensors(checkpoint, device)
    except ValueError as error:
        warnings.warn(f"{error}: the training begins anew", stacklevel=3)
        return None
    if state.get("key") == key:
        return state
    warnings.warn(f"{checkpoint} belongs to another recipe: the training begins anew", stacklevel=3)
    return None


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over the first 4 %, then a cosine to a tenth."""
    warm = max(1, recipe.steps // 25)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm))))


def train(
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    save_every: int = 100,
    stop_after: int | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return its learning curve; a killed run goes on from its checkpoint, bit for bit.

    Args:
        folder: holds ``NAME.ckpt`` (weights, optimizer, step, curve); one of the same recipe decides where the run
            begins, one of another recipe is replaced, with a warning.
        stop_after: leave after this many steps, as a kill would after a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{recipe.name}.ckpt"
    pad = int(tokenizer.pad_token_id)
    text = corpora.documents(recipe.mixture, recipe.seed + 100)
    windows = pack(encode_documents(tokenizer, text), recipe.steps * BATCH, pad)
    watched = validation_windows(tokenizer, 16)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    curve: list[dict[str, float]] = []
    losses: list[Tensor] = []  # since the curve's last row
    start, before = 0, 0.0
    key = repr(asdict(recipe))
    if state := _load(checkpoint, key, model.device):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve, before, losses = state["step"], state["curve"], state["seconds"], state["losses"]
    model.train()
    began = time.monotonic()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = next_token_loss(model, windows[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        done, seconds = step + 1, before + time.monotonic() - began
        if done % 25 == 0 or done == recipe.steps:
            read = int((windows[: done * BATCH] != pad).sum())
            row = {"step": done, "tokens": read, "loss": float(torch.stack(losses).mean())}
            losses = []
            if done % save_every == 0 or done == recipe.steps:
                row["held_out"] = held_out_loss(model, watched)
            curve.append({**row, "seconds": round(seconds, 1)})
        if done % save_every == 0 or done == recipe.steps or done == stop_after:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"key": key, "step": done, "curve": curve, "losses": losses, "seconds": seconds}
            save_tensors(checkpoint, state)
            write_text(folder / f"{recipe.name}.jsonl", "".join(json.dumps(r) + "\n" for r in curve))
        if done == stop_after:
            break
    model.eval()
    return curve
