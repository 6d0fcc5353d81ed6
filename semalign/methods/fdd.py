"""FDD: the teacher's way through its layers, each read by the final norm and head, and the turns of that way."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from semalign import alignment
from semalign.lm.examples import TaskData, collate, supervised
from semalign.lm.hooks import capture, head_logits
from semalign.lm.parts import Model, decoder, decoder_layers, final_norm, head_weight
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.supervision import Source, SupervisionCache
from semalign.training.config import TransferConfig, TransferResult
from semalign.training.loop import Stage
from semalign.training.losses import LOGITS


def transfer(
    pair: Pair,
    data: TaskData,
    config: TransferConfig | None = None,
    *,
    paired_layers: int = 4,
    trajectory_weight: float = 1.0,
    delta_weight: float = 1.0,
) -> TransferResult:
    """Feature dynamics distillation (FDD, ACL 2025, 2025.acl-long.1125) beside labels and logits.

    At ``paired_layers`` layers of each model, evenly spaced and the last one with them (all, of a model with fewer),
    the stream is read by the model's own final norm and head. The loss is CE and KL in equal parts, as in ``logit_kd``,
    plus KL between these distributions (the trajectory) and 1 - cos between the changes of these logits from one paired
    layer to the next (the delta), each a mean over layers. LoRA on all layers.

    The teacher runs once; of it the states are cached, and its final norm and head stay in memory with the student.

    Raises:
        ValueError: fewer than one paired layer, or as :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    if paired_layers < 1:
        raise ValueError(
            f"paired_layers={paired_layers}: FDD compares at least one layer of each model, so choose 1 or more"
        )
    start = time.perf_counter()
    config = replace(
        config or TransferConfig(), layers="all", teacher_layers=None, interface="stream", schedule="joint",
        projection=None, layer_weight=1.0, output_loss="kl", output_weight=0.5, label_weight=0.5,
    )  # fmt: skip
    with alignment.workplace(config) as scratch:
        given, watched = alignment.examples_of(pair, data, config)
        encoded = given + watched
        n_student, head, _ = alignment.read_off(pair, config)
        teacher = pair.load_teacher().eval()
        vocabulary, n_teacher = min(len(head), len(head_weight(teacher))), len(decoder_layers(teacher))
        paired = evenly(n_teacher, n_student, paired_layers)
        supervision = SupervisionCache.build(
            config.cache_folder or scratch / "supervision",
            teacher,
            encoded,
            [Source(t, t, point="stream") for t, _ in paired],
            dtype=config.target_dtype,
            top_k=min(config.top_k, vocabulary),
            vocabulary=vocabulary,
        )
        read_teacher = lens(teacher, copied=True)
        del teacher
        gc.collect()
        student, layers = pair.load_student().eval(), tuple(range(1, n_student + 1))
        output = alignment.objective_of(
            replace(config, layer_weight=0.0), student, encoded, supervision, layers, vocabulary
        )
        read_student = lens(student)

        def terms(stage: Stage, examples: list[int]) -> dict[str, Tensor]:
            with capture(student, [(k, "stream") for _, k in paired]) as seen:
                sums = output(stage, examples)
            mask = supervised(collate([encoded[i] for i in examples], 0, student.device)["labels"])
            rows = supervision.rows(examples)
            ours = torch.stack([seen[k, "stream"][mask] for _, k in paired], 1)
            targets = [supervision.target(j, rows) for j in range(len(paired))]
            theirs = torch.stack([h * norm[:, None] for h, norm in targets], 1).to(student.device)
            with torch.autocast(student.device.type, enabled=False):
                trajectory, delta = dynamics(ours, theirs, read_student, read_teacher, vocabulary)
            sums |= {"trajectory": trajectory.sum(), "delta": delta.sum()}
            sums["layer_loss"] = trajectory_weight * sums["trajectory"] + delta_weight * sums["delta"]
            return {name: value for name, value in sums.items() if name not in ("cos", "norm_ratio")}

        said = f"fdd {paired} {trajectory_weight} {delta_weight}"
        result = alignment.fit(
            student, encoded, len(given), config, layers, supervision, terms, scratch, objective=said
        )
    result.cost["wall_s"] = time.perf_counter() - start
    return result


def evenly(n_teacher: int, n_student: int, count: int) -> list[tuple[int, int]]:
    """``count`` pairs of teacher and student layers, from 1, at equal shares of both depths, the last ones a pair."""
    count = min(count, n_teacher, n_student)
    return [(j * n_teacher // count, j * n_student // count) for j in range(1, count + 1)]


def lens(model: Model, *, copied: bool = False) -> Callable[[Tensor], Tensor]:
    """From streams (..., D) to logits (..., m) float32 by the model's final norm and head, or by copies of the two."""
    parts: Any = (final_norm(model), model.get_output_embeddings())  # type: ignore[operator]
    norm, head = copy.deepcopy(parts) if copied else parts
    for p in (*norm.parameters(), *head.parameters()) if copied else ():
        p.requires_grad_(False)
    config, dtype = decoder(model).config, head.weight.dtype
    return lambda states: head_logits(head, config, norm(states.to(dtype)))


def dynamics(
    student: Tensor,
    teacher: Tensor,
    read_student: Callable[[Tensor], Tensor],
    read_teacher: Callable[[Tensor], Tensor],
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Trajectory (nats) and delta (1 - cos) terms (n,) of streams (n, J, D_S) and (n, J, D_T) at J paired layers.

    Logits of both models are read over the first ``vocabulary`` tokens, some positions at once, and again backwards.
    """

    def part(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        z, goal = read_student(ours)[..., :vocabulary], read_teacher(theirs)[..., :vocabulary]
        logq, logp = z.log_softmax(-1), goal.log_softmax(-1)
        trajectory = (logp.exp() * (logp - logq)).sum(-1).mean(1)
        turns = 1 - F.cosine_similarity(z.diff(dim=1), goal.diff(dim=1), dim=-1)
        return trajectory, turns.mean(1) if turns.shape[1] else torch.zeros_like(trajectory)

    chunk = max(1, LOGITS // (2 * student.shape[1] * vocabulary))
    pieces = list(zip(student.split(chunk), teacher.split(chunk), strict=True))
    if len(pieces) == 1:
        return part(*pieces[0])
    read = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat([trajectory for trajectory, _ in read]), torch.cat([delta for _, delta in read])


METHODS = {
    "fdd": Method(
        "layers' logits and their changes, then KD", transfer, "train", "LoRA on all layers", "states of 4, logits",
        True, colour="#88aaff",
    )
}  # fmt: skip
