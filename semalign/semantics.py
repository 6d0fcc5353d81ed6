"""Vocabulary-defined semantics: bases, frames, and the maps from a teacher's space to a student's (sections 3 and 4).

Everything follows from Gram matrices. With a head W (m, D) and G = W'W (D, D) the pseudoinverse is G^-1 W', so the
paper's h* = S_S S_T' h/|h| is one fixed matrix M (D_S, D_T) times h/|h|: no SVD of a head, no m-vector per token.

A large float32 head is multiplied in float32 by chunks of the vocabulary, summed in float64, and centred first: the
rows of real heads share a mean with half of their energy, and its rounding would drown the small directions. A head
that is too ill-conditioned even so, or small, or float64, is multiplied in float64. Every solve is in float64.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASES = ("dual", "primal", "tight")
KINDS = ("paper", "logit", "logit_centred", "tight", "procrustes", "random", "shuffled")
_CHUNK = 3072  # vocabulary rows that a pass holds at once
_BLOCK = 256  # columns of one block of a symmetric product: blocks below the diagonal are copied, not computed
_SMALL = 2**30  # m D^2 below which float64 costs nothing worth saving
_SPREAD = 256  # mean over smallest eigenvalue of a centred G up to which float32 passes keep M to about 1e-4
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class _Head:
    """A checked head W (m, D), the gain to fold in (D,), and the float64 mean of the folded rows (D,)."""

    weight: Tensor
    gain: Tensor | None
    mean: Tensor

    def rows(self, start: int, dtype: torch.dtype) -> Tensor:
        rows = self.weight[start : start + _CHUNK].to(dtype)
        return rows if self.gain is None else rows * self.gain.to(dtype)


@dataclass(frozen=True)
class _Gram:
    """G (D, D) in float64 and the dtype that passes may use.

    ``factor`` is the Cholesky factor L, G = L L', where G is definite, and G itself where its rank is deficient.
    """

    factor: Tensor
    definite: bool
    rtol: float
    dtype: torch.dtype

    def power(self, exponent: float) -> Tensor:
        """G^exponent on the directions that G has and 0 on those it lacks, as a pseudoinverse does."""
        if exponent == -1 and self.definite:
            return torch.cholesky_inverse(self.factor.to(self.dtype))
        values, vectors = torch.linalg.eigh(self.factor @ self.factor.T if self.definite else self.factor)
        kept = values > self.rtol * values[-1]
        return (vectors * torch.where(kept, values, 1.0).pow(exponent).mul(kept)) @ vectors.T

    def solve(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right, self.factor) if self.definite else self.power(-1) @ right


def _head(weight: Tensor, gain: Tensor | None, name: str) -> _Head:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"the {name} must be a floating point matrix (m, D), got {weight.dtype} {tuple(weight.shape)}")
    if gain is not None and gain.shape != weight.shape[1:]:
        raise ValueError(
            f"the gain of the {name} has shape {tuple(gain.shape)}, but the {name} is {weight.shape[1]} wide: give the "
            "gain of its own norm"
        )
    weight, gain = weight.detach(), None if gain is None else gain.detach().to(weight.device)
    mean = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for chunk in weight.split(_CHUNK):
        mean += chunk.sum(0, dtype=_out_dtype(chunk)) / len(weight)
    mean = mean if gain is None else mean * gain.double()
    if not mean.isfinite().all():
        raise ValueError(f"the {name} or its gain holds NaN or infinite entries: load a sound checkpoint")
    return _Head(weight, gain, mean)


def _pair(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    shared = min(len(teacher), len(student))
    if len(teacher) != len(student):
        sizes = f"{len(teacher)} (teacher) and {len(student)} (student)"
        warnings.warn(f"the vocabularies have {sizes} rows: only the {shared} that both have are used", stacklevel=3)
    return teacher[:shared], student[:shared]


def _cross(left: _Head, right: _Head, dtype: torch.dtype, centred: bool = False, p: Tensor | None = None) -> Tensor:
    """sum_i p_i w_i v_i' (D_left, D_right) in float64, p = 1 by default; ``centred``: of rows less their p-mean."""
    same, total = left is right, float(len(left.weight) if p is None else p.sum())
    shifts = [head.mean.to(dtype) for head in (left, right)]
    sums = [torch.zeros_like(head.mean) for head in (left, right)]  # of the shifted rows
    out = torch.zeros(len(left.mean), len(right.mean), dtype=torch.float64, device=left.weight.device)
    product = torch.empty(0, dtype=dtype, device=out.device)
    for start in range(0, len(left.weight), _CHUNK):
        v = right.rows(start, dtype) - shifts[1]
        u = v if same else left.rows(start, dtype) - shifts[0]
        weighted = (u, v) if p is None else tuple(x * p[start : start + _CHUNK, None].to(dtype) for x in (u, v))
        for first, x in zip(sums, weighted, strict=True):
            first += x.sum(0)
        for i in range(0, len(out), _BLOCK if same else len(out)):
            block = slice(i, i + _BLOCK if same else None), slice(i, None)
            out[block] += torch.mm(weighted[0][:, block[0]].T, v[:, block[1]], out=product.resize_(0))
    if same:
        for i in range(0, len(out), _BLOCK):
            out[i + _BLOCK :, i : i + _BLOCK] = out[i : i + _BLOCK, i + _BLOCK :].T
    if centred:
        return out.addr_(*sums, alpha=-1 / total)
    r, s = (shift.double() for shift in shifts)
    return out.addr_(r, sums[1]).addr_(sums[0], s).addr_(r, s, alpha=total)


def _smallest(cholesky: Tensor) -> float:
    """The smallest eigenvalue of G by inverse iteration: an upper bound, close after a few steps."""
    block = torch.randn(len(cholesky), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = block.to(cholesky.device)
    for _ in range(4):
        block = torch.cholesky_solve(torch.linalg.qr(block).Q, cholesky)
    return 1 / float(torch.linalg.matrix_norm(block, 2))


def _gram(head: _Head, ridge: float, centred: bool = False, p: Tensor | None = None) -> _Gram:
    m, width = head.weight.shape
    rtol = max(m, width) * _EPS
    exact = head.weight.dtype == torch.float64 or m * width**2 < _SMALL or p is not None

    def build(dtype: torch.dtype) -> Tensor:
        gram = _cross(head, head, dtype, centred, p)
        gram.diagonal().add_(ridge)
        return gram

    for dtype in (torch.float64,) if exact else (torch.float32, torch.float64):
        factor, info = build(dtype), torch.empty(0, dtype=torch.int32, device=head.weight.device)
        size = float(factor.norm())
        bulk = float(factor.trace() - (0 if centred else m * head.mean.square().sum())) / width
        torch.linalg.cholesky_ex(factor, out=(factor, info))  # in place: a second matrix would double the peak
        smallest = 0.0 if int(info) else _smallest(factor)
        if smallest * _SPREAD >= bulk:
            break
    definite = smallest > rtol * size
    return _Gram(factor if definite else build(dtype), definite, rtol, dtype)


def _norms(rows: Tensor) -> Tensor:
    """What to divide rows by: their norms, and 1 for a zero row (a padding token), which so stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norms == 0, 1.0, norms)


def _out_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def fold_norm(head: Tensor, gain: Tensor | None = None, *, layer_norm: bool = False) -> Tensor:
    """The head as it acts on a state before the final norm, up to that state's scale.

    Args:
        head: W (m, D).
        gain: g (D,), as ``models.norm_gain`` returns it (for Gemma 1 + w).
        layer_norm: the norm subtracts the mean of a state's channels.

    Returns:
        W diag(g) (m, D); for a LayerNorm W diag(g) (I - 11'/D), whose rank is D - 1. In float32, or float64 if one of
        them is: rounded to 16 bits the mean would not be gone, and an inverse makes much of what is left of it.
    """
    dtype = _out_dtype(head) if gain is None else _out_dtype(head, gain)
    folded = head.to(dtype) if gain is None else head.to(dtype) * gain.to(dtype)
    return folded - folded.mean(1, keepdim=True) if layer_norm else folded


def semantic_bases(
    head: Tensor, *, gain: Tensor | None = None, kind: str = "dual", unit: bool = True, ridge: float = 0.0
) -> Tensor:
    """The semantic basis of every token, a column each (section 3).

    Args:
        head: LM head W (m, D), or the embeddings for the input side.
        gain: final norm gain (D,), signs kept; W diag(g) takes the place of W.
        kind: "dual", G^-1 W', the pseudoinverse (the paper's); "primal", W'; "tight", G^-1/2 W', a frame whose operator
            is the identity before normalisation.
        unit: scale every column to length 1, as the paper does.
        ridge: a in (G + a I), in the units of G.

    Returns:
        S (D, m), float64 for a float64 head and float32 otherwise.

    Raises:
        ValueError: a head or gain of a wrong shape or with entries that are not finite, or an unknown kind.
    """
    if kind not in BASES:
        raise ValueError(f"unknown kind of bases {kind!r}: choose one of {', '.join(BASES)}")
    checked = _head(head, gain, "head")
    factor, dtype = None, torch.float64
    if kind != "primal":
        gram = _gram(checked, ridge)
        factor, dtype = gram.power(-0.5 if kind == "tight" else -1).to(gram.dtype), gram.dtype
    out = torch.empty(head.shape, dtype=_out_dtype(head), device=head.device)
    for start in range(0, len(head), _CHUNK):
        rows = checked.rows(start, dtype) if factor is None else checked.rows(start, dtype) @ factor
        out[start : start + _CHUNK] = rows / _norms(rows) if unit else rows
    return out.T


def _paper(teacher: _Head, student: _Head, ridge: float) -> Tensor:
    """S_S S_T' of unit-norm dual bases, of which a chunk at a time exists."""

    def inverse(head: _Head) -> Tensor:
        gram = _gram(head, ridge)
        return gram.power(-1).to(gram.dtype)

    inverses = [inverse(student), inverse(teacher)]
    out = torch.zeros(len(student.mean), len(teacher.mean), dtype=torch.float64, device=student.weight.device)
    for start in range(0, len(student.weight), _CHUNK):
        s, t = (h.rows(start, i.dtype) @ i for h, i in zip((student, teacher), inverses, strict=True))
        common = torch.promote_types(s.dtype, t.dtype)
        out += s.div_(_norms(s)).to(common).T @ t.div_(_norms(t)).to(common)
    return out


def _procrustes(cross: Tensor, rtol: float) -> Tensor:
    u, values, vh = torch.linalg.svd(cross, full_matrices=False)
    return (u * (values > rtol * values[0])) @ vh  # a direction that a head cannot see has no partner


def _random(rows: int, columns: int, seed: int) -> Tensor:
    draw = torch.randn(max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed)).double()
    q, r = torch.linalg.qr(draw)
    q = q * r.diagonal().sign()  # makes the draw uniform
    return q if rows >= columns else q.T


def _frequency(frequency: Tensor, size: int) -> Tensor:
    p = frequency.detach().double()[:size]
    if p.shape != (size,) or not p.isfinite().all() or bool((p < 0).any()) or not p.sum() > 0:
        raise ValueError(f"frequency must hold {size} finite numbers, one a token, none negative and not all zero")
    return p / p.sum()


def semantic_map(
    teacher_head: Tensor,
    student_head: Tensor,
    *,
    kind: str = "paper",
    teacher_gain: Tensor | None = None,
    student_gain: Tensor | None = None,
    ridge: float = 0.0,
    frequency: Tensor | None = None,
    seed: int = 0,
    control_of: str = "paper",
) -> Tensor:
    """The matrix M that takes a teacher's state to the student's space: h* = M h/|h| (equations 1 and 2).

    With G = W'W of a head and C = W_S'W_T:

    * ``paper``: S_S S_T' of unit-norm dual bases. Between a model and itself it is not the identity: without the unit
      norms it would be G_S^-1 C G_T^-1, which is G^-1 there.
    * ``logit``: G_S^-1 C = W_S^+ W_T, so W_S M h is the least squares fit of the teacher's logits W_T h.
    * ``logit_centred``: the same for heads less the mean of their rows: the softmax ignores a shift of all logits.
    * ``tight``: G_S^-1/2 C G_T^-1/2; its singular values are the canonical correlations of the heads' column spaces.
    * ``procrustes``: U V' of the SVD of C. For D_S <= D_T it is the semi-orthogonal M of least |W_S M - W_T|_F, since
      tr(M'G_S M) = tr(G_S) there; U V' of the ``tight`` matrix would heed faint directions as much as loud ones.
    * ``random``, a uniform semi-orthogonal matrix, and ``shuffled``, ``control_of`` with the teacher's tokens permuted:
      controls without the pairing of tokens.

    Args:
        teacher_head: W_T (m, D_T).
        student_head: W_S (m, D_S). Where m differs (padded vocabularies) the first rows, which both have, are used.
        kind: one of the above.
        teacher_gain: final norm gain (D_T,), folded into W_T.
        student_gain: final norm gain (D_S,), folded into W_S.
        ridge: a in (G + a I) wherever a G is inverted, in the units of G.
        frequency: p (m,), how often each token is expected. Tokens then weigh diag(p) in ``logit`` and diag(p) - p p'
            in ``logit_centred``: the second is the curvature of the KL divergence, averaged.
        seed: of the controls.
        control_of: the kind that ``shuffled`` permutes.

    Returns:
        M (D_S, D_T), float64 if a head is, float32 otherwise.

    Raises:
        ValueError: unknown kind; heads, gains or frequencies of wrong shape or with entries that are not finite.
    """
    if kind not in KINDS or control_of in ("random", "shuffled") or control_of not in KINDS:
        raise ValueError(f"unknown kind of map {kind!r} (control of {control_of!r}): choose one of {', '.join(KINDS)}")
    teacher_head, student_head = _pair(teacher_head, student_head)
    if kind == "shuffled":
        order = torch.randperm(len(teacher_head), generator=torch.Generator().manual_seed(seed))
        teacher_head, kind = teacher_head[order.to(teacher_head.device)], control_of
    if frequency is not None and kind not in ("logit", "logit_centred"):
        raise ValueError(
            f"frequency weighs the tokens of logit and logit_centred: drop it, as {kind} has no use for it"
        )
    teacher = _head(teacher_head, teacher_gain, "teacher head")
    student = _head(student_head, student_gain, "student head")
    if kind == "paper":
        matrix = _paper(teacher, student, ridge)
    elif kind == "random":
        matrix = _random(student_head.shape[1], teacher_head.shape[1], seed).to(student_head.device)
    elif kind == "procrustes":
        matrix = _procrustes(_cross(student, teacher, torch.float64), len(student_head) * _EPS)
    elif kind == "tight":
        grams = [_gram(head, ridge) for head in (student, teacher)]
        cross = _cross(student, teacher, torch.promote_types(*(gram.dtype for gram in grams)))
        matrix = grams[0].power(-0.5) @ cross @ grams[1].power(-0.5)
    else:
        p = None if frequency is None else _frequency(frequency, len(student_head)).to(student_head.device)
        gram = _gram(student, ridge, kind == "logit_centred", p)
        matrix = gram.solve(_cross(student, teacher, gram.dtype, kind == "logit_centred", p))
    return matrix.to(_out_dtype(teacher_head, student_head))


def hidden_map(teacher_hidden: Tensor, student_hidden: Tensor, *, ridge: float = 0.0) -> Tensor:
    """The data-driven baseline: ridge regression of states h_S (n, D_S) on h_T (n, D_T) of the same tokens.

    Returns:
        M (D_S, D_T) = H_S'H_T (H_T'H_T + a I)^-1 with a = ``ridge``; without a ridge, the fit of least norm.

    Raises:
        ValueError: states of different numbers of tokens, or with entries that are not finite.
    """
    if len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"{len(teacher_hidden)} teacher and {len(student_hidden)} student states do not form pairs: give one of "
            "each a token"
        )
    teacher, student = _head(teacher_hidden, None, "teacher states"), _head(student_hidden, None, "student states")
    gram = _gram(teacher, ridge)
    return gram.solve(_cross(teacher, student, gram.dtype)).T.to(_out_dtype(teacher_hidden, student_hidden))


def recompose(hidden: Tensor, matrix: Tensor) -> Tensor:
    """h* = M h/|h| (equations 1 and 2): states h (..., D_T) and M (D_S, D_T) to targets (..., D_S); zero stays zero."""
    return (hidden / _norms(hidden)) @ matrix.to(hidden).T


def decompose(hidden: Tensor, bases: Tensor, *, top: int | None = None) -> tuple[Tensor, Tensor]:
    """a = S'h/|h| (equation 1), largest first, to look at a few states: h (..., D) and S (D, m) to (..., ``top``).

    Returns:
        The ``top`` coefficients (all m by default) and the token ids they belong to.
    """
    values, tokens = (hidden / _norms(hidden) @ bases.to(hidden)).topk(bases.shape[1] if top is None else top, dim=-1)
    return values, tokens


def canonical_correlations(teacher_head: Tensor, student_head: Tensor) -> Tensor:
    """Cosines of the principal angles between two heads' column spaces, largest first: (min(D_S, D_T),), float64.

    They bound what any map between the vocabularies can carry. Gains change no column space, so none is asked for.
    """
    return torch.linalg.svdvals(semantic_map(teacher_head, student_head, kind="tight").double()).clamp_max(1.0)


def map_report(teacher_head: Tensor, student_head: Tensor, hidden: Tensor, **options: Any) -> dict[str, float]:
    """What the map of ``options`` (those of ``semantic_map``, no gains) keeps of teacher states h (n, D_T).

    Heads W_T (m, D_T) and W_S (m, D_S) come with their norms folded in (``fold_norm``).

    Returns:
        Means over the states of ``self_cosine``, cos(h, M h) with the teacher as its own student, ``logit_error``,
        |W_S M h - W_T h| / |W_T h|, which a wrong scale of M spoils, and ``logit_cosine``, which it does not.
    """
    teacher_head, student_head = _pair(teacher_head, student_head)
    itself = recompose(hidden, semantic_map(teacher_head, teacher_head, **options))
    sent = hidden @ semantic_map(teacher_head, student_head, **options).to(hidden).T
    sums = hidden.new_zeros(4, len(hidden), dtype=torch.float64)
    for start in range(0, len(teacher_head), _CHUNK):
        w = teacher_head[start : start + _CHUNK].double() @ hidden.double().T
        z = student_head[start : start + _CHUNK].double() @ sent.double().T
        sums += torch.stack([(z - w).square().sum(0), w.square().sum(0), z.square().sum(0), (z * w).sum(0)])
    return {
        "self_cosine": float(torch.cosine_similarity(hidden, itself, dim=-1).mean()),
        "logit_error": float((sums[0] / sums[1]).sqrt().mean()),
        "logit_cosine": float((sums[3] / (sums[1] * sums[2]).sqrt()).mean()),
    }
