"""Tuning: hyperparameters for every method from the same number of seeded draws, on validation examples alone.

A method is drawn its rate, its number of epochs, the layer that it trains where it trains one, and the weight of its
layer term where it has one. The score is the share of the answers' tokens that are predicted: no question is asked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semalign.lm.parts import decoder_layers
from semalign.methods import REGISTRY
from semalign.models import load_pair
from semalign.profiles import Profile
from semalign.study import trials
from semalign.training.config import DivergedError

RATES = (1e-5, 1e-2)
"""The range of learning rates, drawn evenly in its logarithm."""
DRAWS = 24
"""How many draws every method gets."""
# The most epochs are a budget that every method has, and no optimum: nothing is widened there.
EPOCHS, WEIGHTS = (1, 2, 4), (0.1, 0.3, 1.0, 3.0)
EDGE = 3.0  # a choice within this factor of an end of the range asks for draws beyond it
FURTHER, WIDENINGS = 6, 2  # so many draws a widening, and at most so many widenings

Draw = dict[str, Any]
"""Hyperparameters of one draw, as a profile would give them."""


def tuned_methods(methods: Sequence[str]) -> list[str]:
    """Those of the methods that have draws of their own: not those without a rate, as printed, or after another."""
    return [m for m in methods if REGISTRY[m].tuned and not REGISTRY[m].follows]


def draws(method: str, n: int, depth: int, rates: tuple[float, float] = RATES) -> list[Draw]:
    """``n`` seeded draws for a method on a student of ``depth`` layers; the first m of n are the m of ``draws(m)``."""
    row = REGISTRY[method]
    drawn = []
    for i in range(n):
        chosen = random.Random(f"{method} {rates[0]:g} {i}")
        one: Draw = {"lr": float(f"{math.exp(chosen.uniform(math.log(rates[0]), math.log(rates[1]))):.3g}")}
        one["epochs"] = max(chosen.choice(EPOCHS), row.least_epochs)
        if row.trains.startswith("LoRA on layer k"):
            one["layers"] = [chosen.randint(1, depth)]
            if row.teacher.startswith("states"):
                one["layer_weight"] = chosen.choice(WEIGHTS)
        drawn.append(one)
    return drawn


def tune(p: Profile, method: str, folder: str | Path, n: int) -> dict[str, Any]:
    """The draws of a method with their scores, best first, and what was ``chosen``.

    Each is trained on the tasks of the profile's search under the first seed. Where the best rate lies at an end of
    the range, the range is widened there by a factor of ten, with a few draws more.

    Raises:
        ValueError: every draw diverged.
    """
    depth, (low, high) = len(decoder_layers(load_pair(p).load_student())), RATES
    scored = [{**one, "score": _score(p, method, one, folder)} for one in draws(method, n, depth)]
    for _ in range(WIDENINGS):
        best = _best(method, scored)["lr"]
        if best > high / EDGE:
            beyond = (high, 10 * high)
        elif best < low * EDGE:
            beyond = (low / 10, low)
        else:
            break
        low, high = min(low, beyond[0]), max(high, beyond[1])
        more = draws(method, FURTHER, depth, beyond)
        scored += [{**one, "score": _score(p, method, one, folder)} for one in more]
    best_first = sorted(scored, key=lambda s: -math.inf if s["score"] is None else s["score"], reverse=True)
    chosen = {key: value for key, value in _best(method, scored).items() if key != "score"}
    return {"draws": best_first, "chosen": chosen, "rates": [low, high]}


def _best(method: str, scored: Sequence[Draw]) -> Draw:
    trained = [one for one in scored if one["score"] is not None]
    if not trained:
        raise ValueError(f"training {method} broke off in every one of {len(scored)} draws: try lower rates")
    return max(trained, key=lambda one: float(one["score"]))


def _score(p: Profile, method: str, one: Draw, folder: str | Path) -> float | None:
    """The mean over tasks of the share of tokens predicted on validation examples; None where training broke off."""
    variant = "-".join(str(value).strip("[]") for value in one.values())
    shares = []
    for task in p.search.tasks:
        try:
            made = trials.run_trial(p, task, method, p.seeds[0], folder, changes=one, split=None, variant=variant)
        except DivergedError:
            return None
        shares.append(float(trials.seen([made], "right").mean()))
    return sum(shares) / len(shares)
