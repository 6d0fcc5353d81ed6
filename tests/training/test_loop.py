"""The loop's schedule."""

from __future__ import annotations

import pytest

from semalign.training.config import TransferConfig
from semalign.training.loop import scheduled_rate


def test_the_rate_warms_up_then_falls_or_stays() -> None:
    config = TransferConfig(lr=1.0, warmup=0.2)
    assert [scheduled_rate(config, s, 10) for s in (1, 2, 3, 10)] == pytest.approx([0.5, 1.0, 1.0, 1 / 8])
    flat = TransferConfig(lr=1.0, warmup=0.0, lr_schedule="constant")
    assert [scheduled_rate(flat, s, 10) for s in (1, 10)] == [1.0, 1.0]
