"""Supervised fine-tuning of layer k alone: SemAlign's budget without the teacher's states."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Cross-entropy with the labels at the layer that SemAlign would train; the teacher's only part is to choose it."""
    return alignment.transfer(pair, data, replace(config or TransferConfig(), layer_weight=0.0, output_loss="ce"))
