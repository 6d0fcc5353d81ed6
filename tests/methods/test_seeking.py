"""Seeking: sensitivities against plain autograd, windows against brute force, factors against the SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Letters, tiny_llama, toy_data
from torch import Tensor, nn

from semalign.attribution import objective
from semalign.lm.examples import Encoded, Example, TaskData, collate
from semalign.methods import seeking
from semalign.methods.seeking import (
    STRATEGIES,
    best_window,
    extract,
    layer_scores,
    select_layers,
    sensitivity,
    sensitivity_for,
    student_shapes,
    to_lora,
    transfer,
    window_shares,
)
from semalign.models import Pair
from semalign.training.config import TransferConfig

TARGETS = ("up_proj", "down_proj", "v_proj", "o_proj")
ALL = ("q_proj", "k_proj", "gate_proj", *TARGETS)


def teacher(n_layers: int = 4, hidden: int = 48, **overrides: Any) -> Any:
    return tiny_llama(n_layers, hidden=hidden, seed=1, **overrides)


def student(**overrides: Any) -> Any:
    return tiny_llama(2, hidden=32, seed=2, **overrides)


def reference(model: Any, example: Encoded) -> dict[str, Tensor]:
    """theta * gradient of one example, signed, by plain autograd."""
    named = dict(model.model.layers.named_parameters(prefix="model.layers"))
    gradients = torch.autograd.grad(objective(model, collate([example], 0)), list(named.values()))
    return {n: (p * g).detach() for (n, p), g in zip(named.items(), gradients, strict=True)}


# ------------------------------------------------------------------------------------------------- sensitivity


class Quadratic(nn.Module):
    """A model whose cross-entropy is q(w) = 3 + sum a (w - c)^2: two tokens, of which the right one has exp(-q)."""

    a = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    c = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ParameterList([w])])

    def get_decoder(self) -> nn.Module:
        return self

    def loss(self) -> Tensor:
        return 3 + (self.a * (self.layers[0][0] - self.c) ** 2).sum()  # type: ignore[index]

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        q = self.loss()
        logits = torch.stack([-q, torch.log1p(-torch.exp(-q))]).expand(*input_ids.shape, 2)
        return type("Output", (), {"logits": logits})


ZERO = Encoded(torch.tensor([1, 0]), torch.tensor([-100, 0]))  # the token 0 is the right one


def test_sensitivity_of_a_quadratic_loss_is_its_taylor_term() -> None:
    w = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64)
    (scores,) = sensitivity(Quadratic(w.clone()), [ZERO]).values()
    assert torch.allclose(scores, (w * 2 * Quadratic.a * (w - Quadratic.c)).abs().float(), rtol=1e-5)


@pytest.mark.parametrize("i", range(3))
def test_the_estimate_becomes_exact_as_the_weight_becomes_small(i: int) -> None:
    errors = []
    for eps in (1.0, 1e-1, 1e-2, 1e-3):
        w = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64)
        w[i] *= eps
        cut = w.clone()
        cut[i] = 0
        whole, without = Quadratic(w), Quadratic(cut)
        change = float((whole.loss() - without.loss()).detach().abs())
        (scores,) = sensitivity(whole, [ZERO]).values()
        errors.append(abs(change / float(scores[i]) - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3


def test_the_estimate_of_a_llama_weight_is_nearly_exact_where_the_weight_is_small() -> None:
    (example,), name = toy_data(1), "model.layers.0.mlp.up_proj.weight"
    model = teacher(2)
    weight = model.get_parameter(name).detach()
    at = divmod(int((reference(model, example)[name] / weight).abs().argmax()), weight.shape[1])  # the steepest
    weight[at] = 1e-2
    scores = sensitivity(model, [example])[name]
    with torch.no_grad():
        whole = objective(model, collate([example], 0))
        weight[at] = 0
        change = abs(whole - objective(model, collate([example], 0)))
    assert float(change / scores[at]) == pytest.approx(1, abs=2e-2)


def test_sensitivity_equals_plain_autograd_in_both_orders_of_absolute_value_and_sum() -> None:
    model, data = teacher(2), toy_data(4)
    signed = [reference(model, example) for example in data]
    each, total = sensitivity(model, data), sensitivity(model, data, absolute="sum")
    assert each.keys() == total.keys() == signed[0].keys()
    for name in each:
        parts = torch.stack([s[name] for s in signed])
        assert each[name].dtype == torch.float32
        assert torch.allclose(each[name], parts.abs().sum(0), atol=1e-6)
        assert torch.allclose(total[name], parts.sum(0).abs(), atol=1e-6)
        assert (total[name] <= each[name] + 1e-6).all()
    one, same = sensitivity(model, data[:1]), sensitivity(model, data[:1], absolute="sum")
    assert all(torch.equal(one[n], same[n]) for n in one)
    half = sensitivity(model.bfloat16(), data)
    assert all(scores.dtype == torch.float32 and (scores > 0).any() for scores in half.values())


def test_sensitivity_is_additive_over_examples_and_blind_to_their_order() -> None:
    model, data = teacher(2), toy_data(5)
    whole, first, rest = (sensitivity(model, part) for part in (data, data[:2], data[2:]))
    back = sensitivity(model, data[::-1])
    for name, scores in whole.items():
        assert torch.allclose(scores, first[name] + rest[name], atol=1e-6)
        assert torch.allclose(scores, back[name], atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails: bool) -> None:
    model, data = teacher(2, attention_dropout=0.5), toy_data(2)
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    model.model.layers[0].mlp.gate_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.gate_proj.weight)
    before = {n: (p.requires_grad, p.clone(), p.grad) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    if fails:
        data[1] = Encoded(data[1].input_ids, torch.full_like(data[1].labels, -100))
        with pytest.raises(ValueError, match="no supervised position"):
            sensitivity(model, data)
    else:
        with torch.no_grad():  # of the caller
            scores = sensitivity(model, data)
        assert not any(s.requires_grad for s in scores.values())
        again = sensitivity(teacher(2), data)
        assert all(torch.equal(scores[n], again[n]) for n in scores), "neither dropout nor old gradients have a part"
    assert modes == [m.training for m in model.modules()]
    for name, p in model.named_parameters():
        flag, value, gradient = before[name]
        assert (p.requires_grad, p.grad is gradient) == (flag, True)
        assert torch.equal(p, value)
        assert not p._post_accumulate_grad_hooks


def test_one_gradient_at_a_time_is_alive_and_none_is_left() -> None:
    model, alive = teacher(2), []

    def count(_parameter: nn.Parameter) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))

    handles = [p.register_post_accumulate_grad_hook(count) for p in model.model.layers.parameters()]  # before ours
    store = sensitivity(model, toy_data(3))
    assert alive == [1] * 3 * len(handles) == [1] * 3 * len(store)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------- the layers


def test_layer_scores_sum_every_weight_of_the_layer() -> None:
    model = teacher()
    store = sensitivity(model, toy_data(3))
    scores = layer_scores(store, model)
    wanted = [sum(float(s.sum()) for n, s in store.items() if n.startswith(f"model.layers.{i}.")) for i in range(4)]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-6)
    assert sum("norm" in n for n in store) == 8


def test_the_kept_layers() -> None:
    scores = torch.tensor([1.0, 5.0, 2.0, 5.0, 3.0])
    assert select_layers(scores, 3) == [2, 4, 5]
    assert select_layers(scores, 1) == [2], "the shallower of two equal ones"
    assert select_layers(scores, 2, "first") == [1, 2]
    assert select_layers(scores, 2, "last") == [4, 5]
    assert select_layers(scores, 2, "proportional") == [2, 5]
    assert len({tuple(select_layers(scores, 2, "random", seed)) for seed in range(20)}) > 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kept_layers_increase_strictly_and_are_the_same_each_time(strategy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for depth in range(1, 9):
        scores = torch.randint(0, 3, (depth,), generator=generator).float()
        for n in range(1, depth + 1):
            kept = select_layers(scores, n, strategy, seed=n)
            assert kept == select_layers(scores, n, strategy, seed=n) == sorted(set(kept))
            assert len(kept) == n and kept[0] >= 1 and kept[-1] <= depth
        assert kept == list(range(1, depth + 1))


# -------------------------------------------------------------------------------------------------- the windows


def brute_force(scores: Tensor, n: int, m: int) -> tuple[int, int]:
    rows, columns = scores.shape[0] - n + 1, scores.shape[1] - m + 1
    sums = {
        (r, c): math.fsum(scores[r : r + n, c : c + m].flatten().tolist()) for r in range(rows) for c in range(columns)
    }
    return max(sums, key=lambda at: sums[at])  # the first of equal ones


@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (5, 9), (1, 12)])
def test_the_best_window_is_that_of_brute_force(kind: str, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    draw = torch.rand(rows, columns, generator=generator)
    scores = draw if kind == "continuous" else (3 * draw).floor()
    for n in range(1, rows + 1):
        for m in range(1, columns + 1):
            assert best_window(scores, (n, m)) == brute_force(scores, n, m)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e-30])
def test_of_constant_scores_the_first_window_is_taken(value: float) -> None:
    for shape in [(1, 1), (3, 4), (11, 2), (12, 10)]:
        assert best_window(torch.full((12, 10), value), shape) == (0, 0)


def test_a_planted_block_is_found() -> None:
    for row, column in [(0, 0), (7, 2), (40, 30), (61, 46)]:
        scores = torch.zeros(64, 50)
        scores[row : row + 3, column : column + 4] = 1
        assert best_window(scores, (3, 4)) == (row, column)


def test_small_differences_on_large_sums_decide() -> None:
    scores = torch.full((500, 400), 1.0)
    scores[499, 399] += 1e-4
    assert best_window(scores, (450, 350)) == (50, 50)


# -------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_the_factors_are_the_best_of_their_rank(shape: tuple[int, int], rank: int) -> None:
    block = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    b, a = to_lora(block, rank)
    assert (b.shape, a.shape, b.dtype, a.dtype) == ((shape[0], rank), (rank, shape[1]), torch.float32, torch.float32)
    singular = torch.linalg.svdvals(block.double())
    assert float((block - b @ a).square().sum()) == pytest.approx(float(singular[rank:].square().sum()), abs=1e-4)
    assert torch.allclose(a @ a.T, torch.eye(rank), atol=1e-5)
    assert torch.allclose(b.norm(dim=0).double(), singular[:rank], rtol=1e-5)
    b2, a2 = to_lora(block.bfloat16().float(), rank, "sqrt")
    same = to_lora(block.bfloat16(), rank)
    assert torch.allclose(b2 @ a2, same[0] @ same[1], atol=1e-5)
    assert torch.allclose(b2.norm(dim=0), a2.norm(dim=1), rtol=1e-4)


def test_large_blocks_give_nearly_the_best_factors_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(150, 120, generator=generator) @ torch.diag(0.97 ** torch.arange(120.0))
    exact = to_lora(block, 8)
    monkeypatch.setattr(seeking, "EXACT", 100)
    b, a = to_lora(block, 8)
    torch.manual_seed(5)  # the global generator has no part
    assert all(torch.equal(x, y) for x, y in zip(to_lora(block, 8), (b, a), strict=True))
    assert torch.allclose(a @ a.T, torch.eye(8), atol=1e-5)
    best, got = (float((block - x @ y).square().sum()) for x, y in (exact, (b, a)))
    assert best * (1 - 1e-5) <= got <= best * (1 + 1e-4)


# --------------------------------------------------------------------------------------------------- extraction


def test_a_teacher_of_the_students_shape_gives_its_own_matrices() -> None:
    model = teacher(2, 32)
    shapes = student_shapes(model, ALL)
    assert [len(part) for part in shapes] == [7, 7]
    found = extract(model, shapes, sensitivity(model, toy_data(3)), rank=32)
    assert found.layers == [1, 2]
    assert set(found.windows.values()) == {(0, 0)}
    assert all(share == pytest.approx(1, abs=1e-4) for share in found.energy.values())
    for name, (b, a) in found.adapters.items():
        rest = model.get_submodule(name).weight.detach() - b @ a
        assert rest.abs().max() < 1e-4


@pytest.mark.parametrize("heads", [4, 2])
def test_blocks_come_from_the_best_window_of_the_kept_layers(heads: int) -> None:
    """With grouped queries, k and v have their own shapes, and nothing else changes."""
    big, small = teacher(num_key_value_heads=heads), student(num_key_value_heads=heads)
    before = [p.clone() for p in big.parameters()]
    store = sensitivity(big, toy_data(4))
    found = extract(big, student_shapes(small, ALL), store, rank=3)
    assert found.layers == select_layers(layer_scores(store, big), 2)
    modules = {n: m for n, m in small.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert found.adapters.keys() == found.windows.keys() == found.energy.keys() == modules.keys()
    for name, module in modules.items():
        i, path = int(name.split(".")[2]), name.split(".", 3)[3]
        source = f"model.layers.{found.layers[i] - 1}.{path}.weight"
        n, m = module.weight.shape
        r, c = best_window(store[source], (n, m))
        block = big.get_parameter(source).detach()[r : r + n, c : c + m]
        b, a = found.adapters[name]
        assert found.windows[name] == (r, c) and (b.shape, a.shape) == ((n, 3), (3, m))
        singular = torch.linalg.svdvals(block).square()
        assert torch.allclose((block - b @ a).square().sum(), singular[3:].sum(), rtol=1e-3)
        assert found.energy[name] == pytest.approx(float(singular[:3].sum() / singular.sum()), rel=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(big.parameters(), before, strict=True))


def test_what_extraction_reads_is_the_matrices_and_sums_of_the_rest() -> None:
    big, data = teacher(), toy_data(4)
    shapes, whole = student_shapes(student(), TARGETS), sensitivity(big, data)
    part = sensitivity_for(big, shapes, data)
    assert part.keys() == whole.keys()
    for name, scores in whole.items():
        if name.split(".")[-2] in TARGETS:
            assert torch.equal(part[name], scores)
        else:
            assert part[name].shape == () and float(part[name]) == pytest.approx(float(scores.double().sum()), rel=1e-5)
    assert torch.allclose(layer_scores(part, big), layer_scores(whole, big), rtol=1e-5)
    assert extract(big, shapes, part, rank=2).windows == extract(big, shapes, whole, rank=2).windows


def test_scores_lie_on_the_host_where_the_card_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (seeking.ROOM + 100, 0))
    card = torch.device("cuda")
    assert seeking.has_room(card, 99) and not seeking.has_room(card, 100) and seeking.has_room(torch.device("cpu"), 100)
    asked: list[int] = []
    places: list[Any] = []
    monkeypatch.setattr(seeking, "has_room", lambda _device, scores: bool(asked.append(scores)) or len(asked) > 1)
    monkeypatch.setattr(seeking, "sensitivity", lambda *_a, device, whole: places.append(device) or {})
    big = teacher()
    for _ in range(2):
        seeking.sensitivity_for(big, student_shapes(student(), TARGETS), toy_data(1))
    cut = [p for name, p in big.named_parameters() if name.split(".")[-2] in TARGETS]
    assert places == ["cpu", None] and asked == [4 * sum(p.numel() for p in cut)] * 2


def test_controls_choose_other_windows_by_their_seed() -> None:
    big = teacher()
    shapes, store = student_shapes(student(), TARGETS), sensitivity(big, toy_data(2))
    first = extract(big, shapes, store, rank=2, window="top_left", strategy="last")
    assert first.layers == [3, 4] and set(first.windows.values()) == {(0, 0)}
    one, same, other = (extract(big, shapes, store, rank=2, window="random", seed=s) for s in (0, 0, 1))
    assert one.windows == same.windows != other.windows
    assert all(torch.equal(one.adapters[n][j], same.adapters[n][j]) for n in one.adapters for j in (0, 1))


def test_the_best_window_holds_more_than_its_share() -> None:
    big = teacher()
    shapes, store = student_shapes(student(), TARGETS), sensitivity(big, toy_data(2))
    best, drawn = (extract(big, shapes, store, rank=2, window=w) for w in ("best", "random"))
    shares, others = (window_shares(big, shapes, store, found) for found in (best, drawn))
    assert shares.keys() == best.windows.keys()
    assert all(1 >= shares[n][0] >= max(others[n][0], shares[n][1]) - 1e-6 for n in shares)
    whole = window_shares(
        big, student_shapes(big, TARGETS), store, extract(big, student_shapes(big, TARGETS), store, rank=2)
    )
    assert all(pair == pytest.approx((1, 1)) for pair in whole.values())


# ----------------------------------------------------------------------------------------------------- refusals


def drop(model: Any, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return model


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no example": (lambda: sensitivity(teacher(1), []), "at least one example: give the task"),
    "absolute": (lambda: sensitivity(teacher(1), toy_data(1), absolute="max"), "'max'.*example, sum"),
    "signed sums of a part": (
        lambda: sensitivity(teacher(1), toy_data(1), absolute="sum", whole=[]),
        "absolute='sum' needs the scores of all",
    ),
    "strategy": (lambda: select_layers(torch.ones(3), 2, "best"), "'best'.*sensitivity, random"),
    "depth": (lambda: select_layers(torch.ones(3), 4), "teacher has 3 layers and the student 4.*at least as deep"),
    "nan": (lambda: select_layers(torch.tensor([1.0, math.nan]), 1), "not finite: load the teacher in"),
    "window": (lambda: best_window(torch.ones(3, 4), (4, 4)), r"\(3, 4\) has no window of shape \(4, 4\)"),
    "rank": (lambda: to_lora(torch.ones(3, 4), 4), "rank 4 must be between 1 and 3"),
    "split": (lambda: to_lora(torch.ones(3, 4), 2, "half"), "'half'.*all_on_B, sqrt"),
    "target": (lambda: student_shapes(student(), ("up_proj", "c_fc")), "c_fc.*must name linear.*which holds.*up_proj"),
    "no target": (lambda: student_shapes(student(), ()), "must name linear modules"),
    "gap": (lambda: student_shapes(drop(student(), "model.layers.1.mlp.up_proj"), TARGETS), "layer 2, which holds"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_are_refused(case: str) -> None:
    call, said = REFUSALS[case]
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: teacher(1), "teacher has 1 layers and the student 2"),
        (lambda: teacher(hidden=16), r"layer 1 of the teacher is \(.*\), smaller than.*choose a larger teacher"),
        (lambda: teacher(intermediate_size=40), r"up_proj in layer 1.*\(40, 48\), smaller.*\(64, 32\)"),
        (lambda: drop(teacher(), "model.layers.2.mlp.up_proj"), "layer 3 of the teacher has no linear module mlp.up"),
    ],
)
def test_a_teacher_that_does_not_cover_the_student_is_refused_before_it_runs(
    build: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=said):
        extract(build(), student_shapes(student(), ("up_proj",)), {}, rank=2)
    monkeypatch.setattr(seeking, "sensitivity", None)
    with pytest.raises(ValueError, match=said):
        transfer(pair(build), task(), TransferConfig(lora_targets=("up_proj",)))


def test_an_unknown_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'centre'.*best, random, top_left"):
        extract(teacher(), student_shapes(student(), TARGETS), {}, rank=2, window="centre")


# --------------------------------------------------------------------------------------------------- end to end


def pair(load_teacher: Callable[[], Any] = teacher, load_student: Callable[[], Any] = student) -> Pair:
    tokenizer: Any = Letters()
    return Pair("tiny", load_teacher, load_student, tokenizer)


def task() -> TaskData:
    examples = tuple(Example("abcdef"[: 2 + i % 4], "uvwxyz"[i % 3 : 3 + i % 3]) for i in range(10))
    return TaskData("toy", examples[:8], extract=examples[8:])


def settings(**changes: Any) -> TransferConfig:
    return TransferConfig(**{"epochs": 1, "batch": 4, "micro_batch": 4, "lora_rank": 3, "lr": 0.0, **changes})


@pytest.mark.parametrize("rank", [1, 16])
def test_without_training_the_students_function_is_unchanged(rank: int) -> None:
    result = transfer(pair(), task(), settings(lora_rank=rank))
    batch = collate(toy_data(4), 0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        assert (result.student(**inputs).logits - student()(**inputs).logits).abs().max() < 1e-4
    facts, *steps = result.log
    assert facts["split"] == "extraction" and facts["seeds"] == 2 and len(facts["layers"]) == 2
    assert len(facts["windows"]) == len(facts["energy"]) == 2 * len(TARGETS) == len(result.trained)
    assert all(0 < share <= 1 + 1e-5 for share in facts["energy"].values())
    assert [record["split"] for record in steps] == ["train"] * 2
    tokens = sum(1 + len(e.prompt) + len(e.response) + 1 for e in task().extract)
    assert result.cost["teacher_tokens"] == facts["tokens"] == tokens
    assert result.cost["wall_s"] > facts["wall_s"] > 0


def test_training_moves_the_targets_alone_and_repeats_itself() -> None:
    trained = settings(lr=1e-2, epochs=4)
    one, two = transfer(pair(), task(), trained), transfer(pair(), task(), trained)
    before = dict(student().named_parameters())
    changed = {n for n, p in one.student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(one.trained) == {f"{n}.weight" for n in one.log[0]["windows"]}
    assert one.log[-1]["loss"] < one.log[1]["loss"]
    again = zip(one.student.parameters(), two.student.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in again)


def test_the_first_training_examples_are_the_seeds_where_the_task_names_none() -> None:
    examples = task().train * 5
    result = transfer(pair(), TaskData("toy", examples), settings())
    assert result.log[0]["seeds"] == 32
    data = TaskData("toy", examples, align=examples[:3])
    assert transfer(pair(), data, settings()).log[0]["seeds"] == 3
