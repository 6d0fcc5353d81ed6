"""What a run would fail of after hours, refused before its first model loads, in one sentence with a remedy.

:func:`preflight` reads the profile alone and loads no model library, so that plans can call it. :func:`before_models`
asks the machine and the data too; whatever is about to load a model calls it: a notebook by whichever way it is run, a
trial, and Snakemake before its first job.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from semalign.planning.plan import configurations, downloads, kept_bytes, plan, shape_of
from semalign.profiles import Folder, Hub, Profile, ProfileError

GPU = "SEMALIGN_GPU"
"""Set in the jobs of a cluster, to 1 where they were given a GPU and to 0 where they need none."""
CHECKED = "SEMALIGN_CHECKED"
"""Names the host, and the data that were found whole there, so that a run's own notebooks do not read them again."""
FEWEST = {"validation": 2, "test": 4}
"""Examples of a split without which a chapter has no interval: two, and of the test's two of each kind of question."""


def preflight(p: Profile, results: Path | None = None, *, trains: bool = True) -> None:
    """Refuse what a profile alone, the hub's cache and the disks show to be impossible; loads no model library.

    Args:
        p: the profile that is about to run.
        results: where its results go; None asks nothing of that disk.
        trains: it is this machine that trains, and needs room for a trial's own files.

    Raises:
        ProfileError: too few examples, a folder without a model, a layer that there is not, programs that are not
            allowed to run or cannot be, a gated model without a token, or a disk that is too small; one sentence that
            names the setting or the place, and what mends it.
    """
    for split, fewest in FEWEST.items():
        if (size := getattr(p.sizes, split)) is not None and size < fewest:
            raise ProfileError(
                f"profile {p.name} asks for {size} in {split}, and no interval can be made of so few: set sizes: "
                f"{split} in it to {fewest} or more"
            )
    if p.code_tasks and not p.allow_code_execution:
        raise ProfileError(
            f"profile {p.name} has {' and '.join(p.code_tasks)}, which run programs that a model wrote: set "
            f"allow_code_execution: true in it to have them run in the sandbox, or take the tasks out"
        )
    if p.code_tasks and sys.platform != "linux":
        raise ProfileError(
            f"profile {p.name} has {' and '.join(p.code_tasks)}, and programs that a model wrote run on Linux alone: "
            "use Linux or WSL, or take the tasks out"
        )
    for model in p.models:
        if isinstance(model, Folder) and not (Path(model.path) / "config.json").is_file():
            raise ProfileError(
                f"profile {p.name} names the folder {model.path}, which has no config.json: give one that "
                "save_pretrained wrote"
            )
    if p.layer is not None:
        try:
            depth = shape_of(p.teacher).layers
        except ProfileError:  # a model of the hub that plans do not know
            depth = p.layer
        if p.layer > depth:
            raise ProfileError(f"profile {p.name}: layer {p.layer} is not one of the teacher's: give 1 to {depth}")
    tokens(p)
    disks(p, results, trains=trains)


def before_models(p: Profile, results: Path | None = None, *, elsewhere: bool = False) -> None:
    """:func:`preflight`, and what has to be asked of this machine and of the data.

    Args:
        elsewhere: the jobs run on other machines, which ask for their own device and sandbox.

    Raises:
        ProfileError: as :func:`preflight`; a split with too few examples; a GPU that is asked for and not there.
        SandboxError: less isolation than the profile's programs need.
        DataError: a benchmark's file is absent or malformed.
    """
    preflight(p, results, trains=not elsewhere)
    if not elsewhere:
        _device(p)
        if p.code_tasks and p.isolation != "rlimits":
            from semalign.benchmarks import sandbox

            sandbox.require_level(p.isolation)
    if p.data == "benchmarks" and os.environ.get(CHECKED) != checked(p):
        _data(p)


def asks_more(p: Profile, *, elsewhere: bool = False) -> bool:
    """Whether :func:`before_models` looks at more than :func:`preflight`, for which it loads a model library."""
    here = p.device != "cpu" or bool(p.code_tasks and p.isolation != "rlimits")
    return p.data == "benchmarks" or (here and not elsewhere)


def checked(p: Profile) -> str:
    """What :data:`CHECKED` says after this profile's data were found whole on this host."""
    return f"{socket.gethostname()}:{','.join(p.tasks)}:{os.environ.get('SEMALIGN_DATA', '')}"


def nvidia_devices() -> list[str]:
    """The NVIDIA GPUs whose driver is loaded here; none where CUDA_VISIBLE_DEVICES hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return []
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def on_cpu(p: Profile) -> bool:
    """Whether a run here computes on the processor: the profile says so, or leaves it open and there is no GPU.

    Loads no model library: a driver's devices stand for its GPUs, AMD's among them.
    """
    return p.device == "cpu" or (p.device == "auto" and not nvidia_devices() and not Path("/dev/kfd").exists())


def _device(p: Profile) -> None:
    """Refuse to fall back to the CPU in silence where a GPU was asked for."""
    if p.device == "cpu" or os.environ.get(GPU) == "0":
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if _number(p) < found:
        return
    if p.device != "auto":
        asked = f"profile {p.name} says device: {p.device}"
    elif os.environ.get(GPU) == "1":
        asked = f"this job of profile {p.name} was given a GPU"
    elif nvidia_devices():
        asked = f"profile {p.name} says device: auto on a machine with an NVIDIA GPU"
    else:
        return
    if found:
        why, remedy = f"torch sees {found} of them", "name one of those, counted from 0"
    elif torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is a build for CPUs"
        remedy = "remove .venv and call make setup where the GPU's driver is loaded: in a job, not on a login node"
    else:
        why = f"torch {torch.__version__} sees none"
        remedy = (
            "update the driver or call make setup where it is loaded, see that the job asks for a GPU and that "
            "CUDA_VISIBLE_DEVICES hides none, or set device: cpu"
        )
    raise ProfileError(f"{asked}, and {why}: {remedy}")


def _number(p: Profile) -> int:
    """Which of the GPUs a profile names, counted from 0: the first where it says no more than ``cuda``."""
    return int(p.device.partition(":")[2] or 0)


def memory(p: Profile, chapters: Iterable[str]) -> None:
    """Refuse a run of ``chapters`` on a GPU that the plan finds too small for one of them, or for a method.

    Raises:
        ProfileError: names the first that does not fit, what it takes, and the way out.
    """
    import torch

    if p.device == "cpu" or not torch.cuda.is_available():
        return
    try:
        found = plan(p, chapters)
    except ProfileError:  # a model that plans do not know
        return
    has = torch.cuda.get_device_properties(_number(p)).total_memory
    for name, need in {**found.methods, **found.chapters}.items():
        if need.gpu > has:
            raise ProfileError(
                f"profile {p.name}: {name} takes {need.gpu / 1e9:.0f} GB of a GPU by its plan, and this one has "
                f"{has / 1e9:.0f}: do what make plan PROFILE={p.name} says of it, or run the notebooks that fit by "
                "themselves"
            )


def _data(p: Profile) -> None:
    """Every task has its questions, and examples enough in each split that something reads."""
    from semalign import benchmarks

    for task in p.tasks:
        questions, splits = benchmarks.load_items(task), benchmarks.task_data(task)
        sizes = {name: len(getattr(splits, name)) for name in ("train", "align", "extract", "validation")}
        sizes["test"] = len(questions)
        if few := [f"{size} in {name}" for name, size in sizes.items() if size < FEWEST.get(name, 1)]:
            raise ProfileError(
                f"profile {p.name}: under data: benchmarks, {task} has examples too few, {' and '.join(few)}: give "
                "SEMALIGN_DATA a folder with more of its questions, or take the task out"
            )


def _hubs(p: Profile) -> Iterable[Hub]:
    """The hub's models of a profile, each once."""
    return {(m.id, m.revision): m for m in p.models if isinstance(m, Hub)}.values()


def tokens(p: Profile) -> None:
    """Refuse a gated model that is neither in the hub's cache nor has a token to be had with.

    Raises:
        ProfileError: names the models, and where their licence is accepted.
    """
    hubs = [m for m in _hubs(p) if configurations().get(m.id, {}).get("gated")]
    if not hubs:
        return
    from huggingface_hub import get_token

    needed = [m.id for m in hubs if not in_cache(m)]
    if needed and not get_token():
        raise ProfileError(
            f"profile {p.name} needs {' and '.join(needed)}, which is gated: accept its licence at "
            f"https://huggingface.co/{needed[0]} and set HF_TOKEN to a token of that account"
        )


def in_cache(model: Hub) -> bool:
    """Whether the hub's cache on this machine has the model, so that it needs neither a token nor the network."""
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(model.id, name, revision=model.revision), str) for name in names)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, those that go meanwhile left out."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found += path.lstat().st_size
    return found


def disks(p: Profile, results: Path | None, *, trains: bool = True) -> None:
    """Refuse disks without room for models that are still to be had, for the results, and for one trial's own files.

    The last where it is this machine that ``trains``. What a run that goes on finds of its results has its room.

    Raises:
        ProfileError: names the disk, what it is to hold, and the setting that names another.
    """
    kept, scratch = kept_bytes(p)
    of_trial = scratch if trains else 0
    short = _short(p, results, kept, of_trial)
    if short and results is not None:  # only now: a run asks this at every notebook, and results are many files
        short = _short(p, results, kept - _size(results), of_trial)
    if short:
        size, why, place, free = short
        raise ProfileError(
            f"profile {p.name} needs {size / 1e9:.1f} GB on the disk of {place}, {' and '.join(why)}, and "
            f"{free / 1e9:.1f} GB are free: free some, or set what stands in brackets to a larger disk"
        )


def _short(p: Profile, results: Path | None, kept: int, of_trial: int) -> tuple[int, list[str], Path, int] | None:
    """A disk without room: what it is to hold in bytes, for what, a place on it, and how much of it is free."""
    import tempfile

    wanted: dict[Path, tuple[int, list[str]]] = {}
    absent = [m for m in _hubs(p) if not in_cache(m)]
    if absent and (size := downloads(m.id for m in absent)):
        from huggingface_hub import constants

        wanted[Path(constants.HF_HUB_CACHE)] = size, [f"for {len(absent)} models of the hub (HF_HOME)"]
    if results is not None and kept > 0:
        wanted[results] = kept, ["for results (RESULTS)"]
    if of_trial:
        wanted[Path(tempfile.gettempdir())] = of_trial, ["for the files of a trial while it trains (TMPDIR)"]
    by_disk: dict[int, tuple[int, list[str], Path]] = {}
    for path, (size, why) in wanted.items():
        place = next(q for q in (path, *path.absolute().parents) if q.exists())
        disk = os.stat(place).st_dev
        before, reasons, first = by_disk.get(disk, (0, [], place))
        by_disk[disk] = before + size, [*reasons, *why], first
    for size, why, place in by_disk.values():
        free = shutil.disk_usage(place).free
        if free < size:
            return size, why, place, free
    return None
