"""SemAlign with the map that keeps logits, W_S^+ W_T: the projector that DSKDv2 starts from."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """SemAlign, but for the map. Credit: DSKDv2 (arXiv 2504.11426)."""
    return alignment.transfer(pair, data, replace(config or TransferConfig(), map="logit"))
