"""Version 2 in our reading: identities of its two layer terms, its sources, and which layers a stage trains."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_alignment import changed, make_pair, settings, student, task, teacher, watched_steps
from torch.nn import functional as F

from semalign.lm.examples import encode
from semalign.lm.parts import decoder_layers, head_weight
from semalign.methods import REGISTRY, version_two
from semalign.methods.version_two import attributed_pairs, fisher_quadratic, geometry_loss, token_relations
from semalign.semantics import semantic_map

EXACT: dict[str, Any] = {"target_dtype": "float32", "top_k": 97}
KNOWN: dict[str, Any] = {"layers": (1, 2, 3), "teacher_layers": (1, 2, 3)}
ARMS = ("geometry_frontier", "fisher_frontier")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(width: int) -> torch.Tensor:
    return torch.linalg.qr(draw(width, width, seed=9)).Q


# --------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("kind", ["paper", "tight", "procrustes", "logit"])
def test_the_geometry_depends_on_a_map_through_its_metric_alone(kind: str) -> None:
    h, heads = draw(11, 48), [head_weight(m()) for m in (teacher, student)]
    m = semantic_map(*heads, kind=kind).double()
    through = token_relations(h @ m.T)
    assert torch.allclose(through, token_relations(h, m.T @ m), atol=1e-8)
    assert torch.allclose(through, token_relations(h @ (turn(32) @ m).T), atol=1e-8)
    assert not torch.allclose(through, token_relations(h), atol=1e-2)


def test_with_the_identity_as_metric_it_is_plain_and_no_rotation_is_seen() -> None:
    h, own = draw(11, 48), draw(11, 32, seed=1)
    centred = h - h.mean(0)
    plain = F.cosine_similarity(centred[:, None], centred[None], dim=-1)
    assert torch.allclose(token_relations(h), plain, atol=1e-10)
    assert torch.allclose(token_relations(h, torch.eye(48)), plain, atol=1e-8)
    assert torch.allclose(token_relations(7 * h @ turn(48) + draw(48)), plain, atol=1e-8)
    loss = geometry_loss(own, h, [4, 7])
    assert torch.allclose(geometry_loss(own @ turn(32), h @ turn(48), [4, 7]), loss, atol=1e-9)
    by_hand = (token_relations(own[:4]) - token_relations(h[:4])).square().sum() / 16
    assert loss[:4].tolist() == pytest.approx([by_hand.item()] * 4) and loss.shape == (11,)


def test_a_position_alone_has_no_relations_and_no_gradient_that_is_no_number() -> None:
    own = draw(3, 8).requires_grad_()
    loss = geometry_loss(own, draw(3, 8, seed=1), [1, 2]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)  # of two centred positions the relations are always the same
    assert own.grad is not None and own.grad.isfinite().all()
    assert torch.equal(token_relations(torch.ones(4, 8)), torch.zeros(4, 4))


# ----------------------------------------------------------------------------------------------------------- fisher


def test_the_quadratic_is_the_divergence_to_second_order() -> None:
    head, target, step = draw(97, 16), draw(6, 16, seed=1), draw(6, 16, seed=2)
    off = []
    for size in (1e-2, 1e-3):
        own = target + size * step
        logp, logq = ((h @ head.T).log_softmax(-1) for h in (target, own))
        kl = (logp.exp() * (logp - logq)).sum(-1)
        off.append(((fisher_quadratic(own, target, head, 97) - kl).abs() / kl).max().item())
    assert off[0] < 0.1 and off[1] < 0.15 * off[0]  # what is left is of the third order


def test_the_cheap_form_over_all_tokens_is_the_full_one() -> None:
    head, own, target = draw(97, 16), draw(6, 16, seed=1), draw(6, 16, seed=2)
    p, d = (target @ head.T).softmax(-1), own - target
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    z = d @ head.T
    full = (z[:, None] @ fisher @ z[:, :, None])[:, 0, 0] / 2
    assert torch.allclose(fisher_quadratic(own, target, head, 97), full)
    assert torch.allclose(fisher_quadratic(own, target, head, 500), full)
    peaked = 3 * target
    most = fisher_quadratic(peaked + d, peaked, head, 60)
    whole = fisher_quadratic(peaked + d, peaked, head, 97)
    assert torch.allclose(most, whole, rtol=0.05)


# ---------------------------------------------------------------------------------------------------------- sources


def test_sources_keep_the_order_and_the_window_and_have_the_largest_score() -> None:
    for seed, (n_teacher, n_student) in enumerate([(5, 4), (8, 4), (4, 6), (3, 3)]):
        scores = torch.rand(n_teacher, generator=torch.Generator().manual_seed(seed))
        found = attributed_pairs(scores, n_student)
        middle = version_two.depth_pairs(n_teacher, n_student)
        near = [[at for at in range(1, n_teacher + 1) if abs(at - m) <= 1] for m in middle]
        allowed = [path for path in itertools.product(*near) if list(path) == sorted(path)]
        best = max(sum(scores[at - 1].item() for at in path) for path in allowed)
        assert tuple(found) in allowed
        assert sum(scores[at - 1].item() for at in found) == pytest.approx(best)
    assert attributed_pairs(torch.rand(8), 4, window=0) == version_two.depth_pairs(8, 4)


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("name", ARMS)
def test_each_stage_trains_its_layer_alone_from_shallow_to_deep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, steps = watched_steps(monkeypatch)
    result = REGISTRY[name].transfer(make_pair(load_student=load), task(), settings(epochs=1))
    reached = [{int(n.split("layers.")[1].split(".")[0]) + 1 for n in sizes} for sizes in steps]
    assert reached == [{k} for k in (1, 2, 3) for _ in range(3)]
    assert {int(n.split(".")[2]) + 1 for n in changed(result, student())} == {1, 2, 3} == set(result.layers)


def test_joint_training_moves_all_layers_at_once() -> None:
    joint = version_two.transfer(make_pair(), task(), settings(epochs=1, **KNOWN), schedule="joint")
    assert {r["stage"] for r in joint.log} == {1} and joint.layers == (1, 2, 3)


@pytest.mark.parametrize("name", ARMS)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(name: str) -> None:
    own = make_pair(student, student)
    config = settings(epochs=1, lr=1e-9, map="logit", **KNOWN, **EXACT)
    for record in REGISTRY[name].transfer(own, task(), config).log:
        assert record["layer_loss"] == pytest.approx(0.0, abs=1e-5)
        assert record["output_loss"] == pytest.approx(0.0, abs=1e-5)


def test_the_metric_of_a_map_is_what_the_geometry_is_held_against() -> None:
    def first(kind: Any) -> float:
        config = settings(epochs=1, batch=12, micro_batch=12, map=kind, **KNOWN, **EXACT)
        return version_two.transfer(make_pair(), task(), config).log[0]["layer_loss"]

    matrix = semantic_map(head_weight(teacher()), head_weight(student()), kind="tight").float()
    losses = {"tight": first("tight"), "turned": first(turn(32).float() @ matrix), "identity": first(None)}
    assert losses["turned"] == pytest.approx(losses["tight"], rel=1e-4)
    assert losses["identity"] != pytest.approx(losses["tight"], rel=1e-2)


def test_the_teachers_states_as_inputs_have_its_directions_and_the_students_lengths() -> None:
    encoded = encode(make_pair().tokenizer, task(3).train, max_length=64)
    fed = version_two.below(make_pair(student, student), encoded, (1, 2, 3))
    assert set(fed) == {2, 3}
    model = student()
    for i, e in enumerate(encoded):
        with torch.no_grad(), version_two.capture(model, [(1, "stream")]) as seen:
            model(e.input_ids[None])
        stream = seen[1, "stream"][0]
        assert torch.allclose(fed[2][i], stream, atol=1e-3)  # of the student itself they are its own
    own = torch.randn(2, 5, 32)
    read = version_two.in_place_of(lambda _: own, [torch.randn(5, 32), torch.randn(3, 32)])
    given = read([0, 1])
    assert torch.allclose(given[0].norm(dim=-1), own[0].norm(dim=-1), rtol=1e-5)
    assert torch.equal(given[1, 3:], torch.zeros(2, 32))


def test_with_the_teachers_inputs_another_student_comes_out() -> None:
    config = settings(epochs=1, lr=1e-3, **KNOWN)
    own, other = (version_two.transfer(make_pair(), task(), config, inputs=inputs) for inputs in ("own", "teacher"))
    name = f"model.layers.{len(decoder_layers(student())) - 1}.mlp.down_proj.weight"
    assert not torch.equal(own.student.get_parameter(name), other.student.get_parameter(name))
    assert own.log[0]["loss"] == pytest.approx(other.log[0]["loss"])  # layer 1 reads the student's embeddings


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="term='cka' must be one of geometry, fisher"):
        version_two.transfer(make_pair(), task(), settings(), term="cka")
    with pytest.raises(ValueError, match="feed each other: choose schedule='frontier'"):
        version_two.transfer(make_pair(), task(), settings(), schedule="joint", inputs="teacher")
    with pytest.raises(ValueError, match="map gives a matrix of shape"):
        REGISTRY["fisher_frontier"].transfer(make_pair(), task(), replace(settings(), map=None))
