"""``python -m MODULE``, as a fork of a process that has made the imports once: the jobs of a run and their kernels.

Importing torch, transformers, pandas and seaborn takes longer than most chapters take for everything else. On a CPU one
process of the run imports them, and each job and each kernel is a fork of it, in the folder, environment and files of
whoever asked.

Called as a script this file is who asks: it loads nothing but the standard library, waits for its fork, and ends as the
fork ended. Killing it kills the fork, and the fork ends with the process that it came from. Where nobody answers, as in
a job on another machine, the script becomes ``python -m MODULE`` itself.
"""

import atexit
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "SEMALIGN_FORKS"
"""The variable of the environment with the socket at which forks are asked for."""
FORWARDED = (signal.SIGINT, signal.SIGTERM)
"""What is said to whoever asks is said to the fork: Jupyter interrupts a kernel before it asks it to end."""
IMPORTS = (
    "ipykernel.kernelapp", "ipykernel.debugger", "IPython.core.debugger", "papermill", "seaborn",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "pandas.io.formats.style",
    "transformers.models.llama.modeling_llama", "semalign.methods", "semalign.study.tables", "semalign.study.kept",
    "semalign.report", "semalign.benchmarks.engine", "lm_eval.evaluator",
)  # fmt: skip
"""What is imported before the first fork, with all that it imports."""
_SIZE = struct.Struct("!i")
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_LONGEST = 100  # bytes of a socket's path; systems refuse more than about 104


def command(python: str, module: str) -> list[str]:
    """What is called in place of ``PYTHON -m MODULE``; arguments follow. It takes no start-up files and no packages."""
    return [python, "-IS", str(Path(__file__).resolve()), module]


def ask(words: list[str]) -> int | None:
    """Run ``python -m WORDS`` in a fork, and return its exit status, or minus the number of the signal that ended it.

    None where nobody answers.

    Raises:
        RuntimeError: the process whose forks they are has ended.
    """
    asked = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(os.environ[ADDRESS])
        except (KeyError, OSError):
            return None
        sent = json.dumps(asked).encode()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # what comes meanwhile waits until it can be handed on
        socket.send_fds(line, [_SIZE.pack(len(sent))], [0, 1, 2])
        line.sendall(sent)
        for number in FORWARDED:
            signal.signal(number, lambda n, _frame: line.sendall(bytes([n])))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        parent = os.getppid()
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        try:
            said = _received(line, _SIZE.size)
        except OSError:
            said = b""
        if not said:
            raise RuntimeError(
                f"{' '.join(words)} was stopped, since the process of the run that it was a fork of has ended: call "
                "it again"
            )
    return int(_SIZE.unpack(said)[0])


def _end_with(parent: int) -> None:
    """End once the parent is gone, which a kernel learns of by its parent's number, and its fork cannot."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _received(line: socket.socket, size: int) -> bytes:
    """So many bytes, or none where the other side is gone."""
    parts = b""
    while len(parts) < size:
        part = line.recv(size - len(parts))
        if not part:
            return b""
        parts += part
    return parts


@contextmanager
def forking(*, classroom: Sequence[tuple[str, str, int | None]] = (), ahead: bool = False) -> Iterator[None]:
    """While this is open, what is called by :func:`command` is a fork of one process, which ends with it.

    On Linux: other systems' libraries do not survive a fork. Items of the classroom, the same for all, are made once as
    well: ``classroom`` has subjects, splits and how many items, None for all. The imports wait until somebody asks;
    ``ahead`` of that where somebody is sure to.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "forks")
        if sys.platform != "linux" or len(os.fsencode(address)) > _LONGEST:
            yield
            return
        of_one_thread = {"OMP_NUM_THREADS": "1", ADDRESS: address}  # threads that imports start would be lost in a fork
        origin = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main({list(classroom)}, {ahead})"],
            env={**os.environ, **of_one_thread}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            origin.terminate()
            origin.wait()


def kernel_of_forks(folder: Path) -> None:
    """Let Jupyter start its Python kernels as forks too, by a kernel of that name in ``folder``."""
    spec = {
        "argv": [*command(sys.executable, "ipykernel_launcher"), "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    own = folder / "kernels" / "python3"
    own.mkdir(parents=True)
    (own / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = str(folder)


class Origin:
    """The process that forks: who asked for which fork, until it ends or whoever asked is gone."""

    def __init__(self, address: str) -> None:
        signal.signal(signal.SIGINT, lambda *_: None)  # at a terminal it is meant for those who have asked
        self.parent = os.getppid()
        self.over = False
        self.asked: dict[int, socket.socket] = {}
        self.events = selectors.DefaultSelector()
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(address)
        self.door.listen(64)  # from now on whoever asks waits for the imports
        self.events.register(self.door, selectors.EVENT_READ)

    def asked_for(self) -> bool:
        """Wait until somebody asks; False where the run ends before."""
        while not self.events.select(timeout=0.5):
            if os.getppid() != self.parent:
                return False
        return True

    def serve(self) -> None:
        """Fork for whoever asks, until the run ends."""
        ended, wake = socket.socketpair()
        for end in (ended, wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "over", True))
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.events.register(ended, selectors.EVENT_READ)
        while os.getppid() == self.parent and not self.over:
            for key, _ in self.events.select(timeout=0.5):
                if key.fileobj is self.door:
                    if words := self.answer(self.door.accept()[0]):
                        run_module(words)
                elif key.fileobj is ended:
                    ended.recv(4096)
                    self.bury()
                elif key.data in self.asked:
                    self.heed(key.data)
        for fork in list(self.asked):
            self.forget(fork)

    def answer(self, line: socket.socket) -> list[str]:
        """Fork as one asks; the words that were asked for in the fork, and none in this process."""
        head, files, _, _ = socket.recv_fds(line, _SIZE.size, 3)
        asked = _received(line, _SIZE.unpack(head)[0]) if len(head) == _SIZE.size else b""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a fork takes them once they are its own
        fork = os.fork() if asked else -1
        if fork == 0:
            line.close()
            self.leave()
            return take_place(json.loads(asked), files)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        for file in files:
            os.close(file)
        if fork > 0:
            self.asked[fork] = line
            self.events.register(line, selectors.EVENT_READ, fork)
        else:  # gone before it had said what it wants
            line.close()
        return []

    def leave(self) -> None:
        """In a fork: give up what belongs to this process alone, and end with it however it ends."""
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for line in (self.door, *self.asked.values()):
            line.close()
        self.events.close()

    def bury(self) -> None:
        """Tell those whose forks have ended how they did."""
        for fork in list(self.asked):
            ended, status = os.waitpid(fork, os.WNOHANG)
            if ended:
                with suppress(OSError):  # whoever asked is gone meanwhile
                    self.asked[fork].sendall(_SIZE.pack(os.waitstatus_to_exitcode(status)))
                self.close(fork)

    def heed(self, fork: int) -> None:
        """Hand on the signals that whoever asked has received; where it is gone, its fork goes too."""
        try:
            said = self.asked[fork].recv(64)
        except OSError:
            said = b""
        for number in said:
            os.kill(fork, number)
        if not said:
            self.forget(fork)

    def forget(self, fork: int) -> None:
        """Kill a fork whose asker is gone, and what it started in its own session."""
        with suppress(ProcessLookupError):  # it has no session yet
            os.killpg(fork, signal.SIGKILL)
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)
        self.close(fork)

    def close(self, fork: int) -> None:
        """End the talk with whoever asked for a fork."""
        line = self.asked.pop(fork)
        self.events.unregister(line)
        line.close()


def take_place(asked: dict[str, Any], files: list[int]) -> list[str]:
    """In a fork: stand where whoever asked stands; returns the words."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[0] = asked["folder"]
    words: list[str] = asked["words"]
    return words


def run_module(words: list[str]) -> NoReturn:
    """Be ``python -m WORDS`` in this fork, to its end."""
    import runpy

    sys.argv, status = words, 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # A kernel's last word goes through a thread that its own end function stops first, and then it waits ten seconds.
    for thread in threading.enumerate():
        if thread.name == "Control":
            thread.join(timeout=2)
    # As Python ends, but without taking every imported module apart, which takes five times as long as the rest.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def main(classroom: Sequence[tuple[str, str, int | None]], ahead: bool) -> None:
    """Once somebody asks, or ``ahead``, make what chapters, trials and kernels would all make anew, and then fork."""
    origin = Origin(os.environ[ADDRESS])
    if ahead or origin.asked_for():  # otherwise the run has nothing to do
        prepare(classroom)
        origin.serve()


def prepare(classroom: Sequence[tuple[str, str, int | None]]) -> None:
    """The imports, and what else is the same for all forks, as items of the ``classroom``."""
    import gc
    import warnings

    from semalign.pipeline.notebooks import leave_the_user_out

    leave_the_user_out(Path(os.environ[ADDRESS]).parent)
    warnings.filterwarnings("ignore", message="IProgress not found")  # the variable is read when Python starts
    # Both are read when the modules are imported: a kernel ends with its parent, and its figures go to the page.
    os.environ |= {"JPY_PARENT_PID": str(os.getpid()), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a debugger that nobody attached warns of Python's own modules
    gc.disable()  # nothing of what is imported goes
    for name in IMPORTS:
        importlib.import_module(name)
    from semalign.benchmarks import BENCHMARKS
    from semalign.study import trials

    # All modules as syntax trees: each fork would read them, and walk through them at every collection.
    trials.own_code("", tuple(BENCHMARKS))
    if classroom:
        from semalign.classroom import corpora

        for subject, split, first in classroom:
            if corpora.has(subject, split):
                corpora.items(subject, split, first)
    gc.freeze()  # what forks share stays shared: a collection would write into every page of it
    gc.enable()


if __name__ == "__main__":
    try:
        ended = ask(sys.argv[1:])
    except RuntimeError as error:
        sys.exit(f"semalign: {error}")
    if ended is None:
        os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
    if ended < 0:  # by a signal, and so does this: it says more than a number
        with suppress(OSError):  # of SIGKILL nobody can change what it does
            signal.signal(-ended, signal.SIG_DFL)
        os.kill(os.getpid(), -ended)
    sys.exit(ended)
