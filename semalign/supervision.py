"""The teacher's one pass: aligned targets of student width, kept on disk so that the teacher is freed before training.

Targets are kept at supervised positions, those whose next token is a label. Layers are numbered from 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semalign.lm.examples import Encoded, by_length, collate, mask_of, supervised
from semalign.lm.files import locked, reserve
from semalign.lm.hooks import (
    POINTS,
    SUBLAYERS,
    capture,
    check_head,
    check_sublayers,
    float_logits,
    skip_layers,
)
from semalign.lm.parts import Model, decoder, decoder_layers, fingerprint

VERSION = 2
CHUNK = 256  # rows of logits in memory at once


@dataclass(frozen=True)
class Source:
    """Where the teacher is read: ``(1 - mix) h_low + mix h_high`` at ``point`` (section 4.1)."""

    low: int
    high: int
    mix: float = 0.0
    point: str = "mlp"


@dataclass(frozen=True)
class SupervisionCache:
    """Targets h* = M h_T / |h_T| (eqs. 1 and 2) at every supervised position, memory-mapped; optionally top-k logits.

    Rows follow the examples in order, and the positions within each: example i owns ``offsets[i]:offsets[i + 1]``.
    """

    folder: Path
    key: str
    arrays: dict[str, np.ndarray]
    teacher_tokens: int  # tokens that the teacher read in this call: 0 where the cache was found

    @classmethod
    def build(
        cls,
        root: str | Path,
        teacher: Model | None,
        data: Sequence[Encoded],
        sources: Sequence[Source],
        *,
        matrix: Tensor | None = None,
        dtype: str = "float16",
        top_k: int = 0,
        vocabulary: int | None = None,
        batch_tokens: int = 2048,
    ) -> SupervisionCache:
        """Find the cache of exactly these inputs under ``root``, or run the teacher once and write it.

        Args:
            teacher: not run, and may be None, where nothing of it is kept: no ``sources`` and no ``top_k``.
            matrix: M (D_S, D_T), or None for the identity.
            dtype: ``float16`` or ``float32``, of targets and top-k log-probabilities.
            top_k: how many of the teacher's log-probabilities to keep a position; 0 stops the teacher after the last
                layer of ``sources``.
            vocabulary: the part of the vocabulary that both models share; the teacher's logits are cut to it.

        Raises:
            ValueError: an unknown point, a layer that the teacher lacks, or a target that is not finite.
            OSError: the disk cannot hold the cache; nothing is left behind.
        """
        if not sources and not top_k:
            teacher = None
        depth = 0 if teacher is None else len(decoder_layers(teacher))
        for source in sources:
            if source.point not in POINTS or not 1 <= source.low <= source.high <= depth:
                raise ValueError(
                    f"{source} is not in a teacher of {depth} layers with points {', '.join(POINTS)}: choose among "
                    "these"
                )
        key = _key(teacher, data, sources, matrix, dtype, top_k, vocabulary if top_k else None)
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        final, tokens = root / key[:32], 0
        with locked(root):
            shapes = _shapes(data, len(sources), 0, dtype, top_k)
            problem = _problem(final, key, shapes) if os.path.lexists(final) else None
            if problem:
                warnings.warn(f"the supervision cache {final} is damaged ({problem}) and is rebuilt", stacklevel=2)
                shutil.rmtree(final) if final.is_dir() and not final.is_symlink() else final.unlink()
            if not final.exists():
                width = 0
                if sources and teacher is not None:
                    width = decoder(teacher).config.hidden_size if matrix is None else len(matrix)  # type: ignore[union-attr, assignment]
                with _reserved(root, final, _shapes(data, len(sources), width, dtype, top_k)) as arrays:
                    arrays["offsets"][:] = np.cumsum([0] + [int(supervised(e.labels).sum()) for e in data])
                    if teacher is not None:
                        _fill(arrays, teacher, data, sources, matrix, vocabulary, batch_tokens)
                    _seal(arrays, {"key": key, "version": VERSION, "sources": [asdict(s) for s in sources]})
                tokens = sum(len(e.input_ids) for e in data) if teacher is not None else 0
        names = json.loads((final / "manifest.json").read_text())["arrays"]
        return cls(final, key, {n: np.load(final / f"{n}.npy", mmap_mode="r") for n in names}, tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each supervised position."""
        return sum(a.nbytes for a in self.arrays.values()) / int(self.arrays["offsets"][-1])

    def rows(self, examples: Sequence[int]) -> np.ndarray:
        """Row numbers (n,) of these examples' supervised positions, in order."""
        return _rows(self.arrays["offsets"], examples)

    def target(self, source: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """h* (n, D_S) and the teacher's norm |h_T| (n,), float32, for source number ``source``."""
        return self._read(f"target_{source}", rows).float(), self._read(f"norm_{source}", rows)

    def teacher_top(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's top log-probabilities (n, k), their token ids (n, k) int64, and the mass of the rest (n,)."""
        return self._read("top_logprob", rows).float(), self._read("top_index", rows).long(), self._read("tail", rows)

    def _read(self, name: str, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name][rows]))


def _rows(offsets: np.ndarray, examples: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in examples])


def _key(teacher: Model | None, data: Sequence[Encoded], *rest: Any) -> str:
    """sha256 over everything that determines the cache."""
    digest = hashlib.sha256(f"{VERSION} {fingerprint(teacher) if teacher is not None else None}".encode())
    for part in [t for e in data for t in (e.input_ids, e.labels)] + list(rest):
        raw = part.detach().cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else b""
        digest.update(f"{getattr(part, 'shape', part)}|".encode() + raw)
    return digest.hexdigest()


def _shapes(data: Sequence[Encoded], n_sources: int, width: int, dtype: str, top_k: int) -> dict[str, tuple[Any, str]]:
    rows = sum(int(supervised(e.labels).sum()) for e in data)
    shapes: dict[str, tuple[Any, str]] = {"offsets": ((len(data) + 1,), "int64")}
    for i in range(n_sources):
        shapes |= {f"target_{i}": ((rows, width), dtype), f"norm_{i}": ((rows,), "float32")}
    if top_k:
        shapes |= {"top_logprob": ((rows, top_k), dtype), "top_index": ((rows, top_k), "int32")}
        shapes["tail"] = ((rows,), "float32")
    return shapes


@contextmanager
def _reserved(root: Path, final: Path, shapes: dict[str, tuple[Any, str]]) -> Iterator[dict[str, np.memmap]]:
    """Arrays in a temporary folder, their disk space taken; the folder becomes ``final`` if the body succeeds."""
    for stale in root.glob(f".{final.name}.*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale)
    needed = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values()) + 4096 * len(shapes)
    sentence = f"the supervision cache needs {needed:,} bytes in {root} and the disk is full: choose another folder"
    if shutil.disk_usage(root).free < needed:
        raise OSError(sentence)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=root))
    arrays = {}
    try:
        for name, (shape, kind) in shapes.items():
            path = partial / f"{name}.npy"
            arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
            try:
                with open(path, "r+b") as file:
                    reserve(file.fileno(), path.stat().st_size)
            except OSError as error:
                raise OSError(sentence) from error
        yield arrays
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def _fill(
    arrays: dict[str, np.memmap],
    teacher: Model,
    data: Sequence[Encoded],
    sources: Sequence[Source],
    matrix: Tensor | None,
    vocabulary: int | None,
    batch_tokens: int,
) -> None:
    """Run the teacher over batches of similar length and write every array."""
    device = next(teacher.parameters()).device
    matrix = None if matrix is None else matrix.to(device, torch.float32)
    taps = {(layer, s.point) for s in sources for layer in (s.low, s.high)}
    last = len(decoder_layers(teacher)) if "tail" in arrays else max(layer for layer, _ in taps)
    teacher.eval()
    if any(point in SUBLAYERS for _, point in taps):
        check_sublayers(teacher, last)
    if "tail" in arrays:
        check_head(teacher)
    with skip_layers(teacher, range(last + 1, len(decoder_layers(teacher)) + 1)), capture(teacher, taps) as seen:
        for examples in by_length(data, batch_tokens):
            batch = collate([data[i] for i in examples], 0, device)
            mask, rows = supervised(batch["labels"]), _rows(arrays["offsets"], examples)
            out = decoder(teacher)(batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
            for number, source in enumerate(sources):
                low, high = (seen[layer, source.point][mask].float() for layer in (source.low, source.high))
                h = torch.lerp(low, high, source.mix)
                norm = h.norm(dim=-1)
                unit = h / norm.clamp_min(1e-30)[:, None]
                _store(arrays[f"target_{number}"], rows, unit if matrix is None else unit @ matrix.T, source)
                _store(arrays[f"norm_{number}"], rows, norm, source)
            for at, states in enumerate(out.last_hidden_state[mask].split(CHUNK) if "tail" in arrays else ()):
                _store_top(arrays, rows[at * CHUNK :][:CHUNK], float_logits(teacher, states)[:, :vocabulary])


def _store(array: np.memmap, rows: np.ndarray, values: Tensor, source: Source) -> None:
    array[rows] = values.cpu().numpy().astype(array.dtype)
    if not np.isfinite(array[rows]).all():
        raise ValueError(f"the teacher's target at {source} is not finite in {array.dtype}: try float32, or look at it")


def _store_top(arrays: dict[str, np.memmap], rows: np.ndarray, logits: Tensor) -> None:
    logp = logits.log_softmax(-1)
    top, index = logp.topk(arrays["top_index"].shape[1], dim=-1)
    arrays["top_logprob"][rows], arrays["top_index"][rows] = top.cpu().numpy(), index.cpu().numpy()
    arrays["tail"][rows] = logp.scatter(1, index, -torch.inf).exp().sum(-1).cpu().numpy()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(arrays: dict[str, np.memmap], facts: dict[str, Any]) -> None:
    listed = {}
    for name, array in arrays.items():
        array.flush()
        path = Path(str(array.filename))
        listed[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _checksum(path)}
    path.with_name("manifest.json").write_text(json.dumps({**facts, "arrays": listed}, indent=1))


def _problem(folder: Path, key: str, names: Collection[str]) -> str | None:
    """What is wrong with a cache on disk, which has to hold arrays of these names; or None."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        broken = [n for n, facts in manifest["arrays"].items() if _checksum(folder / f"{n}.npy") != facts["sha256"]]
        if manifest["key"] != key:
            return "its key differs"
        if missing := set(names) ^ set(manifest["arrays"]):
            return f"its arrays are not the right ones: {', '.join(sorted(missing))}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"the checksum of {', '.join(broken)} differs" if broken else None
