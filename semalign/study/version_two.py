"""Version 2 in our reading: the arms of its comparison, and what they are held against."""

from __future__ import annotations

from typing import Any

from semalign.profiles import Profile
from semalign.study.arms import WATCHED
from semalign.study.regimes import Way, budget

EXAMPLES, STEPS = 32, 16
"""Of every training: how many examples, and about how many steps of a stage."""
ROOM = 2**31
"""Bytes of the teacher's states that may be in memory as inputs."""

METRICS = {
    "identity": None, "paper": "paper", "tight": "tight", "procrustes": "procrustes", "logit": "logit",
    "random": "random",
}  # fmt: skip
"""By name, the map M whose M'M is the metric of the teacher's contributions; None is plain relational distillation."""

ALONE, FRONTIER, FED = "KL alone", "geometry, logit", "teacher's inputs"
JOINT = {"joint, steps a layer": False, "joint, all steps": True}
"""All layers at once: each in as many steps as in its stage of the frontier, or in as many as all stages have."""

PAIRS = {
    "geometry minus KL alone": (FRONTIER, ALONE),
    "curvature minus KL alone": ("curvature", ALONE),
    "logit metric minus identity": (FRONTIER, "geometry, identity"),
    "paper's metric minus identity": ("geometry, paper", "geometry, identity"),
    "frontier minus joint": (FRONTIER, "joint, all steps"),
    "teacher's inputs minus own": (FED, FRONTIER),
}
"""What the chapter judges, by name: one arm minus another."""


def arms(p: Profile, depth: int, width: int, length: int) -> dict[str, Way]:
    """The ways that are compared, by name, on a student of ``depth`` layers and ``width``.

    All have the rate of ``logit_kd``. The arm with the teacher's states as inputs is left out where those of examples
    of ``length`` tokens would take more than ``ROOM``.
    """

    def geometry(**settings: Any) -> Way:
        return Way("geometry_frontier", {"map": "logit", **settings}, "logit_kd")

    found = {ALONE: geometry(layer_weight=0.0)}
    found |= {f"geometry, {name}": geometry(map=kind) for name, kind in METRICS.items()}
    found["curvature"] = Way("fisher_frontier", {"map": "logit"}, "logit_kd")
    epochs = budget(p, EXAMPLES, STEPS)["epochs"]
    found |= {name: geometry(schedule="joint", epochs=epochs * (depth if all_ else 1)) for name, all_ in JOINT.items()}
    if 4 * (depth - 1) * width * length * (EXAMPLES + WATCHED) <= ROOM:
        found[FED] = geometry(inputs="teacher")
    return found


def pairs(found: dict[str, Way]) -> dict[str, tuple[str, str]]:
    """Those of ``PAIRS`` of which both arms are there."""
    return {name: both for name, both in PAIRS.items() if set(both) <= set(found)}
