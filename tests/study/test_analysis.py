from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats
from test_supervision import toy_data
from tiny import tiny_llama
from torch import Tensor

from semalign.lm.examples import IGNORED, Encoded, supervised
from semalign.study.analysis import (
    by_example,
    holm,
    linear_cka,
    mcnemar,
    over_seeds_and_items,
    paired_bootstrap,
    read_out,
    verdict,
)
from semalign.supervision import SupervisionCache


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


def test_seeds_and_items_are_both_resampled() -> None:
    torch.manual_seed(0)
    items = torch.randn(1, 200).double()
    alone = over_seeds_and_items(items)
    mean, low, high = paired_bootstrap(items[0], torch.zeros(200))
    assert alone.mean == pytest.approx(mean)
    assert (alone.low, alone.high) == pytest.approx((low, high), abs=0.01)
    steady, moving = items.expand(5, -1), items + torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None]
    width = {n: (e := over_seeds_and_items(v)).high - e.low for n, v in (("s", steady), ("m", moving))}
    assert width["s"] == pytest.approx(high - low, abs=0.02)
    assert width["m"] == pytest.approx(2 * 1.96 * (2.0 / 5 + 1 / 200) ** 0.5, rel=0.1)


def test_a_verdict_needs_an_interval_on_one_side_of_zero() -> None:
    assert [verdict(*i) for i in ((0.1, 0.2), (-0.2, -0.1))] == ["better than", "worse than"]
    assert {verdict(*i) for i in ((-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (0.0, 0.0))} == {"not distinguishable from"}


def test_the_p_value_is_that_of_a_known_case() -> None:
    torch.manual_seed(1)
    values = torch.randn(1, 400).double()
    values = (values - values.mean()) / values.std() + 0.1  # two standard errors above 0
    assert over_seeds_and_items(values).p == pytest.approx(0.0455, abs=0.015)
    assert over_seeds_and_items(torch.ones(2, 30)).p < 1e-3
    assert over_seeds_and_items(torch.zeros(2, 30)).p == 1.0
    with pytest.raises(ValueError, match=r"\(seeds, items\)"):
        over_seeds_and_items(torch.zeros(0, 3))


def test_a_model_agrees_with_its_own_distribution(tmp_path: Path) -> None:
    model, other, data = tiny_llama(2, seed=1), tiny_llama(2, seed=2), toy_data(5)
    top = SupervisionCache.build(tmp_path, model, data, (), top_k=97, vocabulary=97, dtype="float32")
    own = read_out(model, data, batch=2, teacher=top)
    assert own["agree"].all() and float(own["kl"].abs().max()) < 1e-5
    found = read_out(other, data, batch=3, teacher=top)
    ids, labels = data[0].input_ids[None], data[0].labels
    p, q = (m(ids).logits[0][supervised(labels)].log_softmax(-1) for m in (model, other))
    torch.testing.assert_close(found["kl"][: len(p)], (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(found["agree"][: len(p)], p.argmax(-1) == q.argmax(-1))
