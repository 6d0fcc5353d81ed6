"""``python -m`` as a fork: the same files, folder, environment and end as of a process of its own, and no imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from semalign.pipeline import forks

PROBE = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv[1:], "folder": os.getcwd(), "given": os.environ.get("GIVEN"), "name": __name__,
    "said": sys.stdin.read(), "imported": "transformers" in sys.modules, "home": sys.path[0],
}))
print("a complaint", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[psutil.Process]:
    with forks.forking():
        own = next(one for one in psutil.Process().children() if "semalign.pipeline.forks" in " ".join(one.cmdline()))
        _until(lambda: Path(os.environ[forks.ADDRESS]).exists())
        yield own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "sleeper.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    return tmp_path


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("it did not happen within a minute")


BARE = """
from semalign.pipeline import forks
start = forks.subprocess.Popen
bare = "from semalign.pipeline import forks; forks.prepare = lambda classroom: None; "
forks.subprocess.Popen = lambda words, **how: start([*words[:2], bare + words[2]], **how)
"""
"""In front of a program: what forks for it imports nothing before."""


def _run_elsewhere(given: str = "", before: str = "") -> tuple[subprocess.Popen[str], psutil.Process, str]:
    """A process in which ``forking(GIVEN)`` is open for a minute, the process that forks for it, and its address."""
    code = f"import time; from semalign.pipeline.forks import *; c = forking({given}); c.__enter__()"
    owner = subprocess.Popen(
        [sys.executable, "-c", f"{before}{code}; print(os.environ[ADDRESS], flush=True); time.sleep(60)"],
        text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdout
    address = owner.stdout.readline().strip()
    _until(lambda: Path(address).exists())
    return owner, psutil.Process(owner.pid).children()[0], address


def _sleeper(folder: Path) -> subprocess.Popen[str]:
    asker = subprocess.Popen(
        forks.command(sys.executable, "sleeper"), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert asker.stdout and asker.stdout.readline() == "begun\n"
    return asker


def test_a_fork_is_what_python_m_is_but_for_the_imports(origin: psutil.Process, folder: Path) -> None:
    plain = [sys.executable, "-m", "probe"]
    for status in ("0", "3"):
        own, fork = (
            subprocess.run(
                [*words, status, "a word"], cwd=folder, env={**os.environ, "GIVEN": "yes"}, input="a line",
                text=True, capture_output=True,
            )
            for words in (plain, forks.command(sys.executable, "probe"))
        )  # fmt: skip
        assert own.returncode == fork.returncode == int(status)
        assert own.stderr == fork.stderr == "a complaint\n"
        alone, forked = json.loads(own.stdout), json.loads(fork.stdout)
        assert forked.pop("imported") and not alone.pop("imported")
        assert alone == forked
    assert origin.children() == []


def test_whoever_asks_ends_by_the_signal_that_ended_the_fork(origin: psutil.Process, folder: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        asker = _sleeper(folder)
        origin.children()[0].send_signal(number)
        assert asker.wait(timeout=10) == -number


def test_a_fork_ends_with_whoever_asked(origin: psutil.Process, folder: Path) -> None:
    asker = _sleeper(folder)
    fork = origin.children()[0]
    asker.kill()
    asker.wait()
    fork.wait(timeout=10)
    assert origin.children() == []


def test_whoever_asks_ends_with_its_parent(origin: psutil.Process, folder: Path) -> None:
    """As a kernel does whose owner was killed: Jupyter starts it in a session of its own."""
    words = forks.command(sys.executable, "sleeper")
    code = f"import subprocess, time; subprocess.Popen({words!r}, start_new_session=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.DEVNULL)
    _until(lambda: len(origin.children()) == 1)
    fork = origin.children()[0]
    owner.kill()
    owner.wait()
    fork.wait(timeout=10)


def test_all_ends_with_the_run(folder: Path) -> None:
    """The run's process is killed: its origin, the fork and whoever asked for it end; what was asked for is named."""
    owner, own, address = _run_elsewhere(before=BARE)
    asker = subprocess.Popen(
        forks.command(sys.executable, "sleeper"), cwd=folder, env={**os.environ, forks.ADDRESS: address},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert asker.stdout and asker.stderr and asker.stdout.readline() == "begun\n"
    family = [own, *own.children()]
    assert len(family) == 2
    owner.kill()
    owner.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert asker.wait(timeout=10) == 1
    said = "sleeper was stopped, since the process of the run that it was a fork of has ended: call it again"
    assert asker.stderr.read() == f"semalign: {said}\n"


def test_where_nobody_answers_it_is_python_m_itself(folder: Path) -> None:
    for address in ({}, {forks.ADDRESS: str(folder / "nobody")}):
        bare = {name: value for name, value in os.environ.items() if name != forks.ADDRESS}
        done = subprocess.run(
            [*forks.command(sys.executable, "probe"), "4"], cwd=folder, env=bare | address, input="",
            text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 4 and not json.loads(done.stdout)["imported"]


@pytest.mark.parametrize("ahead", [False, True])
def test_imports_wait_for_somebody_who_asks_unless_they_are_sure_to_come(ahead: bool) -> None:
    owner, own, _ = _run_elsewhere(f"ahead={ahead}")
    if ahead:
        _until(lambda: any("libtorch" in one.path for one in own.memory_maps()))
    else:
        time.sleep(1)
        assert not any("libtorch" in one.path for one in own.memory_maps())
    own.kill()  # it would make all of them before it saw that its owner is gone
    owner.kill()


def test_a_folder_too_deep_for_a_socket_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("deep" * 25)
    deep.mkdir()
    monkeypatch.delenv(forks.ADDRESS, raising=False)
    monkeypatch.setattr(forks.tempfile, "tempdir", str(deep))
    with forks.forking():
        assert forks.ADDRESS not in os.environ


def test_what_a_fork_opened_is_closed_at_its_end(origin: psutil.Process, folder: Path) -> None:
    """Functions of ``atexit`` and threads, as of a process of its own; and an error is shown, whatever it is."""
    lines = [
        "import atexit, tempfile, threading, time",
        "own = tempfile.TemporaryDirectory(dir='.', prefix='own')",
        "atexit.register(print, 'at the end')",
        "threading.Thread(target=lambda: (time.sleep(0.3), print('a thread'))).start()",
        "raise ArithmeticError('of its own')",
    ]
    (folder / "closing.py").write_text("\n".join(lines))
    for words in ([sys.executable, "-m", "closing"], forks.command(sys.executable, "closing")):
        done = subprocess.run(words, cwd=folder, text=True, capture_output=True)
        assert done.returncode == 1 and done.stdout == "a thread\nat the end\n"
        assert done.stderr.endswith("ArithmeticError: of its own\n")
        assert list(folder.glob("own*")) == []


def test_a_kernel_ends_the_thread_by_which_it_was_told_to_before_its_end_functions(
    origin: psutil.Process, folder: Path
) -> None:
    """One of them stops what that thread still waits for, and a kernel that hangs is killed after some seconds."""
    lines = [
        "import atexit, threading, time",
        "atexit.register(print, 'at the end')",
        "told = lambda: (time.sleep(0.3), print('goodbye'))",
        "threading.Thread(target=told, name='Control', daemon=True).start()",
    ]
    (folder / "kernel.py").write_text("\n".join(lines))
    done = subprocess.run(forks.command(sys.executable, "kernel"), cwd=folder, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "goodbye\nat the end\n")


def test_an_exit_with_a_sentence_is_an_error_that_says_it(origin: psutil.Process, folder: Path) -> None:
    (folder / "leaving.py").write_text("raise SystemExit('not here')")
    done = subprocess.run(forks.command(sys.executable, "leaving"), cwd=folder, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (1, "not here\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_to_whoever_asks_is_one_to_the_fork(
    origin: psutil.Process, folder: Path, number: signal.Signals, status: int
) -> None:
    """Jupyter interrupts a kernel before it asks it to end: nothing is printed, and the fork decides what happens."""
    lines = ["import time", "try:", "    print('begun', flush=True)", "    time.sleep(60)"]
    lines += ["except KeyboardInterrupt:", "    raise SystemExit(7)"]
    (folder / "sleeper.py").write_text("\n".join(lines))
    asker = _sleeper(folder)
    asker.send_signal(number)
    assert asker.wait(timeout=10) == status
    assert asker.stderr and asker.stderr.read() == ""
    _until(lambda: origin.children() == [])


def test_a_signal_amid_the_asking_is_one_to_the_fork(origin: psutil.Process, folder: Path) -> None:
    """It arrives when the fork is asked for and nothing hands it on yet: the fork ends by it, not whoever asked."""
    lines = [
        "import os, signal, sys",
        "from semalign.pipeline import forks",
        "send = forks.socket.send_fds",
        "forks.socket.send_fds = lambda *given: (send(*given), os.kill(os.getpid(), signal.SIGINT))",
        "print('ended as', forks.ask(['sleeper']))",
    ]
    own = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(own, cwd=folder, text=True, capture_output=True, timeout=30)
    assert done.returncode == 0 and done.stdout.endswith("ended as 1\n")
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert origin.children() == []


def test_a_signal_to_a_fork_that_has_just_begun_is_not_lost(folder: Path) -> None:
    """It arrives before the fork has given up its origin's way with signals, which is to go on."""
    lines = [
        "import os, signal",
        "from semalign.pipeline import forks",
        "fork = os.fork",
        "def struck():",
        "    if not (number := fork()): os.kill(os.getpid(), signal.SIGTERM)",
        "    return number",
        "os.fork, forks.prepare = struck, lambda classroom: None",
        "forks.main((), False)",
    ]
    given = {**os.environ, forks.ADDRESS: str(folder / "forks")}
    own = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], env=given)
    try:
        _until((folder / "forks").exists)
        asker = subprocess.run(
            forks.command(sys.executable, "sleeper"), cwd=folder, env=given, capture_output=True, timeout=30
        )
        assert asker.returncode == -signal.SIGTERM
    finally:
        own.kill()
        own.wait()


def test_an_interrupt_at_the_terminal_leaves_the_origin_to_its_run(origin: psutil.Process, folder: Path) -> None:
    asker = _sleeper(folder)
    origin.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert asker.poll() is None and origin.is_running()
    asker.kill()
    asker.wait()
    _until(lambda: origin.children() == [])


def test_a_fork_ends_with_its_origin_however_that_ends(origin: psutil.Process, folder: Path) -> None:
    asker = _sleeper(folder)
    fork = origin.children()[0]
    origin.kill()  # the last test of this file: nothing answers any more
    fork.wait(timeout=10)
    assert asker.wait(timeout=10) == 1
    assert asker.stderr and "was stopped, since the process of the run" in asker.stderr.read()
