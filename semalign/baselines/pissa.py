"""PiSSA: LoRA that starts at the student's own principal components. The control for Seeking."""

from __future__ import annotations

from dataclasses import replace

from semalign.alignment import TransferConfig, TransferResult
from semalign.baselines import sft
from semalign.models import Pair
from semalign.supervision import TaskData


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """SFT from B = U_r S_r^(1/2), A = S_r^(1/2) V_r' of each weight, with BA taken out of it first (Meng 2024; peft's).

    Scaling is 1, as for Seeking: with both factors large from the start a larger one would only raise the rate.
    """
    config = config or TransferConfig()
    return sft.transfer(pair, data, replace(config, adapters="pissa", lora_alpha=config.lora_rank))
