"""FitNets: the same layer pair through a learned projection in place of a computed map."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Layer loss between P h_k and h_T in the teacher's width, P (D_T, D_S) trained with layer k, beside the labels.

    FitNets (Romero 2015) minimises a squared distance first and the task after it; here both go together, as in
    SemAlign, and ``config.layer_loss`` says cosine or MSE.
    """
    config = replace(config or TransferConfig(), map=None, projection="random", output_loss="ce")
    return alignment.transfer(pair, data, config)
