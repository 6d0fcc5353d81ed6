"""Examples as token ids: what is supervised, what is cut, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, ODD, Letters

from semalign.lm.examples import Encoded, Example, collate, encode, fitting, mask_of, supervised


class NoBos(Letters):
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text, False)


def test_encode_puts_bos_in_front_and_eos_after_the_response() -> None:
    tokenizer: Any = Letters()
    (encoded,) = encode(tokenizer, [Example("ab", "cd")], max_length=10)
    a, b, c, d = (ord(x) % 90 + 3 for x in "abcd")
    assert encoded.input_ids.tolist() == [1, a, b, c, d, 2]
    assert encoded.labels.tolist() == [-100, -100, -100, c, d, 2]
    assert supervised(encoded.labels).tolist() == [False, False, True, True, True, False]


def test_encode_adds_no_bos_where_the_tokenizer_adds_none_and_cuts_on_the_right() -> None:
    tokenizer: Any = NoBos()
    (encoded,) = encode(tokenizer, [Example("ab", "cdefg")], max_length=4)
    assert encoded.input_ids.tolist() == [ord(x) % 90 + 3 for x in "abcd"]


def test_encode_leaves_out_and_counts_a_prompt_that_leaves_no_response() -> None:
    tokenizer: Any = Letters()
    some = [Example("abcdef", "g"), Example("a", "b"), Example("abcdefg", "h")]
    with pytest.warns(
        UserWarning, match=r"2 of 3 examples, with prompts of up to 8 tokens, .*max_length=5 and are left"
    ):
        (encoded,) = encode(tokenizer, some, max_length=5)
    assert encoded.input_ids.tolist() == encode(tokenizer, some[1:2], max_length=5)[0].input_ids.tolist()
    with pytest.warns(UserWarning, match="left out"):
        assert fitting(tokenizer, some, max_length=5) == some[1:2]
    assert encode(tokenizer, [], max_length=5) == []


def test_encode_refuses_examples_of_which_none_fits_and_a_tokenizer_without_eos() -> None:
    tokenizer: Any = Letters()
    with pytest.raises(ValueError, match=r"2 of 2 examples, .* raise max_length"):
        encode(tokenizer, [Example("abcdef", "g")] * 2, max_length=5)
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no EOS"):
        encode(tokenizer, [Example("a", "b")], max_length=5)


def test_an_empty_prompt_without_bos_leaves_the_first_token_out() -> None:
    tokenizer: Any = NoBos()
    (encoded,) = encode(tokenizer, [Example("", "ab")], max_length=5)
    assert int(supervised(encoded.labels).sum()) == 2  # b and EOS: nothing comes before a


def test_collate_pads_right_and_ignores_the_padding() -> None:
    long, short = torch.tensor([5, 6, 7]), torch.tensor([8, 9])
    batch = collate([Encoded(long, torch.tensor([-100, 6, 7])), Encoded(short, short)], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]
    assert supervised(batch["labels"]).tolist() == [[True, True, False], [True, False, False]]


def test_only_padding_in_front_of_a_token_needs_a_mask() -> None:
    rows = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    assert mask_of({"attention_mask": rows}) is None
    for other in (rows.flip(1), torch.tensor([[1, 0, 1]])):
        assert mask_of({"attention_mask": other}) is other


@pytest.mark.parametrize("name", [*FAMILIES, *ODD])
def test_padding_behind_tokens_changes_nothing_before_it(name: str) -> None:
    """What :func:`mask_of` rests on, of a model's states and of the gradient of what is read of them."""
    model = {**FAMILIES, **ODD}[name]().eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = []
    for given in (mask, mask_of({"attention_mask": mask})):
        states = model.get_decoder()(ids, attention_mask=given, use_cache=False).last_hidden_state[mask.bool()]
        weight = next(model.parameters())
        found.append((states.detach(), *torch.autograd.grad(states.square().sum(), weight)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
