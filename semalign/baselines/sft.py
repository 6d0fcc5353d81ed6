"""Supervised fine-tuning: the control that decides everything."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Cross-entropy with the labels, LoRA on every layer, no teacher."""
    config = config or TransferConfig()
    return alignment.transfer(pair, data, replace(config, layers="all", layer_weight=0.0, output_loss="ce"))
