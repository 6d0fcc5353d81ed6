"""What is compared and how sure we are: representation similarity, held-out answers, paired tests and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

UNVARIED = (
    "a representation is the same for every state, so its similarity to another is not defined: give states that differ"
)


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> float:
    """Linear centred kernel alignment of two representations of the same n states, in [0, 1] (figures 4 to 6).

    |Y'X|_F^2 / (|X'X|_F |Y'Y|_F) of column-centred X (n, p) and Y (n, q), in float64; the same from the (n, n) Gram
    matrices where that is cheaper. It does not change under rotation and isotropic scaling of either side.

    Args:
        unbiased: estimate each of the three terms without bias, from pairs of different states alone. Where n is not
            far above p and q, independent representations look alike otherwise; these have about 0, or a little below.

    Raises:
        ValueError: different n, fewer than two states (unbiased: four), or a representation that does not vary.
    """
    least = 3 if unbiased else 1
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) <= least:
        raise ValueError(
            f"CKA needs two matrices (n, p) and (n, q) with n > {least}: got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = (t.detach().double() - t.detach().double().mean(0) for t in (x, y))
    p, q = x.shape[1], y.shape[1]
    if not unbiased and len(x) * (p + q) < p * p + p * q + q * q:
        k, l = x @ x.T, y @ y.T  # noqa: E741 - the usual names of the two kernels
        cross, scale = (k * l).sum(), torch.linalg.matrix_norm(k) * torch.linalg.matrix_norm(l)
    else:
        product = _of_different_states if unbiased else _of_kernels
        cross, scale = product(x, y), product(x, x).clamp(min=0).sqrt() * product(y, y).clamp(min=0).sqrt()
    if not scale > 0:
        raise ValueError(UNVARIED)
    return float(cross / scale)


def _of_kernels(x: Tensor, y: Tensor) -> Tensor:
    """<XX', YY'> of centred X (n, p) and Y (n, q), without a matrix (n, n)."""
    return (y.T @ x).square().sum()


def _of_different_states(x: Tensor, y: Tensor) -> Tensor:
    """The same of the U-centred kernels, which pairs of different states alone make: without bias times n (n - 3).

    Of centred X the rows of XX' add up to zero, so that without its diagonal k they add up to -k. With that the general
    formula for kernels K and L of zero diagonal, tr KL + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2), needs
    nothing but the two diagonals.
    """
    n, k, l = len(x), x.square().sum(1), y.square().sum(1)  # noqa: E741
    own = k @ l
    return _of_kernels(x, y) - own + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * own / (n - 2)


def cka_matrix(
    rows: Sequence[Tensor], columns: Sequence[Tensor], *, device: torch.device | str | None = None
) -> Tensor:
    """Linear CKA of every representation in ``rows`` with every one in ``columns``, of the same n states, in float64.

    As :func:`linear_cka`, with what belongs to one representation computed once: its Gram matrix where n is small, so
    that a pair costs n^2, else its norm, so that a pair costs n p q. The result is on the CPU.

    Args:
        device: where it is computed, by default where the representations are. Of two Llama-2 stacks and 10,000 states
            it is hours of a processor and a minute of a card.

    Raises:
        ValueError: as :func:`linear_cka`.
    """
    shapes = {(len(x), x.dim()) for x in (*rows, *columns)}
    if len(shapes) > 1 or min(shapes) < (2, 2):
        raise ValueError(
            f"CKA needs matrices (n, p) of the same n > 1: got {[tuple(x.shape) for x in (*rows, *columns)]}"
        )

    def centred(x: Tensor) -> Tensor:
        x = x.double()
        return x - x.mean(0)

    sides = [[x.detach().to(device or x.device) for x in side] for side in (rows, columns)]
    n, widest = len(rows[0]), max(x.shape[1] for x in (*rows, *columns))
    if n <= widest:
        grams = [torch.stack([(x @ x.T).flatten() for x in map(centred, side)]) for side in sides]
        cross, norms = grams[0] @ grams[1].T, [g.norm(dim=1) for g in grams]
    else:
        cross = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=sides[0][0].device)
        for i, x in enumerate(map(centred, sides[0])):
            for j, y in enumerate(sides[1]):  # of a model with itself half of them
                cross[i, j] = cross[j, i] if rows is columns and j < i else _of_kernels(x, centred(y))
        norms = [torch.stack([torch.linalg.matrix_norm(x.T @ x) for x in map(centred, side)]) for side in sides]
    if not all((norm > 0).all() for norm in norms):
        raise ValueError(UNVARIED)
    return (cross / (norms[0][:, None] * norms[1])).cpu()


class Estimate(NamedTuple):
    """A mean with what is known of it: an interval (95 % unless asked otherwise) and the p-value for a mean of 0."""

    mean: float
    low: float
    high: float
    p: float  # two-sided
    error: float  # standard error
    df: float  # degrees of freedom of the t distribution
    seeds: int  # trainings behind it; of one, it speaks of that trained student alone
    students: int = 1

    @property
    def about(self) -> str:
        """Whom the interval speaks of, beyond the questions."""
        if self.students > 1:
            return "students of this kind, and their trainings"
        return "trainings of this student" if self.seeds > 1 else "this trained student"


def verdict(low: float, high: float) -> str:
    """What an interval of the difference between two methods says of the first, as words to put before the second."""
    return "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"


def over_seeds_and_items(values: Tensor, *, level: float = 0.95) -> Estimate:
    """The mean of ``values`` (seeds, items) or (students, seeds, items), as a sample of each of these.

    Give differences of two methods on the same seeds and items for a paired comparison. The variance of the mean is
    that of crossed random effects, (A + B - E) / N, with A the mean square of seeds, B of items, E of what is left and
    N values; never less than either alone. Its degrees of freedom are Satterthwaite's, so that three seeds that differ
    count as three. With students, A is that of the students' means over their seeds, or of the seeds within a student
    where that is larger. Of what there is one of, nothing is learnt: one seed speaks of this trained student, over
    items alone (:attr:`Estimate.about`).

    Where all values are the same the interval has no width, and p is that of as many signs that agree by chance.

    Raises:
        ValueError: no value, one alone, or one that is not a number.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or values.numel() < 2:
        raise ValueError(
            f"values are (seeds, items) or (students, seeds, items), two or more: give these, not {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        wrong = int((~values.isfinite()).sum())
        raise ValueError(f"{wrong} of {values.numel()} values are no numbers: leave out the trainings that diverged")
    mean = float(values.mean())
    if bool((values == values[0, 0, 0]).all()):
        p = 2.0 ** (1 - values.shape[2]) if mean else 1.0
        return Estimate(mean, mean, mean, p, 0.0, float(max(values.shape) - 1), values.shape[1], len(values))
    variance, df = (float(t[0]) for t in variance_of_mean(values[None]))
    error = variance**0.5
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, df))
    return Estimate(mean, mean - half, mean + half, p, error, df, values.shape[1], len(values))


def variance_of_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the mean of (runs, students, seeds, items) and its degrees of freedom, (runs,) each.

    See :func:`over_seeds_and_items`; over many runs at once for simulations of its coverage.
    """
    _, students, seeds, items = values.shape
    n = students * seeds * items
    grand = values.mean((1, 2, 3), keepdim=True)
    by_item = values.mean((1, 2), keepdim=True)
    b, df_b = _mean_square(by_item - grand, students * seeds, items - 1)
    levels = []  # of trained units: their mean square, what it shares with the items', and the degrees of freedom
    if students > 1:
        level = values.mean(2, keepdim=True)
        of_units = level.mean(3, keepdim=True)
        a, df_a = _mean_square(of_units - grand, seeds * items, students - 1)
        e, df_e = _mean_square(level - of_units - by_item + grand, seeds, (students - 1) * (items - 1))
        levels.append((a, df_a, e, df_e))
    if seeds > 1:
        of_student = values.mean(2, keepdim=True)
        of_units, centre = values.mean(3, keepdim=True), of_student.mean(3, keepdim=True)
        a, df_a = _mean_square(of_units - centre, items, students * (seeds - 1))
        e, df_e = _mean_square(values - of_student - of_units + centre, 1, students * (seeds - 1) * (items - 1))
        levels.append((a, df_a, e, df_e))
    total, df = b, torch.full_like(b, df_b)
    for a, df_a, e, df_e in levels:
        both = a + b - e
        free = both.square() / (a.square() / df_a + _over(b, df_b) + _over(e, df_e))
        for sum_of, its_df in ((both, free), (a, torch.full_like(a, df_a))):
            larger = sum_of > total
            total, df = torch.where(larger, sum_of, total), torch.where(larger, its_df, df)
    return total / n, df


def _mean_square(deviations: Tensor, each: int, df: int) -> tuple[Tensor, int]:
    """Of deviations (runs, ...) that stand for ``each`` values: (runs,), and its degrees of freedom; 0 without any."""
    total = deviations.square().sum((1, 2, 3)) * each
    return total / max(df, 1), df


def _over(mean_square: Tensor, df: int) -> Tensor:
    return mean_square.square() / max(df, 1)


class Equivalence(NamedTuple):
    """Two one-sided tests: whether a difference is inside plus and minus ``bound``, by its 90 % interval."""

    within: bool
    low: float
    high: float
    p: float  # the larger of the two one-sided
    bound: float


def equivalence(estimate: Estimate, bound: float = 0.03, level: float = 0.05) -> Equivalence:
    """Whether a difference is too small to matter: two one-sided tests against -``bound`` and ``bound`` (TOST).

    An interval that holds 0 says that nothing was seen; only one that lies inside the bounds says that there is nothing
    of that size to see.

    Raises:
        ValueError: the bound is not above 0.
    """
    if not bound > 0:
        raise ValueError(f"an equivalence bound lies above 0: give one, not {bound}")
    mean, error, df = estimate.mean, estimate.error, estimate.df
    if not error:
        return Equivalence(abs(mean) < bound, mean, mean, float(abs(mean) >= bound), bound)
    half = float(stats.t.ppf(1 - level, df)) * error
    p = float(stats.t.sf((bound - abs(mean)) / error, df))
    return Equivalence(mean - half > -bound and mean + half < bound, mean - half, mean + half, p, bound)


def questions_needed(
    bound: float = 0.03,
    *,
    differing: float = 0.1,
    seeds: int = 1,
    seed_spread: float = 0.0,
    power: float = 0.8,
    level: float = 0.05,
) -> int | None:
    """How many questions show, with this power, that two methods that are alike differ by less than ``bound``.

    Args:
        bound: a share of the questions, as in :func:`equivalence`.
        differing: the share of questions on which one of two alike methods is right and the other is not.
        seed_spread: the standard deviation over trainings of the difference in the share of right answers.

    Returns:
        The number, by the normal approximation; None where the seeds alone vary too much for any number of questions.

    Raises:
        ValueError: a bound that is not above 0, or a share that is none.
    """
    if not bound > 0 or not 0 <= differing <= 1 or seeds < 1:
        raise ValueError(f"needs bound > 0, 0 <= differing <= 1, seeds > 0: got {bound}, {differing}, {seeds}")
    normal = stats.norm.ppf(1 - level) + stats.norm.ppf((1 + power) / 2)
    left = (bound / normal) ** 2 - seed_spread**2 / seeds
    return math.ceil(differing / left) if left > 0 else None


def too_few_questions(questions: int, bound: float = 0.03, **assumed: float) -> str:
    """A sentence where ``questions`` of a task are too few for a verdict of *no benefit*, or nothing; before a run.

    ``assumed`` goes to :func:`questions_needed`.
    """
    needed = questions_needed(bound, **assumed)  # type: ignore[arg-type]  # the integers among them are numbers too
    if needed is not None and questions >= needed:
        return ""
    lacks = "no number of questions can" if needed is None else f"that takes about {needed:,}"
    return (
        f"{questions:,} questions cannot show that a method changes less than {100 * bound:g} points: {lacks}; what "
        f"does not move will be called undecided"
    )


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for the number of tests in the family (Holm's step-down), in the order given.

    Raises:
        ValueError: a p-value that is none; it would silence the whole family.
    """
    if wrong := [name for name, value in p.items() if not 0 <= value <= 1]:
        raise ValueError(f"a p-value lies between 0 and 1, and {wrong[0]} has {p[wrong[0]]}: leave it out")
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p, key=lambda n: p[n])):
        running = max(running, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p}
