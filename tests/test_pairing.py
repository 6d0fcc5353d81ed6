from __future__ import annotations

from fractions import Fraction
from itertools import combinations_with_replacement
from math import ceil, floor

import pytest
import torch

from semalign.pairing import (
    cka_argmax,
    critical_pair,
    depth_pairs,
    interpolation,
    order_preserving,
    random_pairs,
    reversed_pairs,
    uniform_ceil,
)

DEPTHS = [(t, s) for t in range(1, 49) for s in range(1, 49)]


def test_depth_rule_is_the_formula_at_every_depth_up_to_48() -> None:
    for n_teacher, n_student in DEPTHS:
        ratio = Fraction(n_teacher, n_student)
        assert depth_pairs(n_teacher, n_student) == [max(1, floor(ratio * k)) for k in range(1, n_student + 1)]


def test_depth_rule_is_exact_where_floating_point_is_not() -> None:
    wrong = [(t, s, k) for t, s in DEPTHS for k in range(1, s + 1) if max(1, floor(t / s * k)) != max(1, t * k // s)]
    assert wrong, "the formula in floats is off somewhere, or there would be no reason for integers"
    for t, s, k in wrong:
        assert depth_pairs(t, s)[k - 1] == max(1, floor(Fraction(t, s) * k))


def test_llama_2_pairs() -> None:
    depths = depth_pairs(40, 32)
    assert depths[:6] == [1, 2, 3, 5, 6, 7]
    assert depths[-1] == 40
    assert critical_pair(4, 40, 32) == (5, 4)  # layer 4 is nobody's, so the first deeper pair is taken
    assert critical_pair(5, 40, 32) == (5, 4)
    assert interpolation(2, 40, 32) == (2, 3, 0.5)


def test_critical_layer_goes_to_the_smallest_k_that_reaches_it() -> None:
    for n_teacher, n_student in DEPTHS:
        depths = depth_pairs(n_teacher, n_student)
        for layer in range(1, n_teacher + 1):
            l, k = critical_pair(layer, n_teacher, n_student)  # noqa: E741 - the paper's name
            assert depths[k - 1] == l
            assert l >= layer
            assert all(depth < layer for depth in depths[: k - 1])


def test_interpolation_weighs_two_neighbours_to_the_exact_depth() -> None:
    for n_teacher, n_student in DEPTHS:
        for k in range(1, n_student + 1):
            a, b, weight = interpolation(k, n_teacher, n_student)
            depth = Fraction(n_teacher * k, n_student)
            if n_teacher == 1:
                assert (a, b, weight) == (1, 1, 0.0)
                continue
            assert (a, b) == (max(1, min(floor(depth), n_teacher - 1)), a + 1)
            assert abs(weight - min(max(depth - a, 0), 1)) < 1e-12
            assert abs((1 - weight) * a + weight * b - max(depth, 1)) < 1e-9


@pytest.mark.parametrize(("n_teacher", "n_student"), [(40, 32), (24, 32), (3, 7), (5, 1)])
def test_other_rules_give_each_student_layer_a_teacher_layer(n_teacher: int, n_student: int) -> None:
    assert uniform_ceil(n_teacher, n_student) == [
        ceil(Fraction(n_teacher * k, n_student)) for k in range(1, n_student + 1)
    ]
    assert reversed_pairs(n_teacher, n_student) == sorted(depth_pairs(n_teacher, n_student), reverse=True)
    drawn = random_pairs(n_teacher, n_student, seed=3)
    assert len(drawn) == n_student
    assert set(drawn) <= set(range(1, n_teacher + 1))
    assert drawn == random_pairs(n_teacher, n_student, seed=3)


def test_random_pairs_depend_on_the_seed_and_reach_every_layer() -> None:
    draws = [random_pairs(5, 8, seed=seed) for seed in range(20)]
    assert len({tuple(d) for d in draws}) > 15
    assert {l for d in draws for l in d} == {1, 2, 3, 4, 5}  # noqa: E741 - the paper's name


def test_argmax_takes_the_most_similar_layer_of_each_column() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 0.1], [0.2, 0.1, 0.7], [0.0, 0.0, 0.1]])
    assert cka_argmax(similarity) == [2, 1, 3]
    assert order_preserving(similarity) in ([2, 2, 3], [1, 1, 3])


@pytest.mark.parametrize(("n_teacher", "n_student"), [(4, 4), (6, 4), (3, 5), (1, 3), (5, 1)])
def test_order_preserving_assignment_is_the_best_of_all(n_teacher: int, n_student: int) -> None:
    for seed in range(20):
        similarity = torch.rand(n_teacher, n_student, generator=torch.Generator().manual_seed(seed)).double()
        totals = {
            path: sum(float(similarity[l - 1, k]) for k, l in enumerate(path))  # noqa: E741 - the paper's name
            for path in combinations_with_replacement(range(1, n_teacher + 1), n_student)
        }
        found = order_preserving(similarity)
        assert found == sorted(found)
        assert totals[tuple(found)] == pytest.approx(max(totals.values()))


def test_order_preserving_prefers_shallow_layers_among_equals() -> None:
    assert order_preserving(torch.zeros(4, 3)) == [1, 1, 1]
    assert order_preserving(torch.eye(5)) == [1, 2, 3, 4, 5]


def test_impossible_depths_are_refused() -> None:
    for call in (depth_pairs, uniform_ceil, reversed_pairs, random_pairs):
        with pytest.raises(ValueError, match="at least one layer"):
            call(0, 4)
    with pytest.raises(ValueError, match="numbered 1 to 40"):
        critical_pair(41, 40, 32)
    with pytest.raises(ValueError, match="numbered 1 to 40"):
        critical_pair(0, 40, 32)
    with pytest.raises(ValueError, match="numbered 1 to 32"):
        interpolation(33, 40, 32)
    for similarity in (torch.rand(4), torch.rand(0, 3), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match=r"\(L_T, L_S\)"):
            order_preserving(similarity)
