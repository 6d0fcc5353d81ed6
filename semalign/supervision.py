"""The teacher's one pass: aligned targets of student width, kept on disk so that the teacher is freed before training.

A *supervised position* is a position t whose next token is a label; h_k, h* and z are read there and nowhere else.
Layers are numbered from 1.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from semalign.models import Model, decoder, decoder_layers, fingerprint, sublayers
from semalign.report import write_text

POINTS = ("stream", "residual", "mlp", "attention")
IGNORED = -100
VERSION = 1
CHUNK = 256  # rows of logits in memory at once


@dataclass(frozen=True)
class Example:
    """One supervised example as text: the response, and only the response, is learned."""

    prompt: str
    response: str


@dataclass(frozen=True)
class TaskData:
    """A task's splits: ``train`` to learn from, ``align`` and ``extract`` as seed sets, ``validation`` to watch."""

    name: str
    train: tuple[Example, ...]
    align: tuple[Example, ...] = ()
    extract: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()


def save_task(data: TaskData, path: Path) -> None:
    """Write a task's splits as json."""
    write_text(path, json.dumps(asdict(data)))


def load_task(path: Path) -> TaskData:
    """What :func:`save_task` wrote.

    Raises:
        ValueError: the file is missing or is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content.pop("name")
        return TaskData(name, **{split: tuple(Example(**e) for e in examples) for split, examples in content.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"there is no task in {path}: run the notebook 00_models_and_data again") from None


@dataclass(frozen=True)
class Encoded:
    """Token ids (T,) and labels (T,), int64; labels are -100 outside the response."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Source:
    """Where the teacher is read: ``(1 - mix) h_low + mix h_high`` at ``point`` (section 4.1)."""

    low: int
    high: int
    mix: float = 0.0
    point: str = "mlp"


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int) -> list[Encoded]:
    """Tokenise prompt and response apart, join them, end the response with EOS, cut at ``max_length`` on the right.

    BOS goes in front where the tokenizer adds one by itself.

    Raises:
        ValueError: the tokenizer has no EOS token, or an example keeps no supervised position.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which ends every response: set tokenizer.eos_token")
    first = tokenizer("a")["input_ids"][:1]
    front = first if first == [tokenizer.bos_token_id] else []
    encoded = []
    for number, example in enumerate(examples):
        prompt = front + tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor(([IGNORED] * len(prompt) + response)[:max_length])
        if not (labels[1:] != IGNORED).any():
            raise ValueError(
                f"example {number} has a prompt of {len(prompt)} tokens and no response token left to learn within "
                f"max_length={max_length}: shorten the prompt or raise max_length"
            )
        encoded.append(Encoded(torch.tensor((prompt + response)[:max_length]), labels))
    return encoded


def collate(encoded: Sequence[Encoded], pad_id: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Pad on the right: ``input_ids``, ``attention_mask``, ``labels``, each (B, T) int64, on ``device``."""
    columns = {
        "input_ids": ([e.input_ids for e in encoded], pad_id),
        "attention_mask": ([torch.ones_like(e.input_ids) for e in encoded], 0),
        "labels": ([e.labels for e in encoded], IGNORED),
    }
    pad = torch.nn.utils.rnn.pad_sequence
    return {n: pad(rows, batch_first=True, padding_value=fill).to(device) for n, (rows, fill) in columns.items()}


def supervised(labels: Tensor) -> Tensor:
    """Supervised positions (..., T) bool for labels (..., T): true at t where ``labels[t + 1]`` is a label."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[..., :-1] = labels[..., 1:] != IGNORED
    return mask


@contextmanager
def capture(model: Model, taps: Iterable[tuple[int, str]]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Record (B, T, D) tensors, with their graph, of every (layer, point) in ``taps`` during the forward passes inside.

    Points are ``stream`` (the layer's output), ``residual`` (output minus input), ``mlp`` and ``attention`` (what the
    sublayer adds to the stream), and ``input`` (what the layer receives).
    """
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []

    def tap(layer: int, point: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if point in ("input", "residual"):
                received = args[0] if args else kwargs["hidden_states"]
                value = received if point == "input" else value - received
            seen[layer, point] = value

        return hook

    for layer, point in taps:
        block = decoder_layers(model)[layer - 1]
        module = sublayers(block)[point == "mlp"] if point in ("mlp", "attention") else block
        handles.append(module.register_forward_hook(tap(layer, point), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_layers(model: Model, numbers: Iterable[int]) -> Iterator[None]:
    """Inside, the given layers hand their input on unchanged and cost nothing; the decoder's own code runs as ever."""
    layers = decoder_layers(model)
    skipped = [(layers[n - 1], layers[n - 1].__dict__.get("forward")) for n in numbers]
    for layer, _ in skipped:
        layer.forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    try:
        yield
    finally:
        for layer, own in skipped:
            del layer.forward
            if own is not None:
                layer.forward = own


def logits_of(model: Model, final: Tensor) -> Tensor:
    """Logits (n, m) float32 of normalised final states (n, D), with the architecture's scale and soft cap."""
    config: Any = decoder(model).config
    z: Tensor = model.get_output_embeddings()(final).float()  # type: ignore[operator]
    z = z * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(z / cap) if cap else z


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
                raise ValueError(f"{source} is not in a teacher of {depth} layers with points {', '.join(POINTS)}")
        key = _key(teacher, data, sources, matrix, dtype, top_k, vocabulary if top_k else None)
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        final, tokens = root / key[:32], 0
        with _locked(root):
            problem = _problem(final, key) if final.exists() else None
            if problem:
                warnings.warn(f"the supervision cache {final} is damaged ({problem}) and is rebuilt", stacklevel=2)
                shutil.rmtree(final)
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
def _locked(root: Path) -> Iterator[None]:
    """One builder at a time in this folder; the system drops the lock of a process that dies."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def reserve(descriptor: int, size: int) -> None:
    """Take ``size`` bytes on disk for a file now: a disk that fills under a memory map ends the process by SIGBUS."""
    os.truncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


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
    with skip_layers(teacher, range(last + 1, len(decoder_layers(teacher)) + 1)), capture(teacher, taps) as seen:
        for examples in by_length(data, batch_tokens):
            batch = collate([data[i] for i in examples], 0, device)
            mask, rows = supervised(batch["labels"]), _rows(arrays["offsets"], examples)
            out = decoder(teacher)(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            for number, source in enumerate(sources):
                low, high = (seen[layer, source.point][mask].float() for layer in (source.low, source.high))
                h = torch.lerp(low, high, source.mix)
                norm = h.norm(dim=-1)
                unit = h / norm.clamp_min(1e-30)[:, None]
                _store(arrays[f"target_{number}"], rows, unit if matrix is None else unit @ matrix.T, source)
                _store(arrays[f"norm_{number}"], rows, norm, source)
            for at, states in enumerate(out.last_hidden_state[mask].split(CHUNK) if "tail" in arrays else ()):
                _store_top(arrays, rows[at * CHUNK :][:CHUNK], logits_of(teacher, states)[:, :vocabulary])


def _store(array: np.memmap, rows: np.ndarray, values: Tensor, source: Source) -> None:
    array[rows] = values.cpu().numpy().astype(array.dtype)
    if not np.isfinite(array[rows]).all():
        raise ValueError(f"the teacher's target at {source} is not finite in {array.dtype}: try float32, or look at it")


def _store_top(arrays: dict[str, np.memmap], rows: np.ndarray, logits: Tensor) -> None:
    logp = logits.log_softmax(-1)
    top, index = logp.topk(arrays["top_index"].shape[1], dim=-1)
    arrays["top_logprob"][rows], arrays["top_index"][rows] = top.cpu().numpy(), index.cpu().numpy()
    arrays["tail"][rows] = logp.scatter(1, index, -torch.inf).exp().sum(-1).cpu().numpy()


def by_length(data: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Examples in batches of at most ``batch_tokens`` padded tokens, longest first: memory peaks at the start."""
    batch: list[int] = []
    for i in sorted(range(len(data)), key=lambda i: -len(data[i].input_ids)):
        if batch and (len(batch) + 1) * len(data[batch[0]].input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


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


def _problem(folder: Path, key: str) -> str | None:
    """What is wrong with a cache on disk, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        broken = [n for n, facts in manifest["arrays"].items() if _checksum(folder / f"{n}.npy") != facts["sha256"]]
        if manifest["key"] != key:
            return "its key differs"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"the checksum of {', '.join(broken)} differs" if broken else None
