"""Tests in a process that no program shares: what they call is asked over a socket, and only plain values come back.

This first process forks a process a task. The text of ``plain.py`` stands above this one on the command line.
"""

# mypy: disable-error-code="import-not-found"
import _socket
import ast
import builtins
import posix
import resource
import signal
import sys
import time
import typing

if typing.TYPE_CHECKING:
    from semalign.benchmarks.sandbox.plain import BYTES, pack, unpack

START_S = 20.0
MEMORY = 1 << 30


class Ended(BaseException):
    """The program's process has ended, or said something that is no answer."""


class CannotCross(BaseException):
    """A test gives its function something that is not plain: this task is not judged here."""


class ProgramError(Exception):
    """An exception of the program's own class."""


def serve(fd: int, uid: int) -> None:
    """Fork a process for each request over the socket ``fd``; it carries the sockets of the box and of the verdict."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = _socket.socket(fileno=fd)
    while True:
        asked, passed, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(8))
        if not asked:
            return
        box, verdict = memoryview(passed[0][2]).cast("i")
        if not posix.fork():
            control.close()
            if uid:
                posix.setgroups([])
                posix.setresgid(uid, uid, uid)
                posix.setresuid(uid, uid, uid)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            test(box, verdict)
            posix._exit(0)
        posix.close(box)
        posix.close(verdict)


def test(box: int, verdict: int) -> None:
    """Judge the task (token, limits, solution, head, tests, names, seconds), and write (reason, seconds) as verdict."""
    token, limits, solution, head, tests, names, seconds = unpack(received(verdict))
    signal.setitimer(signal.ITIMER_REAL, START_S)  # its signal ends this process, whatever it does
    try:
        sent(box, token + b"".join(len(part).to_bytes(8, "big") + part for part in (limits, solution)))
        if taken(box, 16) != token:
            raise Ended
    except (Ended, OSError):
        sent(verdict, framed(("the sandbox did not start", 0.0)))
        return
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        sent(box, b"g")
        answered(box)  # the solution has been run
        namespace: dict[str, typing.Any] = {}
        exec(compile(head, "<head>", "exec"), namespace)
        namespace |= {name: asked(box, name) for name in (*names, *missing(tests, namespace))}
        exec(compile(tests, "<tests>", "exec"), namespace)
        reason = "passed"
    except (Ended, OSError):
        reason = "ended early"
    except CannotCross as error:
        reason = f"cannot cross: {error}"
    except BaseException as error:
        name = error.args[0] if isinstance(error, ProgramError) else f"{type(error).__name__}: {error}"
        reason = f"stopped: {name}"[:200]
    sent(verdict, framed((reason, time.monotonic() - started)))


def missing(tests: str, namespace: dict[str, typing.Any]) -> set[str]:
    """The names that tests take from the program; of the standard library's modules they get those themselves."""
    tree = ast.parse(tests)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins)) | set(namespace)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).split(".")[0])
    read = {node.id for node in names} - made
    whole = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for name in read & whole & set(sys.stdlib_module_names):
        namespace[name] = __import__(name)
    return read - set(namespace)


def asked(box: int, name: str) -> typing.Callable[..., typing.Any]:
    """A function that has the program's function of this name called."""

    def call(*args: typing.Any, **options: typing.Any) -> typing.Any:
        try:
            question = framed((name, args, options))
        except (TypeError, ValueError) as error:
            raise CannotCross(str(error)) from None
        sent(box, question)
        return answered(box)

    return call


def answered(box: int) -> typing.Any:
    """The value of the program's answer; raises what the program raised, where that is a built-in exception."""
    try:
        kind, value, text = unpack(received(box))
        if kind == "value":
            return value
        name, text = str(value), str(text)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError):
        raise Ended from None
    error = getattr(builtins, name, None)
    if (
        isinstance(error, type)
        and issubclass(error, Exception)
        and error not in (UnicodeDecodeError, UnicodeEncodeError)
    ):
        raise error(text)
    raise ProgramError(f"{name}: {text}")


def framed(value: typing.Any) -> bytes:
    """A message: four bytes of length, then a plain value."""
    data = pack(value)
    return len(data).to_bytes(4, "big") + data


def received(fd: int) -> bytes:
    """The text of one message."""
    size = int.from_bytes(taken(fd, 4), "big")
    if size > BYTES:
        raise Ended
    return taken(fd, size)


def taken(fd: int, size: int) -> bytes:
    """Exactly so many bytes."""
    parts = []
    while size:
        part = posix.read(fd, min(size, 1 << 20))
        if not part:
            raise Ended
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def sent(fd: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[posix.write(fd, data) :]


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
