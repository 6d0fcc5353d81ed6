"""Pairing from outputs: partners chosen by what layers read out, and by what their states do in each other's place.

The paper pairs layers by depth alone (section 4.1) and names pairing from the two models' outputs as future work. A
layer is read by its own model's final norm and head (the logit lens), so that layers of any two widths can be compared
in the vocabulary that both share. Matrices here are (L_T, L_S), and the nearer a pair, the less.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semalign import pairing
from semalign.lm.examples import Encoded, collate, encode, mask_of, supervised
from semalign.lm.hooks import float_logits, skip_layers
from semalign.lm.parts import Model, decoder, decoder_layers, head_weight
from semalign.methods.fdd import lens
from semalign.models import Pair, load_pair
from semalign.planning.work import most_examples
from semalign.profiles import Profile, Source
from semalign.semantics import hidden_map
from semalign.study import analysis, reading, regimes, trials
from semalign.training.losses import LOGITS

FITTED, HELD_OUT = 40, 20
"""Examples on which maps between layers are fitted, and others on which all is measured."""
RIDGE = 0.01
"""Of the fitted maps, as a share of the mean eigenvalue of the teacher's Gram matrix."""
OUTPUTS = ("lens", "lens, mapped", "swap")
"""What pairs by outputs: two readings; the same with a map between; the student's own output with the state in it."""
SETTINGS = {
    "SemAlign, tuned": regimes.Way("semalign_tuned", {}, "semalign_tuned"),
    # What carries most between kin: the stream itself through the logit map, and no label beside it.
    "states alone": regimes.Way("semalign", {"interface": "stream", "map": "logit", "output_loss": "none"}, "sft"),
}
"""How students are trained towards their partners, in all layers."""
NO_STATES = {"layer_weight": 0.0, "teacher_layers": None}
PARTNERS = ("depth rule", *OUTPUTS, "CKA", "reversed", "random")
"""The pairings that are compared."""
Read = Callable[[Tensor], Tensor]
"""From a layer's states (n, D) to logits (n, m)."""


def lens_divergence(
    teacher: Sequence[Tensor], student: Sequence[Tensor], read_teacher: Read, read_student: Read, vocabulary: int
) -> Tensor:
    """KL(teacher layer, student layer) in nats of what each reads out, a mean over positions: (L_T, L_S) float64.

    Args:
        teacher: of every teacher layer the stream (n, D_T) at the same n positions.
        student: of every student layer the stream (n, D_S) there.
        read_teacher: the teacher's final norm and head; ``read_student`` the student's.
        vocabulary: how many tokens both have; the others are not read.

    Raises:
        ValueError: layers that were not read at the same positions.
    """
    _check_positions([*teacher, *student])
    sums = torch.zeros(len(teacher), len(student), dtype=torch.float64)
    n = len(teacher[0])
    chunk = max(1, LOGITS // ((len(teacher) + len(student)) * vocabulary))
    for at in range(0, n, chunk):
        logp = _log_probabilities([h[at : at + chunk] for h in teacher], read_teacher, vocabulary)
        logq = _log_probabilities([h[at : at + chunk] for h in student], read_student, vocabulary)
        p = logp.exp()
        of_each = (p * logp).sum(-1, keepdim=True) - p @ logq.transpose(1, 2)  # (positions, L_T, L_S)
        sums += of_each.double().sum(0)  # over positions in float64: of all at once float32 left four digits
    return sums / n


def ridge_maps(teacher: Sequence[Tensor], student: Sequence[Tensor], ridge: float = RIDGE) -> Tensor:
    """For each pair of layers the affine ridge regression of h_k on h_l: (L_T, L_S, D_S, D_T + 1), its constant last.

    Args:
        teacher: of every teacher layer the stream (n, D_T); ``student`` of every student layer (n, D_S), same tokens.
        ridge: as a share of the mean eigenvalue of each H_T'H_T.

    Raises:
        ValueError: layers that were not read at the same positions.
    """
    _check_positions([*teacher, *student])
    fitted = []
    for h in teacher:
        scale = h.double().square().sum().item() / h.shape[1]
        fitted.append(torch.stack([hidden_map(_with_one(h), goal, ridge=ridge * scale) for goal in student]))
    return torch.stack(fitted)


def mapped_divergence(teacher: Sequence[Tensor], student: Sequence[Tensor], maps: Tensor, read_student: Read) -> Tensor:
    """As :func:`lens_divergence`, of teacher layers that were mapped to the student's width and read by its head.

    Args:
        maps: of :func:`ridge_maps`, fitted at other positions than these.
    """
    vocabulary = read_student(student[0][:1]).shape[-1]
    columns = []
    for k, h in enumerate(student):
        sent = [apply(maps[depth, k], states) for depth, states in enumerate(teacher)]
        columns.append(lens_divergence(sent, [h], read_student, read_student, vocabulary))
    return torch.cat(columns, dim=1)


@torch.no_grad()
def swap_effect(
    student: Model, encoded: Sequence[Encoded], teacher: Sequence[Tensor], maps: Tensor, logp: Tensor
) -> Tensor:
    """The change of KL(teacher, student) in nats when M h_l stands in the place of h_k: (L_T, L_S) float64.

    The layers above k run on what they are given. Below zero: the student with the teacher's state in it is nearer to
    the teacher's distribution than without.

    Args:
        teacher: of every teacher layer the stream (tokens, D_T) at all tokens of ``encoded``, in order.
        maps: of :func:`ridge_maps`.
        logp: the teacher's log-probabilities (P, m') at the supervised positions, over the m' tokens that both have.
    """
    device = next(student.parameters()).device
    batch = collate(encoded, 0, device)
    tokens, answering = batch["attention_mask"].bool(), supervised(batch["labels"])
    p, width = logp.exp(), maps.shape[2]

    def divergence() -> float:
        out = decoder(student)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
        logq = float_logits(student, out.last_hidden_state[answering])[:, : p.shape[1]].log_softmax(-1).cpu()
        return float((p * (logp - logq)).sum(-1).double().mean())

    before = divergence()
    effect = torch.zeros(maps.shape[:2], dtype=torch.float64)
    for depth, states in enumerate(teacher):
        for k in range(maps.shape[1]):
            sent = torch.zeros(*tokens.shape, width, device=device)
            sent[tokens] = apply(maps[depth, k], states).to(device)
            with swapped(student, k + 1, sent.to(next(student.parameters()).dtype)):
                effect[depth, k] = divergence() - before
    return effect


@contextmanager
def swapped(model: Model, k: int, states: Tensor) -> Iterator[None]:
    """Inside, layer k hands on ``states`` (B, T, D) whatever it receives; the layers below it are not run."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = decoder_layers(model)[k - 1].register_forward_hook(hook)
    try:
        with skip_layers(model, range(1, k + 1)):
            yield
    finally:
        handle.remove()


def nearness(pair: Pair, fitted: Sequence[Encoded], held_out: Sequence[Encoded]) -> dict[str, Tensor]:
    """How near every teacher layer is to every student layer: (L_T, L_S) by each of ``OUTPUTS``, and 1 - ``CKA``.

    Maps are fitted at all tokens of ``fitted``; readings are compared at the supervised positions of ``held_out``. The
    two models are never in memory together, but for the teacher's final norm and head.
    """
    answering = torch.cat([supervised(e.labels) for e in held_out])
    teacher = pair.load_teacher().eval()
    of_teacher = [reading.layer_outputs(teacher, some) for some in (fitted, held_out)]
    read_teacher, theirs = _reader(teacher), len(head_weight(teacher))
    del teacher
    gc.collect()
    student = pair.load_student().eval()
    vocabulary = min(theirs, len(head_weight(student)))
    of_student = [reading.layer_outputs(student, some) for some in (fitted, held_out)]
    theirs_at, ours_at = ([h[answering] for h in states[1]] for states in (of_teacher, of_student))
    read_student = _reader(student)
    logp = read_teacher(theirs_at[-1])[:, :vocabulary].log_softmax(-1)
    mapped, swaps, goals = [], [], [h.to(student.device) for h in of_student[0]]
    for fit, at, everywhere in zip(of_teacher[0], theirs_at, of_teacher[1], strict=True):
        # A teacher layer at a time: for Llama-2 the maps of all take 107 GB.
        maps = ridge_maps([fit.to(student.device)], goals)
        mapped.append(mapped_divergence([at], ours_at, maps, read_student))
        swaps.append(swap_effect(student, held_out, [everywhere], maps, logp))
    return {
        "lens": lens_divergence(theirs_at, ours_at, read_teacher, read_student, vocabulary),
        "lens, mapped": torch.cat(mapped),
        "swap": torch.cat(swaps),
        "CKA": 1 - analysis.cka_matrix(of_teacher[1], of_student[1], device=student.device),
    }


def partners(near: Mapping[str, Tensor], seed: int = 0) -> dict[str, list[int]]:
    """By each of ``PARTNERS`` one teacher layer, from 1, for every student layer.

    By outputs: the order-preserving assignment of the least total. CKA is the paper's own comparison, without an order.
    """
    n_teacher, n_student = near["lens"].shape
    by_outputs = {name: pairing.order_preserving(-near[name]) for name in OUTPUTS}
    return {
        "depth rule": pairing.depth_pairs(n_teacher, n_student),
        **by_outputs,
        "CKA": pairing.cka_argmax(-near["CKA"]),
        "reversed": pairing.reversed_pairs(n_teacher, n_student),
        "random": pairing.random_pairs(n_teacher, n_student, seed),
    }


def examples_of(p: Profile, pair: Pair, task: str) -> tuple[list[Encoded], list[Encoded]]:
    """What maps are fitted on, from the training examples, and what is held out, from the validation examples."""
    data = trials.splits(p, task)
    train, held_out = (
        encode(pair.tokenizer, some, max_length=p.max_length)
        for some in (data.train[:FITTED], data.validation[:HELD_OUT])
    )
    return train, held_out


def of_students(p: Profile, task: str, teachers: Sequence[Source] = ()) -> list[dict[str, Tensor]]:
    """:func:`nearness` of each of the profile's students to its teacher, or to the profile's, on a task's examples."""
    found = []
    for teacher, student in zip(teachers or [p.teacher] * len(p.students), p.students, strict=True):
        pair = load_pair(p.changed(teacher=teacher, student=student))
        found.append(nearness(pair, *examples_of(p, pair, task)))
    return found


def taught(
    p: Profile,
    task: str,
    setting: str,
    layers: Sequence[Sequence[int]],
    folder: str | Path,
    teachers: Sequence[Source] = (),
) -> list[list[dict[str, Any]]]:
    """Every student trained in all layers towards its own ``layers`` of the teacher: a list of one trial each.

    Equal partners are one training.

    Args:
        setting: of ``SETTINGS``. Questions are asked where the labels are learnt too.
        layers: for each student one teacher layer, from 1, for each of its layers; ``[]`` is no layer term at all.
        teachers: one for each student; by default the profile's.
    """
    of, made, examples = SETTINGS[setting], [], most_examples(p)
    asked = "test" if of.settings.get("output_loss") != "none" else None
    given = of.changes(p, task, examples, p.regimes.steps // 2)
    for at, own in enumerate(layers):
        teacher = teachers[at] if teachers else p.teacher
        pair = p.changed(student=p.students[at], teacher=teacher, sizes={"train": examples})
        depth = len(decoder_layers(load_pair(pair).load_student()))
        changes = {**given, "layers": list(range(1, depth + 1))}
        changes |= {"teacher_layers": list(own)} if own else NO_STATES
        name = f"{list(SETTINGS).index(setting)}{'-kin' * bool(teachers)}-{'-'.join(map(str, own)) or 'none'}-{at}"
        made.append(
            [trials.run_trial(pair, task, of.method, p.seeds[0], folder, changes=changes, split=asked, variant=name)]
        )
    return made


def apply(matrix: Tensor, states: Tensor) -> Tensor:
    """M (h, 1) for states h (n, D_T) and one of :func:`ridge_maps`: (n, D_S), on the device of the map."""
    return _with_one(states.to(matrix.device)) @ matrix.T.to(states.dtype)


def _with_one(states: Tensor) -> Tensor:
    return torch.cat([states, torch.ones_like(states[:, :1])], dim=1)


def _reader(model: Model) -> Read:
    read, device = lens(model, copied=True), next(model.parameters()).device
    return torch.no_grad()(lambda states: read(states.to(device)).cpu())


def _log_probabilities(layers: Sequence[Tensor], read: Read, vocabulary: int) -> Tensor:
    """Log-probabilities of every layer's states: (n, L, m')."""
    return torch.stack([read(h)[:, :vocabulary].log_softmax(-1) for h in layers], dim=1)


def _check_positions(layers: Sequence[Tensor]) -> None:
    counts = {len(h) for h in layers}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"layers are compared at the same positions, and these have {sorted(counts)} states: read both models on "
            "the same examples"
        )
