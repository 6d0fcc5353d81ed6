"""What every method owes: a row that says what it is, and one signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from semalign.training.config import TransferConfig, TransferResult

Transfer = Callable[..., TransferResult]
"""``transfer(pair, data, config)``, and as keyword-only arguments the hyperparameters that are the method's alone."""


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: what it does, on which data, what trains, and what it takes from the teacher.

    ``colour`` is its own in every figure. Without ``tuned`` nothing of it is chosen on validation examples; one that
    ``follows`` another takes over what was chosen for that. Without ``seeded`` it draws nothing, so that one run is
    all there is. ``least_epochs`` is how few it can train for.
    """

    title: str
    transfer: Transfer
    data: str  # splits that it reads
    trains: str
    teacher: str
    labels: bool  # whether it learns from the examples' responses as labels
    colour: str
    tuned: bool = True
    seeded: bool = True
    follows: str = ""
    least_epochs: int = 1
    vocabularies: str = "same"  # or shared: it takes a pair with two tokenizers


def own_options(method: Method) -> set[str]:
    """The hyperparameters that are no field of a ``TransferConfig``: keyword-only arguments of ``transfer``."""
    given = inspect.signature(method.transfer).parameters.values()
    return {p.name for p in given if p.kind is inspect.Parameter.KEYWORD_ONLY}


def run(
    method: Method, pair: Any, data: Any, config: TransferConfig, hyperparameters: Mapping[str, Any]
) -> TransferResult:
    """Transfer by a method with hyperparameters of its own: fields of the configuration, or its options.

    Raises:
        ValueError: a hyperparameter that the method does not have (the message names those there are), or a pair of
            two tokenizers for a method that needs one.
    """
    if pair.teacher_tokenizer is not None and method.teacher != "-" and method.vocabularies == "same":
        raise ValueError(
            f"the method {method.title!r} needs one vocabulary, and {pair.name} has two: choose a pair of one family, "
            "or a method for shared tokens"
        )
    known, options = {f.name for f in fields(config)}, own_options(method)
    if wrong := sorted(set(hyperparameters) - known - options):
        valid = ", ".join([*sorted(options), *sorted(known)])
        raise ValueError(f"the method {method.title!r} has no hyperparameter {wrong[0]!r}; it has {valid}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in hyperparameters.items()}
    settings: dict[str, Any] = {k: v for k, v in values.items() if k in known}
    return method.transfer(pair, data, replace(config, **settings), **{k: v for k, v in values.items() if k in options})
