"""The question beyond the paper: does any way of aligning states beat plain supervision and distillation?

Three families of configurations are searched with the same number of seeded draws each, on validation examples: labels
alone, the teacher's output distribution, and the teacher's states. All are settings of
:class:`~semalign.training.config.TransferConfig`, so that the best of the third can be run again without its states and
nothing else changed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

Changes = dict[str, Any]
"""Fields of ``TransferConfig`` that differ from the profile's."""

MAPS = ("paper", "logit", "logit_centred", "tight", "procrustes")
_RATES: tuple[Changes, ...] = tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2))
_ONE: Changes = {"layers": None}  # the pair that attribution names
_ALL: Changes = {"layers": "all"}
_TEACHER_OUT: tuple[Changes, ...] = (
    {"output_loss": "kl"},
    {"output_loss": "kl", "output_weight": 0.5, "label_weight": 0.5},
    {"output_loss": "reverse_kl", "output_weight": 0.5, "label_weight": 0.5},
    {"output_loss": "jsd", "output_weight": 0.5, "label_weight": 0.5},
)
_LABELS: Changes = {"output_loss": "ce"}

SPACES: dict[str, dict[str, tuple[Changes, ...]]] = {
    "labels": {
        "states": ({"layer_weight": 0.0},),
        "output": (_LABELS,),
        "layers": (_ONE, _ALL),
        "start": ({}, {"adapters": "pissa"}),
        "trained": ({}, {"lora_rank": 64, "lora_alpha": 128}, {"trained": "layer"}),
        "rate": _RATES,
    },
    "logits": {
        "states": ({"layer_weight": 0.0},),
        "output": _TEACHER_OUT,
        "layers": (_ONE, _ALL),
        "trained": ({}, {"lora_rank": 64, "lora_alpha": 128}, {"trained": "layer"}),
        "rate": _RATES,
    },
    "states": {
        # A weight that hardly trains would count as a win of states and be one of its output loss: none below 0.1.
        "states": tuple({"layer_weight": w} for w in (0.1, 0.3, 1.0, 3.0)),
        "output": (_LABELS, *_TEACHER_OUT[:2]),
        "layers": (_ONE, _ALL, {**_ALL, "schedule": "frontier"}),
        "map": (*({"map": kind} for kind in MAPS), {"map": None, "projection": "random"}),
        "interface": tuple({"interface": i} for i in ("mlp", "attention", "residual", "stream")),
        "layer loss": tuple({"layer_loss": name} for name in ("cosine", "mse", "relational", "fisher")),
        "trained": ({}, {"lora_rank": 64, "lora_alpha": 128}, {"trained": "layer"}),
        "rate": _RATES,
    },
}
"""By family and ingredient, the settings that one is drawn from."""


def draws(family: str, n: int, seed: int = 0, *, whole_layers: bool = True) -> list[dict[str, Changes]]:
    """``n`` different configurations of a family, an entry an ingredient; the first m of n are the m of ``draws(m)``.

    Args:
        whole_layers: as a profile's ``search`` has it; False leaves out what trains all layers whole.

    Raises:
        ValueError: an unknown family, or one that has fewer than ``n`` configurations.
    """
    if family not in SPACES:
        raise ValueError(f"unknown family {family!r}: the families are {', '.join(SPACES)}")
    space, chosen = SPACES[family], random.Random(f"{family} {seed}")
    found: list[dict[str, Changes]] = []
    for _ in range(100 * n + 1):
        if len(found) == n:
            return found
        one = {ingredient: chosen.choice(settings) for ingredient, settings in space.items()}
        if possible(one, whole_layers=whole_layers) and one not in found:
            found.append(one)
    raise ValueError(f"the family {family!r} has fewer than {n} configurations: ask for less")


def size(family: str, *, whole_layers: bool = True) -> int:
    """How many different configurations a family has."""
    space = SPACES[family]
    every = (dict(zip(space, settings, strict=True)) for settings in itertools.product(*space.values()))
    return sum(possible(one, whole_layers=whole_layers) for one in every)


def possible(one: Mapping[str, Changes], *, whole_layers: bool = True) -> bool:
    """Whether the ingredients go together: PiSSA starts adapters; ``fisher`` reads logits from the student's width."""
    changes = config(one)
    if not whole_layers and (changes.get("trained"), changes.get("layers")) == ("layer", "all"):
        return False
    learned = changes.get("projection") is not None
    adapters = changes.get("adapters") is None or changes.get("trained") != "layer"
    return adapters and not (learned and changes.get("layer_loss") == "fisher")


def config(one: Mapping[str, Changes]) -> Changes:
    """The settings of all ingredients together."""
    return {name: value for settings in one.values() for name, value in settings.items()}


def without_states(changes: Changes) -> Changes:
    """The same configuration but for the layer term: what is left is layers, losses, rate and steps."""
    return {**changes, "layer_weight": 0.0}


def told(one: Mapping[str, Changes]) -> str:
    """A configuration in words, an ingredient after the other."""
    parts = [f"{ingredient}: {', '.join(f'{k}={v}' for k, v in s.items())}" for ingredient, s in one.items() if s]
    return "; ".join(parts)
