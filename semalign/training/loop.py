"""The one training loop: some layers of a student, from what they receive, computed once.

What lies below the lowest trained layer never changes, so its output is cached; what lies above runs without parameter
gradients. The objective is a function that the loop is given. A checkpoint holds all that a run needs to go on to the
same bits.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from semalign.lm.examples import Encoded, by_length, collate, mask_of
from semalign.lm.files import load_tensors, reserve, save_tensors
from semalign.lm.hooks import capture, check_head, partial_decoder, skip_layers
from semalign.lm.parts import Model, decoder, decoder_layers, head_weight
from semalign.training.config import DivergedError, TransferConfig

DIVERGED = 10.0  # a loss above this many first-epoch medians stops the run
TERMS = ("layer_loss", "output_loss", "label_loss")
EXACT_SVD = 1024  # widths up to this get an exact decomposition for PiSSA; wider ones subspace iteration
PROJECTION = "_projection"  # the name of P among the student's parameters while it trains
IN_MEMORY = 2**30  # bytes of cached layer inputs that stay in memory; more go to a file


@dataclass
class Stage:
    """Layers that train together: what runs from their inputs, how these are read, and what the optimizer moves."""

    layers: tuple[int, ...]
    read: Callable[[Sequence[int]], Tensor]
    forward: Callable[[Tensor, Tensor | None], Tensor]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


@dataclass
class Run:
    """A training run: what every step reads, and what has been written so far.

    ``data`` holds the ``n_train`` training examples first and validation examples after them; ``counts`` their numbers
    of supervised positions. ``terms`` gives, for a stage and some examples, the sums over these positions of each loss
    in ``TERMS``, which is to be weighted, and of whatever else is to be logged.
    """

    config: TransferConfig
    student: PreTrainedModel
    data: list[Encoded]
    counts: list[int]
    n_train: int
    layers: tuple[int, ...]
    terms: Callable[[Stage, list[int]], dict[str, Tensor]]
    key: str
    log: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    inputs_s: float = 0.0
    train_s: float = 0.0


class FloatAdamW(torch.optim.AdamW):
    """AdamW without weight decay that keeps a float32 master of each parameter in 16 bits, and adds gradients in it.

    A step below 2^-9 of a bfloat16 weight would be rounded away. Inside ``with`` a gradient moves to its master as soon
    as it is there. Parameters in float32 are their own masters: of these alone this is plain AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.live = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.live]
        self.handles: list[Any] = []
        # In one call for all of them: the same bits, and a twentieth of a small model's training less.
        super().__init__(self.masters, lr=lr, weight_decay=0.0, foreach=True)

    def __enter__(self) -> FloatAdamW:
        def mover(master: nn.Parameter) -> Callable[[nn.Parameter], None]:
            def move(parameter: nn.Parameter) -> None:
                gradient = cast(Tensor, parameter.grad).float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

            return move

        self.handles = [p.register_post_accumulate_grad_hook(mover(m)) for p, m in self._pairs()]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(p, m) for p, m in zip(self.live, self.masters, strict=True) if p is not m]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the masters, which the parameters then follow."""
        loss = super().step(closure)
        for parameter, master in self._pairs():
            parameter.copy_(master)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the masters."""
        return {**super().state_dict(), "masters": [m.detach().clone() for _, m in self._pairs()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        own = dict(state_dict)
        for (_, master), kept in zip(self._pairs(), own.pop("masters", []), strict=True):
            master.copy_(kept)
        super().load_state_dict(own)


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
            decoder(model)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
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
    epoch_batches = [pool[at : at + size] for pool in pools for at in range(0, len(pool), size)]
    return [epoch_batches[i] for i in order.permutation(len(epoch_batches))]


def scheduled_rate(config: TransferConfig, step: int, total: int) -> float:
    """The rate of step 1..total: linear warm-up, then constant or linear to zero."""
    warm = math.ceil(config.warmup * total)
    if step <= warm:
        return config.lr * step / warm
    return config.lr if config.lr_schedule == "constant" else config.lr * (total - step + 1) / (total - warm)


def train(run: Run, folder: Path) -> tuple[list[str], int]:
    """All stages, from the checkpoint in ``folder`` if there is one, merged into the student.

    Returns:
        The names of the changed parameters, and how many numbers were trained.

    Raises:
        ValueError: the checkpoint belongs to other inputs, or the student's layers cannot be run by themselves.
        DivergedError: a loss that is not finite, or above ``DIVERGED`` times the first epoch's median.
    """
    config, student = run.config, run.student
    stages = [(k,) for k in run.layers] if config.schedule == "frontier" else [run.layers]
    fresh: dict[str, Any] = {"stage": 0, "step": 0, "finished": {}, "count": 0, "log": [], "tokens": 0}
    state = _load_checkpoint(folder, run.key) or fresh
    run.log, run.tokens = state["log"], state["tokens"]
    student.load_state_dict(state["finished"], strict=False)
    unread = config.output_loss == "none" and not config.label_weight
    if not unread:
        check_head(student)
    while state["stage"] < len(stages):
        layers = stages[state["stage"]]
        start = time.perf_counter()
        read = layer_inputs(student, run.data, layers[0], folder)
        run.inputs_s += time.perf_counter() - start
        _check_inputs(student, run.data[0], layers[0], read)
        changed, parameters, merge = _attach(student, layers, config)
        optimizer = FloatAdamW(parameters.values(), lr=config.lr)
        start = time.perf_counter()
        with (
            optimizer,
            partial_decoder(student, layers[0], max(layers) if unread else len(decoder_layers(student))) as forward,
        ):
            failure = _steps(run, Stage(layers, read, forward, parameters, optimizer), folder, state)
        run.train_s += time.perf_counter() - start
        merge()
        done = {n: p.detach().cpu().clone() for n, p in student.named_parameters() if n in changed}
        if failure:
            if config.folder:
                save_tensors(folder / "last_good.pt", done)
            raise DivergedError(failure, student)
        count = state["count"] + sum(p.numel() for p in parameters.values())
        state = {**fresh, "stage": state["stage"] + 1, "finished": state["finished"] | done, "count": count}
        _save_checkpoint(run, folder, state)
    return list(state["finished"]), state["count"]


def _steps(run: Run, stage: Stage, folder: Path, state: dict[str, Any]) -> str | None:
    """Train from ``state["step"]`` on; returns what went wrong, with the last good weights restored, or None."""
    config = run.config
    if state["step"]:
        run.student.load_state_dict(state["parameters"], strict=False)
        stage.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    lengths = [len(e.input_ids) for e in run.data[: run.n_train]]
    validation = list(range(run.n_train, len(run.data))) if config.watch else []
    total = config.epochs * math.ceil(run.n_train / config.batch)
    plan = [(e, b) for e in range(1, config.epochs + 1) for b in batches(lengths, config.batch, config.seed, e)]
    good = copied(stage.parameters)
    if validation and state["step"] == 0:  # what training starts from
        record = {"step": 0, "epoch": 0, "stage": state["stage"] + 1, "split": "validation", "lr": 0.0}
        run.log.append({**record, **_means(run, stage, validation, train=False)})
    for step, (epoch, examples) in enumerate(plan, start=1):
        if step <= state["step"]:
            continue
        rate = scheduled_rate(config, step, total)
        record = {"step": step, "epoch": epoch, "stage": state["stage"] + 1, "split": "train", "lr": rate}
        record |= _means(run, stage, examples, train=True)
        if not record["loss"] <= _limit(run.log, record):
            run.student.load_state_dict(good, strict=False)
            return (
                f"training stopped at step {step} of {total} (epoch {epoch}) with loss {record['loss']:.4g} on the "
                f"batch of examples {examples}; the last good weights are kept: check the batch or lower lr={config.lr}"
            )
        good = copied(stage.parameters)
        stage.optimizer.param_groups[0]["lr"] = rate
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        run.log.append(record)
        if validation and (step == total or plan[step][0] > epoch):
            run.log.append({**record, "split": "validation", **_means(run, stage, validation, train=False)})
        if step % config.checkpoint_every == 0:
            live = {"step": step, "parameters": copied(stage.parameters), "optimizer": stage.optimizer.state_dict()}
            _save_checkpoint(run, folder, {**state, **live})
    return None


def copied(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parameters' values now, by name."""
    return {n: p.detach().clone() for n, p in parameters.items()}


def _limit(log: list[dict[str, Any]], record: dict[str, Any]) -> float:
    """The largest acceptable loss: any finite one in a stage's first epoch, then ``DIVERGED`` medians of it."""
    first = [r["loss"] for r in log if (r["epoch"], r["stage"], r["split"]) == (1, record["stage"], "train")]
    return DIVERGED * max(statistics.median(first), 1e-2) if record["epoch"] > 1 else sys.float_info.max


def _means(run: Run, stage: Stage, examples: list[int], *, train: bool) -> dict[str, float]:
    """Means over the supervised positions of ``examples``, in micro-batches; with ``train`` also the gradients."""
    config, device = run.config, run.student.device
    positions = sum(run.counts[i] for i in examples)
    weights = dict(zip(TERMS, (config.layer_weight, config.output_weight, config.label_weight), strict=True))
    sums: dict[str, float] = {}
    for at in range(0, len(examples), config.micro_batch):
        some = examples[at : at + config.micro_batch]
        with torch.set_grad_enabled(train), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            values = run.terms(stage, some)
        loss = torch.stack([weights[term] * values[term] for term in TERMS]).sum()
        if train:
            (loss / positions).backward()
        for name, value in {"loss": loss, **values}.items():
            sums[name] = sums.get(name, 0.0) + value.item() / positions
        run.tokens += train * sum(len(run.data[i].input_ids) for i in some)
    return sums


def _check_inputs(student: Model, example: Encoded, first: int, read: Callable[[Sequence[int]], Tensor]) -> None:
    """Refuse an architecture whose layers need more than the residual stream of the layer below."""
    ids = example.input_ids[None].to(next(student.parameters()).device)
    with torch.no_grad(), capture(student, [(first, "stream")]) as seen:
        decoder(student)(ids, use_cache=False)
        whole = seen[first, "stream"]
        with partial_decoder(student, first, first) as forward:
            forward(read([0]), torch.ones_like(ids))
        if F.cosine_similarity(whole.float(), seen[first, "stream"].float(), dim=-1).min() < 0.99:
            raise ValueError(
                f"{type(student).__name__} is not supported: layers need more than the residual stream, so choose "
                "another student"
            )


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
    _check_targets(student, layers, config)
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
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's, of a transformers name
            adapted: Any = get_peft_model(student, lora)
    except ValueError as error:  # of experts whose matrices are one
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"lora_targets={config.lora_targets} cannot be adapted in a {type(student).__name__} ({reason}): choose "
            'others, or trained="layer"'
        ) from None
    if isinstance(config.adapters, Mapping):
        _start_from({n: student.get_submodule(n) for n in targets}, config.adapters)
    _add_projection(student, config)

    def merge() -> None:
        adapted.merge_and_unload()
        _release(student)

    return {f"{n}.weight" for n in targets}, _trainable(student), merge


def _check_targets(student: Model, layers: tuple[int, ...], config: TransferConfig) -> None:
    """Refuse adapters that would train less than was asked for, in some layer or in rank, without a word."""
    for k in layers:
        named = decoder_layers(student)[k - 1].named_modules()
        linear = {n.rsplit(".", 1)[-1]: m for n, m in named if isinstance(m, nn.Linear | Conv1D)}
        missing = [target for target in config.lora_targets if target not in linear]
        if missing or not config.lora_targets:
            raise ValueError(
                f"lora_targets={config.lora_targets} must name linear modules of every trained layer, and layer {k} of "
                f"a {type(student).__name__} has no {', '.join(missing) or 'nameless one'}: choose among those which "
                f"hold its weights, {', '.join(sorted(linear)) or 'of which none is a linear module'}"
            )
        ranks = {name: min(linear[name].weight.shape) for name in config.lora_targets}
        low = min(ranks, key=lambda name: ranks[name])
        if config.adapters == "pissa" and config.lora_rank > ranks[low]:
            raise ValueError(
                f"PiSSA has no rank {config.lora_rank} in {low}, whose rank is at most {ranks[low]}: lower lora_rank"
            )


def _add_projection(student: Model, config: TransferConfig) -> None:
    """P becomes a parameter of the student while it trains, so that checkpoints and optimizer hold it."""
    if isinstance(config.projection, Tensor):
        projection = config.projection.to(next(student.parameters()).device, torch.float32, copy=True)
        student.register_parameter(PROJECTION, nn.Parameter(projection))


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


def _save_checkpoint(run: Run, folder: Path, state: dict[str, Any]) -> None:
    if run.config.folder:
        facts = {"key": run.key, "rng": torch.get_rng_state(), "log": run.log, "tokens": run.tokens}
        save_tensors(folder / "checkpoint.pt", {**state, **facts})


def _load_checkpoint(folder: Path, key: str) -> dict[str, Any] | None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state: dict[str, Any] = load_tensors(path)
    if state["key"] != key:
        raise ValueError(f"{path} belongs to other inputs or another configuration: choose another folder or delete it")
    return state
