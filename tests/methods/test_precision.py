"""What 16 bits may change of training: little, in every method: losses, masters and read-outs are in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_alignment import make_pair, settings, student, task, teacher
from test_methods import Spelled, ending_teacher
from tiny import toy_data

from semalign import alignment
from semalign.lm.examples import TaskData, supervised
from semalign.lm.hooks import float_logits, logits_of
from semalign.methods import REGISTRY, on_policy, seq_kd
from semalign.models import Pair
from semalign.study.reading import divergence_between, read_out
from semalign.training import loop
from semalign.training.loop import FloatAdamW

STEPS = 10
BOUND = 0.03
"""Largest relative difference of a step's loss that bfloat16 may make; its numbers have 8 bits, 0.4 % apart."""
WRITERS = (on_policy, seq_kd)
"""What trains on texts that a model wrote: where 16 bits choose another token, it would train on other data."""
WRITTEN: dict[tuple[str, int | None], list[list[int]]] = {}
"""These texts, by method and seed, as the model in float32 wrote them."""


def rounded(make: Callable[[], Any], dtype: torch.dtype) -> Callable[[], Any]:
    """The same weights, all of which bfloat16 can hold, in one type or the other."""
    return lambda: make().bfloat16().to(dtype)


def pair(dtype: torch.dtype) -> Pair:
    whole = replace(make_pair(ending_teacher), tokenizer=Spelled())  # type: ignore[arg-type]
    return replace(whole, load_teacher=rounded(ending_teacher, dtype), load_student=rounded(student, dtype))


def data() -> TaskData:
    whole = task(10)
    return replace(whole, align=whole.train[:4], extract=whole.train[4:7])


class AsOnACard(torch.autocast):
    """What names the type of its products uses it here too, where training leaves it to cards."""

    def __init__(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        super().__init__(device, dtype, enabled=enabled or dtype is not None)


@cache
def first_losses(name: str, dtype: torch.dtype) -> list[float]:
    config, options = settings(layers=(2,), epochs=5, lr=1e-3), {"steps": STEPS} if name.startswith("laten") else {}
    write = seq_kd.write

    def written(*args: Any, seed: int | None = None) -> list[list[int]]:
        if (name, seed) not in WRITTEN:
            WRITTEN[name, seed] = write(*args, seed=seed)
        return WRITTEN[name, seed]

    with pytest.MonkeyPatch.context() as patch:
        for module in WRITERS:
            patch.setattr(module, "write", written)
        if dtype == torch.bfloat16:
            patch.setattr(torch, "autocast", AsOnACard)
        log = REGISTRY[name].transfer(pair(dtype), data(), config, **options).log
    return [record["loss"] for record in log if record.get("split") == "train"][:STEPS]


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"none"}))
def test_the_first_steps_in_bfloat16_are_those_in_float32(name: str) -> None:
    whole, half = (first_losses(name, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert len(whole) == len(half) == STEPS
    assert half == pytest.approx(whole, rel=BOUND, abs=BOUND / 10)


class Rounding(torch.optim.AdamW):
    """What trains without masters: each step is rounded into the parameter."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=0.0)

    def __enter__(self) -> Rounding:
        return self

    def __exit__(self, *_error: object) -> None: ...


def test_whole_layers_move_by_steps_that_bfloat16_would_round_away(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(layers=(2,), epochs=4, lr=1e-4, trained="layer", layer_weight=0.0, output_loss="ce")

    def moved(dtype: torch.dtype) -> torch.Tensor:
        result = alignment.transfer(pair(dtype), data(), config)
        name = next(n for n in result.trained if "up_proj" in n)
        return (
            result.student.get_parameter(name).float() - rounded(student, torch.float32)().get_parameter(name)
        ).detach()

    expected = moved(torch.float32)

    def reached() -> float:
        return float((moved(torch.bfloat16) * expected).sum() / expected.square().sum())

    with_masters = reached()
    monkeypatch.setattr(loop, "FloatAdamW", Rounding)
    without = reached()
    assert with_masters == pytest.approx(1.0, abs=0.1)
    assert without < 0.7, "a step of 1e-4 is below half of what 16 bits tell apart at 0.1, where these weights are"


def test_masters_hold_what_parameters_round_and_resume_to_the_same_bits() -> None:
    def steps(optimizer: FloatAdamW, parameter: torch.nn.Parameter, count: int) -> None:
        with optimizer:
            for _ in range(count):
                for _ in range(2):  # micro-batches
                    (parameter.float() - 2).square().sum().backward()
                    assert parameter.grad is None
                optimizer.step()
                optimizer.zero_grad()

    one, two = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    whole = FloatAdamW([one], lr=1e-4)
    steps(whole, one, 6)
    assert whole.masters[0][0].item() == pytest.approx(1 + 6e-4, rel=1e-5)
    assert torch.equal(one, torch.ones(3, dtype=torch.bfloat16))  # 6e-4 is below half a step of bfloat16 at 1
    first = FloatAdamW([two], lr=1e-4)
    steps(first, two, 3)
    resumed = FloatAdamW([two], lr=1e-4)
    resumed.load_state_dict(first.state_dict())
    steps(resumed, two, 3)
    assert torch.equal(resumed.masters[0], whole.masters[0])


def test_float32_parameters_are_their_own_masters() -> None:
    p, q = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    ours, plain = FloatAdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    with ours:
        for _ in range(3):
            for parameter, optimizer in ((p, ours), (q, plain)):
                parameter.square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert torch.equal(p, q) and ours.masters[0] is p


def test_a_projection_is_learned_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    plain = alignment.LAYER_LOSSES["cosine"]

    def watching(h: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(h.dtype)
        return plain(h, *rest)

    monkeypatch.setitem(alignment.LAYER_LOSSES, "cosine", watching)
    built: list[FloatAdamW] = []
    start = FloatAdamW.__init__
    monkeypatch.setattr(FloatAdamW, "__init__", lambda self, *a, **k: (built.append(self), start(self, *a, **k))[1])
    REGISTRY["fitnets"].transfer(pair(torch.bfloat16), data(), settings(layers=(2,), epochs=1))
    assert set(seen) == {torch.float32}
    assert built and all(p.dtype == torch.float32 for p in built[0].live)  # adapters too


def test_a_divergence_in_16_bits_is_not_that_of_a_rounded_head() -> None:
    """Of two models that differ by a sixteenth of their final norm, with logits as large as trained ones have them."""
    one, other = (rounded(teacher, torch.float32)() for _ in range(2))
    with torch.no_grad():
        one.lm_head.weight *= 16
        other.lm_head.weight *= 16
        other.get_decoder().norm.weight *= 1.0625  # which bfloat16 can hold
    encoded = toy_data(40)
    exact = float(divergence_between(one, other, encoded).mean())
    halves = one.bfloat16(), other.bfloat16()
    read = float(divergence_between(*halves, encoded).mean())
    logp = [
        [m(e.input_ids[None]).logits[0].float().log_softmax(-1)[supervised(e.labels)] for m in halves] for e in encoded
    ]
    rough = torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in logp]).mean().item()
    assert read == pytest.approx(exact, rel=0.05)
    assert abs(read - exact) < abs(rough - exact) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_logits_are_products_in_float32(dtype: torch.dtype) -> None:
    model = rounded(student, dtype)()
    states = torch.randn(5, model.config.hidden_size).to(dtype)
    exact = (states.double() @ model.lm_head.weight.double().T).detach()
    assert (float_logits(model, states) - exact).abs().max() < 1e-5
    if dtype == torch.float32:
        assert torch.equal(float_logits(model, states), logits_of(model, states))
    else:
        assert (logits_of(model, states) - exact).abs().max() > 1e-4


def test_a_read_out_in_bfloat16_is_that_in_float32() -> None:
    encoded = toy_data(6)
    whole, half = (read_out(rounded(student, dtype)(), encoded)["loss"] for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert half.mean() == pytest.approx(float(whole.mean()), rel=0.01)
