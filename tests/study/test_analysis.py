from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from semalign.study.analysis import (
    cka_matrix,
    equivalence,
    holm,
    linear_cka,
    over_seeds_and_items,
    questions_needed,
    too_few_questions,
    variance_of_mean,
    verdict,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook_cka(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the centring matrix written out."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (centring @ t.double() @ t.double().T @ centring for t in (x, y))  # noqa: E741 - the two kernels
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


@pytest.mark.parametrize(("n", "p", "q"), [(200, 7, 5), (12, 40, 30), (20, 60, 3), (50, 40, 40)])
def test_cka_is_the_textbook_formula_by_either_route(n: int, p: int, q: int) -> None:
    x, y = draw(n, p, seed=1) + 5, draw(n, q, seed=2)
    y[:, 0] += x[:, 0]
    assert linear_cka(x, y) == pytest.approx(textbook_cka(x, y), abs=1e-10)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)


def test_cka_ignores_rotation_scale_and_shift_and_nothing_else() -> None:
    x = draw(100, 12)
    rotation = torch.linalg.qr(draw(12, 12, seed=3)).Q
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, x * torch.logspace(0, 2, 12)) < 0.9
    assert linear_cka(draw(5000, 4, seed=4), draw(5000, 4, seed=5)) < 0.01


def test_debiased_cka_does_not_mistake_width_for_likeness() -> None:
    x, y = draw(100, 576, seed=1), draw(100, 960, seed=2)
    assert linear_cka(x, y) > 0.85
    assert linear_cka(x, y, unbiased=True) == pytest.approx(0, abs=0.02)
    assert linear_cka(x, 3 * x + 2, unbiased=True) == pytest.approx(1, abs=1e-6)
    few, many = draw(1000, 4, seed=4), draw(1000, 4, seed=5)
    many[:, 0] += few[:, 0]
    assert linear_cka(few, many, unbiased=True) == pytest.approx(linear_cka(few, many), abs=0.005)
    with pytest.raises(ValueError, match="n > 3"):
        linear_cka(draw(3, 2), draw(3, 2), unbiased=True)


def test_debiased_cka_is_the_cosine_of_the_kernels_centred_without_their_diagonals() -> None:
    """By its definition (U-centring), which needs matrices of states by states."""

    def kernel(states: torch.Tensor) -> torch.Tensor:
        k, n = (states.double() @ states.double().T).fill_diagonal_(0), len(states)
        centred = k - k.sum(0) / (n - 2) - k.sum(1, keepdim=True) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        return centred.fill_diagonal_(0)

    for n, p, q in ((4, 2, 3), (40, 60, 80), (300, 7, 20)):
        x, y = draw(n, p, seed=1) + 3, draw(n, q, seed=2)
        y[:, :2] += x[:, :2]
        k, l = kernel(x), kernel(y)  # noqa: E741
        expected = ((k * l).sum() / (k.norm() * l.norm())).item()
        assert linear_cka(x, y, unbiased=True) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [12, 60])  # by Gram matrices, and by products of features
def test_the_matrix_of_similarities_is_that_of_all_pairs(n: int) -> None:
    rows = [draw(n, 20, seed=i).cumsum(0) + 3 for i in range(3)]
    columns = [draw(n, 9, seed=10), rows[0] @ draw(20, 15, seed=11)]
    matrix = cka_matrix(rows, columns)
    expected = torch.tensor([[linear_cka(x, y) for y in columns] for x in rows], dtype=torch.float64)
    torch.testing.assert_close(matrix, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(cka_matrix(rows, rows), cka_matrix(rows, list(rows)), atol=1e-12, rtol=1e-10)
    with pytest.raises(ValueError, match="same n > 1"):
        cka_matrix(rows, [draw(n + 1, 9)])
    with pytest.raises(ValueError, match="same for every state"):
        cka_matrix(rows, [torch.ones(n, 9)])


def test_cka_refuses_what_has_no_similarity() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(6, 3\)"):
        linear_cka(draw(5, 3), draw(6, 3))
    with pytest.raises(ValueError, match="n > 1"):
        linear_cka(draw(1, 3), draw(1, 3))
    with pytest.raises(ValueError, match="same for every state"):
        linear_cka(torch.ones(5, 3), draw(5, 3))


def test_one_seed_is_the_textbooks_paired_t() -> None:
    a, b = draw(400, seed=1) + 0.3, draw(400, seed=2)
    found = over_seeds_and_items((a - b)[None])
    test = stats.ttest_rel(a.double(), b.double())
    assert (found.mean, found.p, found.df) == pytest.approx((float((a - b).mean()), float(test.pvalue), 399))
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.about == "this trained student"
    narrow = over_seeds_and_items((a - b)[None], level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_one_item_is_a_t_over_seeds_and_nothing_varies_by_chance_alone() -> None:
    five = draw(5, seed=3)
    found = over_seeds_and_items(five[:, None])
    assert found.p == pytest.approx(float(stats.ttest_1samp(five.double(), 0).pvalue))
    hard = 10 * draw(50)
    same = over_seeds_and_items(((hard + 1) - hard).round()[None])  # the pairs are kept: a constant gain is certain
    assert same[:3] == (1, 1, 1) and same.p == pytest.approx(2.0**-49)
    assert over_seeds_and_items(torch.ones(1, 4)).p == 0.125  # four signs agree by chance in one of eight
    assert over_seeds_and_items(torch.zeros(2, 30))[:4] == (0, 0, 0, 1)


def test_values_without_an_interval_are_refused() -> None:
    for wrong in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match=r"\(seeds, items\) or \(students, seeds, items\)"):
            over_seeds_and_items(wrong)
    with pytest.raises(ValueError, match="1 of 6 values are no numbers"):
        over_seeds_and_items(torch.tensor([[1, 2, 3], [4, 5, float("nan")]]))


def test_the_variance_is_that_of_crossed_random_effects() -> None:
    """Against the sums of squares written out, for seeds and items, and for students in the place of seeds."""
    values = draw(4, 7).double() + 3 * draw(4, 1, seed=5).double() + draw(1, 7, seed=6).double()
    rows, columns = values.mean(1), values.mean(0)
    rest = values - rows[:, None] - columns[None, :] + values.mean()
    a, b, e = 7 * rows.var(), 4 * columns.var(), rest.square().sum() / 18
    found = over_seeds_and_items(values)
    assert found.error**2 == pytest.approx(float((a + b - e) / 28))
    assert found.df == pytest.approx(float((a + b - e) ** 2 / (a**2 / 3 + b**2 / 6 + e**2 / 18)))
    assert found.about == "trainings of this student"
    students = values[:, None, :].expand(-1, 2, -1)  # two trainings each that are the same
    of_students = over_seeds_and_items(students)
    assert (of_students.error, of_students.students) == (pytest.approx(found.error), 4)
    assert over_seeds_and_items(values[None]) == found and "students" in of_students.about


def coverage(students: int, seeds: int, items: int, spreads: tuple[float, ...], binary: bool, runs: int) -> list[float]:
    """The shares of 95 % intervals that hold the truth, where trained units differ by so many errors of the items.

    Answers are right with a chance of 0.2 to 0.8 by the item; losses have an item's part and a part of their own.
    """
    generator, inside = torch.Generator().manual_seed(items), [0] * len(spreads)
    units, of_runs = ((students, 1) if students > 1 else (1, seeds)), 500
    error = (0.25 / items) ** 0.5 if binary else ((1 + 0.5 / (students * seeds)) / items) ** 0.5
    for _ in range(runs // of_runs):
        noise = torch.rand if binary else torch.randn
        item, drawn = (noise(of_runs, *n, items, generator=generator) for n in ((1, 1), (students, seeds)))
        for at, spread in enumerate(spreads):
            shift = spread * error * torch.randn(of_runs, *units, 1, generator=generator)
            values = (drawn < 0.6 * item + 0.2 + shift).float() - 0.5 if binary else item + 0.7 * drawn + shift
            variance, df = variance_of_mean(values)
            half = torch.tensor(stats.t.ppf(0.975, df)) * variance.sqrt()
            inside[at] += int((values.mean((1, 2, 3)).abs() <= half).sum())
    return [n / runs for n in inside]


@pytest.mark.parametrize("binary", [True, False], ids=["answers", "losses"])
@pytest.mark.parametrize(
    ("students", "seeds", "items", "runs"), [(1, 1, 300, 2000), (1, 3, 300, 4000), (1, 5, 800, 2000), (3, 5, 300, 4000)]
)
def test_intervals_cover_the_truth(students: int, seeds: int, items: int, runs: int, binary: bool) -> None:
    """At the book's shapes, with trained students that differ by up to eight times the error of the questions."""
    spreads = (0.0, 1.0, 3.2, 8.0) if students * seeds > 1 else (0.0,)
    shares = coverage(students, seeds, items, spreads, binary, runs)
    print(shares)
    assert all(0.92 <= share <= 0.98 for share in shares), dict(zip(spreads, shares, strict=True))


def test_equivalence_is_two_one_sided_tests() -> None:
    values = 0.05 * draw(1, 900) + 0.001
    found = over_seeds_and_items(values)
    equal = equivalence(found)
    below = stats.ttest_1samp(values[0].double(), 0.03, alternative="less").pvalue
    above = stats.ttest_1samp(values[0].double(), -0.03, alternative="greater").pvalue
    assert equal.within and equal.p == pytest.approx(float(max(below, above)))
    ninety = over_seeds_and_items(values, level=0.9)
    assert (equal.low, equal.high) == pytest.approx((ninety.low, ninety.high))
    assert not equivalence(over_seeds_and_items(values + 0.029)).within
    assert not equivalence(over_seeds_and_items(10 * values[:, :30])).within  # too few to tell
    assert equivalence(over_seeds_and_items(torch.zeros(1, 9))).within
    assert not equivalence(over_seeds_and_items(torch.ones(1, 9))).within
    with pytest.raises(ValueError, match="above 0"):
        equivalence(found, 0)


def test_the_number_of_questions_has_the_power_that_it_is_chosen_for() -> None:
    needed = questions_needed(0.03, differing=0.1)
    assert needed == 952
    signs = torch.rand(1000, needed, generator=torch.Generator().manual_seed(0))
    shown = [equivalence(over_seeds_and_items(((s < 0.05).double() - (s > 0.95).double())[None])).within for s in signs]
    assert sum(shown) / len(shown) == pytest.approx(0.8, abs=0.04)
    assert questions_needed(0.03, seeds=5, seed_spread=0.01) > needed
    assert questions_needed(0.03, seeds=1, seed_spread=0.02) is None
    assert too_few_questions(1000) == ""
    assert "300 questions cannot show" in (said := too_few_questions(300)) and "about 952" in said
    assert "no number of questions can" in too_few_questions(9999, seed_spread=0.02)
    with pytest.raises(ValueError, match="bound > 0"):
        questions_needed(-1)


def test_holm_on_a_known_family() -> None:
    got = holm({"d": 0.005, "a": 0.01, "c": 0.04, "b": 0.03})
    assert list(got) == ["d", "a", "c", "b"]
    assert got == pytest.approx({"d": 0.02, "a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"x": 0.6, "y": 0.7}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}
    with pytest.raises(ValueError, match="between 0 and 1, and b has nan"):
        holm({"a": 0.01, "b": float("nan")})


def test_a_verdict_needs_an_interval_on_one_side_of_zero() -> None:
    assert [verdict(*i) for i in ((0.1, 0.2), (-0.2, -0.1))] == ["better than", "worse than"]
    assert {verdict(*i) for i in ((-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (0.0, 0.0))} == {"not distinguishable from"}
