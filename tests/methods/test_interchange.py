"""The interchange term: minimal where the student is the planted teacher, felt by layer k alone, blind to scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_alignment import K, changed, make_pair, same_weights, settings, student, task, watched_steps
from test_methods import data, pair
from torch.nn import functional as F

from semalign import alignment
from semalign.lm.examples import encode, supervised
from semalign.lm.hooks import capture
from semalign.methods import REGISTRY, interchange
from semalign.methods.interchange import Movement, movement_loss
from semalign.study import causal
from semalign.training.config import TransferResult

EXACT: dict[str, Any] = {"target_dtype": "float32", "top_k": 97}
ARMS = ("interchange", "semantic_and_causal", "scrambled_pairs")


def planted(delta: float = 1.0) -> Any:
    """The student with ``delta`` times a known change of rank 2 in layer k."""
    model = student()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            weight = model.get_parameter(f"model.layers.{K - 1}.{name}.weight")
            b, a = (torch.randn(n, 2, generator=generator) for n in weight.shape)
            weight += delta * 0.1 * b @ a.T
    return model


def first(delta: float, name: str = "interchange", **changes: Any) -> dict[str, Any]:
    """The first record of a student that is ``delta`` of the way to the planted teacher."""
    kin = make_pair(planted, lambda: planted(delta))
    config = settings(epochs=1, batch=12, micro_batch=12, **{**EXACT, **changes})
    return REGISTRY[name].transfer(kin, task(), config).log[0]


def test_the_causal_term_is_minimal_at_the_planted_delta() -> None:
    along = {delta: first(delta)["causal"] for delta in (0.0, 0.9, 1.0, 1.1)}
    assert along[1.0] == pytest.approx(0.0, abs=1e-5)
    assert along[0.0] > along[0.9] > 10 * along[1.0] and along[1.1] > 10 * along[1.0]
    assert first(1.0, "semantic_and_causal")["semantic"] == pytest.approx(0.0, abs=1e-5)
    assert first(1.0, "scrambled_pairs")["causal"] > along[0.9]  # others' swaps do not end there


def test_training_on_swaps_alone_goes_to_the_planted_delta() -> None:
    kin = make_pair(planted, student)
    config = settings(epochs=25, output_weight=0.0, **EXACT)
    log = interchange.transfer(kin, task(), config, semantic_weight=0.0).log
    assert log[-1]["causal"] < 0.5 * log[0]["causal"]


@pytest.mark.parametrize("name", ARMS)
def test_gradients_reach_layer_k_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, steps = watched_steps(monkeypatch)
    result = REGISTRY[name].transfer(make_pair(load_student=load), task(), settings())
    reached = {n for sizes in steps for n in sizes}
    assert reached and all(n.startswith(f"model.layers.{K - 1}.") for n in reached)
    assert {n.split(".")[2] for n in changed(result, student())} == {str(K - 1)}


def test_the_causal_term_alone_moves_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(weight: float) -> TransferResult:
        return interchange.transfer(make_pair(), task(), settings(), semantic_weight=0.0, causal_weight=weight)

    assert not same_weights(trained(1.0).student, trained(0.0).student)
    alone = {"layer_weight": 0.0, "output_loss": "ce"}
    labels = alignment.transfer(make_pair(), task(), settings(**alone))
    halved = alignment.transfer(make_pair(), task(), settings(**alone, micro_batch=2))  # as an interchange sums them
    assert same_weights(trained(0.0).student, halved.student)
    without = REGISTRY["interchange"].transfer(make_pair(), task(), settings(layer_weight=0.0))
    assert same_weights(without.student, labels.student) and without.cost["teacher_tokens"] == 0


@pytest.mark.parametrize(("micro_batch", "rows"), [(4, 2), (3, 1), (1, 1)])
def test_its_two_passes_are_of_half_as_many_examples(micro_batch: int, rows: int) -> None:
    """Both are kept for the one backward pass, which is to take no more memory than that of other methods."""
    at_once: list[int] = []

    def load() -> Any:
        model = student()

        def seen(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
            at_once.append(len(args[0]) * torch.is_grad_enabled())

        model.model.layers[K - 1].register_forward_hook(seen)
        return model

    REGISTRY["interchange"].transfer(make_pair(load_student=load), task(), settings(micro_batch=micro_batch))
    assert max(at_once) == rows


def test_a_movement_is_seen_whatever_the_models_say_without_it() -> None:
    torch.manual_seed(0)
    before, move, elsewhere = torch.randn(3, 5, 30)
    index = torch.arange(30).expand(5, 30)
    teacher = Movement(index, before.log_softmax(-1), (before + move).log_softmax(-1))
    assert movement_loss(elsewhere, elsewhere + move + 3.0, teacher).abs().max() < 1e-5
    still = movement_loss(elsewhere, elsewhere, teacher)
    expected = F.kl_div(teacher.before, teacher.after, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(still, expected, atol=1e-5)


def test_the_tokens_that_are_not_kept_count_as_one() -> None:
    torch.manual_seed(1)
    before, after, s, t = (2 * torch.randn(4, 30) for _ in range(4))
    index = torch.stack([torch.randperm(30)[:6] for _ in range(4)])

    def kept(z: torch.Tensor) -> torch.Tensor:
        p = z.softmax(-1)
        chosen = p.gather(1, index)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], 1).log()

    found = movement_loss(s, t, Movement(index, kept(before), kept(after)))
    q = (kept(before) + kept(t) - kept(s)).softmax(-1)
    expected = (kept(after).exp() * (kept(after) - q.log())).sum(-1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_swap_changes_the_directions_of_a_question_from_its_end_on_and_nothing_else() -> None:
    model, ids = student(), torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    ends, states = [4, 6], [torch.randn(3, 32), torch.randn(12, 32)]
    with torch.no_grad(), capture(model, [(K, "stream")]) as plain:
        before = model(ids).logits
    with torch.no_grad(), interchange.swapped(model, K, ends, states), capture(model, [(K, "stream")]) as seen:
        after = model(ids).logits
    for row, places in enumerate([[2, 3, 4], list(range(7))]):
        old, new = plain[K, "stream"][row], seen[K, "stream"][row]
        put = states[row][-len(places) :]
        assert torch.allclose(F.normalize(new[places], dim=-1), F.normalize(put, dim=-1), atol=1e-6)
        assert torch.allclose(new[places].norm(dim=-1), old[places].norm(dim=-1), rtol=1e-5)
        others = [i for i in range(9) if i not in places]
        assert torch.equal(new[others], old[others])
        assert torch.allclose(after[row, : places[0]], before[row, : places[0]], atol=1e-6)
        assert not torch.allclose(after[row, places[0] :], before[row, places[0] :], atol=1e-2)
    assert torch.equal(model(ids).logits, before) and not any(m._forward_hooks for m in model.modules())


def test_the_teachers_movements_are_those_of_whole_forward_passes() -> None:
    model = planted()
    encoded = encode(make_pair().tokenizer, task(5).train, max_length=64)
    partners = interchange.partners_of([5], 0)
    found = interchange.movements(model, encoded, partners, 3, 97, 97, batch_tokens=30)
    ends, expected = [interchange.question_end(e) for e in encoded], []
    for e, end, partner in zip(encoded, ends, partners, strict=True):
        with torch.no_grad(), capture(model, [(3, "stream")]) as seen:
            model(encoded[partner].input_ids[None])
        with torch.no_grad(), interchange.swapped(model, 3, [end], [seen[3, "stream"][0, : ends[partner] + 1]]):
            expected.append(model(e.input_ids[None]).logits[0, supervised(e.labels)].log_softmax(-1))
    assert torch.allclose(found.after, torch.cat(expected).gather(1, found.tokens), atol=1e-4)


def test_a_questions_positions_end_where_the_response_is_first_predicted() -> None:
    for e in encode(make_pair().tokenizer, task(5).train, max_length=64):
        end, asked = interchange.question_end(e), interchange.question_of(e)
        assert supervised(asked.labels).nonzero()[:, 0].tolist() == list(range(end + 1))
        assert torch.equal(asked.input_ids, e.input_ids) and supervised(e.labels)[end]


def test_partners_are_others_of_the_same_split_and_the_control_has_somebody_else() -> None:
    one, two = (interchange.partners_of([7, 3], 0, other=other) for other in (1, 2))
    assert sorted(one[:7]) == list(range(7)) and sorted(one[7:]) == [7, 8, 9]
    for i in range(10):
        assert len({i, one[i], two[i]}) == 3
        assert two[i] == one[one[i]]
    assert one != interchange.partners_of([7, 3], 1) and interchange.partners_of([1, 0], 0) == [0]


def test_several_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="at one layer pair: choose one of layers"):
        interchange.transfer(pair(), data(), settings(layers=(1, 2)))


def test_on_the_way_to_a_planted_teacher_both_terms_end_where_the_student_is_it() -> None:
    config = settings(teacher_layers=(K,), top_k=97)
    found = causal.along(make_pair(), planted(), task(4, validation=4), config, [0.0, 1.0])
    assert all(found[0.0][term] > 1e-3 and abs(found[1.0][term]) < 1e-5 for term in ("semantic", "causal"))


def test_what_a_question_does_is_read_after_every_layer() -> None:
    encoded = encode(make_pair().tokenizer, task(5).train, max_length=64)
    sizes = causal.movement_sizes(planted(), encoded, 0)
    assert len(sizes) == 3 and all(len(s) == sum(int(supervised(e.labels).sum()) for e in encoded) for s in sizes)
    firsts = torch.tensor([int(supervised(e.labels).sum()) for e in encoded]).cumsum(0)[:-1]
    later = torch.ones(len(sizes[2]), dtype=torch.bool)
    later[[0, *firsts.tolist()]] = False
    assert sizes[2][later].abs().max() < 1e-5  # after the last layer a question acts on its own last position alone
    assert sizes[0][later].mean() > 1e-3
