"""What is compared and how sure we are: representation similarity, held-out answers, paired tests and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from semalign.lm.examples import IGNORED, Encoded, collate, supervised
from semalign.lm.hooks import capture, logits_of
from semalign.lm.parts import Model, decoder, decoder_layers
from semalign.supervision import SupervisionCache
from semalign.training.losses import divergence


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same n states, in [0, 1] (figures 4 to 6).

    |Y'X|_F^2 / (|X'X|_F |Y'Y|_F) of column-centred X (n, p) and Y (n, q), in float64; the same from the (n, n) Gram
    matrices where that is cheaper. It does not change under rotation and isotropic scaling of either side.

    Raises:
        ValueError: different n, fewer than two states, or a representation that does not vary.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"CKA needs two matrices (n, p) and (n, q) with n > 1: got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = (t.detach().double() - t.detach().double().mean(0) for t in (x, y))
    p, q = x.shape[1], y.shape[1]
    if len(x) * (p + q) < p * p + p * q + q * q:
        k, l = x @ x.T, y @ y.T  # noqa: E741 - the usual names of the two kernels
        cross, own = (k * l).sum(), torch.linalg.matrix_norm(k) * torch.linalg.matrix_norm(l)
    else:
        cross = (y.T @ x).square().sum()
        own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    if not own > 0:
        raise ValueError("a representation is the same for every state, so its similarity to another is not defined")
    return float(cross / own)


@torch.no_grad()
def read_out(
    model: Model,
    encoded: Sequence[Encoded],
    *,
    batch: int = 16,
    teacher: SupervisionCache | None = None,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """What a model makes of given answers, token by token, at the P supervised positions in order of ``encoded``.

    Args:
        teacher: another model's top log-probabilities for the same ``encoded``, over the first ``vocabulary`` tokens.

    Returns:
        ``loss`` (P,) cross-entropy in nats, ``predicted`` (P,) the most likely token, ``right`` (P,) whether it is the
        answer's, ``example`` (P,) the index of the example; with ``teacher`` also ``kl`` (P,), the divergence of this
        model's distribution from it in nats, and ``agree`` (P,), whether both predict the same. On the CPU.
    """
    names = ("loss", "predicted", "right", "example", *(("kl", "agree") if teacher else ()))
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    device = next(model.parameters()).device
    for start in range(0, len(encoded), batch):
        part = collate(encoded[start : start + batch], 0)
        places = supervised(part["labels"])
        targets = part["labels"][:, 1:][places[:, :-1]]
        final = decoder(model)(
            input_ids=part["input_ids"].to(device), attention_mask=part["attention_mask"].to(device), use_cache=False
        ).last_hidden_state
        logits = logits_of(model, final[places.to(device)]).cpu()
        predicted = logits.argmax(-1)
        columns["loss"].append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        columns["predicted"].append(predicted)
        columns["right"].append(predicted == targets)
        columns["example"].append(places.nonzero()[:, 0] + start)
        if teacher:
            top = teacher.teacher_top(teacher.rows(range(start, min(start + batch, len(encoded)))))
            columns["kl"].append(divergence("kl", logits[:, :vocabulary], *top))
            columns["agree"].append(top[1][:, 0] == predicted)
    return {name: torch.cat(parts) for name, parts in columns.items()}


def by_example(values: Tensor, example: Tensor) -> Tensor:
    """Means of ``values`` (P,) over the positions of each example: (n,), for ``example`` (P,) of indices 0 to n - 1."""
    n = int(example.max()) + 1
    sums = torch.zeros(n, dtype=torch.float64).index_add(0, example, values.double())
    return sums / torch.bincount(example, minlength=n)


def paired_bootstrap(
    a: Tensor | Sequence[float], b: Tensor | Sequence[float], *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of a - b, low, high): the percentile interval over resamples of the items that ``a`` and ``b`` share.

    Raises:
        ValueError: the two do not pair, or there is no item.
    """
    a, b = (torch.as_tensor(t, dtype=torch.float64).flatten() for t in (a, b))
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"paired values need the same items: got {a.numel()} and {b.numel()}")
    difference = a - b
    generator = torch.Generator().manual_seed(seed)
    means = [
        difference[torch.randint(len(a), (min(1000, draws - at), len(a)), generator=generator)].mean(1)
        for at in range(0, draws, 1000)
    ]
    low, high = torch.quantile(torch.cat(means), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(difference.mean()), float(low), float(high)


class Estimate(NamedTuple):
    """A mean, its 95 % interval, and the two-sided p-value for a mean of 0."""

    mean: float
    low: float
    high: float
    p: float


def verdict(low: float, high: float) -> str:
    """What an interval of the difference between two methods says of the first, as words to put before the second."""
    return "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"


def over_seeds_and_items(values: Tensor, *, draws: int = 10_000, level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of ``values`` (seeds, items), with both the seeds and the items resampled (percentile bootstrap).

    Give differences of two methods on the same seeds and items for a paired comparison. One seed speaks of items alone.

    Raises:
        ValueError: no value.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"values are (seeds, items) with at least one of each: got {tuple(values.shape)}")
    s, n = values.shape
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(draws, dtype=torch.float64)
    for at in range(0, draws, 500):
        size = min(500, draws - at)
        of_seeds = values[torch.randint(s, (size, s), generator=generator)].mean(1)  # (size, n)
        means[at : at + size] = of_seeds.gather(1, torch.randint(n, (size, n), generator=generator)).mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Estimate(float(values.mean()), low, high, min(1.0, 2 * (beyond + 1) / (draws + 1)))


def mcnemar(a: Tensor | Sequence[bool], b: Tensor | Sequence[bool]) -> float:
    """The two-sided exact p-value that right answers ``a`` and ``b`` on the same items differ by chance (McNemar).

    Raises:
        ValueError: the two do not pair.
    """
    a, b = (torch.as_tensor(t, dtype=torch.bool).flatten() for t in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"paired answers need the same items: got {a.numel()} and {b.numel()}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for the number of tests in the family (Holm's step-down), in the order given."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p, key=lambda n: p[n])):
        running = max(running, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p}


@torch.no_grad()
def layer_outputs(model: Model, encoded: Sequence[Encoded], point: str = "stream") -> list[Tensor]:
    """Every layer read at ``point``, layer 1 first, at each token of one batch of examples: (tokens, D), on the CPU."""
    batch = collate(encoded, 0, next(model.parameters()).device)
    taps = [(k, point) for k in range(1, len(decoder_layers(model)) + 1)]
    with capture(model, taps) as seen:
        decoder(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return [seen[tap][batch["attention_mask"].bool()].float().cpu() for tap in taps]


def cka_matrix(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Linear CKA of every representation in ``rows`` with every one in ``columns``, of the same n states."""
    return torch.tensor([[linear_cka(x, y) for y in columns] for x in rows])


@torch.no_grad()
def mean_divergence(model: Model, other: Model, encoded: Sequence[Encoded]) -> float:
    """KL(model | other) in nats over the whole vocabulary: a mean over examples of the mean over supervised positions.

    The exact number for two models at hand; :func:`read_out` has it from a teacher's top tokens alone.
    """
    parts = []
    for e in encoded:
        ids = e.input_ids[None].to(next(model.parameters()).device)
        p, q = (m(input_ids=ids).logits[0, :-1].float().log_softmax(-1).cpu() for m in (model, other))
        parts.append((p.exp() * (p - q)).sum(-1)[e.labels[1:] != IGNORED].mean())
    return float(torch.stack(parts).mean())
