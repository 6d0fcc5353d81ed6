"""Logit distillation: the labels, and the teacher's distribution at every supervised position."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, divergence: str = "kl"
) -> TransferResult:
    """CE + D(teacher, student) in equal parts, LoRA on every layer (Hinton 2015, temperature 1).

    Args:
        divergence: ``kl`` (forward), ``reverse_kl`` or ``jsd``. The teacher's top-k log-probabilities and the mass of
            its rest are computed once; the rest is one bin.
    """
    config = config or TransferConfig()
    half = replace(config, layers="all", layer_weight=0.0, output_loss=divergence, output_weight=0.5, label_weight=0.5)
    return alignment.transfer(pair, data, half)
