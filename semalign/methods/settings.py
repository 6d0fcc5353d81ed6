"""The methods that are settings of one training loop, side by side: SemAlign itself, and what differs from it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from semalign import alignment
from semalign.lm.examples import TaskData
from semalign.methods.registry import Method, Transfer
from semalign.models import Pair
from semalign.training.config import TransferConfig, TransferResult, costs


def fixed(**settings: Any) -> Transfer:
    """SemAlign's training with these settings, whatever the configuration says of them."""

    def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
        return alignment.transfer(pair, data, replace(config or TransferConfig(), **settings))

    return transfer


def untouched(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """The student as it is: what every other method has to beat. ``data`` and ``config`` are not read."""
    start = time.perf_counter()
    student = pair.load_student().eval()
    return TransferResult(student, [], costs(wall_s=time.perf_counter() - start), [])


def pissa(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """SFT from B = U_r S_r^(1/2), A = S_r^(1/2) V_r' of each weight, with BA taken out of it first (Meng 2024; peft's).

    Scaling is 1, as for Seeking: with both factors large from the start a larger one would only raise the rate.
    """
    config = config or TransferConfig()
    return SFT(pair, data, replace(config, adapters="pissa", lora_alpha=config.lora_rank))


def logit_kd(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, divergence: str = "kl"
) -> TransferResult:
    """CE + D(teacher, student) in equal parts, LoRA on every layer (Hinton 2015, temperature 1).

    Args:
        divergence: ``kl`` (forward), ``reverse_kl`` or ``jsd``. The teacher's top-k log-probabilities and the mass of
            its rest are computed once; the rest is one bin.
    """
    halves = fixed(layers="all", layer_weight=0.0, output_loss=divergence, output_weight=0.5, label_weight=0.5)
    return halves(pair, data, config)


SFT = fixed(layers="all", layer_weight=0.0, output_loss="ce")
"""Cross-entropy with the labels, LoRA on every layer, no teacher: the control that decides everything."""

_ALL, _K, _STATES = "LoRA on all layers", "LoRA on layer k", "states at l(k)"

# A row's colour was found by a search that keeps any two apart to every kind of colour vision.
METHODS = {
    "none": Method(
        "the untouched student", untouched, "-", "nothing", "-", False, colour="#000000", tuned=False, seeded=False
    ),
    "sft": Method("supervised LoRA", SFT, "train", _ALL, "-", True, colour="#0072b2"),
    # SemAlign's budget without the teacher's states: the teacher's only part is to choose the layer.
    "sft_layer": Method(
        "supervised LoRA, layer k alone", fixed(layer_weight=0.0, output_loss="ce"), "train", _K, "chooses k", True,
        colour="#00ddff",
    ),
    # The control for Seeking.
    "pissa": Method("SFT from the student's principal components", pissa, "train", _ALL, "-", True, colour="#001199"),
    "logit_kd": Method("labels and KL to the teacher", logit_kd, "train", _ALL, "top-k logits", True, colour="#770044"),
    # FitNets (Romero 2015): the layer loss between P h_k and h_T in the teacher's width, P (D_T, D_S) trained with k.
    # Romero minimises a squared distance first and the task after it; here both go together, as in SemAlign.
    "fitnets": Method(
        "hidden states through a learned P", fixed(map=None, projection="random", output_loss="ce"), "train",
        f"{_K}, P", _STATES, True, colour="#bbdd66",
    ),
    "relational": Method(
        "token-token geometry, no map", fixed(map=None, layer_loss="relational", output_loss="ce"), "train", _K,
        _STATES, True, colour="#885544",
    ),
    "semalign": Method(
        "SemAlign as in the paper", alignment.transfer, "train, extract", _K, _STATES, True, colour="#d55e00",
        tuned=False,
    ),
    # The same again, for a profile to give hyperparameters to: what is printed and what was tuned stand side by side.
    "semalign_tuned": Method(
        "SemAlign tuned", alignment.transfer, "train, extract", _K, _STATES, True, colour="#ee77bb"
    ),
    # All of SemAlign but its layer term: what the states add to the output loss in layer k.
    "twin": Method(
        "SemAlign without its layer term", fixed(layer_weight=0.0), "train, extract", _K, "chooses k", True,
        colour="#ee22cc", follows="semalign_tuned",
    ),
    # W_S^+ W_T, the projector that DSKDv2 (arXiv 2504.11426) starts from.
    "logit_map": Method(
        "SemAlign with the logit map", fixed(map="logit"), "train, extract", _K, _STATES, True, colour="#aa0000"
    ),
    # Targets that carry no knowledge of the token at hand: what is left is regularisation.
    "random_target": Method(
        "SemAlign towards noise", fixed(targets="random"), "train", _K, "lengths alone", True, colour="#777788",
        follows="semalign_tuned",
    ),
    "scrambled_tokens": Method(
        "SemAlign towards other tokens", fixed(targets="scrambled"), "train", _K, _STATES, True, colour="#eebbbb",
        follows="semalign_tuned",
    ),
}  # fmt: skip
