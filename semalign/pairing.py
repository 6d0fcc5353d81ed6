"""Layer pairing (section 4.1): which teacher layer answers to which student layer. Layer numbers count from 1."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def _check_depths(n_teacher: int, n_student: int) -> None:
    if n_teacher < 1 or n_student < 1:
        raise ValueError(f"a model needs at least one layer: got {n_teacher} (teacher) and {n_student} (student)")


def depth_pairs(n_teacher: int, n_student: int) -> list[int]:
    """The paper's rule: l(k) = max(1, floor(L_T k / L_S)) for k = 1..L_S.

    In integers, so that it is exact: in floating point floor((L_T / L_S) k) can fall one short of a whole number.

    Raises:
        ValueError: a model without layers.
    """
    _check_depths(n_teacher, n_student)
    return [max(1, n_teacher * k // n_student) for k in range(1, n_student + 1)]


def critical_pair(layer: int, n_teacher: int, n_student: int) -> tuple[int, int]:
    """The pair (l(k), k) to train for a critical teacher layer l*: the smallest k with l(k) >= l*, else k = L_S.

    Raises:
        ValueError: the teacher has no such layer.
    """
    depths = depth_pairs(n_teacher, n_student)
    if not 1 <= layer <= n_teacher:
        raise ValueError(f"layer {layer} is not a teacher layer: they are numbered 1 to {n_teacher}")
    k = next((k for k, depth in enumerate(depths, start=1) if depth >= layer), n_student)
    return depths[k - 1], k


def interpolation(k: int, n_teacher: int, n_student: int) -> tuple[int, int, float]:
    """(a, b, lambda): student layer k's exact depth u = L_T k / L_S lies between teacher layers a and b = a + 1.

    The target source is (1 - lambda) h_a + lambda h_b. A teacher of one layer gives (1, 1, 0).

    Raises:
        ValueError: the student has no layer k.
    """
    _check_depths(n_teacher, n_student)
    if not 1 <= k <= n_student:
        raise ValueError(f"k = {k} is not a student layer: they are numbered 1 to {n_student}")
    if n_teacher == 1:
        return 1, 1, 0.0
    low = max(1, min(n_teacher * k // n_student, n_teacher - 1))
    return low, low + 1, min(max(n_teacher * k / n_student - low, 0.0), 1.0)


def uniform_ceil(n_teacher: int, n_student: int) -> list[int]:
    """l(k) = ceil(L_T k / L_S): the paper's rule, rounded towards the deeper layer."""
    _check_depths(n_teacher, n_student)
    return [-(-n_teacher * k // n_student) for k in range(1, n_student + 1)]


def reversed_pairs(n_teacher: int, n_student: int) -> list[int]:
    """The paper's depths from deep to shallow: a control that keeps the layers and inverts the order."""
    return depth_pairs(n_teacher, n_student)[::-1]


def random_pairs(n_teacher: int, n_student: int, seed: int = 0) -> list[int]:
    """A seeded, independent teacher layer for each student layer: a control without any order."""
    _check_depths(n_teacher, n_student)
    draw = random.Random(seed)
    return [draw.randint(1, n_teacher) for _ in range(n_student)]


def _similarity(similarity: Tensor) -> Tensor:
    if similarity.dim() != 2 or 0 in similarity.shape or not similarity.isfinite().all():
        raise ValueError(f"a similarity matrix must be (L_T, L_S) and finite, got shape {tuple(similarity.shape)}")
    return similarity.detach().cpu().double()


def cka_argmax(similarity: Tensor) -> list[int]:
    """For each student layer the most similar teacher layer, whatever the order; ``similarity`` is (L_T, L_S)."""
    return [int(row) + 1 for row in _similarity(similarity).argmax(0)]


def order_preserving(similarity: Tensor) -> list[int]:
    """The non-decreasing assignment l(1) <= ... <= l(L_S) of the largest total similarity, by dynamic programming.

    ``similarity`` is (L_T, L_S), for instance of linear CKA. Of equal totals the shallower teacher layers win.
    """
    values = _similarity(similarity)
    best, back = values[:, 0], []
    for k in range(1, values.shape[1]):
        reach = torch.cummax(best, 0).values
        back.append(torch.searchsorted(reach, reach))  # of each running maximum, the first place that has it
        best = reach + values[:, k]
    layer = int(best.argmax())
    path = [layer]
    for pointers in reversed(back):
        layer = int(pointers[layer])
        path.append(layer)
    return [layer + 1 for layer in reversed(path)]
