"""SemAlign between two vocabularies: with one it is SemAlign to the bit; with two, targets stand where both read."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from semalign import alignment
from semalign.classroom import task_data
from semalign.lm.examples import TaskData, encode, supervised
from semalign.lm.parts import head_weight, norm_gain
from semalign.methods import REGISTRY, across
from semalign.methods.registry import run
from semalign.models import Pair, load_pair
from semalign.profiles import TrialSettings
from semalign.semantics import semantic_map
from semalign.training.config import TransferConfig, TransferResult
from semalign.vocabularies import shared_tokens

CONFIG = TransferConfig(
    layers=(2,), epochs=1, batch=4, lr=1e-3, map="logit", output_loss="ce", interface="residual", max_length=256
)
BYTES = {"source": "random", "seed": 1, "config": {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
}}  # fmt: skip
PICO = {"source": "pico", "id": "pico-s"}


@cache
def data() -> TaskData:
    whole = task_data("gsm8k")
    return TaskData("gsm8k", whole.train[:8], extract=whole.train[8:10], validation=whole.validation[:3])


@cache
def two() -> Pair:
    """A teacher with a token a byte, and a student with Pico's vocabulary."""
    return load_pair(TrialSettings(teacher=BYTES, student=PICO, vocabularies="shared"))  # type: ignore[arg-type]


@cache
def done(**changes: Any) -> TransferResult:
    return across.transfer(two(), data(), replace(CONFIG, **changes))


def same(one: TransferResult, other: TransferResult) -> bool:
    theirs = dict(other.student.named_parameters())
    return all(torch.equal(p, theirs[n]) for n, p in one.student.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"layers": (2, 3)}, {"targets": "scrambled"}, {"layer_loss": "mse"}])
def test_with_one_tokenizer_on_both_sides_it_is_semalign_bit_for_bit(changes: dict[str, Any]) -> None:
    one = load_pair(TrialSettings(teacher={"source": "pico", "id": "pico-s-1"}, student=PICO))  # type: ignore[arg-type]
    config = replace(CONFIG, **changes)
    # teachers map through every row here; the shared tokens leave the roles out
    matrix = semantic_map(head_weight(one.load_teacher()), head_weight(one.load_student()), kind="logit")
    expected = alignment.transfer(one, data(), replace(config, map=matrix))
    found = across.transfer(replace(one, teacher_tokenizer=one.tokenizer), data(), replace(config, map=matrix))
    assert same(found, expected) and found.layers == expected.layers
    names = ("loss", "layer_loss", "output_loss", "cos", "norm_ratio")
    assert [[r[n] for n in names] for r in found.log] == [[r[n] for n in names] for r in expected.log]


def test_without_a_second_tokenizer_it_is_semalign() -> None:
    one = replace(two(), teacher_tokenizer=None, load_teacher=two().load_student)
    assert same(across.transfer(one, data(), CONFIG), alignment.transfer(one, data(), CONFIG))


def test_a_map_of_shared_tokens_pairs_rows_by_their_text() -> None:
    pair = two()
    theirs, ours = (head_weight(m) for m in (pair.load_teacher(), pair.load_student()))
    shared = shared_tokens(pair.teacher_tokenizer, pair.tokenizer, len(theirs), len(ours))  # type: ignore[arg-type]
    matrix = across.shared_map(shared, theirs, ours, kind="logit")
    assert matrix.shape == (128, 32)
    pinv = torch.linalg.pinv(ours[shared.student].double()) @ theirs[shared.teacher].double()
    torch.testing.assert_close(matrix.double(), pinv, rtol=1e-3, atol=1e-5)


def test_a_head_in_another_order_and_a_turned_stream_is_mapped_back_by_the_shared_tokens_alone() -> None:
    """What is known: the teacher is the student with its tokens renumbered and its stream turned by Q."""
    pair = two()
    student = pair.load_student()
    head, gain = head_weight(student), norm_gain(student)
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    theirs = ((head * gain).double() @ turn)[order]  # row j is the student's token order[j]
    own = shared_tokens(pair.tokenizer, pair.tokenizer)
    shared = replace(own, teacher=order.argsort()[own.student])
    for kind in ("logit", "tight", "procrustes"):
        found = across.shared_map(shared, theirs, (head * gain).double(), kind=kind)
        torch.testing.assert_close(found, turn, rtol=0, atol=1e-6)
    by_number = semantic_map(theirs, (head * gain).double(), kind="logit")
    assert (by_number - turn).norm() > 0.5 * turn.norm()


def test_training_nears_targets_at_matched_positions_and_the_output_term_counts_everywhere() -> None:
    result = done(epochs=4)
    first, last = ([r for r in result.log if r["split"] == "validation"][at] for at in (0, -1))
    assert last["layer_loss"] < first["layer_loss"] and last["output_loss"] < first["output_loss"]
    # labels alone see the same output loss before the first step
    labels = REGISTRY["sft_layer"].transfer(two(), data(), replace(CONFIG, epochs=4))
    assert labels.log[0]["output_loss"] == pytest.approx(first["output_loss"], rel=1e-5)
    assert result.layers == labels.layers == (2,)


def test_the_layer_term_is_the_mean_over_matched_positions() -> None:
    """Against the same by hand: one example, no output loss."""
    pair, one = two(), TaskData("one", data().train[:1])
    config = replace(CONFIG, output_loss="none", layer_loss="mse", target_dtype="float32")
    result = across.transfer(pair, one, config)
    theirs, ours = (encode(t, one.train, max_length=256) for t in (pair.teacher_tokenizer, pair.tokenizer))  # type: ignore[arg-type]
    (at,) = across.matched(one.train, (pair.teacher_tokenizer, theirs), (pair.tokenizer, ours))  # type: ignore[arg-type]
    assert len(at) < int(supervised(ours[0].labels).sum()) < int(supervised(theirs[0].labels).sum()) or len(at) > 3
    teacher, student = pair.load_teacher(), pair.load_student()
    shared = shared_tokens(pair.teacher_tokenizer, pair.tokenizer, 259, 2048)  # type: ignore[arg-type]
    matrix = across.shared_map(shared, head_weight(teacher), head_weight(student), kind="logit")

    def residual(model: Any, ids: torch.Tensor, k: int) -> torch.Tensor:
        states = model(ids[None], output_hidden_states=True).hidden_states  # the last one is normalised: k is not last
        return states[k][0] - states[k - 1][0]

    with torch.no_grad():
        h_t = residual(teacher, theirs[0].input_ids, 1 if len(teacher.model.layers) < 4 else 2)[at[:, 0]]
        h_s = residual(student, ours[0].input_ids, 2)[at[:, 1]]
    target = h_t @ matrix.T
    expected = ((h_s - target).square().sum(-1) / target.square().sum(-1)).mean()
    assert result.log[0]["layer_loss"] == pytest.approx(float(expected), rel=1e-3)


def test_controls_differ_from_it_and_a_seed_repeats_it() -> None:
    assert same(done(), across.transfer(two(), data(), CONFIG))
    assert not same(done(), done(targets="scrambled")) and not same(done(), done(targets="random"))


def test_attribution_chooses_a_layer_on_the_teachers_own_tokens() -> None:
    chosen = done(layers=None)
    assert len(chosen.layers) == 1 and chosen.layers[0] in (1, 2, 3, 4)


def test_the_registry_lets_two_vocabularies_through_to_it() -> None:
    assert REGISTRY["across"].vocabularies == "shared"
    assert same(run(REGISTRY["across"], two(), data(), CONFIG, {"layers": [2]}), done())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_loss": "kl"}, "output_loss='kl' is not for a pair of two vocabularies: choose ce or cosine"),
        ({"projection": "random"}, "projection='random' is not for a pair of two vocabularies"),
        ({"map": None}, r"map gives a matrix of shape \(32, 32\), and this pair needs \(D_S, D_T\) = \(128, 32\)"),
    ],
)
def test_what_needs_one_vocabulary_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        across.transfer(two(), data(), replace(CONFIG, **changes))


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="has no training examples"):
        across.transfer(two(), TaskData("none", ()), CONFIG)
