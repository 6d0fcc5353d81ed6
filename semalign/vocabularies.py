"""What two vocabularies have in common: tokens that stand for the same text, whatever marks a space in either.

A token of SmolLM2 writes a space as ``Ġ`` and any other byte as a letter of its own; one of Gemma or Llama writes it as
``▁``, and a byte that no token covers as ``<0x0A>``. A basis of one model has a partner in the other where the tokens
stand for the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

LEAST_SHARE = 0.1
"""Below this share of the student's tokens too few bases have a partner, and a pair is refused."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class SharedTokens:
    """Tokens that teacher and student share: of each the two ids, (n,) int64, in the order of the student's.

    ``strings`` of them stand for the same text, and the ``bytes`` after them for a single byte of another character's
    code. Tokens with a role and no text (BOS, EOS and their like) are in neither; ``of_teacher`` and ``of_student``
    count the tokens that have a text.
    """

    teacher: Tensor
    student: Tensor
    strings: int
    bytes: int
    of_teacher: int
    of_student: int

    @property
    def share(self) -> float:
        """The share of the student's tokens with a text that the teacher has too."""
        return len(self.student) / max(1, self.of_student)

    def __str__(self) -> str:
        n, theirs, ours = len(self.student), self.of_teacher, self.of_student
        return (
            f"{n:,} tokens are shared, {self.share:.1%} of the student's {ours:,} "
            f"and {n / max(1, theirs):.1%} of the teacher's {theirs:,}"
        )


def shared_tokens(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_rows: int | None = None,
    student_rows: int | None = None,
) -> SharedTokens:
    """The tokens of two tokenizers that stand for the same bytes; only ids below ``rows``, those of a head, count."""
    (theirs, their_bytes), (ours, our_bytes) = texts(teacher, teacher_rows), texts(student, student_rows)
    all_theirs, all_ours = their_bytes | theirs, our_bytes | ours
    common = all_ours.keys() & all_theirs.keys()
    strings = sorted((ours[t], theirs[t]) for t in common if t in ours and t in theirs)
    single = sorted((all_ours[t], all_theirs[t]) for t in common if t not in ours or t not in theirs)
    ids = torch.tensor(strings + single, dtype=torch.int64).reshape(-1, 2)
    return SharedTokens(ids[:, 1], ids[:, 0], len(strings), len(single), len(all_theirs), len(all_ours))


def texts(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """The id of each text, as UTF-8 bytes, and of each single byte that is no text by itself.

    Tokens with a role are left out, as are ids from ``rows`` on. Of two tokens with one text the lower id counts.
    """
    vocabulary = tokenizer.get_vocab()
    roles = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    by_byte = _spells_bytes(tokenizer)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found: dict[bytes, int] = {}
    single: dict[bytes, int] = {}
    for token, i in sorted(vocabulary.items(), key=lambda pair: pair[1]):
        if i in roles or (rows is not None and i >= rows):
            continue
        if by_byte and all(letter in letters for letter in token):
            text = bytes(letters[letter] for letter in token)
        elif not by_byte and (byte := _BYTE.fullmatch(token)):
            single.setdefault(bytes.fromhex(byte[1]), i)
            continue
        else:
            text = (token if by_byte else token.replace("▁", " ")).encode()
        (single if len(text) == 1 and text[0] >= 0x80 else found).setdefault(text, i)
    return found, {byte: i for byte, i in single.items() if byte not in found}


def _spells_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its tokens write bytes as letters (GPT-2's way), and not text with ``▁`` for a space."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    told = f"{core.pre_tokenizer} {core.decoder}" if core is not None else ""
    return "ByteLevel" in told or (core is None and hasattr(tokenizer, "byte_encoder"))
