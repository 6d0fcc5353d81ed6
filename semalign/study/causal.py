"""Do swaps of states teach what states do not? The arms of that comparison, and a teacher whose change is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from semalign.lm.examples import Encoded, TaskData
from semalign.lm.parts import Model, decoder_layers, head_weight
from semalign.methods import REGISTRY
from semalign.methods.interchange import movements, partners_of
from semalign.models import Pair
from semalign.study.regimes import Way
from semalign.training.config import TransferConfig

EXAMPLES, STEPS = 32, 120
"""Of every arm: how many examples, and about how many steps; half of these do not bring out what labels teach."""

ARMS = {
    "labels": Way("sft_layer", {}, "sft_layer"),
    "twin": Way("twin"),  # SemAlign's own output loss without the layer term, as it was tuned
    "semantic": Way("semalign", {"interface": "stream", "map": "logit", "output_loss": "ce"}, "sft_layer"),
    "causal": Way("interchange", {}, "sft_layer"),
    "both": Way("semantic_and_causal", {}, "sft_layer"),
    "both, scrambled": Way("scrambled_pairs", {}, "sft_layer"),
}
"""By name: all but the twin have cross-entropy with the labels, one layer, and the rate that labels have there."""

PAIRS = {
    "both minus labels": ("both", "labels"),
    "both minus semantic": ("both", "semantic"),
    "both minus scrambled": ("both", "both, scrambled"),
    "causal minus labels": ("causal", "labels"),
    "semantic minus labels": ("semantic", "labels"),
}
"""What the chapter judges, by name: one arm minus another."""

TERMS: dict[str, dict[str, Any]] = {
    "semantic": {"causal_weight": 0.0},
    "causal": {"semantic_weight": 0.0},
    "both": {},
    "both, scrambled": {"scrambled": True},
}
"""Options of the interchange for each of its terms."""


def planted(pair: Pair, teacher: PreTrainedModel) -> Pair:
    """A pair whose teacher is this model, in copies."""
    return Pair("planted", lambda: copy.deepcopy(teacher), pair.load_student, pair.tokenizer)


def along(
    pair: Pair, teacher: PreTrainedModel, data: TaskData, config: TransferConfig, deltas: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Both terms, before any training, of students that are ``delta`` of the way from the student to a planted teacher.

    ``data`` has a validation example or more, at which they are read; ``config`` names one layer of both.
    """
    found = {}
    for delta in deltas:

        def part(delta: float = delta) -> PreTrainedModel:
            model = pair.load_student()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.lerp_(teacher.get_parameter(name).to(weight), delta)
            return model

        kin = replace(planted(pair, teacher), load_student=part)
        one = replace(config, epochs=1, target_dtype="float32")
        log = REGISTRY["semantic_and_causal"].transfer(kin, replace(data, train=data.train[:2]), one).log
        found[delta] = {term: log[0][term] for term in ("semantic", "causal")}
    return found


def recovered(
    pair: Pair, teacher: PreTrainedModel, data: TaskData, config: TransferConfig, read: Callable[[Model], Tensor]
) -> dict[str, Tensor]:
    """What ``read`` says of students taught by each of ``TERMS`` from a planted teacher, without a label or an output.

    They are made one after another, and only what was read is kept.
    """
    transfer = REGISTRY["semantic_and_causal"].transfer
    alone = replace(config, output_weight=0.0)
    return {name: read(transfer(planted(pair, teacher), data, alone, **of).student) for name, of in TERMS.items()}


def movement_sizes(model: Model, encoded: Sequence[Encoded], seed: int) -> list[Tensor]:
    """How far a model's predictions of each response move when the question's states after a layer are another's.

    A tensor a layer, layer 1 first: the divergence in nats of the prediction with the swap from that without, at every
    supervised position.
    """
    vocabulary, partners = len(head_weight(model)), partners_of([len(encoded)], seed)
    sizes = []
    for layer in range(1, len(decoder_layers(model)) + 1):
        moved = movements(model, encoded, partners, layer, min(64, vocabulary), vocabulary)
        sizes.append((moved.after.exp() * (moved.after - moved.before)).sum(-1))
    return sizes
