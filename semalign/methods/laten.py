"""LaTen: locate teacher neurons, translate their weights by a hypernetwork, add them to the student's.

Source: Tan et al., Neural Incompatibility (ACL 2025), method "LaTen": A capture, B score (the static neuron attribution
of Yu & Ananiadou 2024), C select, D extract, E translate, F inject, G align, H merge. ``released=True`` computes what
the authors' published code computes, defects included, and the log shows their effect in numbers.

L layers, numbered from 1; D width; F MLP neurons and A attention neurons a layer, numbered from 0; V tokens; n layers
that give or receive, k neurons in each. An MLP neuron is a row of ``up_proj`` and a column of ``down_proj``, an
attention neuron a row of ``v_proj`` and a column of ``o_proj``. Under grouped-query attention ``v_proj`` has fewer rows
than ``o_proj`` has columns, and is left alone.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semalign.attribution import objective
from semalign.lm import hooks
from semalign.lm.examples import Encoded, Example, TaskData, collate, encode, fitting
from semalign.lm.parts import Model, decoder, decoder_layers, head_weight, norm_gain, sublayers
from semalign.methods.registry import Method
from semalign.models import Pair
from semalign.training.config import DivergedError, TransferConfig, TransferResult, costs

MODULES = ("up_proj", "down_proj", "v_proj", "o_proj")
MLP = ("up_proj", "down_proj")
ROWS = ("up_proj", "v_proj")  # where a neuron is a row of the weight; it is a column of the other two
START = 0.01  # the first injected vectors over the teacher's, entry for entry
STRIPPED = '." )\n,]'  # what a response may end in and is not attributed
Vectors = Mapping[str, Tensor]
"""Neurons' weights by module, each (n, k, D): layer by layer, neuron by neuron, rows and columns alike."""
Selection = Mapping[str, Sequence[tuple[int, Tensor]]]
"""By module: n layers in ascending order, each with its neurons (k,), int64 on the CPU, best first."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Internals at the last position, float32."""

    stream: Tensor  # (L + 1, D): the inputs of layers 1..L, then the output of layer L
    residual: Tensor  # (L, D): the stream between attention and MLP
    mlp: Tensor  # (L, F): what down_proj receives
    attention: Tensor  # (L, A): what o_proj receives
    scale: Tensor  # (): s, by which the final norm divides


@dataclass(frozen=True, eq=False)
class Scores:
    """Gains in the target's log-probability in nats: of neurons (L, F) and (L, A), and of whole sublayers (L,)."""

    mlp: Tensor
    attention: Tensor
    layer_mlp: Tensor
    layer_attention: Tensor


def projections(model: Model) -> list[dict[str, nn.Linear]]:
    """The four projections of each layer by name, layer 1 first.

    Raises:
        ValueError: a layer has not all four, or normalises what they compute before it is added to the stream.
    """
    by_layer = []
    for k, layer in enumerate(decoder_layers(model), start=1):
        attention, mlp = sublayers(layer)
        homes = {name: mlp if name in MLP else attention for name in MODULES}
        missing = [name for name, home in homes.items() if not hasattr(home, name)]
        if missing:
            raise ValueError(
                f"layer {k} of a {type(model).__name__} adds the outputs of {type(attention).__name__} and "
                f"{type(mlp).__name__}, which have no {', '.join(missing)}: LaTen needs layers built as Llama's, "
                "Mistral's or Qwen's are, so choose a pair of such models or another baseline"
            )
        by_layer.append({name: getattr(home, name) for name, home in homes.items()})
    return by_layer


def transferable(model: Model) -> tuple[str, ...]:
    """The modules whose neurons can be moved: all four, or without ``v_proj`` under grouped-query attention."""
    first = projections(model)[0]
    grouped = first["v_proj"].out_features != first["o_proj"].in_features
    return tuple(name for name in MODULES if not (grouped and name == "v_proj"))


@torch.no_grad()
def trace_last(model: Model, input_ids: Tensor, *, released: bool = False) -> Trace:
    """Run ``input_ids`` (T,) and keep the last position's internals (step A).

    An attention neuron is the attention-weighted sum of its values over all positions. ``released`` keeps the last
    position's own term alone, and has for s, in place of the root mean square, sqrt(std) of the last layer's output,
    std^2 being its biased variance + 1e-5.

    Raises:
        ValueError: the model is none whose logits are ``W_head (g * h / s)`` of a plain sum of sublayer outputs.
    """
    parts, depths = projections(model), range(1, len(decoder_layers(model)) + 1)
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, k: int) -> Any:
        return lambda _module, args: seen.__setitem__((name, k), args[0][0, -1].float())

    def last_alone(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(output[:, :-1]), output[:, -1:]], dim=1)

    def rerun(k: int) -> Any:
        def hook(attention: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            handle = parts[k - 1]["v_proj"].register_forward_hook(last_alone)
            attention.forward(*args, **kwargs)  # what o_proj receives now replaces the sum over positions in ``seen``
            handle.remove()

        return hook

    taps = [(k, point) for k in depths for point in ("input", "stream", "attention", "mlp")]
    with ExitStack() as stack, hooks.capture(model, taps) as points:
        for k, layer in enumerate(decoder_layers(model), start=1):
            for name in ("down_proj", "o_proj"):
                stack.callback(parts[k - 1][name].register_forward_pre_hook(keep(name, k)).remove)
            if released:
                stack.callback(sublayers(layer)[0].register_forward_hook(rerun(k), with_kwargs=True).remove)
        logits = model(input_ids=input_ids[None].to(head_weight(model).device), use_cache=False).logits[0, -1].float()
    x, y, attention, mlp = (
        torch.stack([points[k, point][0, -1].float() for k in depths])
        for point in ("input", "stream", "attention", "mlp")
    )
    rms = (y[-1].square().mean() + getattr(decoder(model).config, "rms_norm_eps", 0.0)).sqrt()
    for got, wanted in ((x + attention + mlp, y), (_readout(model, rms) @ y[-1], logits)):
        if not (got - wanted).norm() < 0.05 * wanted.norm():  # rounding in 16 bits stays well below
            raise ValueError(
                f"LaTen's scores are not defined for a {type(model).__name__}: its stream is not the plain sum of "
                "sublayer outputs, or its logits are not a linear head of an RMS norm; choose another pair or baseline"
            )
    c, u = (torch.stack([seen[name, k] for k in depths]) for name in ("down_proj", "o_proj"))
    return Trace(
        torch.cat([x, y[-1:]]), x + attention, c, u, (y[-1].var(unbiased=False) + 1e-5) ** 0.25 if released else rms
    )


def _readout(model: Model, scale: Tensor) -> Tensor:
    """W_head diag(g) / s (V, D), float32: the logits of a state under the frozen norm."""
    return head_weight(model).float() * (norm_gain(model).float() / scale)


@torch.no_grad()
def neuron_scores(model: Model, inside: Trace, target: int, *, chunk: int = 1024, released: bool = False) -> Scores:
    """How much each neuron and each sublayer raises log q(target), read by the head under the frozen norm (step B).

    MLP neuron j of a layer scores log q(r + c_j w_j) - log q(r), with the residual r and column w_j of ``down_proj``;
    attention neurons likewise on the layer's input, with ``o_proj``. ``chunk`` neurons are read at once as logits
    (chunk, V); it changes no score. ``released`` reads by a float16 head, takes the logarithm of a float16 softmax and
    rounds to 4 decimals;
    a score that is no number then becomes infinite, because the released sort puts such neurons first.
    """
    readout, half = _readout(model, inside.scale), head_weight(model).half().float()

    def log_q(states: Tensor) -> Tensor:  # (n, D) -> (n,)
        if released:
            normed = (states * (norm_gain(model).float() / inside.scale)).half().float()
            # As cards multiply in float16: sums in float32, rounded at the end. Processors take twenty times as long.
            return (normed @ half.T).half().softmax(-1)[:, target].log().float()
        return (states @ readout.T).log_softmax(-1)[:, target]

    def gain(after: Tensor, before: Tensor) -> Tensor:
        return (after - before).mul(1e4).round().div(1e4).nan_to_num(math.inf, math.inf) if released else after - before

    def neurons(base: Tensor, activations: Tensor, projection: nn.Linear) -> Tensor:
        pieces = zip(activations.split(chunk), projection.weight.T.split(chunk), strict=True)
        return gain(torch.cat([log_q(base + a[:, None] * w.float()) for a, w in pieces]), log_q(base[None]))

    x, r, parts = inside.stream[:-1], inside.residual, projections(model)
    return Scores(
        torch.stack([neurons(a, c, part["down_proj"]) for a, c, part in zip(r, inside.mlp, parts, strict=True)]),
        torch.stack([neurons(a, u, part["o_proj"]) for a, u, part in zip(x, inside.attention, parts, strict=True)]),
        gain(log_q(inside.stream[1:]), log_q(r)),
        gain(log_q(r), log_q(x)),
    )


def tie_rate(scores: Scores) -> float:
    """The fraction of neurons whose score repeats another's in its layer: what is ranked by number and not by score."""
    rows = [row for table in (scores.mlp, scores.attention) for row in table]
    return 1 - sum(len(row.unique()) for row in rows) / sum(len(row) for row in rows)


def select(scores: Scores, n_layers: int, k_mlp: int, k_attention: int) -> Selection:
    """The ``n_layers`` best layers, ascending, and the best neurons of each, best first (step C).

    MLP and attention may take different layers. Equal scores go by number.

    Raises:
        ValueError: a score is NaN, or more layers or neurons are asked for than there are, or none.
    """

    def best(table: Tensor, count: int, what: str) -> Tensor:
        if table.isnan().any():
            raise ValueError(f"the scores of {what} hold NaN, so that they have no order: run the model in float32")
        if not 1 <= count <= table.shape[-1]:
            raise ValueError(f"{count} {what} were asked for and there are {table.shape[-1]}: choose another ratio")
        return table.cpu().argsort(dim=-1, descending=True, stable=True)[..., :count]

    def ranked(layers: Tensor, neurons: Tensor, count: int, what: str) -> list[tuple[int, Tensor]]:
        kept = best(layers, n_layers, "layers").sort().values
        return [(int(i) + 1, best(neurons[i], count, what)) for i in kept]

    mlp = ranked(scores.layer_mlp, scores.mlp, k_mlp, "MLP neurons")
    attention = ranked(scores.layer_attention, scores.attention, k_attention, "attention neurons")
    return {name: mlp if name in MLP else attention for name in MODULES}


def _neurons(name: str, linear: nn.Linear) -> Tensor:
    """A view (neurons, D) of the weight."""
    return linear.weight if name in ROWS else linear.weight.T


def _sites(model: Model, selection: Selection, modules: Sequence[str]) -> Iterator[tuple[str, int, nn.Linear, Tensor]]:
    """Module name, index among its n layers, projection and neurons on its device, for each place in ``modules``."""
    parts = projections(model)
    for name in modules:
        for i, (layer, ids) in enumerate(selection[name]):
            linear = parts[layer - 1][name]
            yield name, i, linear, ids.to(linear.weight.device)


def extract(model: Model, selection: Selection, modules: Sequence[str] = MODULES) -> dict[str, Tensor]:
    """The selected neurons' weights (n, k, D) of each module (step D), copied."""
    blocks: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name, _, linear, ids in _sites(model, selection, modules):
        blocks[name].append(_neurons(name, linear).detach()[ids])
    return {name: torch.stack(by_layer) for name, by_layer in blocks.items()}


def default_init_std(width: int, *, released: bool = False) -> float:
    """The hypernetwork's initial standard deviation for teacher width D_T.

    Entries come out std^2 D_T / sqrt(2) times as large as they went in. The released 1e-5 leaves a share of 4e-7, too
    small for float16. Ours leaves ``START`` = 1 %: more than bfloat16 rounds off (0.4 %), too little to disturb the
    student, and from hidden units that are large enough for both matrices to have gradients.
    """
    return 1e-5 if released else math.sqrt(START * math.sqrt(2) / width)


class HyperNet(nn.Module):
    """An MLP D_T -> D_T -> D_S per module, ReLU and no bias, float32, for all its layers and neurons (step E)."""

    def __init__(self, modules: Sequence[str], d_in: int, d_out: int, *, std: float, seed: int, half: bool = False):
        super().__init__()
        self.half_output = half

        def net() -> nn.Module:
            return nn.Sequential(nn.Linear(d_in, d_in, bias=False), nn.ReLU(), nn.Linear(d_in, d_out, bias=False))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.nets = nn.ModuleDict({name: net() for name in modules})
            for weight in self.parameters():
                nn.init.normal_(weight, std=std)

    def forward(self, vectors: Vectors) -> dict[str, Tensor]:
        """Teacher vectors (n, k, D_T), on any device, to student vectors (n, k, D_S), float16 with ``half``."""
        out = {name: self.nets[name](v.to(next(self.parameters()))) for name, v in vectors.items()}
        return {name: v.half() for name, v in out.items()} if self.half_output else out


@contextmanager
def inject(student: Model, selection: Selection, vectors: Vectors) -> Iterator[None]:
    """Inside, the student computes as if ``vectors`` (n, k, D_S) were added to its selected neurons (step F).

    Activations are changed and no weight, so that gradients reach ``vectors`` and no weight's size is allocated.
    """

    def hook(name: str, ids: Tensor, block: Tensor) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            extra = block.to(output)
            if name in ROWS:
                return output.index_add(-1, ids, args[0] @ extra.T)
            return output + args[0][..., ids] @ extra

        return add

    with ExitStack() as stack:
        for name, i, linear, ids in _sites(student, selection, list(vectors)):
            stack.callback(linear.register_forward_hook(hook(name, ids, vectors[name][i])).remove)
        yield


@torch.no_grad()
def merge(student: Model, selection: Selection, vectors: Vectors) -> dict[str, list[int]]:
    """Add ``vectors`` (n, k, D_S) to the weights for good, in float32 with one rounding.

    Returns:
        The neurons that really changed, in ascending order, for each changed parameter.
    """
    changed, names = {}, {id(p): name for name, p in student.named_parameters()}
    for name, i, linear, ids in _sites(student, selection, list(vectors)):
        view = _neurons(name, linear)
        old = view[ids]
        view[ids] = new = (old + vectors[name][i].to(old.device, torch.float32)).to(old.dtype)
        moved = ids[(new != old).any(-1)]
        if len(moved):
            changed[names[id(linear.weight)]] = moved.sort().values.tolist()
    return changed


def l2_penalty(vectors: Vectors) -> Tensor:
    """Mean square of each module's vectors, added up; in float16 its gradient is 0 at any size that occurs."""
    return torch.stack([F.mse_loss(v, torch.zeros_like(v)) for v in vectors.values()]).sum()


def one_cycle_rate(lr: float, step: int, total: int) -> float:
    """The one-cycle rate of step 1..total: lr/25 to lr in the first tenth, then back to lr/25, both by a cosine."""
    peak, at = 0.1 * total - 1, step - 1  # the steps' numbers from 0, as in torch's OneCycleLR
    done = at / peak if at <= peak and peak > 0 else 1 - (at - peak) / (total - 1 - peak)
    return lr / 25 + (lr - lr / 25) * (1 - math.cos(math.pi * done)) / 2


@contextmanager
def _float32(model: Model) -> Iterator[None]:
    """Parameters in float32 inside, in their own type after; buffers, which rotary positions need exact, stay."""
    types = [(p, p.dtype) for p in model.parameters()]
    try:
        for p, _ in types:
            p.data = p.data.float()
        yield
    finally:
        for p, dtype in types:
            p.data = p.data.to(dtype)


def _attributed(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Tensor:
    """Token ids (T,), T > 1, the last of them the attributed one: what the response ends in but for punctuation."""
    response = example.response.rstrip(STRIPPED)
    ids = encode(tokenizer, [Example(example.prompt, response)], max_length=max_length)[0].input_ids
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    if not response or len(ids) < 2:
        raise ValueError(f"{example} has no token to attribute, or none before it: correct the example")
    return ids


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run reads: the texts that locate, the examples that train and validate, and how many go into a step.

    ``texts`` holds the token ids (T,) of each of ``seeds``, by which its steps locate, and last those of the training
    example by which validation and merge do. The last token of each is the attributed one.
    """

    texts: list[Tensor]
    seeds: list[Encoded]
    align: list[Encoded]
    validation: list[Encoded]
    steps: int
    items: int

    @property
    def located_tokens(self) -> int:
        """Tokens that a model reads to be located in."""
        return sum(len(text) - 1 for text in self.texts)


@dataclass(frozen=True, eq=False)
class Places:
    """For each text, last the one of validation and merge: where the student receives, and ties to log.

    ``blocks`` are the teacher's vectors (n, k, D_T) on the CPU, ``before`` the student's weights at the last place.
    """

    selections: list[Selection]
    ties: list[dict[str, float]]
    blocks: list[dict[str, Tensor]]
    modules: tuple[str, ...]
    before: Vectors


@dataclass(frozen=True, eq=False)
class Trained:
    """The vectors to merge, the step (from 1) and validation loss that chose them, the log, and tokens trained on."""

    vectors: Vectors
    step: int
    loss: float
    log: list[dict[str, Any]]
    tokens: int


def planned(pair: Pair, data: TaskData, config: TransferConfig, steps: int | None, items: int) -> Plan:
    """Draw the examples of a run, one order of ``data.extract`` a seed.

    Raises:
        ValueError: no extract or no align examples, or one without a token to attribute.
    """
    if not data.extract or not data.align or items < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"LaTen locates by extract examples and trains on align examples too: task {data.name} has "
            f"{len(data.extract)} and {len(data.align)}; give both, and items={items} and steps={steps} count from 1"
        )
    extract, train = (fitting(pair.tokenizer, s, max_length=config.max_length) for s in (data.extract, data.train))
    rng, steps = random.Random(config.seed), steps or len(extract)
    examples = rng.sample(extract, len(extract))[:steps]
    located = [*examples, rng.choice(train or extract)]
    texts = [_attributed(pair.tokenizer, e, config.max_length) for e in located]
    split = (examples, data.align, data.validation or data.align)
    seeds, align, validation = (encode(pair.tokenizer, some, max_length=config.max_length) for some in split)
    return Plan(texts, seeds, align, validation, steps, items)


def _best(
    model: Model, text: Tensor, depth: int, sizes: tuple[int, int], released: bool = False
) -> tuple[Selection, float]:
    """Steps A to C for one text (T,): the ``depth`` best layers with ``sizes`` neurons each, and the rate of ties."""
    inside = trace_last(model, text[:-1], released=released)
    scores = neuron_scores(model, inside, int(text[-1]), released=released)
    return select(scores, depth, *sizes), tie_rate(scores)


def _neuron_counts(student: Model, ratio: float) -> tuple[int, int]:
    """MLP and attention neurons that receive in a layer: ``ratio`` of those the student has."""
    first = projections(student)[0]
    return int(ratio * first["down_proj"].in_features), int(ratio * first["o_proj"].in_features)


def locate(
    pair: Pair, texts: Sequence[Tensor], ratio: float, *, released: bool = False
) -> tuple[PreTrainedModel, Places]:
    """Steps A to D in both models, one after the other: the student, frozen, and its places with what goes there."""
    student = pair.load_student()
    depth, modules, sizes = len(decoder_layers(student)), transferable(student), _neuron_counts(student, ratio)
    del student
    gc.collect()
    teacher = pair.load_teacher().eval()
    depth, modules = min(depth, len(decoder_layers(teacher))), tuple(m for m in modules if m in transferable(teacher))
    given = [_best(teacher, text, depth, sizes, released) for text in texts]
    blocks = [{m: v.cpu() for m, v in extract(teacher, selection, modules).items()} for selection, _ in given]
    del teacher
    gc.collect()
    student = pair.load_student().eval().requires_grad_(False)
    received = [_best(student, text, depth, sizes, released) for text in texts]
    ties = [{"teacher_ties": t, "student_ties": s} for (_, t), (_, s) in zip(given, received, strict=True)]
    selections = [selection for selection, _ in received]
    return student, Places(selections, ties, blocks, modules, extract(student, selections[-1], modules))


def train(
    student: PreTrainedModel,
    plan: Plan,
    places: Places,
    made: Callable[[int], Vectors],
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    penalty: float,
    seed: int,
    released: bool = False,
) -> Trained:
    """Steps F and G: ``made(i)`` are the vectors for text i (-1 for the last), and the optimizer moves what makes them.

    The step of the lowest validation loss is kept, the last one with ``released``, so that it is watched in any case.

    Raises:
        DivergedError: a loss that is not finite.
    """
    log: list[dict[str, Any]] = [
        {"step": 0, "split": "validation", "lr": 0.0, "loss": _mean_loss(student, plan.validation)}
    ]
    best, final, lowest, read = 0, dict[str, Tensor](), math.inf, 0
    with nullcontext() if released else _float32(student):
        for step in range(1, plan.steps + 1):
            i, rate = (step - 1) % len(plan.seeds), one_cycle_rate(lr, step, plan.steps)
            draw = random.Random(step - 1 if released else f"{seed} {step}")
            batch = [plan.seeds[i], *draw.sample(plan.align, min(plan.items - 1, len(plan.align)))]
            vectors = made(i)
            share = 1.0 if released else 1 / len(batch)
            losses = _injected_gradients(student, places.selections[i], vectors, batch, penalty, share)
            if not math.isfinite(losses["loss"]):
                raise DivergedError(f"the loss of step {step} is {losses['loss']}: lower lr={lr}", student)
            sizes = _sizes(vectors, places.before)
            log.append({"step": step, "split": "train", "lr": rate, **losses, **places.ties[i], **sizes})
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            read += sum(len(e.input_ids) for e in batch)
            with torch.no_grad(), inject(student, places.selections[-1], vectors := made(-1)):
                loss = _mean_loss(student, plan.validation)
            log.append({"step": step, "split": "validation", "lr": rate, "loss": loss})
            if not math.isfinite(loss):
                raise DivergedError(f"the validation loss after step {step} is {loss}: lower lr={lr}", student)
            if released or loss < lowest:
                best, final, lowest = step, {m: v.detach().clone() for m, v in vectors.items()}, loss
    return Trained(final, best, lowest, log, read)


def merged(student: Model, places: Places, run: Trained, *, released: bool = False) -> list[str]:
    """Step H: the parameters that changed. With ``released`` the vectors only hang on the modules, as ``delta``.

    The log of ``run`` gets its last record.

    Raises:
        ValueError: the merged student equals its base.
    """
    trained: list[str] = []
    place, modules = places.selections[-1], places.modules
    if released:
        for m, n, linear, _ in _sites(student, place, modules):
            linear.delta = run.vectors[m][n]  # a plain attribute, in no state_dict
    else:
        trained = list(merge(student, place, run.vectors))
    changed = sum(int((v != places.before[m]).sum()) for m, v in extract(student, place, modules).items())
    if not released and not changed:
        raise ValueError("the merged student equals its base: raise init_std or lr, or load it in float32")
    last = {"step": run.step, "split": "merge", "lr": 0.0, "loss": run.loss, "changed_weights": changed}
    run.log.append({**last, **places.ties[-1], **_sizes(run.vectors, places.before)})
    student.requires_grad_(True)
    return trained


def receiving(places: Places) -> tuple[int, ...]:
    """The student layers that vectors are merged into, from 1."""
    return tuple(sorted({layer for m in places.modules for layer, _ in places.selections[-1][m]}))


def transfer(
    pair: Pair,
    data: TaskData,
    config: TransferConfig | None = None,
    *,
    released: bool = False,
    ratio: float = 0.1,
    steps: int | None = None,
    items: int = 16,
    lr: float = 3e-4,
    penalty: float = 1000.0,
    init_std: float | None = None,
) -> TransferResult:
    """Transfer by LaTen: train the hypernetwork, one step an example of ``data.extract``, and merge what it makes.

    A step locates neurons by its own example; what is validated and merged, by one random training example. Both models
    use their min(L_T, L_S) best layers: of a deeper student, as many receive as the teacher has. Teacher and student
    are never in memory together. Of ``config`` only ``max_length`` and ``seed`` count.

    A step's loss is the mean over its example and ``items`` - 1 of ``data.align``; the step with the lowest loss on
    ``data.validation`` (``data.align`` where that is empty) is merged. ``released`` sums losses, draws the same align
    examples under every seed, takes the last step, and hangs the vectors on the modules as ``delta``, which no forward
    pass reads and no file holds, so that its student's weights are the base student's.

    Args:
        ratio: neurons that receive in a layer, over all the student has; the teacher gives as many.
        steps: None for one an example; more go through the examples again.
        lr: the peak of :func:`one_cycle_rate` (AdamW, betas 0.9 and 0.95, weight decay 0.05).
        penalty: weight of :func:`l2_penalty`.
        init_std: None for :func:`default_init_std`.

    Returns:
        The student, its changed parameters, and the cost as ``alignment.transfer`` reports it: ``inputs_s`` locates and
        extracts, ``student_tokens`` leaves out validation, the cache holds the teacher's vectors. Records of ``log``
        have ``split`` train, validation (step 0: the base student) or merge (with ``changed_weights``).

    Raises:
        ValueError: no extract or no align examples, an example without a token to attribute, a model without the four
            projections or with too few neurons, or a merged student that equals its base.
        DivergedError: a loss that is not finite; its student is the base student.
    """
    config, start = config or TransferConfig(), time.perf_counter()
    plan = planned(pair, data, config, steps, items)
    student, places = locate(pair, plan.texts, ratio, released=released)
    inputs_s, begun = time.perf_counter() - start, time.perf_counter()
    d_teacher, d_student = places.blocks[0][MODULES[0]].shape[-1], head_weight(student).shape[1]
    std = default_init_std(d_teacher, released=released) if init_std is None else init_std
    net = HyperNet(places.modules, d_teacher, d_student, std=std, seed=config.seed, half=released)
    net.to(head_weight(student).device)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.05)

    def made(i: int) -> Vectors:
        return net(places.blocks[i])

    run = train(
        student, plan, places, made, optimizer, lr=lr, penalty=penalty, seed=config.seed, released=released
    )  # fmt: skip
    trained = merged(student, places, run, released=released)
    cost = costs(
        wall_s=time.perf_counter() - start,
        inputs_s=inputs_s,
        train_s=time.perf_counter() - begun,
        teacher_tokens=float(plan.located_tokens),
        student_tokens=float(plan.located_tokens + run.tokens),
        trainable_parameters=float(sum(p.numel() for p in net.parameters())),
        cached_bytes_per_token=sum(v.nbytes for b in places.blocks for v in b.values()) / plan.located_tokens,
    )
    return TransferResult(student, trained, cost, run.log, () if released else receiving(places))


def direct(
    pair: Pair,
    data: TaskData,
    config: TransferConfig | None = None,
    *,
    ratio: float = 0.1,
    steps: int | None = None,
    items: int = 16,
    lr: float = 3e-4,
    penalty: float = 1000.0,
) -> TransferResult:
    """The hypernetwork's control: LaTen's injected vectors are the parameters themselves, from 0, without a teacher.

    Examples, steps, rate, penalty and the choice of the step are LaTen's, and so are the places: the neurons, in all
    layers of the student, that its training example for validation and merge locates. They are the same at every step.
    What is better than this came from the teacher. Arguments, result and errors as for :func:`transfer`.
    """
    config, start = config or TransferConfig(), time.perf_counter()
    plan = planned(pair, data, config, steps, items)
    student = pair.load_student().eval().requires_grad_(False)
    depth, modules = len(decoder_layers(student)), transferable(student)
    place, ties = _best(student, plan.texts[-1], depth, _neuron_counts(student, ratio))
    every, before = len(plan.texts), extract(student, place, modules)
    places = Places([place] * every, [{"student_ties": ties}] * every, [], modules, before)
    vectors = {m: torch.zeros(v.shape, device=v.device, requires_grad=True) for m, v in before.items()}
    optimizer = torch.optim.AdamW(vectors.values(), betas=(0.9, 0.95), weight_decay=0.05)
    inputs_s, begun = time.perf_counter() - start, time.perf_counter()
    run = train(student, plan, places, lambda _: vectors, optimizer, lr=lr, penalty=penalty, seed=config.seed)
    trained = merged(student, places, run)
    cost = costs(
        wall_s=time.perf_counter() - start,
        inputs_s=inputs_s,
        train_s=time.perf_counter() - begun,
        student_tokens=float(len(plan.texts[-1]) - 1 + run.tokens),
        trainable_parameters=float(sum(v.numel() for v in vectors.values())),
    )
    return TransferResult(student, trained, cost, run.log, receiving(places))


@torch.no_grad()
def _mean_loss(student: Model, examples: list[Encoded]) -> float:
    device = head_weight(student).device
    return sum(objective(student, collate([e], 0, device)).item() for e in examples) / len(examples)


def _injected_gradients(
    student: Model, selection: Selection, vectors: Vectors, batch: list[Encoded], penalty: float, share: float
) -> dict[str, float]:
    """Step G up to the optimizer: each example's loss counts ``share``; returns means over examples, to log."""
    leaves = {m: v.detach().requires_grad_() for m, v in vectors.items()}
    lm = 0.0
    with inject(student, selection, leaves):
        for e in batch:  # one at a time: a step needs the memory of one example
            loss = objective(student, collate([e], 0, head_weight(student).device))
            (share * loss).backward()
            lm += loss.item() / len(batch)
    term = penalty * l2_penalty(leaves)
    pulls = torch.autograd.grad(term, list(leaves.values()), retain_graph=True)
    (share * len(batch) * term).backward()
    torch.autograd.backward(list(vectors.values()), [v.grad for v in leaves.values()])
    norm = math.sqrt(sum(float(p.float().square().sum()) for p in pulls))
    return {"loss": lm + term.item(), "lm_loss": lm, "penalty": term.item(), "penalty_gradient": norm}


def _sizes(vectors: Vectors, weights: Vectors) -> dict[str, float]:
    """The share of vector entries that are 0, and the norm of all vectors over that of the weights they go to."""
    zeros = sum(int((v == 0).sum()) for v in vectors.values()) / sum(v.numel() for v in vectors.values())
    delta, base = (sum(float(t.detach().float().square().sum()) for t in m.values()) for m in (vectors, weights))
    return {"zero_outputs": zeros, "relative_norm": math.sqrt(delta / base)}


_SPLITS = "align, extract, train"
METHODS = {
    "laten": Method(
        "injected neurons", transfer, _SPLITS, "hypernetwork", "weights", True, colour="#bb55ff", tuned=False
    ),
    "laten_released": Method(
        "the same as released", partial(transfer, released=True), _SPLITS, "hypernetwork", "weights", True,
        colour="#88ee00", tuned=False,
    ),
    "laten_direct": Method(
        "injected neurons without a teacher", direct, _SPLITS, "injected vectors", "-", True, colour="#552211",
        tuned=False,
    ),
}  # fmt: skip
