"""Files that are whole or not there, and that say when they are damaged; room for a memory map; locks."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUM = "sha256"
"""Under which a json file states the checksum of everything else in it."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder: a reader sees the old text or the new one, never half."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same for a file that is no text. What killed processes of this machine left half written is removed.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the message names the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
    except OSError as error:
        said = error.strerror or error
        raise type(error)(f"{path} cannot be written ({said}): make room, or choose another folder") from None


def _write(path: Path, content: bytes) -> None:
    host = socket.gethostname()
    for stale in path.parent.glob(f".{path.name}.{host}-*"):
        number = stale.name.rpartition("-")[2]
        if not (number.isdecimal() and alive(int(number))):
            stale.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{host}-{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine, whoever's it is."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """A mapping as json, with the checksum of what it says.

    Raises:
        ValueError: a number that is not finite.
    """
    plain = json.loads(json.dumps(content, allow_nan=False))  # with the keys and types that a reader will see
    write_text(path, json.dumps({**plain, SUM: _sum_of(plain)}, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, or not what was written; the message names it.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop(SUM, None) != _sum_of(content):
            raise ValueError("its checksum differs")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made again") from None
    return content


def _sum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_tensors(path: Path, content: Any) -> None:
    """``torch.save``, whole or not at all; its checksum follows at the end, where ``torch.load`` does not look."""
    import torch  # here: what plans a run writes text alone, and must not wait for it

    buffer = io.BytesIO()
    torch.save(content, buffer)
    written = buffer.getvalue()
    write_bytes(path, written + hashlib.sha256(written).digest())


def load_tensors(path: Path, device: Any = "cpu") -> Any:
    """What :func:`save_tensors` wrote.

    Raises:
        ValueError: it is not such a file, or not what was written; the message names it.
    """
    import torch

    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    if hashlib.sha256(content[:-size]).digest() != content[-size:]:
        raise ValueError(f"{path} is damaged (its checksum differs): delete it, and what it held is made again")
    return torch.load(io.BytesIO(content[:-size]), weights_only=True, map_location=device)


def reserve(descriptor: int, size: int) -> None:
    """Take ``size`` bytes on disk for a file now: a disk that fills under a memory map ends the process by SIGBUS."""
    os.truncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


@contextmanager
def locked(root: Path, *, wait: bool = True) -> Iterator[None]:
    """One builder at a time in this folder; the system drops the lock of a process that dies.

    The lock is on a file that can be written: on shared file systems one on a folder holds on one host alone.

    Raises:
        RuntimeError: another process has it, and this one is not to ``wait``.
    """
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f"another process is writing to {root}: wait for it to end, or stop it") from None
        yield
    finally:
        os.close(handle)
