"""Files are whole or not there; what is damaged is named; what killed processes left goes; a lock spans processes."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semalign.lm.files import load_tensors, locked, read_json, save_tensors, write_bytes, write_json, write_text


def test_json_comes_back_and_says_when_one_character_changed(tmp_path: Path) -> None:
    path = tmp_path / "folder/numbers.json"
    write_json(path, {"b": [0.1, 1e-17, None, True], "a": {"x": "é"}, 3: 1})
    assert read_json(path) == {"b": [0.1, 1e-17, None, True], "a": {"x": "é"}, "3": 1}
    text = path.read_text()
    for damaged in (text.replace("0.1", "9.0"), text[:-5], "", "[1]", "{}", "[" * 100_000, "\0\1", "null"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"numbers\.json is damaged"):
            read_json(path)
    with pytest.raises(ValueError, match=r"[Oo]ut of range|not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == "null" and [p.name for p in path.parent.iterdir()] == ["numbers.json"]


def test_tensors_come_back_and_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    path, value = tmp_path / "a.pt", {"w": torch.randn(3, 5), "step": 7}
    save_tensors(path, value)
    back = load_tensors(path)
    assert torch.equal(back["w"], value["w"]) and back["step"] == 7
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"a\.pt is damaged"):
            load_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pt is damaged"):
        load_tensors(path)


def test_writing_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    host = socket.gethostname()
    dead, running, elsewhere, another = (
        tmp_path / name
        for name in (
            f".a.json.{host}-{int(done.stdout)}", f".a.json.{host}-{os.getppid()}", f".a.json.other-{int(done.stdout)}",
            f".b.json.{host}-{int(done.stdout)}",
        )
    )  # fmt: skip
    for left in (dead, running, elsewhere, another):
        left.write_text("half")
    write_text(tmp_path / "a.json", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", running.name, elsewhere.name, another.name}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a", "text")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "denied")])
def test_what_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError
) -> None:
    def fails(*_arguments: object) -> None:
        raise fault

    save_tensors(tmp_path / "a.pt", {"step": 1})
    monkeypatch.setattr(Path, "write_bytes", fails)
    said = rf"^{tmp_path}/a\.pt cannot be written \({fault.strerror}\): make room, or choose another folder$"
    with pytest.raises(type(fault), match=said):
        save_tensors(tmp_path / "a.pt", {"step": 2})
    assert load_tensors(tmp_path / "a.pt") == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(FileExistsError, match="results/a cannot be written"):
        write_text(tmp_path / "results" / "a", "text")


def test_one_that_does_not_wait_for_the_lock_is_refused(tmp_path: Path) -> None:
    said = r"is writing to .*: wait for it to end"
    with locked(tmp_path), pytest.raises(RuntimeError, match=said), locked(tmp_path, wait=False):
        pass
    with locked(tmp_path, wait=False):
        pass


def test_one_holds_the_lock_at_a_time_and_it_is_on_a_file_that_can_be_written(tmp_path: Path) -> None:
    code = f"""
import fcntl
handle = open({str(tmp_path / ".lock")!r}, "r+")
try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("taken")
"""

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    with locked(tmp_path):
        assert other() == "taken"
    assert other() == "free" and json.dumps(os.listdir(tmp_path)) == '[".lock"]'
