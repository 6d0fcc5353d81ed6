"""The untouched student."""

from __future__ import annotations

import time

from semalign.alignment import TransferConfig, TransferResult, costs
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """The student as it is: what every other method has to beat. ``data`` and ``config`` are not read."""
    start = time.perf_counter()
    student = pair.load_student().eval()
    return TransferResult(student, [], costs(wall_s=time.perf_counter() - start), [])
