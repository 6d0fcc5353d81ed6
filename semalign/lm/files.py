"""Files that are whole or not there: text, tensors, and the room that a memory map takes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder: a reader sees the old text or the new one, never half."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same for a file that is no text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def save_tensors(path: Path, content: Any) -> None:
    """``torch.save``, whole or not at all."""
    import torch  # here: what plans a run writes text alone, and must not wait for it

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def reserve(descriptor: int, size: int) -> None:
    """Take ``size`` bytes on disk for a file now: a disk that fills under a memory map ends the process by SIGBUS."""
    os.truncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One builder at a time in this folder; the system drops the lock of a process that dies."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
