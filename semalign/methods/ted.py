"""TED: filters that keep what the task needs, then distillation between the filtered states."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semalign import alignment
from semalign.lm.examples import IGNORED, TaskData, encode
from semalign.lm.hooks import logits_of
from semalign.lm.parts import Model, decoder_layers, final_norm, head_weight
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.supervision import Source, SupervisionCache
from semalign.training.config import TransferConfig, TransferResult


def transfer(
    pair: Pair,
    data: TaskData,
    config: TransferConfig | None = None,
    *,
    filter_steps: int = 200,
    filter_lr: float = 1e-2,
) -> TransferResult:
    """Task-aware layer-wise distillation (Liang 2022) at the layer pair of SemAlign, read on the stream.

    Stage 1 trains a linear filter for each model, G_T (D_S, D_T) and G_S (D_S, D_S), with the task's cross-entropy and
    both models frozen. Both are read by the student's final norm and head, so that the filtered states of models of
    different widths can be compared; TED gives every filter a head of its own. Stage 2 minimises |G_S h_k - G_T h_T|^2,
    CE and KL; G_S trains on, G_T stays.
    """
    config = replace(config or TransferConfig(), interface="stream")
    start = time.perf_counter()
    encoded = encode(pair.tokenizer, data.train, max_length=config.max_length)
    student = pair.load_student().eval()
    n_student = len(decoder_layers(student))
    teacher = pair.load_teacher().eval()
    layers, sources = alignment.choose_layers(pair, teacher, data, n_student, config)
    if len(layers) > 1:
        raise ValueError(f"TED filters one layer pair here, and layers={layers}: name one layer")
    labels = torch.cat([e.labels[1:][e.labels[1:] != IGNORED] for e in encoded])
    with tempfile.TemporaryDirectory() as folder:
        of_teacher = SupervisionCache.build(folder, teacher, encoded, sources)
        width = of_teacher.arrays["target_0"].shape[1]
        del teacher
        gc.collect()
        of_student = SupervisionCache.build(folder, student, encoded, [Source(layers[0], layers[0], point="stream")])
        filters = []
        for cache in (of_teacher, of_student):
            states, scale = _states(cache)
            g, loss = task_filter(states, labels, student, filter_steps, filter_lr, config.seed)
            filters.append((scale * g, loss))  # from here on the filter meets states as they are
    del student
    gc.collect()
    (g_t, teacher_loss), (g_s, student_loss) = filters
    spent = time.perf_counter() - start
    second = replace(
        config, layers=layers, teacher_layers=None, map=g_t, projection=g_s, layer_loss="mse",
        output_loss="kl", output_weight=0.5, label_weight=0.5,
    )  # fmt: skip
    result = alignment.transfer(pair, data, second)
    result.cost["wall_s"] += spent
    result.cost["teacher_tokens"] += of_teacher.teacher_tokens
    result.cost["trainable_parameters"] += g_t.numel()
    losses = {"teacher_filter_loss": teacher_loss, "student_filter_loss": student_loss}
    return replace(result, log=[{"split": "filters", "width": width, **losses}, *result.log])


def _states(cache: SupervisionCache) -> tuple[Tensor, float]:
    """c h (n, D) float32 of every supervised position, and the c that makes an entry's mean square 1 on average.

    A filter trained on c h is c G to the states themselves: without c in it the loss would depend on the unit in which
    a model keeps its stream, which its final norm does not see.
    """
    h, norm = cache.target(0, np.arange(int(cache.arrays["offsets"][-1])))
    size = norm.square().mean().sqrt()
    return h * (norm / size)[:, None] * h.shape[1] ** 0.5, float(h.shape[1] ** 0.5 / size)


def task_filter(
    states: Tensor, labels: Tensor, student: Model, steps: int, lr: float, seed: int, *, batch: int = 512
) -> tuple[Tensor, float]:
    """The filter G (D_S, D) for states (n, D) whose next tokens are ``labels`` (n,), and its last loss in nats.

    Minimises the cross-entropy of the student's head on norm(G h), with G in float32 whatever the student is in; the
    student does not change.
    """
    d_s, dtype = head_weight(student).shape[1], head_weight(student).dtype
    generator = torch.Generator().manual_seed(seed)
    device = next(student.parameters()).device
    g = (torch.randn(d_s, states.shape[1], generator=generator) / states.shape[1] ** 0.5).to(device).requires_grad_()
    optimizer = torch.optim.AdamW([g], lr=lr, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(labels), (min(batch, len(labels)),), generator=generator)
        z = logits_of(student, final_norm(student)((states[rows].to(device) @ g.T).to(dtype)))
        loss = F.cross_entropy(z, labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward(inputs=[g])
        optimizer.step()
    return g.detach().cpu(), float(loss.detach())


METHODS = {
    "ted": Method(
        "task-aware filters, then KD", transfer, "train", "LoRA on layer k, filters", "states at l(k), logits", True,
        colour="#441166",
    )
}  # fmt: skip
