"""Latent semantic alignment (section 4.3): layer k of the student trained on aligned targets, and nothing else.

Heads and losses see supervised positions only. For the cosine of logits z = W h with a onehot no logit is ever formed:
cos = w_y . h / |R h| with R'R = W'W, one D x D factor instead of m x D.
"""

from __future__ import annotations

import gc
import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from semalign.attribution import layer_attribution, over_examples
from semalign.lm.examples import Encoded, TaskData, collate, encode, mask_of, supervised
from semalign.lm.hooks import SUBLAYERS, capture, check_sublayers, float_logits
from semalign.lm.parts import Model, decoder_layers, fingerprint, head_weight, norm_gain
from semalign.models import Pair
from semalign.pairing import critical_pair, depth_pairs, interpolation
from semalign.semantics import semantic_map
from semalign.supervision import Source, SupervisionCache
from semalign.training.config import TransferConfig, TransferResult, costs
from semalign.training.loop import PROJECTION, Run, Stage, train
from semalign.training.losses import DIVERGENCES, LAYER_LOSSES, head_factor, output_loss

WHOLE_VOCABULARY, WHOLE_CACHE = 2**16, 2**28
"""Up to this many tokens, and bytes on disk, ``reverse_kl`` reads the teacher's whole distribution."""


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Transfer task knowledge from the pair's teacher to its student by latent semantic alignment (section 4).

    Teacher and student are never in memory together: the student is loaded for its head and freed, the teacher is
    loaded, run once and freed, then the student is loaded again and trained.

    Raises:
        ValueError: no training example, a layer that a model lacks, or a checkpoint of other inputs in ``folder``.
        DivergedError: a loss that is not finite, or above 10 times the first epoch's median.
    """
    config = config or TransferConfig()
    start = time.perf_counter()
    with workplace(config) as scratch:
        given, watched = examples_of(pair, data, config)
        encoded = given + watched
        layers, supervision, vocabulary = supervise(pair, data, encoded, config, scratch)
        student = pair.load_student().eval()
        if isinstance(config.projection, str):
            config = replace(config, projection=_random_projection(supervision, student, config.seed))
        terms = objective_of(config, student, encoded, supervision, layers, vocabulary)
        result = fit(student, encoded, len(given), config, layers, supervision, terms, scratch)
    result.cost["wall_s"] = time.perf_counter() - start
    return result


@contextmanager
def workplace(config: TransferConfig) -> Iterator[Path]:
    """The folder of a training's checkpoints and supervision: ``config.folder``, or one that is gone at the end."""
    if config.folder:
        folder = Path(config.folder)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as own:
        yield Path(own)


def examples_of(pair: Pair, data: TaskData, config: TransferConfig) -> tuple[list[Encoded], list[Encoded]]:
    """The training examples of a task and those that are watched, as the student reads them.

    Raises:
        ValueError: there is no training example.
    """
    if not data.train:
        raise ValueError(f"task {data.name} has no training examples: give it at least one")
    train, watched = (encode(pair.tokenizer, s, max_length=config.max_length) for s in (data.train, data.validation))
    return train, watched


def fit(
    student: PreTrainedModel,
    encoded: list[Encoded],
    n_train: int,
    config: TransferConfig,
    layers: tuple[int, ...],
    supervision: SupervisionCache,
    terms: Callable[[Stage, list[int]], dict[str, Tensor]],
    scratch: Path,
    *,
    objective: str = "",
) -> TransferResult:
    """Train ``layers`` by ``terms`` on the first ``n_train`` examples; those behind them are watched.

    ``objective`` names what the configuration does not say of ``terms``, so that a checkpoint of others is refused.

    Raises:
        ValueError, DivergedError: as :func:`semalign.training.loop.train`.
    """
    start = time.perf_counter()
    counts = [int(supervised(e.labels).sum()) for e in encoded]
    key = _run_key(config, student, supervision.key + objective, layers, n_train)
    run = Run(config, student, encoded, counts, n_train, layers, terms, key)
    trained, n_trained = train(run, scratch)
    cost = costs(
        wall_s=time.perf_counter() - start,
        inputs_s=run.inputs_s,
        train_s=run.train_s,
        teacher_tokens=float(supervision.teacher_tokens),
        student_tokens=float(run.tokens),
        trainable_parameters=float(n_trained),
        cached_bytes_per_token=supervision.bytes_per_token,
    )
    return TransferResult(student, trained, cost, run.log, layers)


def supervise(
    pair: Pair, data: TaskData, encoded: list[Encoded], config: TransferConfig, scratch: Path
) -> tuple[tuple[int, ...], SupervisionCache, int]:
    """The student layers to train, the teacher's targets for them, and the size of the shared vocabulary."""
    n_student, head, gain = read_off(pair, config)
    layers = _named(config, n_student)
    folder, divergence = config.cache_folder or scratch / "supervision", config.output_loss in DIVERGENCES
    if layers is not None and not config.layer_weight and not divergence:  # the labels alone: no teacher is needed
        return _checked(layers, n_student), SupervisionCache.build(folder, None, encoded, ()), len(head)
    teacher = pair.load_teacher()
    layers, sources = choose_layers(pair, teacher, data, n_student, config)
    vocabulary = min(len(head), len(head_weight(teacher)))
    matrix = map_of(config, teacher, head, gain)
    _check_widths(config, matrix, head.shape[1], head_weight(teacher).shape[1])
    supervision = SupervisionCache.build(
        folder,
        teacher,
        encoded,
        sources if config.layer_weight else (),
        matrix=matrix if config.layer_weight else None,
        dtype=config.target_dtype,
        top_k=_kept_tokens(config, vocabulary, encoded) if divergence else 0,
        vocabulary=vocabulary,
    )
    _warn_of_tail(config, supervision, vocabulary)
    del teacher
    gc.collect()
    return layers, supervision, vocabulary


def read_off(pair: Pair, config: TransferConfig) -> tuple[int, Tensor, Tensor]:
    """Of the student, which is loaded and freed: its depth L_S, its head (m, D_S), its final norm's gain (D_S,).

    Raises:
        ValueError: the configuration takes states at an interface that its layers do not have.
    """
    student = pair.load_student().eval()
    if config.layer_weight and config.interface in SUBLAYERS:
        check_sublayers(student)
    found = len(decoder_layers(student)), head_weight(student).clone(), norm_gain(student).clone()
    del student
    gc.collect()
    return found


def map_of(
    config: TransferConfig, teacher: Model, head: Tensor, gain: Tensor, make: Callable[..., Tensor] = semantic_map
) -> Tensor | None:
    """M (D_S, D_T) of a teacher and a student's ``head`` and ``gain``: made by its kind, as given, or None for none."""
    if not isinstance(config.map, str):
        return config.map
    gains: dict[str, Any] = {"teacher_gain": norm_gain(teacher), "student_gain": gain} if config.fold_gain else {}
    return make(head_weight(teacher), head, kind=config.map, ridge=config.ridge, **gains)


def check_map(shape: tuple[int, ...], needed: tuple[int, int]) -> None:
    """Refuse a map of another shape than (D_S, D_T).

    Raises:
        ValueError: with both shapes.
    """
    if shape != needed:
        raise ValueError(
            f"map gives a matrix of shape {shape}, and this pair needs (D_S, D_T) = {needed}: name a kind of map, or "
            "give a matrix of that shape"
        )


def _kept_tokens(config: TransferConfig, vocabulary: int, encoded: list[Encoded]) -> int:
    """How many of the teacher's log-probabilities to keep: ``top_k``, or all for ``reverse_kl`` where they fit.

    KL(q || p) lives where the student puts its mass: over the teacher's top 64 and one bin it lost 17 % of its value
    and 40 % of its gradient, the other divergences 1 %.
    """
    positions = sum(int(supervised(e.labels).sum()) for e in encoded)
    size = positions * vocabulary * (np.dtype(config.target_dtype).itemsize + np.dtype("int32").itemsize)
    whole = config.output_loss == "reverse_kl" and vocabulary <= WHOLE_VOCABULARY and size <= WHOLE_CACHE
    return vocabulary if whole else min(config.top_k, vocabulary)


def _warn_of_tail(config: TransferConfig, supervision: SupervisionCache, vocabulary: int) -> None:
    """Say what a reverse divergence over a part of the vocabulary leaves out."""
    if config.output_loss != "reverse_kl" or (kept := supervision.arrays["top_index"].shape[1]) == vocabulary:
        return
    mass = 1 - float(supervision.arrays["tail"].mean())
    warnings.warn(
        f"reverse_kl reads {kept} of {vocabulary} tokens, which hold {mass:.1%} of the teacher's probability, and the "
        "rest as one: its value and gradient are rough; raise top_k, or choose jsd or kl",
        stacklevel=4,
    )


def _check_widths(config: TransferConfig, matrix: Tensor | None, d_s: int, d_t: int) -> None:
    """The target M h_T must be as wide as what it is compared with: h_k, or P h_k."""
    if not config.layer_weight:
        return
    given = (d_t, d_t) if matrix is None else tuple(matrix.shape)
    projection, compared = config.projection, given[0] if config.projection is not None else d_s
    if isinstance(projection, Tensor) and projection.shape != (compared, d_s):
        raise ValueError(
            f"projection is {tuple(projection.shape)}, and this pair needs {(compared, d_s)}: give one of that shape"
        )
    if matrix is not None or config.layer_loss != "relational":
        check_map(given, (compared, d_t))


def attributed(pair: Pair, teacher: Model, data: TaskData, config: TransferConfig) -> Tensor:
    """The score of every teacher layer (L_T,) over all supervised positions of a task's extract examples."""
    seeds = encode(pair.tokenizer, data.extract or data.align or data.train, max_length=config.max_length)
    read = partial(layer_attribution, point=config.attribution_point, reduce=config.attribution_reduce)
    return over_examples(teacher, seeds, read)


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
        scores = attributed(pair, teacher, data, config)
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


def objective_of(
    config: TransferConfig,
    student: PreTrainedModel,
    data: list[Encoded],
    supervision: SupervisionCache,
    layers: tuple[int, ...],
    vocabulary: int,
) -> Callable[[Stage, list[int]], dict[str, Tensor]]:
    """The objective L = L_layer + L_out (section 4.3) for the loop: a function of a stage and example numbers.

    It returns sums over supervised positions: the loss terms, and cos(h_k, h*) and |h_k| / |M h_T| to log; layers are
    averaged. ``layers`` are all that have targets, in the order of the supervision's sources.
    """
    device = student.device
    factor = head_factor(student) if config.output_loss == "cosine" else None
    head = head_weight(student)

    def read_output(kind: str, final: Tensor, following: Tensor, rows: np.ndarray) -> Tensor:
        top = supervision.teacher_top(rows) if kind in DIVERGENCES else ()
        return output_loss(
            kind, final, following, lambda states: float_logits(student, states), head,
            factor=factor, teacher=top, vocabulary=vocabulary,
        )  # fmt: skip

    def terms(stage: Stage, examples: list[int]) -> dict[str, Tensor]:
        batch = collate([data[i] for i in examples], 0, device)
        mask, rows = supervised(batch["labels"]), supervision.rows(examples)
        taps = [(k, config.interface) for k in stage.layers] if config.layer_weight else []
        with capture(student, taps) as seen:
            final = stage.forward(stage.read(examples), mask_of(batch))
        with torch.autocast(device.type, enabled=False):  # which would round the operands of every product below
            return losses(stage, examples, batch["labels"], mask, rows, {tap: seen[tap][mask] for tap in taps}, final)

    def losses(
        stage: Stage,
        examples: list[int],
        labels: Tensor,
        mask: Tensor,
        rows: np.ndarray,
        seen: dict[tuple[int, str], Tensor],
        final: Tensor,
    ) -> dict[str, Tensor]:
        sums: dict[str, Any] = dict.fromkeys(("layer_loss", "cos", "norm_ratio"), torch.zeros((), device=device))
        projection = getattr(student, PROJECTION, None)
        for tap, states in seen.items():
            target, norm = controlled_targets(config, supervision, layers.index(tap[0]), examples, rows, device)
            h = states.float() if projection is None else states.float() @ projection.float().T
            plain = h.detach()
            comparable = plain.shape == target.shape
            of_layer = {
                "layer_loss": LAYER_LOSSES[config.layer_loss](h, target, norm, mask.sum(1).tolist(), head),
                "cos": F.cosine_similarity(plain, target, dim=-1) if comparable else torch.full_like(norm, math.nan),
                "norm_ratio": plain.norm(dim=-1) / (norm * target.norm(dim=-1)),
            }
            sums = {n: sums[n] + of_layer[n].sum() / len(seen) for n in sums}
        following = labels.roll(-1, dims=1)[mask]
        sums["output_loss"] = read_output(config.output_loss, final[mask], following, rows).sum()
        sums["label_loss"] = read_output("ce" if config.label_weight else "none", final[mask], following, rows).sum()
        return sums

    return terms


def controlled_targets(
    config: TransferConfig,
    supervision: SupervisionCache,
    source: int,
    examples: list[int],
    rows: np.ndarray,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """h* (n, D') and |h_T| (n,) of these examples, or a control's in their place, which is the same at every epoch."""
    kind, seed = config.targets, config.seed
    if kind == "scrambled":
        rows = np.random.default_rng(seed).permutation(int(supervision.arrays["offsets"][-1]))[rows]
    target, norm = (t.to(device) for t in supervision.target(source, rows))
    if kind == "random":
        draws = [
            np.random.default_rng((seed, source, i)).standard_normal((len(supervision.rows([i])), target.shape[1]))
            for i in examples
        ]
        noise = torch.from_numpy(np.concatenate(draws)).to(target)
        target = F.normalize(noise, dim=-1) * target.norm(dim=-1, keepdim=True)
    return target, norm


def _random_projection(supervision: SupervisionCache, student: Model, seed: int) -> Tensor:
    """P (D', D_S) for targets of width D', entries of variance 1 / D_S."""
    d_s = head_weight(student).shape[1]
    shape = (supervision.arrays["target_0"].shape[1], d_s)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / d_s**0.5


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
