"""Positions of two tokenisations: the identity with one, the same text read with two, whatever marks and pieces."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from semalign.classroom import corpora, load_tokenizer
from semalign.lm.examples import Example, encode, supervised
from semalign.lm.positions import ends, matched, meetings, only, spelling
from semalign.models import byte_tokenizer

TEXTS = [
    "Héllo  wörld, naïve",
    "x =  42.5\n\n\n  # ok",
    "日本語と 🙂 ok",
    " leading and trailing  ",
    "a",
    "\n",
    "the them then",
]


def lines(n: int = 300) -> list[str]:
    """Text of the classroom, and of other scripts."""
    found = corpora.documents(corpora.Mixture(corpora.PRETRAINING), 3)
    return [p + r for p, r in (next(found) for _ in range(n))] + TEXTS * 3


@cache
def marked(prefix: bool = False) -> PreTrainedTokenizerFast:
    """A trained tokenizer in sentencepiece's way: ▁ for a space, bytes for what is rare; ``prefix`` as Llama-2 has."""
    core = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{b:02X}>" for b in range(256))]
    core.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    again = Tokenizer.from_str(core.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=again, bos_token="<bos>", eos_token="<eos>")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return tokenizer


@cache
def lettered() -> PreTrainedTokenizerFast:
    """A trained tokenizer in GPT-2's way, whose own offsets leave spaces out."""
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(lines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"pico": load_tokenizer, "bytes": byte_tokenizer, "lettered": lettered, "marked": marked}


def examples(n: int = 12) -> list[Example]:
    """Prompts and responses of odd texts, drawn with a seed."""
    draw = random.Random(0)
    return [Example(draw.choice(TEXTS), "".join(draw.choices(TEXTS, k=2))) for _ in range(n)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_tokenizer_meets_itself_everywhere(name: str) -> None:
    tokenizer, some = TOKENIZERS[name](), examples()
    encoded = encode(tokenizer, some, max_length=512)
    for at, e in zip(matched(some, (tokenizer, encoded), (tokenizer, encoded)), encoded, strict=True):
        assert torch.equal(at[:, 0], at[:, 1])
        if name != "marked":  # whose bytes below 0x80 have two tokens each
            assert torch.equal(at[:, 0], supervised(e.labels).nonzero()[:, 0])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ends_are_those_of_the_decoded_prefixes(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for example in examples():
        (encoded,) = encode(tokenizer, [example], max_length=512)
        start, read = int((encoded.labels == -100).sum()), ends(encoded, example, spelling(tokenizer))
        before = len(example.prompt.encode())
        assert read[start - 1] == before and read.diff().min() >= 0
        for t in range(start, len(read) - 1):
            said = tokenizer.decode(encoded.input_ids[start : t + 1], clean_up_tokenization_spaces=False)
            if "\ufffd" not in said:  # a piece of a character
                assert said.encode() == example.response.encode()[: int(read[t]) - before]


@pytest.mark.parametrize("pair", [("pico", "bytes"), ("marked", "lettered"), ("lettered", "pico"), ("marked", "bytes")])
def test_where_two_meet_both_have_read_the_same_text(pair: tuple[str, str]) -> None:
    teacher, student = (TOKENIZERS[name]() for name in pair)
    some = examples()
    theirs, ours = (encode(t, some, max_length=512) for t in (teacher, student))
    for example, e, f, at in zip(some, theirs, ours, matched(some, (teacher, theirs), (student, ours)), strict=True):
        assert len(at) and (at.diff(dim=0) > 0).all()
        read = [ends(x, example, spelling(t)) for x, t in ((e, teacher), (f, student))]
        assert torch.equal(read[0][at[:, 0]], read[1][at[:, 1]])
        # the end of the prompt and the end of the response are among them
        assert at[0].tolist() == [int((x.labels == -100).sum()) - 1 for x in (e, f)]
        assert at[-1].tolist() == [len(x.labels) - 2 for x in (e, f)]
        # and every end that both have
        places = (set(r[supervised(x.labels)].tolist()) for r, x in zip(read, (e, f), strict=True))
        common = set.intersection(*places)
        assert common == set(read[1][at[:, 1]].tolist())


def test_a_space_in_front_that_the_tokenizer_adds_is_no_text() -> None:
    some = [Example("the them", "then 42"), Example(" the", " x")]
    prefixed, plain = marked(prefix=True), lettered()
    theirs, ours = (encode(t, some, max_length=64) for t in (prefixed, plain))
    for example, at, e, f in zip(some, matched(some, (prefixed, theirs), (plain, ours)), theirs, ours, strict=True):
        assert ends(e, example, spelling(prefixed))[-1] == len((example.prompt + example.response).encode())
        assert at[0, 1] == int((f.labels == -100).sum()) - 1 and at[-1].tolist() == [len(x.labels) - 2 for x in (e, f)]


def test_known_answers() -> None:
    assert meetings(torch.tensor([1, 3, 6, 6]), torch.tensor([2, 3, 4, 6])).tolist() == [[1, 1], [3, 3]]
    assert meetings(torch.tensor([1]), torch.tensor([2])).shape == (0, 2)


def test_tokens_with_a_role_count_where_the_text_names_them_and_not_where_they_were_added() -> None:
    pico, plain = load_tokenizer(), byte_tokenizer()
    some = [Example("<|user|>\nhi\n\n<|assistant|>\n", "ok")]
    theirs, ours = (encode(t, some, max_length=64) for t in (pico, plain))
    assert pico.convert_tokens_to_ids("<|user|>") in theirs[0].input_ids
    assert ends(theirs[0], some[0], spelling(pico))[[0, 1]].tolist() == [0, len("<|user|>")]
    (at,) = matched(some, (pico, theirs), (plain, ours))
    assert at[0, 1] == len(some[0].prompt)  # a byte a token, after BOS


def test_a_position_is_supervised_by_the_token_after_it() -> None:
    (e,) = encode(byte_tokenizer(), [Example("ab", "cdef")], max_length=64)
    assert supervised(only(e, torch.tensor([3, 5])).labels).nonzero()[:, 0].tolist() == [3, 5]


def test_a_tokenizer_that_changes_the_text_is_refused_by_name() -> None:
    lower: Any = lettered().__class__(tokenizer_object=Tokenizer.from_str(lettered().backend_tokenizer.to_str()))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.eos_token = "</s>"
    some = [Example("Shout", "LOUD")]
    encoded = encode(lower, some, max_length=64)
    with pytest.raises(ValueError, match=r"the tokens of 'Shout' or its response stand for another text"):
        ends(encoded[0], some[0], spelling(lower))
