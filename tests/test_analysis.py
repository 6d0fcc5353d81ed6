from __future__ import annotations

import pytest
import torch
from scipy import stats
from tiny import tiny_llama
from torch import Tensor

from semalign.analysis import by_example, holm, linear_cka, mcnemar, paired_bootstrap, read_out
from semalign.supervision import IGNORED, Encoded


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


def test_cka_refuses_what_has_no_similarity() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(6, 3\)"):
        linear_cka(draw(5, 3), draw(6, 3))
    with pytest.raises(ValueError, match="n > 1"):
        linear_cka(draw(1, 3), draw(1, 3))
    with pytest.raises(ValueError, match="same for every state"):
        linear_cka(torch.ones(5, 3), draw(5, 3))


def test_read_out_is_the_models_own_loss_token_by_token() -> None:
    model = tiny_llama()
    examples = []
    for seed, (length, prompt) in enumerate([(9, 4), (5, 2), (7, 6)]):
        ids = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:prompt] = IGNORED
        examples.append(Encoded(ids, labels))
    found = read_out(model, examples, batch=2)
    assert found["example"].tolist() == [0] * 5 + [1] * 3 + [2]
    means = by_example(found["loss"], found["example"])
    with torch.no_grad():
        for i, (example, mean) in enumerate(zip(examples, means, strict=True)):
            out = model(example.input_ids[None], labels=example.labels[None])
            assert float(mean) == pytest.approx(float(out.loss), abs=1e-5)
            places = (example.labels[1:] != IGNORED).nonzero()[:, 0]
            mine = found["example"] == i
            assert torch.equal(found["predicted"][mine], out.logits[0, places].argmax(-1))
    answers = torch.cat([e.labels[e.labels != IGNORED] for e in examples])
    assert torch.equal(found["right"], found["predicted"] == answers)


def test_bootstrap_interval_is_that_of_the_mean_difference() -> None:
    a, b = draw(400, seed=1) + 0.3, draw(400, seed=2)
    mean, low, high = paired_bootstrap(a, b, seed=1)
    difference = (a - b).double()
    half = 1.96 * float(difference.std()) / 400**0.5
    assert mean == pytest.approx(float(difference.mean()))
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert paired_bootstrap(a, b, seed=1) == (mean, low, high)
    assert paired_bootstrap(a, b, seed=2)[1:] != (low, high)
    narrow = paired_bootstrap(a, b, level=0.5, seed=1)
    assert low < narrow[1] < narrow[2] < high


def test_bootstrap_keeps_the_pairs() -> None:
    """A constant gain over items of very different difficulty is certain, which an unpaired interval would miss."""
    hard = 10 * draw(50)
    assert paired_bootstrap(hard + 1, hard) == pytest.approx((1, 1, 1), abs=1e-5)
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_bootstrap([], [])


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        _, low, high = paired_bootstrap(draw(60, seed=seed) + 0.5, draw(60, seed=1000 + seed), draws=1000, seed=seed)
        covered += low <= 0.5 <= high
    assert 0.88 < covered / 100 <= 0.99


def test_mcnemar_is_the_exact_sign_test_of_the_disagreements() -> None:
    a = [True] * 9 + [False] * 2 + [True] * 30 + [False] * 5
    b = [False] * 9 + [True] * 2 + [True] * 30 + [False] * 5
    by_hand = 2 * sum(stats.binom.pmf(k, 11, 0.5) for k in range(3))
    assert mcnemar(a, b) == pytest.approx(by_hand)
    assert mcnemar(b, a) == pytest.approx(by_hand)
    assert mcnemar(a, a) == 1.0
    assert mcnemar([True] * 10, [False] * 10) == pytest.approx(2 / 2**10)
    with pytest.raises(ValueError, match="got 2 and 1"):
        mcnemar([True, False], [True])


def test_holm_on_a_known_family() -> None:
    got = holm({"d": 0.005, "a": 0.01, "c": 0.04, "b": 0.03})
    assert list(got) == ["d", "a", "c", "b"]
    assert got == pytest.approx({"d": 0.02, "a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"x": 0.6, "y": 0.7}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}
