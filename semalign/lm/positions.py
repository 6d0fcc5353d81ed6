"""Where two tokenisations of one text meet: the positions at which both have read the same characters.

A token is taken for the bytes of text that it stands for (:func:`semalign.vocabularies.texts`), so that the marks of a
space and the pieces of a character count as what they are. A teacher's state at the end of a word then meets the
student's at the same place, whatever pieces either read it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from semalign.lm.examples import IGNORED, Encoded, Example, supervised
from semalign.vocabularies import texts


def spelling(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """The bytes of text that each token stands for, by its id, and apart the names of tokens with a role (BOS, EOS).

    Takes a second for a quarter of a million tokens: make it once a tokenizer.
    """
    strings, single = texts(tokenizer)
    roles = {i: t.content.encode() for i, t in tokenizer.added_tokens_decoder.items()}
    return {i: text for of in (single, strings) for text, i in of.items()}, roles


def ends(encoded: Encoded, example: Example, spelled: tuple[Mapping[int, bytes], Mapping[int, bytes]]) -> Tensor:
    """How many bytes of prompt and response have been read after each token: (T,) int64, never falling.

    A token with a role reads its name where the text has it, and nothing elsewhere. A space that a tokenizer puts
    before a text by itself, as sentencepiece may, does not count.

    Raises:
        ValueError: the tokens stand for another text than the example's, as where a tokenizer changes its characters.
    """
    read, before = [], 0
    for part, text in zip((False, True), (example.prompt.encode(), example.response.encode()), strict=True):
        ids = encoded.input_ids[(encoded.labels != IGNORED) == part].tolist()
        within = _walk(ids, text, *spelled)
        if within is None and (with_space := _walk(ids, b" " + text, *spelled)) is not None:
            within = [max(0, at - 1) for at in with_space]
        if within is None:
            raise ValueError(
                f"the tokens of {example.prompt[:40]!r} or its response stand for another text than it is: take out "
                "what the tokenizer changes"
            )
        read += [before + at for at in within]
        before += len(text)
    return torch.tensor(read, dtype=torch.int64)


def _walk(ids: Sequence[int], text: bytes, tokens: Mapping[int, bytes], roles: Mapping[int, bytes]) -> list[int] | None:
    """How far into ``text`` each token reads; None where one does not go on with it."""
    at, read = 0, []
    for i in ids:
        piece = tokens.get(i, roles.get(i, b""))
        if text.startswith(piece, at):
            at += len(piece)
        elif i not in roles:
            return None
        read.append(at)
    return read


def meetings(theirs: Tensor, ours: Tensor) -> Tensor:
    """Pairs of positions (n, 2) at which two tokenisations of one text have read as many bytes: theirs, ours; rising.

    ``theirs`` (T,) and ``ours`` (T',) are what :func:`ends` says of each. Of several positions with the same end, as
    at a token without text, the last of each side is the one.
    """
    last = [{end: at for at, end in enumerate(side.tolist())} for side in (theirs, ours)]
    both = [(last[0][end], at) for end, at in last[1].items() if end in last[0]]
    return torch.tensor(both, dtype=torch.int64).reshape(-1, 2)


def matched(
    examples: Sequence[Example],
    teacher: tuple[PreTrainedTokenizerBase, Sequence[Encoded]],
    student: tuple[PreTrainedTokenizerBase, Sequence[Encoded]],
) -> list[Tensor]:
    """Of each example the positions (n, 2), teacher's and student's, that meet and are supervised on both sides.

    ``examples`` stand beside what each tokenizer made of them.

    Raises:
        ValueError: as :func:`ends`.
    """
    spelled = [spelling(tokenizer) for tokenizer, _ in (teacher, student)]
    found = []
    for example, *sides in zip(examples, teacher[1], student[1], strict=True):
        places = [supervised(e.labels).nonzero()[:, 0] for e in sides]
        read = [ends(e, example, of)[at] for e, of, at in zip(sides, spelled, places, strict=True)]
        met = meetings(*read)
        found.append(torch.stack([at[met[:, side]] for side, at in enumerate(places)], dim=1))
    return found


def only(encoded: Encoded, positions: Tensor) -> Encoded:
    """The same tokens, supervised at ``positions`` (n,) alone, each of which has a token after it."""
    labels = torch.full_like(encoded.labels, IGNORED)
    labels[positions + 1] = encoded.input_ids[positions + 1]
    return Encoded(encoded.input_ids, labels)
