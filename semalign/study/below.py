"""Where in a layer to align: the whole of it, a sublayer, each head, or groups of neurons, all else being equal.

Every way trains the same LoRA in the same layer, at the rate that labels in this layer have, with cross-entropy beside
the layer term and the logit map under it, and supervises D_S numbers a position. Without its layer term each of them is
labels in the same layer, to the bit: that is the twin of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semalign.alignment import choose_layers
from semalign.attribution import over_examples
from semalign.contributions import (
    MATRICES,
    contributions,
    entering,
    head_attribution,
    head_columns,
    last_matrix,
    written,
)
from semalign.lm.examples import Encoded, TaskData, collate, mask_of
from semalign.lm.hooks import capture
from semalign.lm.parts import Model, decoder, decoder_layers, head_weight
from semalign.methods.heads import paired, parts_of
from semalign.models import Pair
from semalign.pairing import critical_pair
from semalign.profiles import Profile
from semalign.semantics import semantic_map
from semalign.study import trials
from semalign.study.regimes import Way

EXAMPLES, STEPS, QUESTIONS = 64, 32, 50
"""Of every training: the most examples, about how many steps, and the most questions whose answers are read."""
SEEDS = 3
"""Trainings of every student, where the search has as many draws: of one, a lead of a point can be its luck."""
WEIGHTS = (1.0, 0.3, 0.1)
"""What the weight of the layer term is chosen from; the first is the paper's, and a small search has it alone."""
GROUPS = 4
"""Groups of neurons."""
AT_ONCE = 32
"""Parts whose contributions are in memory at once; those of all neurons of a layer would be 100 GB for Llama-2 13B."""

_LIKE = {"map": "logit", "output_loss": "ce"}
WAYS = {
    "labels": Way("sft_layer"),
    "layer": Way("semalign", {**_LIKE, "interface": "residual"}, "sft_layer"),
    "attention": Way("semalign", {**_LIKE, "interface": "attention"}, "sft_layer"),
    "MLP": Way("semalign", {**_LIKE, "interface": "mlp"}, "sft_layer"),
    "heads": Way("align_heads", _LIKE, "sft_layer"),
    "neurons": Way("align_neurons", {**_LIKE, "groups": GROUPS}, "sft_layer"),
    "other heads": Way("scrambled_heads", _LIKE, "sft_layer"),
}
"""What is compared, by the name that the chapter has for it."""
OF_PARTS = ("heads", "neurons", "other heads")
"""Those that need parts that add up."""


def refused(model: Model) -> str:
    """Why a model has no heads or neurons that add up to its sublayers, in a sentence; empty where it has."""
    try:
        for k in range(1, len(decoder_layers(model)) + 1):
            for point in MATRICES:
                last_matrix(model, k, point)
    except ValueError as error:
        return str(error)
    return ""


def ways_of(pair: Pair) -> tuple[dict[str, Way], str]:
    """The ways that both models of a pair allow, and why it is not all of them."""
    why = refused(pair.load_teacher()) or refused(pair.load_student())
    return {name: way for name, way in WAYS.items() if not (why and name in OF_PARTS)}, why


@torch.no_grad()
def remainders(model: Model, example: Encoded) -> dict[str, float]:
    """By sublayer, what is left of its contribution without its parts and its bias, as a share of its length.

    The largest over layers and positions of one example; heads at ``attention``, single neurons' columns at ``mlp``.
    """
    batch = collate([example], 0, head_weight(model).device)
    taps = [(k, point) for k in range(1, len(decoder_layers(model)) + 1) for point in MATRICES]
    with capture(model, taps) as whole, entering(model, taps) as seen:
        decoder(model)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
    largest = dict.fromkeys(MATRICES, 0.0)
    for k, point in taps:
        x, added = seen[k, point][0], whole[k, point][0]
        columns = head_columns(model, k) if point == "attention" else torch.arange(x.shape[-1])[:, None]
        bias = getattr(last_matrix(model, k, point), "bias", None)
        x, weight = x.float(), written(model, k, point).float()
        parts = sum(contributions(x, weight, some).sum(1) for some in columns.split(AT_ONCE))
        left = added - parts - (0 if bias is None else bias)
        largest[point] = max(largest[point], float((left.norm(dim=-1) / added.norm(dim=-1)).max()))
    return largest


def heads_attributed(model: Model, encoded: Sequence[Encoded], reduce: str = "abs") -> Tensor:
    """Attribution of every head (L, H) over all supervised positions of the examples."""
    return over_examples(model, encoded, partial(head_attribution, reduce=reduce))


def layer_pair(p: Profile, pair: Pair, data: TaskData) -> tuple[int, int]:
    """The trained pair (l(k), k): the layer that labels alone were tuned to, or that attribution chooses."""
    depths = [len(decoder_layers(load())) for load in (pair.load_teacher, pair.load_student)]
    layers = trials.hyperparameters(p, "sft_layer", data.name).get("layers")
    if layers is None and p.layer is not None:
        layers = [critical_pair(p.layer, *depths)[1]]
    config = replace(trials.config_of(p, p.seeds[0]), layers=tuple(layers) if layers else None)
    (k,), (source,) = choose_layers(pair, pair.load_teacher(), data, depths[1], config)
    return source.low, k


@dataclass(frozen=True)
class Pairing:
    """Of the parts of a layer pair: each student part's ``partners``, from 1, and the mean cosine (H_T, H_S) of all."""

    partners: list[int]
    alike: Tensor

    @property
    def of_partners(self) -> float:
        """The mean cosine of partners; of an assignment at random it is that of all pairs, ``of_all``."""
        return float(torch.stack([self.alike[t - 1, s] for s, t in enumerate(self.partners)]).mean())

    @property
    def of_all(self) -> float:
        """The mean cosine of all pairs."""
        return float(self.alike.mean())


def pairings(pair: Pair, encoded: Sequence[Encoded], layers: tuple[int, int]) -> dict[str, Pairing]:
    """How heads and groups of neurons of teacher layer l and student layer k are paired, through the logit map."""
    teacher, student = pair.load_teacher().eval(), pair.load_student().eval()
    matrix = semantic_map(head_weight(teacher), head_weight(student), kind=str(_LIKE["map"])).float().cpu()
    found = {}
    for name, point, groups in (("heads", "attention", 0), ("neurons", "mlp", GROUPS)):
        theirs, ours = (
            parts_of(model, encoded, at, point, groups=groups)
            for model, at in zip((teacher, student), layers, strict=True)
        )
        found[name] = Pairing(*paired(replace(theirs, weight=matrix @ theirs.weight), ours))
    return found


def seeds_of(p: Profile) -> list[int]:
    """The seeds of a student's trainings, from the profile's first on."""
    return [p.seeds[0] + i for i in range(min(SEEDS, p.search.draws))]


def trial(
    p: Profile, task: str, way: str, seed: int, folder: str | Path, *, layer: int, student: int = 0,
    weight: float = 1.0, watched: str = "test",
) -> dict[str, Any]:  # fmt: skip
    """One training of student layer ``layer``: of a student by its number, with a weight of the layer term.

    No question is asked; what is read are the reference answers of the split ``watched``.
    """
    of, n = WAYS[way], min(EXAMPLES, p.sizes.train)
    sizes = {"train": n, "test": min(QUESTIONS, p.sizes.test or QUESTIONS), "validation": p.sizes.validation}
    taught = p.changed(student=p.students[student], sizes=sizes)
    states = {} if way == "labels" else {"layer_weight": weight}
    changes = {**of.changes(p, task, n, min(STEPS, p.regimes.steps)), "layers": [layer], **states}
    name = f"{list(WAYS).index(way)}-{weight:g}-{student}-{watched}"
    return trials.run_trial(
        taught, task, of.method, seed, folder, changes=changes, split=None, variant=name, watched=watched
    )


def weights(p: Profile, task: str, ways: Mapping[str, Way], folder: str | Path, layer: int) -> dict[str, float]:
    """The weight of each way's layer term, by the tokens predicted right on validation examples.

    Every way has the same number of draws, one for four of the profile's search; the control for heads takes theirs.
    """
    drawn = WEIGHTS[: max(1, min(len(WEIGHTS), p.search.draws // 4))]

    def score(way: str, weight: float) -> float:
        made = trial(p, task, way, p.seeds[0], folder, layer=layer, weight=weight, watched="validation")
        return float(trials.seen([made], "right").mean())

    free = [way for way in ways if way not in ("labels", "other heads")]
    chosen = {way: drawn[0] if len(drawn) == 1 else max(drawn, key=lambda w: score(way, w)) for way in free}
    return chosen | ({"other heads": chosen["heads"]} if "other heads" in ways else {})


def tokens(
    p: Profile, task: str, way: str, weight: float, folder: str | Path, layer: int
) -> tuple[Tensor, dict[str, float]]:
    """The share of the answers' tokens that are predicted, (students, seeds, questions), and what a training took."""
    made = [
        [trial(p, task, way, seed, folder, layer=layer, student=at, weight=weight) for seed in seeds_of(p)]
        for at in range(len(p.students))
    ]
    return torch.stack([trials.seen(of_one, "right") for of_one in made]), made[0][0]["cost"]


def untouched(p: Profile, task: str, folder: str | Path) -> Tensor:
    """The same share of the students as they are: (students, 1, questions)."""
    sizes = {"train": min(EXAMPLES, p.sizes.train), "test": min(QUESTIONS, p.sizes.test or QUESTIONS)}
    made = [
        trials.run_trial(
            p.changed(student=student, sizes=sizes), task, "none", p.seeds[0], folder, split=None,
            variant=f"untouched-{at}", watched="test",
        )
        for at, student in enumerate(p.students)
    ]  # fmt: skip
    return torch.stack([trials.seen([one], "right") for one in made])


def supervised_numbers(config: Any, way: str) -> int:
    """How many numbers the layer term of a way reads at a position of such a student: none, or H parts of D_S / H."""
    heads = int(config.num_attention_heads)
    parts = {"labels": 0, "heads": heads, "other heads": heads, "neurons": GROUPS}.get(way, 1)
    return parts * (int(config.hidden_size) // max(parts, 1))
