"""States first, labels after: the layers are aligned for a while, and then nothing of the alignment is left."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

from semalign import alignment
from semalign.lm.examples import TaskData
from semalign.methods.registry import Method
from semalign.methods.settings import SFT
from semalign.models import Pair
from semalign.training.config import TransferConfig, TransferResult


def transfer(
    pair: Pair, data: TaskData, config: TransferConfig | None = None, *, share: float = 0.34
) -> TransferResult:
    """A ``share`` of the epochs towards the states of all layers, without a label; the rest with labels alone.

    The form in which published work finds states to help: each layer's contribution to the stream, through the logit
    map, as a start that the task then moves on from. Both parts train adapters on all layers; the second finds the
    first's merged into the weights.

    Raises:
        ValueError: fewer than two epochs, which leave nothing for one of the parts, or a share that is none.
    """
    config = config or TransferConfig()
    if not 0 < share < 1 or config.epochs < 2:
        raise ValueError(
            f"a warm-up of share {share:g} needs 0 < share < 1 and two epochs or more: got {config.epochs}"
        )
    folders = {part: Path(config.folder, part) if config.folder else None for part in ("states", "labels")}
    start, epochs = time.perf_counter(), min(config.epochs - 1, max(1, round(share * config.epochs)))
    towards = replace(
        config, layers="all", teacher_layers=None, interface="residual", map="logit", output_loss="none",
        label_weight=0.0, epochs=epochs,
        folder=folders["states"],
    )  # fmt: skip
    first = alignment.transfer(pair, data, towards)
    warm = Pair(pair.name, pair.load_teacher, lambda: copy.deepcopy(first.student), pair.tokenizer)
    result = SFT(warm, data, replace(config, epochs=config.epochs - epochs, folder=folders["labels"]))
    for spent in ("inputs_s", "train_s", "teacher_tokens", "student_tokens"):
        result.cost[spent] += first.cost[spent]
    result.cost["cached_bytes_per_token"] = first.cost["cached_bytes_per_token"]
    result.cost["wall_s"] = time.perf_counter() - start
    return replace(result, log=[*first.log, *result.log])


METHODS = {
    "warm_up": Method(
        "states first, then labels", transfer, "train", "LoRA on all layers", "states of all layers", True,
        colour="#8822cc", least_epochs=2,
    )
}  # fmt: skip
