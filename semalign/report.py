"""Numbers with their origin, in and out of json files, and the one look of all figures."""

from __future__ import annotations

import gc
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from semalign.lm.files import read_json, write_json
from semalign.planning.preflight import before_models
from semalign.planning.stamps import BUT_FOR, unstamp
from semalign.profiles import Profile, ProfileError, load_profile

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
"""The book's prose and data files."""

BASIS_COLOURS = {"dual": "#d55e00", "primal": "#0072b2", "tight": "#441166", "random": "#777788"}
"""A fixed colour for every kind of semantic basis."""


def opened(profile: str, results: str | Path | None, changes: Mapping[str, Any]) -> tuple[Profile, Path]:
    """What a notebook's three parameters stand for: the profile, and where the run keeps its files.

    So plain papermill, Jupyter and the pipeline run the same. The folder, by default ``results/PROFILE``, is made where
    it is missing.

    Raises:
        ProfileError: the profile is unknown or malformed, a profile's values were given as parameters, which no cell
            would read, ``changes`` are no mapping of a profile's values, or nothing can be written to the results.
        ProfileError, SandboxError, DataError: as :func:`semalign.planning.preflight.before_models`.
    """
    beside = vars(sys.modules["__main__"])
    if sources := [k for k in ("teacher", "student") if isinstance(beside.get(k), dict) and "source" in beside[k]]:
        raise ProfileError(
            f"{' and '.join(sources)} are values of a profile and no parameters: give -p profile NAME, where NAME may "
            "be the path of a yaml file, and what is to differ as -y 'changes: {...}'"
        )
    if not isinstance(profile, str):
        raise ProfileError(f"profile is {profile!r}: give the name of a profile, or the path of a yaml file")
    if not isinstance(changes, Mapping) or {"name", "name_or_path", "folder"} & set(changes):
        raise ProfileError(f"changes is {changes!r}: give values of the profile by name, as {{'seeds': [1]}}, or {{}}")
    p = load_profile(profile, **{str(name): value for name, value in changes.items()})
    folder = Path(results).expanduser().resolve() if results else ROOT / "results" / p.name
    try:
        for part in ("artefacts", "metrics"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"no results can go to {folder} ({error.strerror}): give another folder as results"
        raise ProfileError(said) from None
    before_models(p, folder)
    gc.freeze()  # what the imports made stays: between two models a collection need not walk through all of it
    return p, folder


def data_name(p: Profile, task: str) -> str:
    """What a figure calls the data of a task: see :func:`called`."""
    return called(p.data)[task]


def called(data: str) -> dict[str, str]:
    """What figures and sentences call the data of each task: the classroom's by their own name, a benchmark by its."""
    rows = yaml.safe_load((BOOK / "data_names.yaml").read_text(encoding="utf-8"))
    return {task: str(row["name" if data == "classroom" else "sibling"]) for task, row in rows.items()}


def row_called(row: str, called: Mapping[str, str]) -> str:
    """The name of a row such as ``"gsm8k / sft"``, with the data of its task as they are ``called``."""
    return " / ".join(called.get(part, part) for part in row.split(" / "))


def named(profile: Profile, changes: Mapping[str, Any]) -> str:
    """What provenance calls a run: its profile's name, and what differs from it."""
    told = ", ".join(f"{name}={value}" for name, value in changes.items())
    return f"{profile.name}{BUT_FOR}{told}" if told else profile.name


def save_metrics(
    path: str | Path, metrics: Mapping[str, Any], *, seeds: Sequence[int], profile: str, wall_s: float | None = None
) -> None:
    """Write numbers as json, together with what made them; a reader sees the old file or the new one, never half.

    What was said of an older file of that name is said of this one by its run, once it has ended: a notebook that
    somebody runs by hand leaves nothing that counts as a run's.

    Args:
        path: the json file; its folder is made where it is missing.
        metrics: nested mappings and sequences of numbers, text and None; tensors and arrays become lists.
        seeds, profile, wall_s: every seed behind the numbers, the profile's name, the seconds that it took.

    Raises:
        ValueError: a number is not finite (None stands for what does not exist) or a value is no json; it says where.
    """
    content = {"metrics": _plain(metrics, "metrics"), "provenance": _provenance(seeds, profile, wall_s)}
    unstamp(Path(path))
    write_json(Path(path), content, indent=1)


def save_artefact(results: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write what a later notebook reads, as json, to ``results/artefacts/NAME``: whole, or not at all."""
    write_json(results / "artefacts" / name, content)


def load_artefact(results: Path, name: str, *, of: str) -> dict[str, Any]:
    """What the notebook ``of`` left by :func:`save_artefact` under these results.

    Raises:
        ValueError: it is missing or no whole file; the message names the notebook that makes it.
    """
    path = results / "artefacts" / name
    try:
        return read_json(path)
    except (OSError, ValueError):
        raise ValueError(f"there is no whole {path}: run the notebook {of} with these results first") from None


def load_metrics(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What :func:`save_metrics` wrote: (metrics, provenance).

    Raises:
        ValueError: the file is missing or is not such a file.
    """
    try:
        content = read_json(Path(path))
        return content["metrics"], content["provenance"]
    except FileNotFoundError:
        raise ValueError(f"there are no metrics at {path}: run the notebook that writes them") from None
    except (ValueError, KeyError):
        raise ValueError(f"{path} is not a metrics file: delete it and run its notebook again") from None


def entry(metrics: Any, path: Sequence[str]) -> Any:
    """What metrics have at a path, a key a level; None where they lack it."""
    for name in path:
        metrics = metrics.get(name) if isinstance(metrics, Mapping) else None
    return metrics


def provenance_table(provenance: Mapping[str, Any]) -> str:
    """How a page was made, as a markdown table with a row for each thing that is known."""
    commit = str(provenance["commit"])[:12] + (" with uncommitted changes" if provenance["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in provenance["packages"].items())
    rows = {
        "commit": commit,
        "profile": provenance["profile"],
        "seeds": ", ".join(map(str, provenance["seeds"])),
        "versions": f"Python {provenance['python']}, {versions}",
        "machine": f"{provenance['cpu']}, {provenance['cores']} cores",
        "GPU": provenance["gpu"],
        "system": provenance["platform"],
        "date": provenance["date"],
        "wall time": None if provenance["wall_s"] is None else f"{provenance['wall_s']:.0f} s",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items() if text)])


def p_value(p: float | None) -> str:
    """A p-value as text: "< 0.001" where it is smaller, and never with a sign; a dash where there is none."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def use_style() -> None:
    """Set the book's look: seaborn on white, colours that survive colour blindness, vector figures in notebooks."""
    import seaborn
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    # Without a salt the ids inside an svg differ from run to run.
    fixed = {"figure.constrained_layout.use": True, "svg.hashsalt": "semalign"}
    shape = {"figure.figsize": (7, 4), "axes.spines.top": False, "axes.spines.right": False}
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={**shape, **fixed})
    set_matplotlib_formats("svg")


def _plain(value: Any, where: str) -> Any:
    """``value`` in json's own types; ``where`` is its path for error messages."""
    if hasattr(value, "tolist"):  # a tensor, an array, a numpy number
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: store None where there is no number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which json cannot hold: convert it to numbers or text")


def _provenance(seeds: Sequence[int], profile: str, wall_s: float | None) -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit or "unknown",
        "dirty": bool(commit and _git("status", "--porcelain")),
        "profile": profile,
        "seeds": list(seeds),
        "packages": {name: _version(name) for name in ("semalign", "torch", "transformers", "peft", "lm-eval")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "wall_s": wall_s,
    }


def _git(*arguments: str) -> str:
    """What git says of this repository, or nothing where there is no git, no commit, or only a repository around it."""
    if not (ROOT / ".git").exists():  # unpacked from an archive, maybe inside somebody else's repository
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _cpu() -> str:
    """The processor's name for people; Linux keeps it in a file, elsewhere Python knows it."""
    try:
        return Path("/proc/cpuinfo").read_text().split("model name", 1)[1].split(":", 1)[1].split("\n", 1)[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
