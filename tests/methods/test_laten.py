"""LaTen: its scores against brute force, its edits against what they should change, its run against its claims."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import Letters, tiny_llama
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from semalign.lm.examples import Example, TaskData
from semalign.lm.parts import decoder_layers
from semalign.methods.laten import (
    MLP,
    MODULES,
    ROWS,
    HyperNet,
    Scores,
    default_init_std,
    extract,
    inject,
    l2_penalty,
    merge,
    neuron_scores,
    one_cycle_rate,
    projections,
    select,
    tie_rate,
    trace_last,
    transfer,
    transferable,
)
from semalign.models import Pair
from semalign.training.config import TransferConfig, TransferResult

IDS = torch.randint(3, 97, (9,), generator=torch.Generator().manual_seed(5))
TARGET = 40


def teacher() -> Any:
    return tiny_llama(4, hidden=48, seed=1)


def student() -> Any:
    return tiny_llama(2, hidden=32, seed=2)


def make_pair(load_teacher: Any = teacher, load_student: Any = student) -> Pair:
    tokenizer: Any = Letters()
    return Pair("tiny", load_teacher, load_student, tokenizer)


def task(**splits: Any) -> TaskData:
    words = ["red", "blue", "green", "pink", "gold", "grey", "teal", "plum", "rose"]
    examples = tuple(Example(f"{w} is", f" a {w[::-1]}.") for w in words)
    return TaskData("toy", **{"train": examples, "align": examples[:4], "extract": examples[4:7],
                              "validation": examples[7:], **splits})  # fmt: skip


def run(released: bool = False, pair: Pair | None = None, **options: Any) -> TransferResult:
    return transfer(pair or make_pair(), task(), TransferConfig(seed=3), released=released, items=3, **options)


def scored(model: Any, **options: Any) -> Scores:
    return neuron_scores(model, trace_last(model, IDS), TARGET, **options)


def chosen(model: Any, k: int = 5) -> dict[str, Any]:
    return dict(select(scored(model), 2, k, k - 2))


def noise(model: Any, selection: Any, modules: Any = MODULES, scale: float = 0.02) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {m: scale * torch.randn_like(v) for m, v in extract(model, selection, modules).items()}


def weights(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.state_dict().items()}


def differs(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}


# ---------------------------------------------------------------------------------------------- L1: what is scored


@pytest.mark.parametrize("heads", [4, 2])
def test_neurons_add_up_to_their_sublayers_outputs(heads: int) -> None:
    model = tiny_llama(2, num_key_value_heads=heads)
    trace = trace_last(model, IDS)
    for k, part in enumerate(projections(model)):
        attention = part["o_proj"].weight @ trace.attention[k]
        mlp = part["down_proj"].weight @ trace.mlp[k]
        assert torch.allclose(trace.stream[k] + attention, trace.residual[k], atol=1e-5)
        assert torch.allclose(trace.residual[k] + mlp, trace.stream[k + 1], atol=1e-5)
    with torch.no_grad():
        hidden = model(IDS[None], output_hidden_states=True).hidden_states
    assert torch.allclose(trace.stream[:2], torch.stack(hidden[:2])[:, 0, -1], atol=1e-6)
    assert float(trace.scale) == pytest.approx(float(trace.stream[2].square().mean().add(1e-6).sqrt()))


def test_scores_equal_brute_force_whatever_the_chunk() -> None:
    model = tiny_llama(2, intermediate_size=24)
    torch.nn.init.normal_(model.model.norm.weight, 1.0, 0.3)
    trace, scores = trace_last(model, IDS), scored(model)

    def log_q(state: Tensor) -> float:
        z = model.lm_head.weight.double() @ (model.model.norm.weight * state / trace.scale).double()
        return z.log_softmax(0)[TARGET].item()

    for k, part in enumerate(projections(model)):
        x, r, y = trace.stream[k], trace.residual[k], trace.stream[k + 1]
        assert float(scores.layer_attention[k]) == pytest.approx(log_q(r) - log_q(x), abs=1e-5)
        assert float(scores.layer_mlp[k]) == pytest.approx(log_q(y) - log_q(r), abs=1e-5)
        for got, base, a, name in (
            (scores.mlp[k], r, trace.mlp[k], "down_proj"),
            (scores.attention[k], x, trace.attention[k], "o_proj"),
        ):
            wanted = [log_q(base + a[j] * part[name].weight[:, j]) - log_q(base) for j in range(len(a))]
            assert torch.allclose(got, torch.tensor(wanted), atol=1e-5)
    with torch.no_grad():  # the last layer's output is read as the model itself reads it
        assert log_q(trace.stream[2]) == pytest.approx(
            float(model(IDS[None]).logits[0, -1].log_softmax(0)[TARGET]), abs=1e-5
        )
    for chunk in (1, 7):
        other = scored(model, chunk=chunk)
        assert torch.allclose(other.mlp, scores.mlp, atol=2e-6)
        assert torch.allclose(other.attention, scores.attention, atol=2e-6)


@pytest.mark.parametrize("heads", [4, 2])
def test_released_attention_neurons_are_the_last_positions_own_terms(heads: int) -> None:
    model = tiny_llama(2, num_key_value_heads=heads, attn_implementation="eager")
    fixed, trace = trace_last(model, IDS), trace_last(model, IDS, released=True)
    with torch.no_grad():
        out = model(IDS[None], output_attentions=True, output_hidden_states=True)
    for k, layer in enumerate(model.model.layers):
        value = layer.self_attn.v_proj(layer.input_layernorm(out.hidden_states[k]))[0, -1].view(heads, 8)
        own = out.attentions[k][0, :, -1, -1][:, None] * value.repeat_interleave(4 // heads, 0)
        assert torch.allclose(trace.attention[k], own.flatten(), atol=1e-6)
    assert not torch.allclose(trace.attention, fixed.attention, atol=1e-3)
    assert torch.equal(trace.stream, fixed.stream)
    assert torch.equal(trace.mlp, fixed.mlp)
    assert float(trace.scale) == pytest.approx(float((fixed.stream[-1].var(unbiased=False) + 1e-5) ** 0.25))
    alone = trace_last(model, IDS[:1], released=True).attention  # a single position has no other term
    assert torch.allclose(alone, trace_last(model, IDS[:1]).attention, atol=1e-6)
    clean = tiny_llama(2, num_key_value_heads=heads)
    trace_last(clean, IDS, released=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clean.modules())


def test_released_scores_are_read_by_a_head_and_a_softmax_in_16_bits() -> None:
    model = tiny_llama(2)
    trace = trace_last(model, IDS, released=True)
    scores = neuron_scores(model, trace, TARGET, released=True)
    assert float(trace.scale) == pytest.approx(float((trace.stream[-1].var(unbiased=False) + 1e-5).sqrt().sqrt()))

    def log_q(states: Tensor) -> Tensor:
        normed = (states * (model.model.norm.weight / trace.scale)).half()
        return (normed @ model.lm_head.weight.half().T).softmax(-1)[:, TARGET].log().float()

    with torch.no_grad():
        for k, part in enumerate(projections(model)):
            after = trace.residual[k] + trace.mlp[k][:, None] * part["down_proj"].weight.T
            expected = (log_q(after) - log_q(trace.residual[k][None])).mul(1e4).round() / 1e4
            assert torch.equal(scores.mlp[k], expected)


def test_released_scores_tie_and_ours_do_not() -> None:
    model = tiny_llama(2, initializer_range=0.02)
    rough, fine = scored(model, released=True), scored(model)
    assert torch.allclose(rough.mlp, rough.mlp.mul(1e4).round() / 1e4)
    assert tie_rate(rough) > 0.5
    assert tie_rate(fine) < 0.1


# ---------------------------------------------------------------------------------------------- selection


def test_selection_is_by_score_then_number() -> None:
    table = torch.tensor([[1.0, 3, 3, 0], [5, 5, 5, 5], [0, 1, 2, 3]])
    scores = Scores(table, -table, torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.0, 2.0, 3.0]))
    found = select(scores, 2, 3, 2)
    assert [(k, ids.tolist()) for k, ids in found["up_proj"]] == [(1, [1, 2, 0]), (2, [0, 1, 2])]
    assert [(k, ids.tolist()) for k, ids in found["o_proj"]] == [(2, [0, 1]), (3, [0, 1])]
    assert found["down_proj"] is found["up_proj"]
    assert found["v_proj"] is found["o_proj"]
    with pytest.raises(ValueError, match="NaN"):
        select(Scores(table, table * math.nan, table[:, 0], table[:, 0]), 2, 1, 1)
    for sizes, said in (((4, 1, 1), "4 layers"), ((1, 5, 1), "5 MLP"), ((1, 1, 0), "0 attention neurons")):
        with pytest.raises(ValueError, match=said):
            select(scores, *sizes)


# ---------------------------------------------------------------------------------------------- L2, L3: what changes


def test_the_identity_on_oneself_doubles_the_weights() -> None:
    model = student()
    before, selection = weights(model), select(scored(model), 2, 64, 32)
    merge(model, selection, extract(model, selection))
    doubled = {n for n in before if n.split(".")[-2] in MODULES}
    assert differs(model, before) == doubled
    assert all(torch.equal(p, 2 * before[n]) for n, p in model.state_dict().items() if n in doubled)


def test_a_part_of_the_neurons_is_doubled_as_rows_and_as_columns() -> None:
    model = student()
    before, selection = weights(model), chosen(model)
    changed = merge(model, selection, extract(model, selection))
    assert len(changed) == len(differs(model, before)) == 8
    for name, neurons in changed.items():
        module = name.split(".")[-2]
        ids = dict(selection[module])[int(name.split(".")[2]) + 1]
        assert neurons == sorted(ids.tolist())
        axis = 1 if module in ROWS else 0
        factor = model.state_dict()[name] / before[name]
        doubled = (factor == 2).all(axis)
        assert doubled.nonzero()[:, 0].tolist() == neurons
        assert (factor.movedim(axis, 1)[~doubled] == 1).all()
    up, down = (changed[f"model.layers.0.mlp.{m}.weight"] for m in MLP)
    assert up == down


def test_zero_vectors_change_nothing_and_a_saved_student_has_changed_where_selected(tmp_path: Any) -> None:
    model = student()
    before, selection = weights(model), chosen(model)
    nothing = {m: torch.zeros_like(v) for m, v in extract(model, selection).items()}
    assert merge(model, selection, nothing) == {}
    assert differs(model, before) == set()
    vectors = noise(model, selection)
    vectors["up_proj"][0, 1] = 0  # one neuron of layer 1 stays
    changed = merge(model, selection, vectors)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for module, places in selection.items():
        for place, (layer, ids) in enumerate(places):
            name = next(n for n in before if f"layers.{layer - 1}." in n and f"{module}.weight" in n)
            moved = (again.state_dict()[name] != before[name]).any(1 if module in ROWS else 0)
            wanted = set(ids.tolist()) - ({int(ids[1])} if (module, place) == ("up_proj", 0) else set())
            assert set(moved.nonzero()[:, 0].tolist()) == wanted == set(changed[name])
    assert differs(again, before) == set(changed)


def test_a_merge_into_bfloat16_rounds_once() -> None:
    model = student().bfloat16()
    selection = chosen(student())
    before, vectors = extract(model, selection), noise(model, selection)
    merge(model, selection, {m: v.float() for m, v in vectors.items()})
    for m, v in extract(model, selection).items():
        assert torch.equal(v, (before[m].float() + vectors[m].float()).bfloat16())


# ---------------------------------------------------------------------------------------------- L4: injection


@pytest.mark.parametrize("heads", [4, 2])
def test_injected_and_merged_students_compute_the_same(heads: int) -> None:
    model = tiny_llama(2, num_key_value_heads=heads)
    selection = chosen(model)
    vectors = noise(model, selection, transferable(model), 0.1)
    with torch.no_grad():
        base = model(IDS[None]).logits
        with inject(model, selection, vectors):
            injected = model(IDS[None]).logits
        assert torch.equal(model(IDS[None]).logits, base)
        merge(model, selection, vectors)
        merged = model(IDS[None]).logits
    assert (injected - merged).abs().max() < 1e-5
    assert (injected - base).abs().max() > 1e-2
    assert ("v_proj" in vectors) == (heads == 4)


def test_gradients_reach_the_hypernetwork_and_no_weight_of_the_student() -> None:
    model, giver = student().double().requires_grad_(False), teacher()
    selection = chosen(student())
    given = extract(giver, select(scored(giver), 2, 5, 3))
    net = HyperNet(MODULES, 48, 32, std=0.1, seed=0).double()

    def loss() -> Tensor:
        vectors = net(given)
        with inject(model, selection, vectors):
            logits = model(IDS[None]).logits[0]
        return F.cross_entropy(logits[:-1], IDS[1:]) + 10 * l2_penalty(vectors)

    loss().backward()
    assert all(p.grad is None for p in model.parameters())
    for weight in net.parameters():
        assert weight.grad is not None
        slope = weight.grad.norm()
        direction = weight.grad / slope
        assert slope > 1e-5
        with torch.no_grad():
            weight += 1e-4 * direction
            high = loss()
            weight -= 2e-4 * direction
            low = loss()
            weight += 1e-4 * direction
        assert float((high - low) / 2e-4) == pytest.approx(float(slope), rel=5e-3)  # the norms compute in float32


# ---------------------------------------------------------------------------------------------- L5: symmetry, start


def test_permuting_the_teachers_neurons_permutes_their_numbers_only() -> None:
    plain, mixed = teacher(), teacher()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    for layer in decoder_layers(mixed):
        mlp: Any = layer.mlp
        with torch.no_grad():
            for rows in (mlp.gate_proj.weight, mlp.up_proj.weight):
                rows.copy_(rows[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    ours, theirs = (select(scored(m), 2, 9, 4) for m in (plain, mixed))
    for (layer, ids), (other, moved) in zip(ours["up_proj"], theirs["up_proj"], strict=True):
        assert layer == other
        assert torch.equal(ids, order[moved])
        assert not torch.equal(ids, moved)
    before, after = extract(plain, ours), extract(mixed, theirs)
    assert all(torch.equal(before[m], after[m]) for m in MODULES)


def test_the_released_start_underflows_in_float16_and_ours_does_not() -> None:
    torch.manual_seed(0)
    vectors = {"up_proj": 0.02 * torch.randn(1, 8, 5120)}
    net = HyperNet(["up_proj"], 5120, 64, std=default_init_std(5120, released=True), seed=0)
    out = net(vectors)["up_proj"]
    assert 6e-9 < out.std().item() < 9e-9
    net.half_output = True
    assert (net(vectors)["up_proj"] == 0).float().mean() > 0.999
    with torch.no_grad():
        for weight in net.parameters():
            weight *= default_init_std(5120) / 1e-5
    assert net(vectors)["up_proj"].float().std().item() == pytest.approx(0.01 * 0.02, rel=0.25)


def test_the_penalty_in_float16_has_no_gradient() -> None:
    x = 5e-3 * torch.rand(4_200_000, generator=torch.Generator().manual_seed(0))
    for dtype, zero in ((torch.float16, True), (torch.float32, False)):
        leaf = x.to(dtype).requires_grad_()
        (1000 * l2_penalty({"up_proj": leaf})).backward()
        assert leaf.grad is not None
        assert bool((leaf.grad == 0).all()) is zero


@pytest.mark.parametrize("total", [1, 2, 8, 11, 20, 32])
def test_the_rate_is_torchs_one_cycle(total: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-4, total_steps=total, pct_start=0.1, div_factor=25, final_div_factor=1
    )
    for step in range(1, total + 1):
        assert one_cycle_rate(3e-4, step, total) == pytest.approx(cycle.get_last_lr()[0])
        optimizer.step()
        if step < total:
            cycle.step()


# ---------------------------------------------------------------------------------------------- the whole run


def test_a_transfer_changes_the_student_where_it_says() -> None:
    base = student()
    fingerprint = weights(base)
    result = run(lr=1e-2)
    moved = differs(result.student, fingerprint)
    assert moved == set(result.trained)
    assert len(moved) == 8
    merged, train = result.log[-1], [r for r in result.log if r["split"] == "train"]
    assert merged["split"] == "merge"
    count = sum(int((p != fingerprint[n]).sum()) for n, p in result.student.state_dict().items())
    assert merged["changed_weights"] == count > 0
    assert len(train) == 3
    for record in train:
        assert record["penalty_gradient"] > 0
        assert record["zero_outputs"] < 0.01
        assert record["loss"] == pytest.approx(record["lm_loss"] + record["penalty"])
        assert 0 <= record["teacher_ties"] < 0.2
    assert train[0]["relative_norm"] == pytest.approx(0.01, rel=0.5)
    seen = [r for r in result.log if r["split"] == "validation"]
    assert [r["step"] for r in seen] == [0, 1, 2, 3]
    best = min(seen[1:], key=lambda r: r["loss"])
    assert (merged["step"], merged["loss"]) == (best["step"], best["loss"])
    assert all(p.requires_grad and p.grad is None for p in result.student.parameters())
    assert set(result.cost) == {
        "wall_s", "inputs_s", "train_s", "peak_memory_bytes", "teacher_tokens", "student_tokens",
        "trainable_parameters", "cached_bytes_per_token",
    }  # fmt: skip
    assert result.cost["trainable_parameters"] == 4 * (48 * 48 + 48 * 32)
    assert result.cost["inputs_s"] + result.cost["train_s"] == pytest.approx(result.cost["wall_s"], abs=0.1)


def test_the_merged_student_has_the_loss_that_chose_its_step() -> None:
    from semalign.attribution import objective
    from semalign.lm.examples import collate, encode

    result, data = run(lr=3e-2, steps=7), task()
    tokenizer: Any = Letters()
    losses = [
        float(objective(result.student, collate([e], 0)).detach())
        for e in encode(tokenizer, data.validation, max_length=512)
    ]
    assert result.log[-1]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert len([r for r in result.log if r["split"] == "train"]) == 7


def test_the_released_variant_leaves_the_student_as_it_was() -> None:
    base = weights(student())
    result = run(released=True)
    assert differs(result.student, base) == set()
    assert set(result.student.state_dict()) == set(base)
    assert result.trained == []
    assert result.log[-1]["changed_weights"] == 0
    assert sum(hasattr(m, "delta") for m in result.student.modules()) == 8
    train = [r for r in result.log if r["split"] == "train"]
    assert all(r["penalty_gradient"] == 0 for r in train)
    assert train[0]["zero_outputs"] == 1
    assert train[0]["teacher_ties"] > 0.1
    assert result.log[0]["loss"] == pytest.approx(result.log[2]["loss"], rel=1e-5)  # the first injection is all zeros
    with torch.no_grad():
        assert torch.equal(result.student(IDS[None]).logits, student()(IDS[None]).logits)


@pytest.mark.parametrize("released", [False, True])
def test_a_run_is_a_function_of_its_seed(released: bool) -> None:
    first, second = run(released), run(released)
    assert first.log == second.log
    assert differs(first.student, weights(second.student)) == set()
    other = transfer(make_pair(), task(), TransferConfig(seed=4), released=released, items=3)
    assert other.log != first.log


def test_grouped_queries_other_depths_and_bfloat16() -> None:
    loads: list[str] = []

    def shallow() -> Any:
        loads.append("teacher")
        return tiny_llama(2, hidden=48, seed=1)

    def deep() -> Any:
        loads.append("student")
        return tiny_llama(3, hidden=32, seed=2, num_key_value_heads=2).bfloat16()

    result = run(pair=make_pair(shallow, deep), steps=1)
    assert loads == ["student", "teacher", "student"]
    assert result.student.dtype == torch.bfloat16
    assert {n.split(".")[-2] for n in result.trained} == {"up_proj", "down_proj", "o_proj"}
    assert len(result.trained) == 6  # 2 of 3 layers receive
    assert result.log[-1]["changed_weights"] > 0
    assert torch.equal(result.student.model.rotary_emb.inv_freq, deep().model.rotary_emb.inv_freq)


# ---------------------------------------------------------------------------------------------- refusals


def test_models_without_the_projections_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=32)).eval()
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*up_proj, down_proj, v_proj, o_proj.*choose a pair"):
        projections(gpt2)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8, vocab_size=97,
            num_attention_heads=4, num_key_value_heads=4,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="Gemma2RMSNorm, which have no up_proj"):  # norms behind the sublayers
        projections(gemma)
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        run(pair=make_pair(load_teacher=lambda: gpt2))


def test_a_model_that_the_readout_does_not_describe_is_refused() -> None:
    model = tiny_llama(2)
    model.lm_head.register_forward_hook(lambda _module, _args, out: 30 * torch.tanh(3 * out))
    with pytest.raises(ValueError, match="linear head of an RMS norm"):
        trace_last(model, IDS)


@pytest.mark.parametrize(
    ("splits", "options", "said"),
    [
        ({"extract": ()}, {}, "has 0 and 4"),
        ({"align": ()}, {}, "has 3 and 0"),
        ({}, {"items": 0}, "items=0"),
        ({}, {"steps": 0}, "steps=0"),
        ({}, {"ratio": 0.001}, "0 MLP neurons"),
        ({}, {"init_std": 0.0, "lr": 0.0}, "equals its base"),
        ({"extract": (Example("a", " ."),)}, {}, "no token to attribute"),
    ],
)
def test_what_cannot_work_is_refused(splits: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        transfer(make_pair(), task(**splits), TransferConfig(), **options)
