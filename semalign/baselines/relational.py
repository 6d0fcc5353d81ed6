"""Relational distillation: the geometry between tokens at the same layer pair, which needs no map at all."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Squared difference of the centred Gram matrices of unit states in each sequence, beside the labels."""
    config = replace(config or TransferConfig(), map=None, layer_loss="relational", output_loss="ce")
    return alignment.transfer(pair, data, config)
