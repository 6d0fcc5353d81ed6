"""Alignment of heads and of groups of neurons: targets against plain code, equal budgets, controls, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_alignment import Interrupted, changed, interrupt_at, losses, make_pair, same_weights, settings, student, task
from test_alignment import teacher as teacher_of_other_width
from test_contributions import turned
from tiny import FAMILIES, tiny_llama
from torch import Tensor
from torch.nn import functional as F

from semalign.alignment import transfer
from semalign.lm.examples import encode, supervised
from semalign.lm.parts import head_weight
from semalign.methods import REGISTRY, heads
from semalign.semantics import semantic_map
from semalign.training.config import TransferResult

NAMES = ("align_heads", "align_neurons", "scrambled_heads")
EXACT: dict[str, Any] = {"target_dtype": "float32", "batch": 12, "micro_batch": 12, "epochs": 1}


def run(name: str, pair: Any = None, **changes: Any) -> TransferResult:
    return REGISTRY[name].transfer(pair or make_pair(), task(), settings(**changes))


@cache
def plain(name: str) -> TransferResult:
    """Of the tiny pair under the same settings, once for all tests that read it."""
    return run(name)


def first(result: TransferResult) -> dict[str, Any]:
    return next(r for r in result.log if r["split"] == "train")


def partners() -> tuple[list[int], heads.Parts, heads.Parts]:
    """The pairing of the two tiny models at teacher layer 2 and student layer 2, under the logit map."""
    seeds = encode(make_pair().tokenizer, task().train, max_length=64)
    of_teacher, of_student = teacher_of_other_width(), student()
    matrix = semantic_map(head_weight(of_teacher), head_weight(of_student), kind="logit")
    theirs, ours = (heads.parts_of(m, seeds, 2, "attention") for m in (of_teacher, of_student))
    theirs = replace(theirs, weight=matrix @ theirs.weight)
    return heads.paired(theirs, ours)[0], theirs, ours


def slice_of(weight: Tensor, i: int) -> Tensor:
    """The columns of one of four heads."""
    return weight.unflatten(1, (4, -1))[:, i]


def test_the_loss_is_that_of_plain_code_before_training() -> None:
    """Head by head: W_o's slice times the head's output, sent by M, in the 8 directions of the student's own slice."""
    order, _, _ = partners()
    pair, found = make_pair(), []
    of_teacher, of_student = teacher_of_other_width(), student()
    matrix = semantic_map(head_weight(of_teacher), head_weight(of_student), kind="logit")
    for e in encode(pair.tokenizer, task().train, max_length=64):
        entered: list[Tensor] = []
        for model in (of_teacher, of_student):
            o = model.model.layers[1].self_attn.o_proj
            handle = o.register_forward_pre_hook(lambda _m, args, entered=entered: entered.append(args[0][0]))
            with torch.no_grad():
                model(e.input_ids[None])
            handle.remove()
        mask = supervised(e.labels)
        cosines = []
        for i in range(4):
            own = slice_of(of_student.model.layers[1].self_attn.o_proj.weight.detach(), i)
            other = slice_of(of_teacher.model.layers[1].self_attn.o_proj.weight.detach(), order[i] - 1)
            q = torch.linalg.svd(own, full_matrices=False).U[:, :8]
            h = slice_of(entered[1][mask], i) @ own.T
            target = slice_of(entered[0][mask], order[i] - 1) @ other.T @ matrix.T
            cosines.append(F.cosine_similarity(h @ q, target @ q, dim=-1))
        found.append(1 - torch.stack(cosines).mean(0))
    record = first(run("align_heads", map="logit", teacher_layers=(2,), output_loss="ce", **EXACT))
    assert record["layer_loss"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)
    assert record["cos"] == pytest.approx(1 - record["layer_loss"], rel=1e-5)
    assert record["loss"] == pytest.approx(record["layer_loss"] + record["output_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["align_heads", "align_neurons"])
def test_a_student_that_is_its_own_teacher_is_at_its_target(name: str) -> None:
    own = replace(make_pair(), load_teacher=student)
    record = first(run(name, own, map="logit", teacher_layers=(2,), **EXACT))
    assert record["layer_loss"] == pytest.approx(0.0, abs=1e-4)


def test_a_teacher_whose_heads_are_in_another_order_is_its_student_all_the_same() -> None:
    def grouped() -> Any:
        return tiny_llama(3, hidden=32, seed=2, num_key_value_heads=2)

    own = make_pair(lambda: turned(grouped(), [3, 2, 0, 1], [1, 0]), grouped)
    alike, other = (
        first(run(name, own, map="logit", teacher_layers=(2,), **EXACT)) for name in ("align_heads", "scrambled_heads")
    )
    assert alike["layer_loss"] == pytest.approx(0.0, abs=1e-4)
    assert other["layer_loss"] > 0.3  # the same targets, each at another head


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_changes_layer_k_alone(name: str) -> None:
    result = run(name, epochs=4, map="logit", output_loss="ce")
    steps = [r for r in result.log if r["split"] == "train"]
    assert steps[-1]["layer_loss"] < steps[0]["layer_loss"] and steps[-1]["output_loss"] < steps[0]["output_loss"]
    assert {n.split(".")[2] for n in changed(result, student())} == {"1"} and result.layers == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_are_those_of_the_layer(name: str) -> None:
    """As many trained numbers as SemAlign, and D_S supervised numbers a position in D_S / H directions of each part."""
    layer, own = plain("semalign"), plain(name)
    for what in ("trainable_parameters", "student_tokens"):
        assert own.cost[what] == layer.cost[what]
    assert own.cost["teacher_tokens"] == layer.cost["teacher_tokens"] > 0
    _, _, ours = partners()
    directions = heads.own_directions(ours.weight, ours.columns)
    assert directions.shape[0] * directions.shape[2] == head_weight(student()).shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_without_its_layer_term_it_is_labels_in_the_same_layer_to_the_bit(name: str) -> None:
    assert same_weights(run(name, output_loss="ce", layer_weight=0.0).student, plain("sft_layer").student)


def test_the_control_gives_every_head_anothers_target() -> None:
    whole = {name: first(plain(name)) for name in ("align_heads", "scrambled_heads")}
    assert whole["align_heads"]["layer_loss"] != whole["scrambled_heads"]["layer_loss"]
    assert whole["align_heads"]["output_loss"] == whole["scrambled_heads"]["output_loss"]


@pytest.mark.parametrize("output_loss", ["cosine", "kl"])
def test_the_output_term_is_the_configurations(output_loss: str) -> None:
    layer = transfer(make_pair(), task(), settings(output_loss=output_loss, **EXACT))
    assert first(run("align_heads", output_loss=output_loss, **EXACT))["output_loss"] == pytest.approx(
        first(layer)["output_loss"], rel=1e-5
    )


def test_more_and_fewer_heads_than_the_students() -> None:
    for count in (2, 6):
        wide = make_pair(
            lambda count=count: tiny_llama(4, 48, seed=1, num_attention_heads=count, num_key_value_heads=2)
        )
        result = run("align_heads", wide, epochs=4, map="logit")
        assert losses(result)[-1] < losses(result)[0]


def test_it_resumes_to_the_same_bits_and_not_from_another_pairing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 4)
        run("align_heads", checkpoint_every=2, folder=tmp_path)
    with pytest.raises(ValueError, match="belongs to other inputs"):
        run("scrambled_heads", checkpoint_every=2, folder=tmp_path)
    assert same_weights(plain("align_heads").student, run("align_heads", checkpoint_every=2, folder=tmp_path).student)


# ---------------------------------------------------------------------------------------------------------- refusals


def refuses(match: str, name: str, load: Callable[[], Any] = student, **changes: Any) -> None:
    options = {n: changes.pop(n) for n in ("groups",) if n in changes}
    with pytest.raises(ValueError, match=match):
        REGISTRY[name].transfer(make_pair(load_student=load), task(), settings(**changes), **options)


def test_what_cannot_be_aligned_is_refused_in_one_sentence() -> None:
    refuses(r"parts are aligned at one layer pair, and layers=\(1, 2\): name one", "align_heads", layers=(1, 2))
    refuses("groups=5 does not divide the 96 neurons", "align_neurons", groups=5)
    one = tiny_llama(3, hidden=32, seed=2, num_attention_heads=1, num_key_value_heads=1)
    refuses("layer 2 of the student has one head", "scrambled_heads", lambda: one)
    refuses("the attention of layer 2 of a Olmo2ForCausalLM does not end", "align_heads", FAMILIES["olmo2"])
    refuses(r"map gives a matrix of shape \(3, 3\), and this pair needs .* \(32, 48\)", "align_heads", map=torch.eye(3))
    refuses(r"this pair needs \(D_S, D_T\) = \(32, 48\)", "align_heads", map=None)


def test_groups_that_do_not_divide_the_students_width_are_refused() -> None:
    divides_both = make_pair(
        lambda: tiny_llama(4, hidden=48, seed=1, intermediate_size=96),
        lambda: tiny_llama(3, hidden=32, seed=2, intermediate_size=96),
    )
    with pytest.raises(ValueError, match="3 parts of 32 columns cannot share a width of 32 equally"):
        heads.align_neurons(divides_both, task(), settings(), groups=3)
