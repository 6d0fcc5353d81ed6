"""Shared tokens: the same text under whatever marks, bytes, roles, and the pairs that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from semalign import models
from semalign.methods import REGISTRY
from semalign.methods.registry import run
from semalign.models import VocabularyMismatch, byte_tokenizer, load_model, load_pair
from semalign.profiles import Profile
from semalign.vocabularies import LEAST_SHARE, shared_tokens, texts


def marked(*tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer in Gemma's way: ▁ for a space, <0xNN> for a byte, and two tokens with a role."""
    core = Tokenizer(BPE({t: i for i, t in enumerate(("<bos>", "<eos>", *tokens))}, []))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def lettered(*tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer in GPT-2's way: Ġ for a space, and a letter for every byte."""
    core = Tokenizer(BPE({t: i for i, t in enumerate(("<s>", "</s>", *tokens))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def pairs(teacher: Any, student: Any, **rows: int) -> set[tuple[str, str]]:
    shared = shared_tokens(teacher, student, **rows)
    return {
        (teacher.convert_ids_to_tokens(t), student.convert_ids_to_tokens(s))
        for t, s in zip(shared.teacher.tolist(), shared.student.tolist(), strict=True)
    }


def test_tokens_of_the_same_text_are_partners_whatever_marks_a_space() -> None:
    teacher, student = marked("▁the", "the", "\n", "é", "▁only"), lettered("Ġthe", "the", "Ċ", "Ã©", "mine")
    assert pairs(teacher, student) == {("▁the", "Ġthe"), ("the", "the"), ("\n", "Ċ"), ("é", "Ã©")}
    shared = shared_tokens(teacher, student)
    assert (shared.strings, shared.bytes, shared.of_teacher, shared.of_student) == (4, 0, 5, 5)
    assert shared.share == 0.8 and "4 tokens are shared, 80.0% of the student's 5" in str(shared)


def test_a_byte_meets_its_byte_and_a_role_meets_nothing() -> None:
    teacher, student = marked("<0xC3>", "<0x0A>", "\n", "<0x00>", "a"), lettered("Ã", "Ċ", "Ā", "a")
    assert pairs(teacher, student) == {("<0xC3>", "Ã"), ("\n", "Ċ"), ("<0x00>", "Ā"), ("a", "a")}
    shared = shared_tokens(teacher, student)
    assert (shared.strings, shared.bytes) == (2, 2)
    assert b"<bos>" not in texts(teacher)[0] and b"<s>" not in texts(student)[0]


def test_a_tokenizer_shares_all_with_itself_and_ids_beyond_the_head_do_not_count() -> None:
    own = byte_tokenizer()
    shared = shared_tokens(own, own)
    assert torch.equal(shared.teacher, shared.student) and len(shared.student) == len(own) - 3 and shared.share == 1
    assert shared_tokens(own, own, teacher_rows=13).student.max() == 12


def test_smollm2_shares_its_text_with_itself_and_little_with_a_token_a_byte() -> None:
    _, tokenizer = load_model({"source": "pico", "id": "pico-s"})
    found, _ = texts(tokenizer)
    sample = next(text for text in found if text.startswith(b" ") and len(text) > 3)
    assert tokenizer.decode([found[sample]]) == sample.decode()


PICO, BYTES = {"source": "pico", "id": "pico-s"}, {"source": "random", "seed": 0, "config": {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
}}  # fmt: skip


def of(teacher: Any, student: Any, vocabularies: str) -> Profile:
    return Profile.model_validate({
        "description": "a pair", "teacher": teacher, "student": student, "semantics_model": student,
        "vocabularies": vocabularies,
    })  # fmt: skip


def test_a_pair_of_two_vocabularies_is_taken_where_the_profile_says_so_and_refused_with_numbers_where_not() -> None:
    pair = load_pair(of(PICO, BYTES, "shared"))
    assert pair.teacher_tokenizer is not None and len(pair.teacher_tokenizer) != len(pair.tokenizer)
    with pytest.raises(VocabularyMismatch, match=r"differ: id .* set vocabularies: shared \(.*% of the student's"):
        load_pair(of(PICO, BYTES, "same"))
    assert load_pair(of(PICO, PICO, "shared")).teacher_tokenizer is None


def test_vocabularies_with_too_little_in_common_are_refused_with_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LEAST_SHARE", 1.01)
    with pytest.raises(VocabularyMismatch, match=r"have too little in common: [\d,]+ tokens are shared, .*101% of"):
        load_pair(of(PICO, BYTES, "shared"))
    assert 0 < LEAST_SHARE < 0.5


def test_a_method_for_one_vocabulary_refuses_two() -> None:
    pair = load_pair(of(PICO, BYTES, "shared"))
    with pytest.raises(ValueError, match=r"'labels and KL to the teacher' needs one vocabulary, and .* has two"):
        run(REGISTRY["logit_kd"], pair, None, None, {})  # type: ignore[arg-type]
