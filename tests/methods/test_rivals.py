"""FDD, GKD, OPRD and LaTen's control: what they compute against plain code, what they read, and what they change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_alignment import (
    Interrupted,
    changed,
    interrupt_at,
    losses,
    make_pair,
    same_weights,
    settings,
    student,
    task,
    watched_steps,
)
from test_alignment import teacher as teacher_of_other_width
from torch.nn import functional as F

from semalign.lm.examples import IGNORED, Example, TaskData, encode, supervised
from semalign.methods import REGISTRY, fdd, laten, on_policy
from semalign.models import Pair
from semalign.training.config import TransferResult
from semalign.training.losses import LAYER_LOSSES

EXACT: dict[str, Any] = {"target_dtype": "float32", "top_k": 97}
ON_POLICY = ("gkd", "oprd")


def run(name: str, pair: Pair | None = None, data: TaskData | None = None, **changes: Any) -> TransferResult:
    options = {"new_tokens": 8} if name in ON_POLICY else {}
    config = settings(**{"layers": (2,), "epochs": 1, **changes})
    return REGISTRY[name].transfer(pair or make_pair(), data or task(), config, **options)


def trained(result: TransferResult) -> list[dict[str, Any]]:
    return [r for r in result.log if r["split"] == "train"]


# ------------------------------------------------------------------------------------------------------------- FDD


@pytest.mark.parametrize(
    ("depths", "count", "expected"),
    [((8, 4), 4, [(2, 1), (4, 2), (6, 3), (8, 4)]), ((4, 3), 4, [(1, 1), (2, 2), (4, 3)]), ((40, 32), 1, [(40, 32)])],
)
def test_layers_are_paired_evenly(depths: tuple[int, int], count: int, expected: list[tuple[int, int]]) -> None:
    assert fdd.evenly(*depths, count) == expected


@torch.no_grad()
def dynamics_of_whole_models() -> tuple[float, float]:
    """Trajectory and delta before training, from full forward passes, as means over supervised positions."""
    models, pairs, found = (teacher_of_other_width(), student()), fdd.evenly(4, 3, 4), []
    for e in encode(make_pair().tokenizer, task().train, max_length=64):
        mask, lenses = supervised(e.labels), []
        for model, layers in zip(models, zip(*pairs, strict=True), strict=True):
            streams = model(e.input_ids[None], output_hidden_states=True).hidden_states
            normed = [
                streams[k][0] if k == len(model.model.layers) else model.model.norm(streams[k][0]) for k in layers
            ]
            lenses.append(torch.stack([model.lm_head(h)[mask] for h in normed]))
        p, q = (z.log_softmax(-1) for z in lenses)
        turns = F.cosine_similarity(lenses[0].diff(dim=0), lenses[1].diff(dim=0), dim=-1)
        found.append(torch.stack([(p.exp() * (p - q)).sum(-1).mean(0), 1 - turns.mean(0)]))
    trajectory, delta = torch.cat(found, 1).mean(1).tolist()
    return trajectory, delta


def test_fdd_reads_every_paired_layer_as_the_whole_models_do(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: dict[str, Any] = {"batch": 12, "micro_batch": 12, **EXACT}
    first = trained(run("fdd", **whole))[0]
    assert (first["trajectory"], first["delta"]) == pytest.approx(dynamics_of_whole_models(), rel=1e-4)
    assert first["layer_loss"] == pytest.approx(first["trajectory"] + first["delta"], rel=1e-5)
    expected = first["layer_loss"] + (first["output_loss"] + first["label_loss"]) / 2
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(fdd, "LOGITS", 2 * 3 * 97 * 5)  # five positions at once
    chunked = run("fdd", **whole)
    assert trained(chunked)[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_fdd_of_the_student_itself_has_nothing_but_labels_to_say() -> None:
    first = trained(run("fdd", make_pair(student), **EXACT))[0]
    assert (first["trajectory"], first["delta"], first["output_loss"]) == pytest.approx((0, 0, 0), abs=1e-4)
    assert first["label_loss"] > 1


def test_fdd_learns_and_refuses_no_layers() -> None:
    result = run("fdd", epochs=8)
    assert trained(result)[-1]["trajectory"] < 0.9 * trained(result)[0]["trajectory"]
    assert trained(result)[-1]["delta"] < trained(result)[0]["delta"]
    with pytest.raises(ValueError, match="paired_layers=0"):
        fdd.transfer(make_pair(), task(), settings(), paired_layers=0)


def test_fdd_resumes_to_the_same_bits_and_not_from_another_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("fdd", epochs=2, checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 4)
        run("fdd", epochs=2, checkpoint_every=2, folder=tmp_path)
    assert same_weights(whole.student, run("fdd", epochs=2, checkpoint_every=2, folder=tmp_path).student)
    with pytest.raises(ValueError, match="belongs to other inputs"):
        fdd.transfer(
            make_pair(), task(), settings(layers=(2,), epochs=2, checkpoint_every=2, folder=tmp_path), delta_weight=0.0
        )


@pytest.mark.parametrize("name", ["fdd", *ON_POLICY])
def test_gradients_reach_all_layers_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, steps = watched_steps(monkeypatch)
    run(name, make_pair(load_student=load))
    reached = {n for sizes in steps for n, size in sizes.items() if size > 0}
    assert {n.split(".")[2] for n in reached} == {"0", "1", "2"}
    assert all("lora_" in n for n in reached)


# -------------------------------------------------------------------------------------------------- on-policy methods


def test_a_continued_prompt_is_what_the_student_wrote() -> None:
    model, tokenizer = student(), make_pair().tokenizer
    with torch.no_grad():
        model.lm_head.weight[2] *= 3  # an EOS now and then
    examples = task(8).train
    texts = on_policy.continued(model, tokenizer, examples, 12, 64, seed=5)
    prompts = encode(tokenizer, [Example(e.prompt, "") for e in examples], max_length=64)
    for text, prompt in zip(texts, prompts, strict=True):
        at = len(prompt.input_ids) - 1
        assert torch.equal(text.input_ids[:at], prompt.input_ids[:at]) and (text.labels[:at] == IGNORED).all()
        written = text.input_ids[at:]
        assert torch.equal(text.labels[at:], written) and 1 <= len(written) <= 12
        assert (2 not in written[:-1].tolist()) and (len(written) == 12 or written[-1] == 2)
    again, other = (on_policy.continued(model, tokenizer, examples, 12, 64, seed=s) for s in (5, 6))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(texts, again, strict=True))
    assert not all(
        len(a.input_ids) == len(b.input_ids) and torch.equal(a.input_ids, b.input_ids)
        for a, b in zip(texts, other, strict=True)
    )


def test_the_student_itself_as_its_judge_has_nothing_to_say() -> None:
    own = make_pair(student)
    assert trained(run("gkd", own, **EXACT))[0]["output_loss"] == pytest.approx(0, abs=1e-5)
    first = trained(run("oprd", own, **EXACT))[0]
    assert first["layer_loss"] == pytest.approx(0, abs=1e-6) and first["cos"] == pytest.approx(1, abs=1e-4)


def test_mean_square_is_per_entry() -> None:
    h, target, norm = torch.randn(5, 8), F.normalize(torch.randn(5, 8), dim=-1), torch.rand(5)
    expected = (h - norm[:, None] * target).square().mean(1)
    torch.testing.assert_close(LAYER_LOSSES["mean_square"](h, target, norm, [5]), expected)


@pytest.mark.parametrize("name", ON_POLICY)
def test_responses_are_not_read_unless_examples_are(name: str) -> None:
    blind = replace(task(), train=tuple(Example(e.prompt, "other") for e in task().train))
    assert same_weights(run(name).student, run(name, data=blind).student)
    mixed = REGISTRY[name].transfer(make_pair(), task(), settings(epochs=1), new_tokens=8, own_share=0.5)
    assert 0 < mixed.log[0]["own"] < 12


def test_gkd_and_oprd_learn_over_rounds() -> None:
    for name, teacher in (("gkd", teacher_of_other_width), ("oprd", lambda: moved(student()))):
        result = run(name, make_pair(teacher), epochs=2)
        assert [r["round"] for r in result.log if r["split"] == "generation"] == [1, 2]
        steps = trained(result)
        assert [r["step"] for r in steps] == list(range(1, 7)) and [r["epoch"] for r in steps] == sorted([1, 2] * 3)
        assert steps[0]["lr"] > steps[-1]["lr"] > 0
        assert sum(losses(result)[-3:]) < sum(losses(result)[:3])


def moved(model: Any) -> Any:
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def test_factors_of_what_was_learned_have_the_adapters_rank() -> None:
    base, config = student(), settings(lora_rank=4)
    result = run("sft", lora_rank=4)
    learned = {n: result.student.get_parameter(n).detach() for n in result.trained}
    factors = on_policy._factors(base, learned, config)
    for name, weight in learned.items():
        b, a = factors[name.removesuffix(".weight")]
        assert b.shape[1] == len(a) == 4
        before = base.get_parameter(name).detach()
        torch.testing.assert_close(before + config.lora_alpha / 4 * b @ a, weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-4, rtol=0)


def test_a_round_goes_on_where_the_last_one_ended() -> None:
    """All rounds together move each weight within the rank of one adapter."""
    one = run("gkd", lr=1e-2, lr_schedule="constant")
    two = run("gkd", lr=1e-2, lr_schedule="constant", epochs=2)
    ids = torch.randint(3, 97, (2, 9))
    before = changed(one, student())
    assert changed(two, student()) == before
    for name in before:
        delta = two.student.get_parameter(name) - student().get_parameter(name)
        assert torch.linalg.matrix_rank(delta.detach(), rtol=1e-3) <= 16
    assert not torch.equal(one.student(ids).logits, two.student(ids).logits)


@pytest.mark.parametrize("name", ON_POLICY)
def test_an_interrupted_round_resumes_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(name, epochs=2, checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 6)  # the last step of the second round
        run(name, epochs=2, checkpoint_every=2, folder=tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)  # one step is left
        resumed = run(name, epochs=2, checkpoint_every=2, folder=tmp_path)
    assert same_weights(whole.student, resumed.student)


@pytest.mark.parametrize("name", ["fdd", *ON_POLICY])
def test_teacher_and_student_take_turns_in_memory(name: str) -> None:
    alive: list[tuple[str, weakref.ref[Any]]] = []

    def load(role: str, make: Callable[[], Any]) -> Callable[[], Any]:
        def loader() -> Any:
            other = [r for r, model in alive if model() is not None and r != role]
            assert not other, f"{role} is loaded while the other lives"
            alive.append((role, weakref.ref(model := make())))
            return model

        return loader

    result = run(name, make_pair(load("teacher", teacher_of_other_width), load("student", student)), epochs=2)
    gc.collect()
    assert [model() for _, model in alive if model() is not None] == [result.student]


# ------------------------------------------------------------------------------------------------- LaTen's control


def test_direct_vectors_change_the_located_neurons_alone_and_ask_no_teacher() -> None:
    def forbidden() -> Any:
        raise AssertionError("the teacher was loaded")

    data = replace(task(10), align=task(10).train[:4], extract=task(10).train[4:7])
    config = settings(seed=3)
    result = laten.direct(make_pair(forbidden), data, config, items=3, lr=1e-2)
    base, pair = student(), make_pair()
    plan = laten.planned(pair, data, config, None, 3)
    place, _ = laten._best(base, plan.texts[-1], 3, laten._neuron_counts(base, 0.1))
    assert result.layers == (1, 2, 3) and set(result.trained) == changed(result, base)
    assert len(result.trained) == 12
    for name in result.trained:
        layer, module = int(name.split(".")[2]) + 1, name.split(".")[-2]
        difference = result.student.get_parameter(name) != base.get_parameter(name)
        rows = difference.any(1 if module in laten.ROWS else 0).nonzero()[:, 0].tolist()
        assert set(rows) <= set(dict(place[module])[layer].tolist())
    validated = [r["loss"] for r in result.log if r["split"] == "validation"]
    assert result.log[-1]["loss"] == min(validated[1:]) and len(validated) == 4
    assert result.cost["trainable_parameters"] == sum(len(ids) for m in laten.MODULES for _, ids in place[m]) * 32
