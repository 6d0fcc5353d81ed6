"""SemAlign, its rivals and its controls: one file a method, one ``transfer(pair, data, config)``, one row here.

All methods train on ``data.train`` with the same epochs, batch, rate and seed of one ``TransferConfig``, on LoRA of the
same rank and modules, and report the same costs. What a method fixes of the configuration is in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from semalign.alignment import TransferConfig, TransferResult
from semalign.alignment import transfer as semalign
from semalign.baselines import (
    controls,
    fitnets,
    laten,
    logit_kd,
    logit_map,
    none,
    pissa,
    relational,
    seeking,
    seq_kd,
    sft,
    sft_layer,
    ted,
)
from semalign.models import Pair
from semalign.supervision import TaskData


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: what it does, on which data, what trains, and what it takes from the teacher."""

    title: str
    transfer: Callable[[Pair, TaskData, TransferConfig | None], TransferResult]
    data: str  # splits that it reads
    trains: str
    teacher: str
    labels: bool  # whether it learns from the examples' responses as labels


_ALL, _K = "LoRA on all layers", "LoRA on layer k"
_TARGETS = "states at l(k)"
_SEEDS = "align, extract, train"
_AS_RELEASED = partial(laten.transfer, released=True)
REGISTRY: dict[str, Method] = {
    "none": Method("the untouched student", none.transfer, "-", "nothing", "-", False),
    "sft": Method("supervised LoRA", sft.transfer, "train", _ALL, "-", True),
    "sft_layer": Method("supervised LoRA, layer k alone", sft_layer.transfer, "train", _K, "chooses k", True),
    "pissa": Method("SFT from the student's principal components", pissa.transfer, "train", _ALL, "-", True),
    "logit_kd": Method("labels and KL to the teacher", logit_kd.transfer, "train", _ALL, "top-k logits", True),
    "seq_kd": Method("SFT on the teacher's answers", seq_kd.transfer, "train", _ALL, "its answers", False),
    "fitnets": Method("hidden states through a learned P", fitnets.transfer, "train", f"{_K}, P", _TARGETS, True),
    "relational": Method("token-token geometry, no map", relational.transfer, "train", _K, _TARGETS, True),
    "ted": Method("task-aware filters, then KD", ted.transfer, "train", f"{_K}, filters", f"{_TARGETS}, logits", True),
    "semalign": Method("SemAlign as in the paper", semalign, "train, extract", _K, _TARGETS, True),
    "logit_map": Method("SemAlign with the logit map", logit_map.transfer, "train, extract", _K, _TARGETS, True),
    "seeking": Method("SFT from the teacher's weights", seeking.transfer, "train, extract", _ALL, "weights", True),
    "laten": Method("injected neurons", laten.transfer, _SEEDS, "hypernetwork", "weights", True),
    "laten_released": Method("the same as released", _AS_RELEASED, _SEEDS, "hypernetwork", "weights", True),
    "random_target": Method("SemAlign towards noise", controls.random_target, "train", _K, "lengths alone", True),
    "scrambled_tokens": Method(
        "SemAlign towards other tokens", controls.scrambled_tokens, "train", _K, _TARGETS, True
    ),
}  # fmt: skip
