"""Seeking (ParaKnowTransfer, Zhong et al., ICLR 2024): the student's LoRA starts from blocks of the teacher's weights.

Steps: A, the sensitivity of every teacher weight on a few seed examples; B, as many teacher layers as the student has;
C, in each matrix the window of the student's shape with the largest sensitivity, whatever the windows of the other
matrices (so a block is no sub-network); D, its rank-r SVD as LoRA factors; E and F, subtract B A from the student,
attach (B, A) and fine-tune. The student's function is unchanged at the start: only the trained subspace is chosen.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from semalign import alignment
from semalign.attribution import objective
from semalign.lm.examples import Encoded, TaskData, collate, encode
from semalign.lm.parts import Model, decoder_layers
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.pairing import depth_pairs
from semalign.training.config import TransferConfig, TransferResult

ABSOLUTES = ("example", "sum")
STRATEGIES = ("sensitivity", "random", "first", "last", "proportional")
WINDOWS = ("best", "random", "top_left")
SPLITS = ("all_on_B", "sqrt")
SEEDS = 32  # examples of the training set where the task names no seed set
TIES = 1e-12  # of the whole sum: windows closer than this differ by rounding only
EXACT = 1024  # up to this many rows or columns the SVD is exact; above, iterated on a subspace
ROOM = 12 * 2**30  # bytes that a card keeps free of scores for a teacher's backward pass
SPARE, ROUNDS = 32, 8  # directions beyond the rank, and iterations, of that subspace


@dataclass(frozen=True)
class Extraction:
    """LoRA factors by the student's module names, and the facts of how they were found.

    ``adapters``: (B (n, rank), A (rank, m)) float32 on the CPU. ``layers``: the kept teacher layers, from 1.
    ``windows``: first row and column of each window. ``energy``: the share of each window's squared norm in B A.
    """

    adapters: dict[str, tuple[Tensor, Tensor]]
    layers: list[int]
    windows: dict[str, tuple[int, int]]
    energy: dict[str, float]


def _known(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")


def _stack_name(model: Model) -> str:
    """What ``named_modules`` calls the layer list."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


@contextmanager
def _gradients_of(model: Model, hooks: Mapping[str, Callable[[nn.Parameter], None]]) -> Iterator[None]:
    """Inside: eval mode, gradients for the hooked parameters alone. After: modes, flags and gradients as before."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []
    try:
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in hooks)
            if name in hooks:
                handles.append(parameter.register_post_accumulate_grad_hook(hooks[name]))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def sensitivity(
    model: Model,
    encoded: Sequence[Encoded],
    *,
    absolute: str = "example",
    device: torch.device | str | None = None,
    whole: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """First-order estimate of how much the loss changes when a weight is set to 0, for every weight of every layer.

    Source: Seeking, step A. S = sum over examples of |theta * gradient|, the loss of an example being the mean
    cross-entropy over its response. A gradient is dropped as soon as it is used, so that memory holds the weights,
    the scores, and the gradient of one matrix.

    Args:
        model: a causal LM; it is left as it was found.
        encoded: seed examples, (T,) each, run one at a time.
        absolute: value of each ``example`` (the paper), or of the signed ``sum`` over examples.
        device: where the scores are kept; None is beside each parameter.
        whole: the parameters, by name, whose scores are kept one by one; of each other one their sum over weights is
            kept alone, (), float64, for which the values of each ``example`` are needed. None: all.

    Returns:
        The scores by parameter name, of the parameter's shape, float32; embeddings, final norm and head are left out.

    Raises:
        ValueError: no example, an example without labels, an unknown ``absolute``, or signed sums of a part.
    """
    _known("absolute", absolute, ABSOLUTES)
    if not encoded:
        raise ValueError("sensitivity needs at least one example: give the task extract, align or train examples")
    if whole is not None and absolute != "example":
        raise ValueError(f"absolute={absolute!r} needs the scores of all weights: leave whole away, or take 'example'")
    inside = f"{_stack_name(model)}."

    def fresh(name: str, p: nn.Parameter) -> Tensor:
        if whole is None or name in whole:
            return torch.zeros(p.shape, dtype=torch.float32, device=device or p.device)
        return torch.zeros((), dtype=torch.float64, device=device or p.device)

    store = {name: fresh(name, p) for name, p in model.named_parameters() if name.startswith(inside)}

    def adder(scores: Tensor) -> Callable[[nn.Parameter], None]:
        def add(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            product = parameter.grad.float() * parameter.detach()
            parameter.grad = None
            product = product.abs_() if absolute == "example" else product
            scores.add_(
                (product if scores.shape == product.shape else product.sum(dtype=scores.dtype)).to(scores.device)
            )

        return add

    start = next(model.parameters()).device
    with _gradients_of(model, {name: adder(scores) for name, scores in store.items()}):
        for example in encoded:
            objective(model, collate([example], 0, start)).backward()
    return {name: scores.abs_() for name, scores in store.items()}


def layer_scores(store: Mapping[str, Tensor], model: Model) -> Tensor:
    """(L,) float64: the summed sensitivity of all weights of each layer, layer 1 first. Source: Seeking, step B."""
    name = _stack_name(model)
    scores = []
    for i, layer in enumerate(decoder_layers(model)):
        parts = [store[f"{name}.{i}.{inner}"] for inner, _ in layer.named_parameters()]
        scores.append(sum(float(part.sum(dtype=torch.float64)) for part in parts))
    return torch.tensor(scores, dtype=torch.float64)


def select_layers(scores: Tensor, n: int, strategy: str = "sensitivity", seed: int = 0) -> list[int]:
    """The ``n`` teacher layers to keep, from 1, increasing: number i goes to student layer i. Source: Seeking, step B.

    The largest of ``scores`` (L,) by ``sensitivity`` (the paper; equal scores keep the shallower layer), or as controls
    ``random`` ones by ``seed``, the ``first``, the ``last``, or ``proportional`` ones by depth.

    Raises:
        ValueError: fewer than n layers, a score that is not finite, or an unknown strategy.
    """
    _known("strategy", strategy, STRATEGIES)
    depth = len(scores)
    if not 1 <= n <= depth:
        raise ValueError(
            f"the teacher has {depth} layers and the student {n}: Seeking needs a teacher at least as deep"
        )
    if not scores.isfinite().all():
        raise ValueError("the sensitivity of a layer is not finite: load the teacher in float32 or bfloat16")
    kept = {
        "sensitivity": lambda: (scores.argsort(descending=True, stable=True)[:n] + 1).tolist(),
        "random": lambda: random.Random(seed).sample(range(1, depth + 1), n),
        "first": lambda: range(1, n + 1),
        "last": lambda: range(depth - n + 1, depth + 1),
        "proportional": lambda: depth_pairs(depth, n),
    }
    return sorted(kept[strategy]())


def best_window(scores: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """First row and column of the contiguous window (n, m) of ``scores`` (N, M) with the largest sum.

    Source: Seeking, step C. Scores are not negative. Every window is looked at, by a summed-area table in float64.
    Sums that differ by rounding alone count as equal, and among equals the first in row order is taken.

    Raises:
        ValueError: the window is empty or larger than ``scores``.
    """
    n, m = shape
    if not (1 <= n <= scores.shape[0] and 1 <= m <= scores.shape[1]):
        raise ValueError(
            f"a matrix of shape {tuple(scores.shape)} has no window of shape {(n, m)}: choose a smaller one"
        )
    table = scores.new_zeros((scores.shape[0] + 1, scores.shape[1] + 1), dtype=torch.float64)
    table[1:, 1:] = scores
    table.cumsum_(0).cumsum_(1)
    sums = (table[n:, m:] - table[:-n, m:]).sub_(table[n:, :-m]).add_(table[:-n, :-m])
    first = int((sums >= sums.max() - TIES * table[-1, -1]).flatten().byte().argmax())
    return first // sums.shape[1], first % sums.shape[1]


def to_lora(block: Tensor, rank: int, split: str = "all_on_B") -> tuple[Tensor, Tensor]:
    """LoRA factors of the truncated SVD U S V' of a block (n, m): B (n, rank) and A (rank, m), float32.

    Source: Seeking, step D. ``all_on_B`` (the paper) is B = U S with orthonormal rows of A; ``sqrt`` puts the root of S
    on each. Exact for a small block; for a large one, the SVD within a subspace iterated from a fixed start.

    Raises:
        ValueError: a rank that the block does not have, or an unknown split.
    """
    _known("split", split, SPLITS)
    if not 1 <= rank <= min(block.shape):
        raise ValueError(
            f"rank {rank} must be between 1 and {min(block.shape)}, the most of shape {tuple(block.shape)}"
        )
    block = block.detach().float()
    if min(block.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(block, full_matrices=False)
    else:
        start = torch.randn(block.shape[1], rank + SPARE, generator=torch.Generator().manual_seed(0))
        q = torch.linalg.qr(block @ start.to(block.device)).Q
        for _ in range(ROUNDS):
            q = torch.linalg.qr(block @ torch.linalg.qr(block.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ block, full_matrices=False)
        u = q @ u
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    return (u * s, vh.contiguous()) if split == "all_on_B" else (u * s.sqrt(), s.sqrt()[:, None] * vh)


def _linear(layer: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}


def student_shapes(student: Model, targets: Sequence[str]) -> list[dict[str, tuple[int, int]]]:
    """For each layer of the student, layer 1 first: the weight shape (n, m) of its target modules, by full name.

    Raises:
        ValueError: no target, or one that is no linear module of some layer.
    """
    stack, shapes = _stack_name(student), []
    for i, layer in enumerate(decoder_layers(student)):
        linear = {f"{stack}.{i}.{path}": module for path, module in _linear(layer).items()}
        known = {name.rsplit(".", 1)[-1] for name in linear}
        if not targets or not known.issuperset(targets):
            holds = f"layer {i + 1}, which holds {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f"lora_targets={tuple(targets)} must name linear modules of the student's {holds}")
        chosen = {name: module for name, module in linear.items() if name.rsplit(".", 1)[-1] in targets}
        shapes.append({name: (module.out_features, module.in_features) for name, module in chosen.items()})
    return shapes


def _path(name: str, index: int) -> str:
    """A module's path inside its layer, which has this index in the layer list."""
    return name.split(f".{index}.", 1)[1]


def _check_fit(teacher: Model, shapes: Sequence[Mapping[str, tuple[int, int]]]) -> None:
    """Refuse a teacher from which the student's matrices cannot be cut, whichever layers are kept."""
    layers = decoder_layers(teacher)
    select_layers(torch.zeros(len(layers)), len(shapes))
    for path, (n, m) in {(_path(name, i), shape) for i, part in enumerate(shapes) for name, shape in part.items()}:
        for k, layer in enumerate(layers, start=1):
            module = _linear(layer).get(path)
            if module is None:
                raise ValueError(f"layer {k} of the teacher has no linear module {path}: drop it from lora_targets")
            if module.out_features < n or module.in_features < m:
                raise ValueError(
                    f"{path} in layer {k} of the teacher is {tuple(module.weight.shape)}, smaller than the student's "
                    f"{(n, m)}: choose a larger teacher, or drop it from lora_targets"
                )


def extract(
    teacher: Model,
    shapes: Sequence[Mapping[str, tuple[int, int]]],
    store: Mapping[str, Tensor],
    *,
    rank: int,
    strategy: str = "sensitivity",
    window: str = "best",
    seed: int = 0,
) -> Extraction:
    """Cut a block of the student's shape out of the teacher for each student module (Seeking, steps B to D).

    Args:
        teacher: where ``store`` comes from; it is not changed.
        shapes: of the student's modules, from :func:`student_shapes`.
        store: the teacher's :func:`sensitivity`.
        rank: of the factors.
        strategy: of :func:`select_layers`.
        window: ``best`` (the paper), or as controls ``random`` by ``seed``, or ``top_left``.
        seed: of random layers and windows.

    Raises:
        ValueError: a teacher with fewer layers, a smaller matrix or without a module, or an unknown choice.
    """
    _known("window", window, WINDOWS)
    _check_fit(teacher, shapes)
    layers = select_layers(layer_scores(store, teacher), len(shapes), strategy, seed)
    stack, draw = _stack_name(teacher), random.Random(seed)
    cut = Extraction({}, layers, {}, {})
    for i, (k, part) in enumerate(zip(layers, shapes, strict=True)):
        for name, (n, m) in part.items():
            source, row, column = f"{stack}.{k - 1}.{_path(name, i)}.weight", 0, 0
            weight = teacher.get_parameter(source).detach()
            if window == "best":
                row, column = best_window(store[source], (n, m))
            elif window == "random":
                row, column = draw.randint(0, weight.shape[0] - n), draw.randint(0, weight.shape[1] - m)
            block = weight[row : row + n, column : column + m].float()
            b, a = to_lora(block, rank)
            cut.adapters[name], cut.windows[name] = (b.cpu(), a.cpu()), (row, column)
            cut.energy[name] = float(b.square().sum() / block.square().sum())  # A's rows are orthonormal
    return cut


def window_shares(
    teacher: Model,
    shapes: Sequence[Mapping[str, tuple[int, int]]],
    store: Mapping[str, Tensor],
    found: Extraction,
) -> dict[str, tuple[float, float]]:
    """By student module: the share of its teacher matrix's sensitivity inside the window, and the share of the area."""
    stack, shares = _stack_name(teacher), {}
    for i, (k, part) in enumerate(zip(found.layers, shapes, strict=True)):
        for name, (n, m) in part.items():
            scores, (row, column) = store[f"{stack}.{k - 1}.{_path(name, i)}.weight"], found.windows[name]
            inside = scores[row : row + n, column : column + m].sum() / scores.sum()
            shares[name] = (float(inside), n * m / scores.numel())
    return shares


def has_room(device: torch.device, scores: int) -> bool:
    """Whether so many bytes of scores leave a device ``ROOM``; the host is not asked."""
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > scores + ROOM


def sensitivity_for(
    teacher: Model, shapes: Sequence[Mapping[str, tuple[int, int]]], encoded: Sequence[Encoded]
) -> dict[str, Tensor]:
    """What :func:`extract` reads for modules of these shapes: scores of the matrices it may cut, sums of the others.

    They lie beside the teacher where its device has room for them, so that no example's scores have to be brought to
    the host, and there otherwise. A 13-billion teacher has 31 GB of them.

    Raises:
        ValueError: as :func:`sensitivity`.
    """
    stack = _stack_name(teacher)
    paths = {_path(name, i) for i, part in enumerate(shapes) for name in part}
    names = {f"{stack}.{k}.{path}.weight" for k in range(len(decoder_layers(teacher))) for path in paths}
    needed = 4 * sum(p.numel() for name, p in teacher.named_parameters() if name in names)
    beside = has_room(next(teacher.parameters()).device, needed)
    return sensitivity(teacher, encoded, device=None if beside else "cpu", whole=names)


def transfer(pair: Pair, data: TaskData, config: TransferConfig | None = None) -> TransferResult:
    """Seeking from the pair's teacher to its student (Seeking, steps A to F): extraction, then ordinary LoRA tuning.

    Seeds are ``data.extract``, else ``data.align``, else the first 32 of ``data.train``. Of ``config``, layers, losses
    and ``lora_alpha`` are replaced: LoRA in all layers at once, cross-entropy, a scaling of 1. Teacher and student are
    never in memory together. The log's first record (``split`` is ``extraction``) holds the facts of the extraction;
    a seed token, run forward and backward, counts once in ``teacher_tokens``.

    Raises:
        ValueError: no example, a teacher too small for the student, or as :func:`semalign.alignment.transfer`.
        DivergedError: as :func:`semalign.alignment.transfer`.
    """
    config, start = config or TransferConfig(), time.perf_counter()
    seeds = data.extract or data.align or data.train[:SEEDS]
    encoded = encode(pair.tokenizer, seeds, max_length=config.max_length)
    student = pair.load_student()
    shapes = student_shapes(student, config.lora_targets)
    del student
    gc.collect()
    teacher = pair.load_teacher()
    _check_fit(teacher, shapes)  # before the long part
    store = sensitivity_for(teacher, shapes, encoded)
    cut = extract(teacher, shapes, store, rank=config.lora_rank, seed=config.seed)
    del teacher, store
    gc.collect()
    tokens, spent = sum(len(e.input_ids) for e in encoded), time.perf_counter() - start
    facts = {"layers": cut.layers, "windows": cut.windows, "energy": cut.energy}
    tuned = replace(
        config,
        layers="all",
        teacher_layers=None,  # the teacher has done its part
        trained="lora",
        schedule="joint",
        layer_weight=0.0,
        output_loss="ce",
        lora_alpha=config.lora_rank,
        adapters=cut.adapters,
    )
    result = alignment.transfer(pair, data, tuned)
    result.cost["teacher_tokens"] += tokens
    result.cost["wall_s"] += spent
    result.log.insert(0, {"split": "extraction", "seeds": len(seeds), "tokens": tokens, "wall_s": spent, **facts})
    return result


METHODS = {
    "seeking": Method(
        "SFT from the teacher's weights", transfer, "train, extract", "LoRA on all layers", "weights", True,
        colour="#8800ff",
    )
}  # fmt: skip
