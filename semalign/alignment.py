"""Training layer k of the student on aligned targets (section 4.3), and nothing but layer k.

What lies below the lowest trained layer never changes, so its output is computed once; what lies above runs without
parameter gradients; heads and losses see supervised positions only. For the cosine of logits z = W h with a onehot no
logit is ever formed: cos = w_y . h / |R h| with R'R = W'W, one D x D factor instead of m x D.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from semalign.attribution import layer_attribution
from semalign.models import Model, Pair, decoder, decoder_layers, fingerprint, head_weight, norm_gain
from semalign.pairing import critical_pair, depth_pairs, interpolation
from semalign.semantics import semantic_map
from semalign.supervision import (
    Encoded,
    Source,
    SupervisionCache,
    TaskData,
    by_length,
    capture,
    collate,
    encode,
    logits_of,
    reserve,
    skip_layers,
    supervised,
)

CHOICES = {
    "interface": ("mlp", "attention", "residual", "stream"),
    "layer_loss": ("cosine", "mse", "relational", "fisher"),
    "output_loss": ("cosine", "ce", "kl", "reverse_kl", "jsd", "none"),
    "targets": ("teacher", "random", "scrambled"),
    "trained": ("lora", "layer"),
    "schedule": ("joint", "frontier"),
    "lr_schedule": ("linear", "constant"),
}
DIVERGENCES = ("kl", "reverse_kl", "jsd")  # the output losses that read the teacher's distribution
DIVERGED = 10.0  # a loss above this many first-epoch medians stops the run
LOGITS = 2**24  # logits in memory at once
TERMS = ("layer_loss", "output_loss", "label_loss")
EXACT_SVD = 1024  # widths up to this get an exact decomposition for PiSSA; wider ones subspace iteration
PROJECTION = "_projection"  # the name of P among the student's parameters while it trains
IN_MEMORY = 2**30  # bytes of cached layer inputs that stay in memory; more go to a file


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
    top_k: int = 64  # teacher logits kept for the output loss ``kl``
    target_dtype: str = "float16"
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
    """The trained student (a plain transformers model), the parameters that changed, the cost and one record a step."""

    student: PreTrainedModel
    trained: list[str]
    cost: dict[str, float]
    log: list[dict[str, Any]]


class DivergedError(ValueError):
    """Training stopped on a bad loss; ``student`` is the student with the last good weights."""

    def __init__(self, message: str, student: PreTrainedModel) -> None:
        super().__init__(message)
        self.student = student


@dataclass
class _Run:
    """What every step reads."""

    config: TransferConfig
    student: PreTrainedModel
    data: list[Encoded]  # training examples first, validation examples after them
    n_train: int
    supervision: SupervisionCache
    layers: tuple[int, ...]
    vocabulary: int
    key: str
    factor: Tensor | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    inputs_s: float = 0.0
    train_s: float = 0.0


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Transfer task knowledge from the pair's teacher to its student by latent semantic alignment (section 4).

    Teacher and student are never in memory together: the student is loaded for its head and freed, the teacher is
    loaded, run once and freed, then the student is loaded again and trained.

    Raises:
        ValueError: no training example, a layer that a model lacks, or a checkpoint of other inputs in ``folder``.
        DivergedError: a loss that is not finite, or above 10 times the first epoch's median.
    """
    config = config or TransferConfig()
    if not data.train:
        raise ValueError(f"task {data.name} has no training examples: transfer needs at least one")
    start = time.perf_counter()
    with ExitStack() as stack:
        scratch = Path(config.folder) if config.folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch.mkdir(parents=True, exist_ok=True)
        encoded = encode(pair.tokenizer, data.train + data.validation, max_length=config.max_length)
        layers, supervision, vocabulary = _supervise(pair, data, encoded, config, scratch)
        student = pair.load_student().eval()
        if isinstance(config.projection, str):
            config = replace(config, projection=_random_projection(supervision, student, config.seed))
        key = _run_key(config, student, supervision.key, layers, len(data.train))
        run = _Run(config, student, encoded, len(data.train), supervision, layers, vocabulary, key)
        run.factor = head_factor(student) if config.output_loss == "cosine" else None
        trained, n_trained = _train(run, scratch)
    cost = costs(
        wall_s=time.perf_counter() - start,
        inputs_s=run.inputs_s,
        train_s=run.train_s,
        teacher_tokens=float(supervision.teacher_tokens),
        student_tokens=float(run.tokens),
        trainable_parameters=float(n_trained),
        cached_bytes_per_token=supervision.bytes_per_token,
    )
    return TransferResult(student, trained, cost, run.log)


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


def _supervise(
    pair: Pair, data: TaskData, encoded: list[Encoded], config: TransferConfig, scratch: Path
) -> tuple[tuple[int, ...], SupervisionCache, int]:
    """The student layers to train, the teacher's targets for them, and the size of the shared vocabulary."""
    student = pair.load_student()
    n_student, head, gain = len(decoder_layers(student)), head_weight(student).clone(), norm_gain(student).clone()
    del student
    gc.collect()
    layers = _named(config, n_student)
    folder, divergence = config.cache_folder or scratch / "supervision", config.output_loss in DIVERGENCES
    if layers is not None and not config.layer_weight and not divergence:  # the labels alone: no teacher is needed
        return _checked(layers, n_student), SupervisionCache.build(folder, None, encoded, ()), len(head)
    teacher = pair.load_teacher()
    layers, sources = choose_layers(pair, teacher, data, n_student, config)
    vocabulary = min(len(head), len(head_weight(teacher)))
    matrix = config.map if isinstance(config.map, Tensor) else None
    if isinstance(config.map, str):
        gains: dict[str, Any] = {"teacher_gain": norm_gain(teacher), "student_gain": gain} if config.fold_gain else {}
        matrix = semantic_map(head_weight(teacher), head, kind=config.map, ridge=config.ridge, **gains)
    _check_widths(config, matrix, head.shape[1], head_weight(teacher).shape[1])
    supervision = SupervisionCache.build(
        folder,
        teacher,
        encoded,
        sources if config.layer_weight else (),
        matrix=matrix if config.layer_weight else None,
        dtype=config.target_dtype,
        top_k=min(config.top_k, vocabulary) if divergence else 0,
        vocabulary=vocabulary,
    )
    del teacher
    gc.collect()
    return layers, supervision, vocabulary


def _check_widths(config: TransferConfig, matrix: Tensor | None, d_s: int, d_t: int) -> None:
    """The target M h_T must be as wide as what it is compared with: h_k, or P h_k."""
    if not config.layer_weight:
        return
    given = (d_t, d_t) if matrix is None else tuple(matrix.shape)
    projection, compared = config.projection, given[0] if config.projection is not None else d_s
    if isinstance(projection, Tensor) and projection.shape != (compared, d_s):
        raise ValueError(f"projection is {tuple(projection.shape)}, and this pair needs {(compared, d_s)}")
    if given != (compared, d_t) and (matrix is not None or config.layer_loss != "relational"):
        raise ValueError(f"map gives a matrix of shape {given}, and this pair needs (D_S, D_T) = {(compared, d_t)}")


def choose_layers(
    pair: Pair,
    teacher: Model,
    data: TaskData,
    n_student: int,
    config: TransferConfig,
) -> tuple[tuple[int, ...], list[Source]]:
    """Student layers, shallow first, and the teacher source of each (section 4.1)."""
    n_teacher, layers = len(decoder_layers(teacher)), _named(config, n_student)
    if layers is None:
        examples = encode(pair.tokenizer, data.extract or data.align or data.train, max_length=config.max_length)
        scores = torch.zeros(n_teacher)
        for at in range(0, len(examples), config.micro_batch):
            batch = collate(examples[at : at + config.micro_batch], 0, head_weight(teacher).device)
            point, reduce = config.attribution_point, config.attribution_reduce
            part = layer_attribution(teacher, batch, point=point, reduce=reduce).cpu()
            scores += part * int(supervised(batch["labels"]).sum())
        layers = (critical_pair(int(scores.argmax()) + 1, n_teacher, n_student)[1],)
    ordered = _checked(layers, n_student)
    given = dict(zip(layers, config.teacher_layers or (), strict=False))
    sources = []
    for k in ordered:
        depth = given.get(k, depth_pairs(n_teacher, n_student)[k - 1])
        low, high, mix = interpolation(k, n_teacher, n_student) if config.interpolate else (depth, depth, 0.0)
        sources.append(Source(low, high, mix, config.interface))
    return ordered, sources


def _named(config: TransferConfig, n_student: int) -> tuple[int, ...] | None:
    """The student layers that ``config`` names by number or by "all"; None where attribution chooses."""
    return tuple(range(1, n_student + 1)) if isinstance(config.layers, str) else config.layers


def _checked(layers: tuple[int, ...], n_student: int) -> tuple[int, ...]:
    if not layers or len(set(layers)) != len(layers) or not all(1 <= k <= n_student for k in layers):
        raise ValueError(f"layers={layers} must name different layers of a student of {n_student} layers, from 1")
    return tuple(sorted(layers))


def layer_loss(
    kind: str, h: Tensor, target: Tensor, norm: Tensor, counts: Sequence[int], head: Tensor | None = None
) -> Tensor:
    """The layer term at each supervised position (n,) for h_k (n, D), h* (n, D') and the teacher's |h_T| (n,).

    ``cosine`` is the paper's 1 - cos(h_k, h*). ``mse`` is |h_k - M h_T|^2 / |M h_T|^2, which also fixes the length.
    ``relational`` compares, in each sequence (``counts`` positions each), the centred Gram matrices of the unit rows,
    as mean squared difference; the widths D and D' may differ. ``fisher`` is (z - z*)' (diag p - p p') (z - z*) / 2 in
    nats, for z = W h_k, z* = W M h_T, p = softmax(z*) and the student's ``head`` W (m, D): KL(z*, z) to second order.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(h, target, dim=-1)
    if kind == "mse":
        aligned = target * norm[:, None]
        return (h - aligned).pow(2).sum(-1) / aligned.pow(2).sum(-1)
    if kind == "fisher":
        assert head is not None
        aligned, weight = target * norm[:, None], head.detach().to(h.dtype)
        p, moved = (aligned @ weight.T).softmax(-1), (h - aligned) @ weight.T
        return ((p * moved.pow(2)).sum(-1) - (p * moved).sum(-1).pow(2)) / 2
    pairs = zip(h.split(list(counts)), target.split(list(counts)), strict=True)
    return torch.cat([(_gram(a) - _gram(b)).pow(2).mean().expand(len(a)) for a, b in pairs])


def _gram(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=-1)
    centred = unit - unit.mean(0)
    return centred @ centred.T


def head_factor(model: Model) -> Tensor | None:
    """R (D, D) float32 with R'R = W'W, so that |z| = |R h|; None where logits are not W h (bias, soft cap)."""
    config: Any = decoder(model).config
    head = model.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None):
        return None
    gram = sum(w.double().T @ w.double() for w in head.weight.detach().split(4096))
    values, vectors = torch.linalg.eigh(gram)
    return (values.clamp_min(0).sqrt()[:, None] * vectors.T).float()


def output_loss(run: _Run, final: Tensor, labels: Tensor, rows: np.ndarray, kind: str | None = None) -> Tensor:
    """The output term at each supervised position (n,) for normalised final states (n, D) and next tokens (n,)."""
    kind, student = kind or run.config.output_loss, run.student
    if kind == "none":
        return torch.zeros(len(labels), device=final.device)
    if kind == "cosine" and run.factor is not None:
        final = final.float()
        weight = student.get_output_embeddings().weight.detach()[labels].float()
        return 1 - (final * weight).sum(-1) / (final @ run.factor.T).norm(dim=-1)
    top = run.supervision.teacher_top(rows) if kind in DIVERGENCES else ()
    extra = [t.to(final.device) for t in top]

    def part(states: Tensor, y: Tensor, *teacher: Tensor) -> Tensor:
        z = logits_of(student, states)
        if kind == "ce":
            return F.cross_entropy(z, y, reduction="none")
        if kind == "cosine":
            return 1 - z.gather(1, y[:, None])[:, 0] / z.norm(dim=-1)
        return divergence(kind, z[:, : run.vocabulary], *teacher)

    chunk = max(1, LOGITS // student.get_output_embeddings().weight.shape[0])
    pieces = list(zip(*(t.split(chunk) for t in (final, labels, *extra)), strict=True))
    if len(pieces) == 1:
        return part(*pieces[0])
    return torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces])


def divergence(kind: str, z: Tensor, logp: Tensor, index: Tensor, tail: Tensor) -> Tensor:
    """Between teacher p and student q (n,), over the teacher's top-k tokens and one bin for the rest.

    ``kl`` is KL(p || q), ``reverse_kl`` is KL(q || p), ``jsd`` the mean of both against (p + q) / 2. Student logits z
    (n, m); the teacher's ``logp`` and ``index`` (n, k), and the mass of its rest ``tail`` (n,).
    """
    whole = z.log_softmax(-1)
    logq = whole.gather(1, index)
    if index.shape[1] < z.shape[1]:
        rest = whole.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
        logp, logq = torch.cat([logp, tail.clamp_min(1e-12).log()[:, None]], 1), torch.cat([logq, rest], 1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "kl":
        return kl(logp, logq)
    if kind == "reverse_kl":
        return kl(logq, logp)
    middle = torch.logaddexp(logp, logq) - math.log(2)
    return (kl(logp, middle) + kl(logq, middle)) / 2


@contextmanager
def partial_decoder(model: Model, first: int, last: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """A function (hidden, attention_mask) -> final states that runs layers first..last on layer ``first``'s input.

    The decoder's own forward runs, so positions and masks are the architecture's; ``hidden`` (B, T, D) enters at the
    layer itself, so that what the decoder does to its embeddings (scaling, added positions) has no effect.
    """
    layers = decoder_layers(model)
    feed: list[Tensor] = []

    def inject(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((feed[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": feed[0]})

    def forward(hidden: Tensor, attention_mask: Tensor) -> Tensor:
        feed[:] = [hidden]
        out = decoder(model)(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False)
        return out.last_hidden_state

    handle = layers[first - 1].register_forward_pre_hook(inject, with_kwargs=True)
    try:
        with skip_layers(model, [*range(1, first), *range(last + 1, len(layers) + 1)]):
            yield forward
    finally:
        handle.remove()


def layer_inputs(
    model: Model, data: Sequence[Encoded], first: int, folder: Path, batch_tokens: int = 2048
) -> Callable[[Sequence[int]], Tensor]:
    """Compute once what layer ``first`` receives for every token of ``data``; returns a reader of padded (B, T, D).

    The states stay in memory, or in a temporary file in ``folder`` where they are large.
    """
    config: Any = decoder(model).config
    weight = next(decoder_layers(model)[first - 1].parameters())
    offsets = [0, *np.cumsum([len(e.input_ids) for e in data]).tolist()]
    size = offsets[-1] * config.hidden_size
    if size * weight.element_size() <= IN_MEMORY:
        memory = torch.empty(size, dtype=weight.dtype)
    else:
        for stale in folder.glob(".inputs.*"):  # of a run that was killed
            stale.unlink()
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".inputs.")  # noqa: SIM115 (lives as long as the reader)
        reserve(file.fileno(), size * weight.element_size())
        memory = None

    def states() -> Tensor:  # a file is mapped anew at each use, so that its pages do not count as ours for long
        flat = memory if memory is not None else torch.from_file(file.name, True, size, dtype=weight.dtype)
        return flat.view(-1, config.hidden_size)

    def read(examples: Sequence[int]) -> Tensor:
        stored = states()
        parts = [stored[offsets[i] : offsets[i + 1]] for i in examples]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True).to(weight.device)

    above = range(first, len(decoder_layers(model)) + 1)
    with torch.no_grad(), capture(model, [(first, "input")]) as seen, skip_layers(model, above):
        for some in by_length(data, batch_tokens):
            batch = collate([data[i] for i in some], 0, weight.device)
            decoder(model)(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            stored = states()
            for row, i in enumerate(some):
                stored[offsets[i] : offsets[i + 1]] = seen[first, "input"][row, : len(data[i].input_ids)].cpu()
    return read


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches of example numbers: shuffled, of similar length within a batch, in random order.

    A function of its arguments alone, so that an interrupted run sees the same order.
    """
    order = np.random.default_rng((seed, epoch))
    shuffled = order.permutation(len(lengths)).tolist()
    pools = [sorted(shuffled[at : at + 8 * size], key=lambda i: lengths[i]) for at in range(0, len(shuffled), 8 * size)]
    found = [pool[at : at + size] for pool in pools for at in range(0, len(pool), size)]
    return [found[i] for i in order.permutation(len(found))]


def learning_rate(config: TransferConfig, step: int, total: int) -> float:
    """The rate of step 1..total: linear warm-up, then constant or linear to zero."""
    warm = math.ceil(config.warmup * total)
    if step <= warm:
        return config.lr * step / warm
    return config.lr if config.lr_schedule == "constant" else config.lr * (total - step + 1) / (total - warm)


def _train(run: _Run, folder: Path) -> tuple[list[str], int]:
    """All stages, from the checkpoint if there is one; returns the changed parameters and how many numbers trained."""
    stages = [(k,) for k in run.layers] if run.config.schedule == "frontier" else [run.layers]
    fresh: dict[str, Any] = {"stage": 0, "step": 0, "finished": {}, "count": 0, "log": [], "tokens": 0}
    state = _load_checkpoint(folder, run.key) or fresh
    run.log, run.tokens = state["log"], state["tokens"]
    run.student.load_state_dict(state["finished"], strict=False)
    while state["stage"] < len(stages):
        changed, count = _train_stage(run, stages[state["stage"]], folder, state)
        done = {n: p.detach().cpu().clone() for n, p in run.student.named_parameters() if n in changed}
        done, count = state["finished"] | done, state["count"] + count
        state = {**fresh, "stage": state["stage"] + 1, "finished": done, "count": count}
        _save_checkpoint(run, folder, state)
    return list(state["finished"]), state["count"]


def _train_stage(run: _Run, layers: tuple[int, ...], folder: Path, state: dict[str, Any]) -> tuple[set[str], int]:
    """Train ``layers`` together for all epochs and merge the result into the student."""
    config, student = run.config, run.student
    unread = config.output_loss == "none" and not config.label_weight
    last = max(layers) if unread else len(decoder_layers(student))
    start = time.perf_counter()
    read = layer_inputs(student, run.data, layers[0], folder)
    run.inputs_s += time.perf_counter() - start
    _check_inputs(student, run.data[0], layers[0], read)
    changed, parameters, merge = _attach(student, layers, config)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0)
    if state["step"]:
        student.load_state_dict(state["parameters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    start = time.perf_counter()
    with partial_decoder(student, layers[0], last) as forward:
        failure = _epochs(run, _Stage(layers, forward, read, parameters, optimizer), folder, state)
    run.train_s += time.perf_counter() - start
    merge()
    if failure:
        if config.folder:
            _save(folder / "last_good.pt", {n: p.detach().cpu() for n, p in student.named_parameters() if n in changed})
        raise DivergedError(failure, student)
    return changed, sum(p.numel() for p in parameters.values())


def _check_inputs(student: Model, example: Encoded, first: int, read: Callable[[Sequence[int]], Tensor]) -> None:
    """Refuse an architecture whose layers need more than the residual stream of the layer below."""
    ids = example.input_ids[None].to(next(student.parameters()).device)
    with torch.no_grad(), capture(student, [(first, "stream")]) as seen:
        decoder(student)(ids, use_cache=False)
        whole = seen[first, "stream"]
        with partial_decoder(student, first, first) as forward:
            forward(read([0]), torch.ones_like(ids))
        if F.cosine_similarity(whole.float(), seen[first, "stream"].float(), dim=-1).min() < 0.99:
            raise ValueError(f"{type(student).__name__} is not supported: layers need more than the residual stream")


def _attach(
    student: PreTrainedModel, layers: tuple[int, ...], config: TransferConfig
) -> tuple[set[str], dict[str, nn.Parameter], Callable[[], Any]]:
    """Make ``layers`` trainable and nothing else: weights that will change, parameters to train, and how to merge."""
    inside = {m for k in layers for m in decoder_layers(student)[k - 1].modules() if hasattr(m, "weight")}
    modules = {n: m for n, m in student.named_modules() if m in inside}
    student.requires_grad_(False)
    if config.trained == "layer":
        changed = {f"{n}.weight" for n, m in modules.items() if m.weight.ndim >= 2}
        for name in changed:
            student.get_parameter(name).requires_grad_(True)
        _add_projection(student, config)
        return changed, _trainable(student), lambda: _release(student)
    targets = [n for n in modules if n.rsplit(".", 1)[-1] in config.lora_targets]
    if not targets:
        known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in modules}))
        raise ValueError(f"lora_targets={config.lora_targets} are not in the student's layers, which hold {known}")
    torch.manual_seed(config.seed)
    exact = min(head_weight(student).shape) <= EXACT_SVD
    init: Any = ("pissa" if exact else "pissa_niter_16") if config.adapters == "pissa" else True
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        init_lora_weights=init,
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's, of a transformers name
        adapted: Any = get_peft_model(student, lora)
    if isinstance(config.adapters, Mapping):
        _start_from({n: student.get_submodule(n) for n in targets}, config.adapters)
    _add_projection(student, config)

    def merge() -> None:
        adapted.merge_and_unload()
        _release(student)

    return {f"{n}.weight" for n in targets}, _trainable(student), merge


def _add_projection(student: Model, config: TransferConfig) -> None:
    """P becomes a parameter of the student while it trains, so that checkpoints and optimizer hold it."""
    if isinstance(config.projection, Tensor):
        at = next(student.parameters())
        student.register_parameter(PROJECTION, nn.Parameter(config.projection.to(at.device, at.dtype, copy=True)))


def _random_projection(supervision: SupervisionCache, student: Model, seed: int) -> Tensor:
    """P (D', D_S) for targets of width D', entries of variance 1 / D_S."""
    d_s = head_weight(student).shape[1]
    shape = (supervision.arrays["target_0"].shape[1], d_s)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / d_s**0.5


def _release(student: Model) -> None:
    if hasattr(student, PROJECTION):
        delattr(student, PROJECTION)
    student.requires_grad_(True)


@torch.no_grad()
def _start_from(modules: Mapping[str, Any], adapters: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Start LoRA at B (n, r), A (r, m): their product leaves the weight first, so that the function does not change."""
    if set(modules) != set(adapters):
        wrong = sorted(set(modules) ^ set(adapters))
        raise ValueError(f"adapters must name the trained modules and no others; one list alone has {', '.join(wrong)}")
    for name, module in modules.items():
        weight, (b, a) = module.base_layer.weight, (t.to(module.base_layer.weight) for t in adapters[name])
        weight -= module.scaling["default"] * (b @ a)
        module.lora_A["default"].weight.copy_(a)
        module.lora_B["default"].weight.copy_(b)


def _trainable(model: Model) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@dataclass
class _Stage:
    """What the steps of one stage share."""

    layers: tuple[int, ...]
    forward: Callable[[Tensor, Tensor], Tensor]
    read: Callable[[Sequence[int]], Tensor]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


def _epochs(run: _Run, stage: _Stage, folder: Path, state: dict[str, Any]) -> str | None:
    """Train from ``state["step"]`` on; returns what went wrong, with the last good weights restored, or None."""
    config = run.config
    lengths = [len(e.input_ids) for e in run.data[: run.n_train]]
    validation = list(range(run.n_train, len(run.data)))
    total = config.epochs * math.ceil(run.n_train / config.batch)
    plan = [(e, b) for e in range(1, config.epochs + 1) for b in batches(lengths, config.batch, config.seed, e)]
    good = _copy(stage.parameters)
    if validation and state["step"] == 0:  # what training starts from
        record = {"step": 0, "epoch": 0, "stage": state["stage"] + 1, "split": "validation", "lr": 0.0}
        run.log.append({**record, **_measure(run, stage, validation, train=False)})
    for step, (epoch, examples) in enumerate(plan, start=1):
        if step <= state["step"]:
            continue
        rate = learning_rate(config, step, total)
        record = {"step": step, "epoch": epoch, "stage": state["stage"] + 1, "split": "train", "lr": rate}
        record |= _measure(run, stage, examples, train=True)
        if not record["loss"] <= _limit(run.log, record):
            run.student.load_state_dict(good, strict=False)
            return (
                f"training stopped at step {step} of {total} (epoch {epoch}) with loss {record['loss']:.4g} on the "
                f"batch of examples {examples}; the last good weights are kept: check the batch or lower lr={config.lr}"
            )
        good = _copy(stage.parameters)
        stage.optimizer.param_groups[0]["lr"] = rate
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        run.log.append(record)
        if validation and (step == total or plan[step][0] > epoch):
            run.log.append({**record, "split": "validation", **_measure(run, stage, validation, train=False)})
        if step % config.checkpoint_every == 0:
            live = {"step": step, "parameters": _copy(stage.parameters), "optimizer": stage.optimizer.state_dict()}
            _save_checkpoint(run, folder, {**state, **live})
    return None


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parameters.items()}


def _limit(log: list[dict[str, Any]], record: dict[str, Any]) -> float:
    """The largest acceptable loss: any finite one in a stage's first epoch, then ``DIVERGED`` medians of it."""
    first = [r["loss"] for r in log if (r["epoch"], r["stage"], r["split"]) == (1, record["stage"], "train")]
    return DIVERGED * max(statistics.median(first), 1e-2) if record["epoch"] > 1 else sys.float_info.max


def _measure(run: _Run, stage: _Stage, examples: list[int], *, train: bool) -> dict[str, float]:
    """Means over the supervised positions of ``examples``, in micro-batches; with ``train`` also the gradients."""
    config, device = run.config, run.student.device
    rows_total = len(run.supervision.rows(examples))
    sums: dict[str, float] = dict.fromkeys(("loss", *TERMS, "cos", "norm_ratio"), 0.0)
    weights = (config.layer_weight, config.output_weight, config.label_weight)
    for at in range(0, len(examples), config.micro_batch):
        some = examples[at : at + config.micro_batch]
        with torch.set_grad_enabled(train), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            values = _terms(run, stage, some)
        loss = torch.stack([weight * values[term] for weight, term in zip(weights, TERMS, strict=True)]).sum()
        if train:
            (loss / rows_total).backward()
        for name, value in {**values, "loss": loss}.items():
            sums[name] += value.item() / rows_total
        run.tokens += train * sum(len(run.data[i].input_ids) for i in some)
    return sums


def _terms(run: _Run, stage: _Stage, examples: list[int]) -> dict[str, Tensor]:
    """Sums over supervised positions: both loss terms, and cos(h_k, h*) and |h_k| / |M h_T| to log; layers averaged."""
    config, device = run.config, run.student.device
    batch = collate([run.data[i] for i in examples], 0, device)
    mask, rows = supervised(batch["labels"]), run.supervision.rows(examples)
    taps = [(k, config.interface) for k in stage.layers] if config.layer_weight else []
    with capture(run.student, taps) as seen:
        final = stage.forward(stage.read(examples), batch["attention_mask"])
    sums: dict[str, Any] = dict.fromkeys(("layer_loss", "cos", "norm_ratio"), torch.zeros((), device=device))
    projection = getattr(run.student, PROJECTION, None)
    for tap in taps:
        target, norm = _targets(run, run.layers.index(tap[0]), examples, rows)
        h = seen[tap][mask].float()
        h = h if projection is None else h @ projection.float().T
        plain = h.detach()
        comparable = plain.shape == target.shape
        found = {
            "layer_loss": layer_loss(
                config.layer_loss, h, target, norm, mask.sum(1).tolist(), head_weight(run.student)
            ),
            "cos": F.cosine_similarity(plain, target, dim=-1) if comparable else torch.full_like(norm, math.nan),
            "norm_ratio": plain.norm(dim=-1) / (norm * target.norm(dim=-1)),
        }
        sums = {n: sums[n] + found[n].sum() / len(taps) for n in sums}
    following = batch["labels"].roll(-1, dims=1)[mask]
    sums["output_loss"] = output_loss(run, final[mask], following, rows).sum()
    kind = "ce" if config.label_weight else "none"
    return {**sums, "label_loss": output_loss(run, final[mask], following, rows, kind).sum()}


def _targets(run: _Run, source: int, examples: list[int], rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """h* (n, D') and |h_T| (n,) of these examples, or a control's in their place, which is the same at every epoch."""
    device, kind, seed = run.student.device, run.config.targets, run.config.seed
    if kind == "scrambled":
        rows = np.random.default_rng(seed).permutation(int(run.supervision.arrays["offsets"][-1]))[rows]
    target, norm = (t.to(device) for t in run.supervision.target(source, rows))
    if kind == "random":
        draws = [
            np.random.default_rng((seed, source, i)).standard_normal((len(run.supervision.rows([i])), target.shape[1]))
            for i in examples
        ]
        noise = torch.from_numpy(np.concatenate(draws)).to(target)
        target = F.normalize(noise, dim=-1) * target.norm(dim=-1, keepdim=True)
    return target, norm


def _run_key(config: TransferConfig, student: Model, supervision: str, layers: tuple[int, ...], n_train: int) -> str:
    """sha256 over everything that determines the trained student (the supervision key holds teacher, data and map)."""
    skipped = ("folder", "cache_folder", "checkpoint_every", "map", "adapters", "projection")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in skipped}
    digest = hashlib.sha256(f"{settings} {layers} {n_train} {supervision} {fingerprint(student)}".encode())
    given: dict[str, tuple[Tensor, ...]] = {}
    if isinstance(config.adapters, Mapping):
        given |= config.adapters
    elif config.adapters:
        given[config.adapters] = ()
    if isinstance(config.projection, Tensor):
        given[PROJECTION] = (config.projection,)
    for name, tensors in given.items():
        digest.update(name.encode() + b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors))
    return digest.hexdigest()


def _save(path: Path, content: Any) -> None:
    """torch.save, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _save_checkpoint(run: _Run, folder: Path, state: dict[str, Any]) -> None:
    if run.config.folder:
        facts = {"key": run.key, "rng": torch.get_rng_state(), "log": run.log, "tokens": run.tokens}
        _save(folder / "checkpoint.pt", {**state, **facts})


def _load_checkpoint(folder: Path, key: str) -> dict[str, Any] | None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state["key"] != key:
        raise ValueError(f"{path} belongs to other inputs or another configuration: choose another folder or delete it")
    return state
