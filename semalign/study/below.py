"""Where in a layer to align: the whole of it, a sublayer, each head, or groups of neurons, all else being equal.

Every way trains the same LoRA in the same layer, at the rate that labels in this layer have, with cross-entropy beside
the layer term and the logit map under it, and supervises D_S numbers a position. Without its layer term each of them is
labels in the same layer, to the bit: that is the twin of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semalign.contributions import contributions, entering, head_attribution, last_matrix, written
from semalign.lm.examples import Encoded, collate, supervised
from semalign.lm.hooks import capture
from semalign.lm.parts import Model, decoder, decoder_layers, head_weight
from semalign.methods.heads import Parts, parts_of
from semalign.models import Pair
from semalign.profiles import Profile
from semalign.study import trials
from semalign.study.regimes import Way, budget

EXAMPLES, STEPS, QUESTIONS = 128, 64, 100
"""Of every training: the most examples, about how many steps, and the most questions whose answers are read."""
WEIGHTS = (1.0, 0.3, 0.1)
"""What the weight of the layer term is chosen from; the first is the paper's, and a small search has it alone."""
GROUPS = 4
"""Groups of neurons."""

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
            for point in ("attention", "mlp"):
                last_matrix(model, k, point)
    except ValueError as error:
        return str(error)
    return ""


def ways_of(pair: Pair) -> tuple[dict[str, Way], str]:
    """The ways that both models of a pair allow, and why it is not all of them."""
    why = refused(pair.load_teacher()) or refused(pair.load_student())
    return {name: way for name, way in WAYS.items() if not (why and name in OF_PARTS)}, why


@torch.no_grad()
def remainder(model: Model, example: Encoded, k: int, point: str, columns: Tensor) -> float:
    """What is left of layer k's contribution at ``point`` without its parts and its bias, as a share of its length."""
    batch = collate([example], 0, head_weight(model).device)
    with capture(model, [(k, point)]) as whole, entering(model, [(k, point)]) as seen:
        decoder(model)(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    added, bias = whole[k, point][0], getattr(last_matrix(model, k, point), "bias", None)
    parts = contributions(seen[k, point][0], written(model, k, point), columns).sum(1)
    left = added - parts - (0 if bias is None else bias)
    return float(left.norm() / added.norm())


def heads_attributed(model: Model, encoded: Sequence[Encoded], reduce: str = "abs") -> Tensor:
    """Attribution of every head (L, H) over all supervised positions of the examples, one of them after another."""
    total = torch.zeros(())
    for example in encoded:
        batch = collate([example], 0, head_weight(model).device)
        total = total + head_attribution(model, batch, reduce=reduce).cpu() * int(supervised(batch["labels"]).sum())
    return total


def parts_in(model: Model, encoded: Sequence[Encoded], k: int) -> dict[str, Parts]:
    """The heads and the groups of neurons of layer k."""
    return {
        "heads": parts_of(model, encoded, k, "attention"),
        "neurons": parts_of(model, encoded, k, "mlp", groups=GROUPS),
    }


def trial(
    p: Profile, task: str, way: str, seed: int, folder: str | Path, *, student: int = 0, weight: float = 1.0,
    watched: str = "test",
) -> dict[str, Any]:  # fmt: skip
    """One training of a way: of a student by its number, with a weight of the layer term, its answers unasked."""
    of, n = WAYS[way], min(EXAMPLES, p.sizes.train)
    sizes = {"train": n, "test": min(QUESTIONS, p.sizes.test or QUESTIONS), "validation": p.sizes.validation}
    taught = p.changed(student=p.students[student], sizes=sizes)
    states = {} if way == "labels" else {"layer_weight": weight}
    changes = {
        **trials.hyperparameters(p, of.like or of.method, task), **of.settings, **states,
        **budget(n, min(STEPS, p.regimes.steps)),
    }  # fmt: skip
    name = f"{list(WAYS).index(way)}-{weight:g}-{student}-{watched}"
    return trials.run_trial(
        taught, task, of.method, seed, folder, changes=changes, split=None, variant=name, watched=watched
    )


def weights(p: Profile, task: str, ways: Mapping[str, Way], folder: str | Path) -> dict[str, float]:
    """The weight of each way's layer term, by the tokens predicted right on validation examples.

    Every way has the same number of draws, one for four of the profile's search; the control for heads takes theirs.
    """
    drawn = WEIGHTS[: max(1, min(len(WEIGHTS), p.search.draws // 4))]

    def score(way: str, weight: float) -> float:
        made = trial(p, task, way, p.seeds[0], folder, weight=weight, watched="validation")
        return float(trials.seen([made], "right").mean())

    free = [way for way in ways if way not in ("labels", "other heads")]
    chosen = {way: drawn[0] if len(drawn) == 1 else max(drawn, key=lambda w: score(way, w)) for way in free}
    return chosen | ({"other heads": chosen["heads"]} if "other heads" in ways else {})


def tokens(p: Profile, task: str, way: str, weight: float, folder: str | Path) -> tuple[Tensor, dict[str, float]]:
    """The share of the answers' tokens that are predicted, (students, seeds, questions), and what a training took."""
    made = [
        [trial(p, task, way, seed, folder, student=at, weight=weight) for seed in p.seeds]
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
