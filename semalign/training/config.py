"""What decides a training run, what it gives back, and what it costs."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from semalign.training.losses import LAYER_LOSSES, OUTPUT_LOSSES

CHOICES = {
    "interface": ("mlp", "attention", "residual", "stream"),
    "layer_loss": tuple(LAYER_LOSSES),
    "output_loss": (*OUTPUT_LOSSES, "none"),
    "targets": ("teacher", "random", "scrambled"),
    "trained": ("lora", "layer"),
    "schedule": ("joint", "frontier"),
    "lr_schedule": ("linear", "constant"),
}


@dataclass(frozen=True, eq=False)
class TransferConfig:
    """The paper's method by default (section 4 and appendix A); where the paper is silent the default is ours.

    Ours: ``lora_alpha`` 32, linear decay after 3 % warm-up, no weight decay, gains not folded into the map.
    """

    layers: tuple[int, ...] | str | None = None  # student layers k, or "all"; None: the attribution's critical pair
    teacher_layers: tuple[int, ...] | None = None  # one for each of ``layers``; None: the depth rule l(k)
    interpolate: bool = False  # the exact depth between two teacher layers instead of l(k)
    attribution_point: str = "stream"
    attribution_reduce: str = "abs"
    map: str | Tensor | None = "paper"  # a kind of ``semantic_map``, M (D_S, D_T) itself, or None for the identity
    fold_gain: bool = False
    ridge: float = 0.0
    interface: str = "mlp"
    layer_loss: str = "cosine"
    output_loss: str = "cosine"
    layer_weight: float = 1.0
    output_weight: float = 1.0
    label_weight: float = 0.0  # of a cross-entropy with the labels beside the output loss
    targets: str = "teacher"  # controls: random directions, or the teacher's states at other positions
    projection: Tensor | str | None = None  # P (D', D_S) or "random", trained with k: P h_k is compared with the target
    trained: str = "lora"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ("up_proj", "down_proj", "v_proj", "o_proj")
    adapters: Mapping[str, tuple[Tensor, Tensor]] | str | None = None  # LoRA's start: (B, A) a module, or "pissa"
    schedule: str = "joint"  # frontier: the layers one after another, shallow to deep, each for all epochs
    epochs: int = 5
    batch: int = 64
    micro_batch: int = 16
    lr: float = 3e-4
    lr_schedule: str = "linear"
    warmup: float = 0.03
    max_length: int = 512
    top_k: int = 64  # teacher logits kept for a divergence; ``reverse_kl`` keeps all where they fit
    target_dtype: str = "float16"
    watch: bool = True  # the validation losses before training and after each epoch, into the log
    seed: int = 0
    folder: str | Path | None = None  # checkpoints; an interrupted run with the same inputs resumes from here
    cache_folder: str | Path | None = None  # supervision, shared between runs
    checkpoint_every: int = 50  # steps

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.teacher_layers is not None and len(self.teacher_layers) != len(self.layers or ()):
            raise ValueError("teacher_layers names one teacher layer for each of layers: give both, of one length")
        if isinstance(self.projection, str) and self.projection != "random":
            raise ValueError(f'projection={self.projection!r} is neither "random" nor a matrix')
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f'layers={self.layers!r} is neither "all" nor a tuple of layer numbers')


@dataclass
class TransferResult:
    """The trained student (a plain transformers model), the parameters that changed, the cost and one record a step.

    ``layers`` names the student layers that were trained, from 1.
    """

    student: PreTrainedModel
    trained: list[str]
    cost: dict[str, float]
    log: list[dict[str, Any]]
    layers: tuple[int, ...] = ()


class DivergedError(ValueError):
    """Training stopped on a bad loss; ``student`` is the student with the last good weights."""

    def __init__(self, message: str, student: PreTrainedModel) -> None:
        super().__init__(message)
        self.student = student


def costs(**known: float) -> dict[str, float]:
    """What every method reports: seconds, bytes, tokens and trained numbers; what it did not spend is 0.

    ``wall_s`` all of it, ``inputs_s`` and ``train_s`` parts of it; ``peak_memory_bytes`` of this process so far;
    ``teacher_tokens`` and ``student_tokens`` read; ``cached_bytes_per_token`` on disk a supervised position.
    """
    names = ("wall_s", "inputs_s", "train_s", "teacher_tokens", "student_tokens", "trainable_parameters")
    none = dict.fromkeys((*names, "cached_bytes_per_token"), 0.0)
    return {**none, "peak_memory_bytes": peak_memory(), **known}


def peak_memory() -> float:
    """Peak bytes of this process so far (of the GPU where one is in use)."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
