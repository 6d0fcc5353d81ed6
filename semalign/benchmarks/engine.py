"""lm-evaluation-harness's Hugging Face backend with less work: one pass over a prompt whatever the number of choices.

The prompts are padded on the left and sorted by length; logits are made at scored positions only. A request that does
not fit into the model's context is not cut: it is answered with nothing, and ``evaluate`` counts it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

NOT_ASKED = -1e30  # log-probability where the request does not fit


class SharedPrefixLM(HFLM):
    """A model held in memory; ``batch_size`` counts sequences."""

    room = 16  # tokens that an answer needs at least

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        whole, plain = (self.tokenizer.encode("a", add_special_tokens=add) for add in (True, False))
        begins = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        self._after = whole[begins[0] + len(plain) :] if begins else []  # what the tokenizer puts behind every text
        self._after_text = self.tokenizer.decode(self._after)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        inside = (i for i in (self.tokenizer.pad_token_id, self.eot_token_id) if i is not None and i < vocabulary)
        self._pad_id, self._vocabulary = next(inside, 0), vocabulary

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """Token ids of a text that goes on: without the EOS that some tokenizers put behind every text.

        Raises:
            ValueError: a token that the model does not have.
        """
        ids = super().tok_encode(string, *args, **options)
        if self._after and ids[-len(self._after) :] == self._after and not string.endswith(self._after_text):
            ids = ids[: -len(self._after)]
        if ids and max(ids) >= self._vocabulary:
            raise ValueError(
                f"the tokenizer writes token {max(ids)} and the model has {self._vocabulary}: they belong to different "
                "models, so take one model's both, or resize its embeddings"
            )
        return ids

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Rows of token ids as (B, T) with their mask (B, T)."""
        size = max(len(row) for row in rows)
        ids = torch.full((len(rows), size), self._pad_id, device=self.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(size - len(row), size) if side == "left" else slice(0, len(row))
            ids[i, where] = torch.tensor(row, device=self.device)
            mask[i, where] = 1
        return ids, mask

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(Summed log-probability, whether it is greedy) of each request (text, context ids, continuation ids)."""
        answers: list[tuple[float, bool]] = [(NOT_ASKED, False)] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) <= self.max_length:
                groups[tuple(context)].append(i)
        for batch in _batches(groups, requests, int(self.batch_size)):
            ids, mask = self._pad(batch, "left")
            owners = [row for row, context in enumerate(batch) for _ in groups[context]]
            members = [i for context in batch for i in groups[context]]
            wanted = [requests[i][2] for i in members]
            longest = max(len(w) for w in wanted)
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1,
                use_cache=longest > 1,
            )  # fmt: skip
            first = torch.log_softmax(out.logits[:, -1].float(), -1)[owners]  # (choices, m)
            score, greedy = _score(first.unsqueeze(1), [w[:1] for w in wanted])
            if longest > 1:
                name = self._cache_name()
                out[name].batch_select_indices(torch.tensor(owners, device=self.device))
                rest, rest_mask = self._pad([w[:-1] or [0] for w in wanted], "right")
                before = mask[owners]
                later = self.model(
                    input_ids=rest, attention_mask=torch.cat([before, rest_mask], 1), **{name: out[name]},
                    position_ids=before.sum(1, keepdim=True) + torch.arange(rest.shape[1], device=self.device),
                )  # fmt: skip
                more, greedy_too = _score(torch.log_softmax(later.logits.float(), -1), [w[1:] for w in wanted])
                score, greedy = score + more, greedy & greedy_too
            for i, s, g in zip(members, score.tolist(), greedy.tolist(), strict=True):
                answers[i] = (s, g)
        return answers

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text for each request, all with the same generation arguments, cut before the first stop string.

        A batch takes as long as its longest answer. Where nothing is drawn, those that are not at their end after half
        of the tokens that they may have wait, and go on together once all others are done.
        """
        texts = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        fitting = [i for i in range(len(prompts)) if len(prompts[i]) + self.room <= self.max_length]
        order = sorted(fitting, key=lambda i: (-len(prompts[i]), prompts[i]))
        if not order:
            return texts
        options = dict(requests[order[0]].args[1])
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until, most = handle_stop_sequences(options.pop("until", None), eos=eos), options.pop("max_gen_toks")
        written: dict[int, list[int]] = {i: [] for i in order}
        allowed: dict[int, int] = {}
        for pause in (False,) if options.get("do_sample") else (True, False):
            later: list[int] = []
            for start in range(0, len(order), int(self.batch_size)):
                rows = order[start : start + int(self.batch_size)]
                context, mask = self._pad([prompts[i] + written[i] for i in rows], "left")
                for i in rows:
                    allowed.setdefault(i, min(most, self.max_length - context.shape[1]))
                new = max(allowed[i] - len(written[i]) for i in rows)
                ended = _Ended(self, until, context.shape[1])
                count = -(-new // 2) if pause else new
                with self._no_settings():
                    out = self.model.generate(
                        input_ids=context, attention_mask=mask, pad_token_id=self._pad_id, max_new_tokens=count,
                        stopping_criteria=StoppingCriteriaList([ended]), **self._room_for(context.shape[1] + count),
                        **options,
                    )  # fmt: skip
                for i, tokens, end in zip(rows, out[:, context.shape[1] :].tolist(), ended.ends, strict=True):
                    written[i] = (written[i] + tokens)[: allowed[i]]
                    if pause and not end and len(written[i]) < allowed[i]:
                        later.append(i)
                        continue
                    text = self.tok_decode(written[i])
                    texts[i] = postprocess_generated_text(text, stop=until, think_end_token=None)
            order = later
        return texts

    def _room_for(self, tokens: int) -> dict[str, DynamicCache]:
        """The argument with a cache of keys and values that has room for so many tokens, where the model takes one."""
        if not self.model._supports_default_dynamic_cache():
            return {}
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        cache.layers = [_Room(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return {self._cache_name(): cache}

    def _cache_name(self) -> str:
        """What the model calls its cache of keys and values: ``past_key_values`` until transformers 5.2x."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @contextlib.contextmanager
    def _no_settings(self) -> Iterator[None]:
        """Nothing of the model's own ``generation_config`` but the tokens that begin and end a text.

        ``generate`` reads all that is not given from there: a length, a penalty, a number of beams.
        """
        kept = self.model.generation_config
        fresh = GenerationConfig(bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id)
        self.model.generation_config = fresh
        try:
            yield
        finally:
            self.model.generation_config = kept


class _Room(DynamicLayer):
    """A layer's keys and values (B, heads, tokens, D) in memory for all ``tokens``: each is written where it belongs.

    The library's own layer copies all that came before at each token, which took more time than all else.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_given: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [s.new_empty(*s.shape[:2], self.tokens, s.shape[-1]) for s in (key_states, value_states)]
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self.room)
        return self.keys, self.values


class _Ended(StoppingCriteria):
    """Which rows have written a stop string or an end; lm-eval's own waits until all have written the same string."""

    def __init__(self, lm: SharedPrefixLM, until: Sequence[str], start: int) -> None:
        self.lm, self.start, self.ends = lm, start, list[bool]()
        self.until = [stop for stop in until if stop]
        # A model can write a stop string in other tokens than the tokenizer does, and in more of them.
        sizes = [len(lm.tokenizer.encode(stop, add_special_tokens=False)) for stop in self.until]
        self.look = 2 + max(sizes, default=0)
        final = lm.model.generation_config.eos_token_id
        self.final = set(final) if isinstance(final, list) else {final}

    def __call__(self, input_ids: Tensor, scores: Any = None, **_given: Any) -> Any:
        """(B,) bool, of the tokens so far."""
        self.ends = self.ends or [False] * len(input_ids)
        last = input_ids[:, self.start :][:, -self.look :].tolist()
        for row in (r for r, end in enumerate(self.ends) if not end):
            text = self.lm.tok_decode(last[row], skip_special_tokens=False)
            self.ends[row] = last[row][-1] in self.final or any(stop in text for stop in self.until)
        return torch.tensor(self.ends, device=input_ids.device)


def _batches(
    groups: dict[tuple[int, ...], list[int]], requests: list[Any], size: int
) -> Iterator[list[tuple[int, ...]]]:
    """Contexts, the longest first, so many at a time that they, or their longer choices, fill ``size`` rows."""
    batch: list[tuple[int, ...]] = []
    rows = 0
    for context in sorted(groups, key=lambda c: (-len(c), c)):
        single = all(len(requests[i][2]) == 1 for i in groups[context])
        needed = 1 if single else len(groups[context])
        if batch and rows + needed > size:
            yield batch
            batch, rows = [], 0
        batch.append(context)
        rows += needed
    if batch:
        yield batch


def _score(logp: Tensor, wanted: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Sums (B,) of log-probabilities (B, T, m) at the wanted ids, and whether each is the likeliest one, (B,) bool."""
    size = logp.shape[1]
    ids = torch.tensor([w + [0] * (size - len(w)) for w in wanted], device=logp.device)
    real = torch.tensor([[t < len(w) for t in range(size)] for w in wanted], device=logp.device)
    at_ids = logp.gather(2, ids.unsqueeze(2)).squeeze(2)
    return (at_ids * real).sum(1), ((logp.argmax(2) == ids) | ~real).all(1)
