"""SemAlign whose targets carry no knowledge of the token at hand: what is left is regularisation."""

from __future__ import annotations

from dataclasses import replace

from semalign import alignment
from semalign.alignment import TransferConfig, TransferResult
from semalign.models import Pair
from semalign.supervision import TaskData


def random_target(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Targets in random directions, each as long as the true one and the same at every epoch."""
    return alignment.transfer(pair, data, replace(config or TransferConfig(), targets="random"))


def scrambled_tokens(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """The teacher's states at other positions of the data: the right distribution of targets in a wrong order."""
    return alignment.transfer(pair, data, replace(config or TransferConfig(), targets="scrambled"))
