"""Running generated code: a fresh isolated process a program, and proof that the program reached its end.

Isolation has two levels. ``namespace``: ``unshare`` where it works, otherwise bubblewrap, whose folder has no limit on
the number of files (own process, network and mount namespaces; Python's files read-only, an empty 64 MiB folder, which
is ``/tmp`` where the interpreter does not lie there itself, and nothing else of the machine).
``rlimits``: where neither works, a guard inside the interpreter that refuses files, processes and sockets.
Resource limits, the guard against native code and the wall clock act at both. Only the standard library is there.

Memory. A process has ``memory_mb`` of address space. What its files hold is not in that: the folder is a tmpfs of
``FOLDER_BYTES``, and files in memory (``memfd_create``) are at most ``DESCRIPTORS`` of ``FILE_BYTES`` each, 128 MiB.
A control group would count all of it together, and few machines let a user have one.

Proof of the end. Whatever shares an interpreter with a program can be found and forged by it, and so can a result line
or an exit status. So the end is read off from outside: the driver blocks in the same ``read`` call once before and once
after ``exec(program)``, and the kernel's ``/proc/PID/syscall`` gives the main thread's stack pointer. Code that still
runs *inside* ``exec`` is deeper on the C stack, and code that left it by an exception is never called again. Where the
kernel does not show this file, a random token that the driver holds is the only proof.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OUTPUT_BYTES = 1 << 20
FILE_BYTES = 4 << 20
FOLDER_BYTES = 64 << 20
DESCRIPTORS = 32
PROCESSES = 8
START_S = 20.0
NOT_STARTED = "the sandbox did not start"
_UID = 1_000_000  # root's programs run as users of their own from here on: the process limit exempts root
_FLAGS = ("-s", "-S", "-P", "-B", "-u", "-X", "utf8", "-c")  # -u: what was printed is out before a program ends
_ENV = {"PYTHONHASHSEED": "0"}  # sets are ordered alike in every run, so a verdict does not change

# Texts and not modules: their files are not there in a sandbox.
_DRIVER = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("plain.py", "driver.py"))


class SandboxError(RuntimeError):
    """Generated code may not or cannot be executed here; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    ``passed``: the program ran to its end, without an exception, an early exit or a running thread, within its limits.
    ``reason``: ``passed``, ``timed out``, ``too much output``, or what stopped it. ``seconds``: wall clock of the
    program without the interpreter's start. ``output``: the last 2,000 characters that it printed. ``judged``:
    ``inside`` where tests and program shared a process, which a program that means to can deceive, else ``apart``.
    """

    passed: bool
    reason: str
    seconds: float
    output: str = ""
    judged: str = "inside"


def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def _visible() -> tuple[str, ...]:
    """What a program may read: the interpreter, its library and the system's shared libraries."""
    prefixes = [
        Path(sys.base_prefix),
        Path(sys.base_exec_prefix),
        Path(_python()).parent.parent,
        Path("/usr"),
        Path("/"),
    ]
    lib = [str(p / name) for p in prefixes for name in ("lib", "lib64")]
    lib += [os.path.realpath(path) for path in lib]  # an interpreter behind a link looks for its library behind it too
    return tuple(dict.fromkeys(p for p in [_python(), *lib, "/etc/ld.so.cache"] if os.path.exists(p)))


def _apart(folders: tuple[str, ...]) -> str:
    """The first of some folders that holds nothing of what a program may read, so that it can be covered.

    Raises:
        SandboxError: each of them does.
    """
    for folder in folders:
        if not any(path.startswith(f"{folder}/") for path in _visible()):
            return folder
    raise SandboxError(
        f"the interpreter {_python()} lies where the sandbox needs room, below {' or '.join(folders)}: use one that "
        "lies elsewhere"
    )


def _scratch() -> str:
    """The folder that a program can write, as it sees it."""
    return _apart(("/tmp", "/scratch"))


def _tool(name: str) -> str:
    """A command by its path, sought where the user's shell would: a sandbox's own environment has no PATH.

    Raises:
        SandboxError: it is not there.
    """
    if path := shutil.which(name):
        return path
    raise SandboxError(f"{name} is not on the PATH: install it")


def _bubblewrap(uid: int) -> list[str]:
    own = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if uid else ["--unshare-user"]
    command = [_tool("bwrap"), *own, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--die-with-parent", "--as-pid-1", "--dev-bind", "/dev/null", "/dev/null"]
    for path in _visible():
        for above in reversed(Path(path).parents[:-1]):  # bubblewrap would make them for their owner alone
            command += ["--perms", "0755", "--dir", str(above)]
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    command += ["--perms", "0777", "--size", str(FOLDER_BYTES), "--tmpfs", _scratch()]
    return [*command, "--remount-ro", "/", "--chdir", _scratch()]


def _unshare(uid: int) -> list[str]:
    mount, mkdir, ln = (shlex.quote(_tool(name)) for name in ("mount", "mkdir", "ln"))
    jail = _apart(tuple(f for f in ("/mnt", "/srv", "/media", "/home") if os.path.isdir(f)))
    lines = ["set -e", f"{mount} -t tmpfs -o mode=755,nosuid,nodev jail {jail}", f"{mkdir} -p {jail}{_scratch()}"]
    for path in _visible():
        inner, parent = shlex.quote(f"{jail}{path}"), shlex.quote(f"{jail}{os.path.dirname(path)}")
        if os.path.islink(path):
            lines += [f"{mkdir} -p {parent}", f"{ln} -s {shlex.quote(os.readlink(path))} {inner}"]
        else:
            place = f"{mkdir} -p {inner}" if os.path.isdir(path) else f"{mkdir} -p {parent}; : > {inner}"
            lines += [place, f"{mount} -o bind,ro,nosuid,nodev {shlex.quote(path)} {inner}"]
    lines += [f"{mount} -o remount,bind,ro,nosuid,nodev {jail}"]
    small = f"mode=777,nosuid,nodev,noexec,size={FOLDER_BYTES},nr_inodes=4096"
    lines += [f"{mount} -t tmpfs -o {small} work {jail}{_scratch()}"]
    # A second user namespace takes the capabilities over the first one's mounts away.
    again = f"{shlex.quote(_tool('unshare'))} {'' if uid else '--user'}"
    lines += [f'exec {again} --root={jail} --wd={_scratch()} "$@"']
    spaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    own = [] if uid else ["--user", "--map-root-user"]
    return [_tool("unshare"), *spaces, *own, "--", "/bin/sh", "-c", "\n".join(lines), "sh"]


_TOOLS = {"unshare": _unshare, "bubblewrap": _bubblewrap}


@functools.cache
def active_tool() -> str | None:
    """``unshare`` or ``bubblewrap``, whichever first runs a program here; ``None`` where no isolation tool works."""
    for tool in _TOOLS:
        with contextlib.suppress(SandboxError, OSError):
            if _run_all(["pass"], tool, 10.0, 512, 1)[0].passed:
                return tool
    return None


def active_level() -> str:
    """The isolation that programs get on this machine: ``namespace`` or ``rlimits``."""
    return "namespace" if active_tool() else "rlimits"


def _why_no_tool() -> str:
    """Why :func:`active_tool` found none, as a part of a sentence."""
    found = [name for name in ("bwrap", "unshare") if shutil.which(name)]
    if not found:
        return "neither bwrap nor unshare is on the PATH"
    return f"{' and '.join(found)} cannot start {_python()} in a namespace here"


def require_level(isolation: str) -> str:
    """The active level, if it is at least ``isolation`` (``namespace`` or ``rlimits``).

    Raises:
        SandboxError: the machine offers less.
        ValueError: the level is unknown.
    """
    if isolation not in ("namespace", "rlimits"):
        raise ValueError(f"isolation must be 'namespace' or 'rlimits', not {isolation!r}")
    if isolation == "namespace" and active_level() != "namespace":
        raise SandboxError(
            f"programs of models that are not this project's own run in namespaces alone, and {_why_no_tool()}: "
            "install bubblewrap (apt-get install bubblewrap), or leave the tasks out whose answers are programs"
        )
    return active_level()


def _position(pid: int, until: float, expected: tuple[str, ...] | None = None) -> tuple[str, ...] | None:
    """Where the main thread of ``pid`` blocks: (system call, fd, count, stack pointer, program counter).

    On a busy machine it may wait for a core, or for the interpreter's lock, before it blocks (at ``expected``): it has
    until the monotonic time ``until``. ``None`` where the kernel does not tell.
    """
    pause = 0.0
    while True:
        try:
            fields = Path(f"/proc/{pid}/syscall").read_text().split()
        except OSError:
            return None
        where: tuple[str, ...] = ()
        if (
            len(fields) == 9 and int(fields[1], 16) < 1024
        ):  # a descriptor: no wait for a lock, whose word has an address
            where = (fields[0], fields[1], fields[3], fields[7], fields[8])
        if (where and where == (expected or where)) or time.monotonic() > until:
            return where
        time.sleep(pause := min(0.01, pause + 0.0005))


def _limits(timeout_s: float, memory_mb: int, tool: str | None) -> bytes:
    """What a program's process sets for itself, as ``kind:value,...``; later no one can raise them."""
    limits = {
        resource.RLIMIT_CPU: int(timeout_s) + 1,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NPROC: PROCESSES if tool else -1,  # without a namespace it would count all of the user's
        resource.RLIMIT_NOFILE: DESCRIPTORS,
        resource.RLIMIT_CORE: 0,
    }
    return ",".join(f"{kind}:{value}" for kind, value in limits.items()).encode()


@dataclass
class _Box:
    """One sandbox: its first process, the socket to it, its tool, and without one its folder."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    tool: str | None
    folder: str | None


def _open_box(tool: str | None, worker: int, text: str | None = None) -> _Box:
    uid = _UID + os.getpid() % 10_000 * 1000 + worker % 1000 if tool and os.geteuid() == 0 else 0
    folder = None if tool else tempfile.mkdtemp(prefix="semalign-")
    roots = _visible() if tool else (*_visible(), f"{folder}/")
    ours, theirs = socket.socketpair()
    ours.settimeout(START_S)
    setpriv = shutil.which("setpriv") if tool != "bubblewrap" else None  # bubblewrap does this itself
    command = [setpriv, "--pdeathsig", "KILL", "--no-new-privs"] if setpriv else []
    command += _TOOLS[tool](uid) if tool else []
    command += [_python(), *_FLAGS, text or _DRIVER, str(theirs.fileno()), str(uid), "0" if tool else "1", *roots]
    with theirs:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder or "/", env=_ENV, pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
    return _Box(process, ours, tool, folder)


def _close_box(box: _Box, *, at_once: bool = False) -> None:
    box.control.close()  # its first process ends by this, and the kernel ends with it all others of its namespace
    try:
        box.process.wait(0 if at_once else 0.5)
    except subprocess.TimeoutExpired:
        os.killpg(box.process.pid, signal.SIGKILL)
        box.process.wait()
    if box.folder:
        shutil.rmtree(box.folder, ignore_errors=True)


def _run(program: str, box: _Box, timeout_s: float, memory_mb: int) -> tuple[Outcome, bool]:
    """Run one program in ``box``; returns its outcome, and whether the box is as it was before."""
    token = secrets.token_bytes(16)
    parts = _limits(timeout_s, memory_mb, box.tool), program.encode("utf-8", "surrogatepass")
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.settimeout(START_S)
    out, printing = os.pipe()
    printed, watch, pid, started = b"", -1, 0, time.monotonic()
    reason, ready, same = NOT_STARTED, b"", False
    try:
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(box.control, [b"r"], [theirs.fileno(), printing])
        os.close(printing)
        with contextlib.suppress(OSError):
            ours.sendall(token + b"".join(len(part).to_bytes(8, "big") + part for part in parts))
            ready, credentials, _, _ = ours.recvmsg(16, socket.CMSG_SPACE(12))
        if ready == token:
            pid = struct.unpack("3i", credentials[0][2])[0]  # as this process sees it, whatever the namespace
            watch = os.pidfd_open(pid)
            before = _position(pid, time.monotonic() + START_S)
            if before is None:
                _say_token_alone()
            started = time.monotonic()
            ours.send(b"g")
            end = started + timeout_s
            reason, printed = _follow(ours, out, end, token)
            if reason == "passed" and before is not None and _position(pid, end + 0.5, before) != before:
                reason = "the end was forged"
    finally:
        seconds = time.monotonic() - started
        if watch >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch, signal.SIGKILL)
            os.close(watch)
        ours.close()
        os.close(out)
    if pid:
        box.control.settimeout(1.0)
        with contextlib.suppress(OSError):
            same = box.control.recv(4) == b"same"
    text = printed.decode("utf-8", "replace")[-2000:]
    if reason == "ended early" and text.strip():
        reason = f"stopped: {text.strip().splitlines()[-1][:200]}"
    return Outcome(reason == "passed", reason, seconds, text), same


@functools.cache
def _say_token_alone() -> None:
    """Say once that the kernel does not show where a program ended."""
    warnings.warn(
        "this user may not see where a process waits (/proc/PID/syscall), as root without the right to trace: that a "
        "program reached its end is proven by a token alone, which one that means to can find; run as a user who may "
        "trace its own processes",
        stacklevel=2,
    )


def _drain(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def _follow(control: socket.socket, out: int, deadline: float, token: bytes) -> tuple[str, bytes]:
    """Wait for the token, the process's end, the deadline or too much output; returns (reason, last output)."""
    tail, total, said = b"", 0, b""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(out, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            if descriptor == out:
                chunk = os.read(out, 1 << 16)
                total, tail = total + len(chunk), (tail + chunk)[-8192:]
                if not chunk:
                    poll.unregister(out)
                if total > OUTPUT_BYTES:
                    return "too much output", tail
            else:
                chunk = control.recv(64)
                said += chunk
                if len(said) >= len(token) or not chunk:
                    return ("passed" if said == token else "ended early"), tail + _drain(out)
    return "timed out", tail


def run_programs(
    programs: list[str], *, timeout_s: float = 5.0, memory_mb: int = 512, workers: int | None = None,
    isolation: str = "rlimits",
) -> list[Outcome]:  # fmt: skip
    """Run complete programs, each in a process of its own, in parallel over the cores; outcomes in the same order.

    ``timeout_s``: wall-clock seconds a program; ``memory_mb``: MiB of address space; ``workers``: programs at a time
    (default: the cores this process may use); ``isolation``: the least level that is accepted.

    Raises:
        SandboxError: the machine offers less isolation, or is not Linux.
        ValueError: an unknown level, or a limit that is not positive.
    """
    if sys.platform != "linux":
        raise SandboxError(
            "generated code is executed on Linux only, of whose namespaces and limits the sandbox is made: leave the "
            "tasks out whose answers are programs"
        )
    if timeout_s <= 0 or memory_mb <= 0:
        raise ValueError(f"timeout_s and memory_mb must be positive, not {timeout_s} and {memory_mb}")
    require_level(isolation)
    return _run_all(programs, active_tool(), timeout_s, memory_mb, workers or len(os.sched_getaffinity(0)))


def cannot_start(tool: str | None) -> str:
    """The sentence for a sandbox that does not start at all."""
    return f"the sandbox ({tool or 'rlimits'}) cannot start {_python()}: give the machine memory, or use another Python"


def _run_all(programs: list[str], tool: str | None, timeout_s: float, memory_mb: int, workers: int) -> list[Outcome]:
    idle: queue.SimpleQueue[tuple[int, _Box | None]] = queue.SimpleQueue()
    for worker in range(workers):
        idle.put((worker, None))

    def one(program: str) -> Outcome:
        worker, box = idle.get()
        try:
            for _ in range(2):
                box = box or _open_box(tool, worker)
                outcome, same = _run(program, box, timeout_s, memory_mb)
                started = outcome.reason != NOT_STARTED or box.process.poll() is None
                if not same:
                    _close_box(box)
                    box = None
                if started:
                    return outcome
            raise SandboxError(cannot_start(tool))
        finally:
            idle.put((worker, box))

    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(one, programs))
        finally:
            pool.shutdown(cancel_futures=True)
            while not idle.empty():
                if box := idle.get()[1]:
                    _close_box(box)
