"""Heads and groups of neurons: they add up to their sublayer, score as Captum has it, and find their own likes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from test_attribution import captum
from tiny import FAMILIES, ODD, tiny_llama, toy_data
from torch import Tensor

from semalign.attribution import layer_attribution, neuron_attribution
from semalign.contributions import (
    attributed,
    contributions,
    entering,
    head_attribution,
    head_columns,
    last_matrix,
    likeness,
    neuron_columns,
    own_directions,
    pair_parts,
    part_scores,
    read_columns,
    within,
    written,
)
from semalign.lm.examples import collate
from semalign.lm.hooks import capture
from semalign.lm.parts import decoder, decoder_layers


def biased() -> Any:
    """A Llama whose o_proj and down_proj have biases that are not 0."""
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.bias.normal_()  # type: ignore[union-attr, operator]
            layer.mlp.down_proj.bias.normal_()  # type: ignore[union-attr, operator]
    return model


BUILDS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "grouped": lambda: tiny_llama(num_key_value_heads=2),
    "one group": lambda: tiny_llama(num_key_value_heads=1),
    "biased": biased,
    "wide heads": lambda: tiny_llama(head_dim=16),
    "qwen3": FAMILIES["qwen3"],
    "granite": ODD["granite"],
    "phi3": ODD["phi3"],
}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=list(BUILDS))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return collate(toy_data(4), 0)


def states(model: Any, batch: dict[str, Tensor], k: int, point: str) -> tuple[Tensor, Tensor]:
    """What enters the last matrix, and what the sublayer adds: (B, T, P) and (B, T, D)."""
    with torch.no_grad(), entering(model, [(k, point)]) as seen, capture(model, [(k, point)]) as whole:
        decoder(model)(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return seen[k, point], whole[k, point]


# ------------------------------------------------------------------------------------------------------- they add up


@builds
def test_heads_add_up_to_what_attention_adds(build: Callable[[], Any], batch: dict[str, Tensor]) -> None:
    model = build()
    x, added = states(model, batch, 2, "attention")
    columns = head_columns(model, 2)
    assert columns.shape == (4, x.shape[-1] // 4)
    with torch.no_grad():
        parts = contributions(x.flatten(0, 1), written(model, 2, "attention"), columns)
    bias = getattr(last_matrix(model, 2, "attention"), "bias", None)
    total = parts.sum(1) + (0 if bias is None else bias.detach())
    assert parts.shape == (x.shape[0] * x.shape[1], 4, 32)
    assert torch.allclose(total, added.flatten(0, 1), atol=1e-5)


@builds
def test_groups_of_neurons_add_up_to_what_the_mlp_adds(build: Callable[[], Any], batch: dict[str, Tensor]) -> None:
    model = build()
    x, added = states(model, batch, 1, "mlp")
    columns = neuron_columns(torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1)), 4)
    assert sorted(columns.flatten().tolist()) == list(range(x.shape[-1]))
    with torch.no_grad():
        parts = contributions(x.flatten(0, 1), written(model, 1, "mlp"), columns)
    bias = getattr(last_matrix(model, 1, "mlp"), "bias", None)
    assert torch.allclose(parts.sum(1) + (0 if bias is None else bias.detach()), added.flatten(0, 1), atol=1e-5)


def test_a_heads_contribution_is_what_the_layer_loses_without_it(batch: dict[str, Tensor]) -> None:
    model = tiny_llama(num_key_value_heads=2)
    x, added = states(model, batch, 2, "attention")
    columns, matrix = head_columns(model, 2), last_matrix(model, 2, "attention")
    handle = matrix.register_forward_pre_hook(lambda _m, a: (a[0].index_fill(-1, columns[1], 0.0),))
    _, without = states(model, batch, 2, "attention")
    handle.remove()
    with torch.no_grad():
        parts = contributions(x.flatten(0, 1), written(model, 2, "attention"), columns)
    assert torch.allclose((added - without).flatten(0, 1), parts[:, 1], atol=1e-5)


def test_neurons_are_grouped_by_the_size_of_their_scores() -> None:
    assert neuron_columns(torch.tensor([0.1, -3.0, 2.0, 0.0]), 2).tolist() == [[1, 2], [0, 3]]


# ------------------------------------------------------------------------------------------------------- attribution


@builds
def test_heads_and_neurons_score_as_captum_has_it(build: Callable[[], Any], batch: dict[str, Tensor]) -> None:
    model = build()
    heads = {reduce: head_attribution(model, batch, reduce=reduce) for reduce in ("signed", "abs", "l2")}
    _, neurons = read_columns(model, batch, "mlp")
    for k in range(1, 4):
        products = captum(model, batch, last_matrix(model, k, "attention"), entering=True).unflatten(-1, (4, -1))
        wanted = {
            "signed": products.sum((0, 1, 3)),
            "abs": products.abs().sum((0, 1, 3)),
            "l2": products.square().sum((0, 1, 3)).sqrt(),
        }
        for reduce, scores in wanted.items():
            assert torch.allclose(heads[reduce][k - 1], scores, rtol=1e-4, atol=1e-5), reduce
        own = captum(model, batch, last_matrix(model, k, "mlp"), entering=True).sum((0, 1))
        assert torch.allclose(neurons[k - 1], own, rtol=1e-4, atol=1e-5)


def test_signed_scores_of_parts_add_up_to_the_sublayers(batch: dict[str, Tensor]) -> None:
    model = tiny_llama(num_key_value_heads=2)
    heads = head_attribution(model, batch).sum(1)
    assert torch.allclose(heads, layer_attribution(model, batch, point="attention"), atol=1e-5)
    _, scores = read_columns(model, batch, "mlp")
    assert torch.allclose(torch.stack(scores), neuron_attribution(model, batch), atol=1e-5)
    groups = part_scores(scores[0], neuron_columns(scores[0], 4))
    assert groups.sum().item() == pytest.approx(float(layer_attribution(model, batch, point="mlp")[0]), abs=1e-5)


def test_attribution_leaves_the_model_as_it_was_and_needs_no_gradients_of_parameters(batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    wanted = head_attribution(model, batch)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(head_attribution(model.requires_grad_(False), batch), wanted)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        head_attribution(model, batch, reduce="mean")


# ------------------------------------------------------------------------------------------------------------- pairs


def turned(model: Any, order: list[int], groups: list[int]) -> Any:
    """The same function with the heads of every layer, and their groups of keys, in another order."""
    with torch.no_grad():
        for layer in decoder_layers(model):
            attention: Any = layer.self_attn
            for name, moved in {"q_proj": order, "k_proj": groups, "v_proj": groups}.items():
                weight = getattr(attention, name).weight
                weight.copy_(weight.unflatten(0, (len(moved), -1))[moved].flatten(0, 1).clone())
            weight = attention.o_proj.weight
            weight.copy_(weight.unflatten(1, (len(order), -1))[:, order].flatten(1).clone())
    return model


@pytest.mark.parametrize(
    ("n_groups", "order", "groups"),
    [(4, [2, 0, 3, 1], [2, 0, 3, 1]), (2, [3, 2, 0, 1], [1, 0])],
    ids=["own", "grouped"],
)
def test_heads_in_another_order_find_themselves(
    n_groups: int, order: list[int], groups: list[int], batch: dict[str, Tensor]
) -> None:
    """The known answer, with a key of its own for every head, and with keys that heads share."""
    model = tiny_llama(num_key_value_heads=n_groups)
    other = turned(tiny_llama(num_key_value_heads=n_groups), order, groups)
    logits = [m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach() for m in (model, other)]
    assert torch.allclose(*logits, atol=1e-4)
    found = []
    for m in (other, model):  # the teacher, then the student
        x, _ = states(m, batch, 2, "attention")
        parts = contributions(x.flatten(0, 1), written(m, 2, "attention").detach(), head_columns(m, 2))
        found.append((parts, head_attribution(m, batch, reduce="abs")[1]))
    (teacher, a), (student, b) = found
    alike = likeness(teacher, student)
    partners = pair_parts(attributed(alike, a, b))
    assert partners == [order.index(i) + 1 for i in range(4)]
    assert [alike[j - 1, i].item() for i, j in enumerate(partners)] == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize(("n_teacher", "n_student"), [(5, 4), (4, 4), (3, 3), (6, 2)])
def test_an_assignment_has_the_largest_total_of_all(n_teacher: int, n_student: int) -> None:
    similarity = torch.randn(n_teacher, n_student, generator=torch.Generator().manual_seed(n_teacher))
    best = max(sum(similarity[t, s].item() for s, t in enumerate(p)) for p in permutations(range(n_teacher), n_student))
    partners = pair_parts(similarity)
    assert len(set(partners)) == n_student
    assert sum(similarity[t - 1, s].item() for s, t in enumerate(partners)) == pytest.approx(best)


def test_a_student_of_more_heads_shares_its_partners_evenly() -> None:
    partners = pair_parts(torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0], [0.0, 0.0, 0.0, 1.0, 2.0]]))
    assert partners == [1, 1, 1, 2, 2]  # three of one and two of the other: no more than ceil(5 / 2) each


def test_what_matters_to_both_weighs_most_in_the_assignment() -> None:
    alike = torch.tensor([[0.9, 0.8], [0.8, 0.6]])
    assert pair_parts(alike) == [2, 1]
    assert pair_parts(attributed(alike, torch.tensor([9.0, 1.0]), torch.tensor([-9.0, 1.0]))) == [1, 2]


# -------------------------------------------------------------------------------------------------- equal directions


def test_directions_of_all_parts_are_as_many_numbers_as_a_layer_has(batch: dict[str, Tensor]) -> None:
    model = tiny_llama(num_key_value_heads=2)
    weight, columns = written(model, 2, "attention").detach(), head_columns(model, 2)
    own = own_directions(weight, columns)
    assert own.shape == (4, 32, 8) and own.shape[0] * own.shape[2] == 32
    assert torch.allclose(own.transpose(1, 2) @ own, torch.eye(8).expand(4, 8, 8), atol=1e-5)
    x, _ = states(model, batch, 2, "attention")
    parts = contributions(x.flatten(0, 1), weight, columns)
    read = torch.einsum("nhp,hrp->nhr", x.flatten(0, 1)[:, columns], within(own, weight, columns))
    assert torch.allclose(torch.einsum("nhr,hdr->nhd", read, own), parts, atol=1e-5)  # of a head nothing is lost


# ---------------------------------------------------------------------------------------------------------- refusals


def with_config(**changes: Any) -> Any:
    model = tiny_llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def test_heads_that_do_not_divide_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^5 heads do not divide the 32 columns of o_proj in layer 2 .*num_attention"):
        head_columns(with_config(num_attention_heads=5), 2)
    with pytest.raises(ValueError, match=r"^3 key and value heads do not divide the 4 query heads .*num_key_value"):
        head_columns(with_config(num_key_value_heads=3), 2)
    with pytest.raises(ValueError, match=r"^groups=5 does not divide the 64 neurons .*choose a divisor"):
        neuron_columns(torch.zeros(64), 5)
    with pytest.raises(ValueError, match="groups=0 does not divide"):
        neuron_columns(torch.zeros(64), 0)
    with pytest.raises(ValueError, match=r"^3 parts of 4 columns cannot share a width of 32 equally: choose"):
        own_directions(torch.zeros(32, 12), torch.arange(12).view(3, 4))


@pytest.mark.parametrize(("name", "point"), [("olmo2", "attention"), ("gemma3", "mlp"), ("gpt_neox", "attention")])
def test_a_sublayer_that_does_not_end_in_its_matrix_is_refused(name: str, point: str) -> None:
    with pytest.raises(ValueError, match=f"the {point} of layer 1 of a .* does not end in one .*: choose"):
        last_matrix(FAMILIES[name](), 1, point)


def test_experts_have_no_neurons_of_one_matrix() -> None:
    with pytest.raises(ValueError, match="the mlp of layer 1 of a MixtralForCausalLM does not end in one down_proj"):
        last_matrix(ODD["mixtral"](), 1, "mlp")


def test_what_cannot_be_compared_or_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared: give both at the same positions"):
        likeness(torch.zeros(3, 2, 8), torch.zeros(3, 2, 9))
    for wrong in (torch.zeros(0, 2), torch.zeros(2), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match=r"must be \(H_T, H_S\) and finite"):
            pair_parts(wrong)
