"""The first process of a sandbox: it loads common modules once and forks a process a program.

That process calls nothing but C functions held in local variables once the program has run: a Python function could
have been replaced by the program, and would then run at the driver's own stack depth. The text of this file is given to
the interpreter on its command line, because a sandbox sees nothing of this package; it imports nothing of it either.
"""

# ruff: noqa: F401, I001 - what programs mostly import is loaded before they are there
# mypy: disable-error-code="import-not-found, attr-defined"
import _functools, _socket, _thread, posix, resource, sys, time  # noqa: E401
import bisect, collections, copy, datetime, functools, heapq, itertools, math, random, re, string, typing  # noqa: E401

EVENTS = frozenset((
    "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.killpg",
    "subprocess.Popen", "pty.spawn", "signal.pthread_kill", "gc.get_objects", "gc.get_referrers", "gc.get_referents",
    "sys.settrace", "sys.setprofile", "sys._current_frames", "sys.monitoring.register_callback",
    "cpython._PySys_ClearAuditHooks", "sqlite3.enable_load_extension", "sqlite3.load_extension", "sys.remote_exec",
))  # fmt: skip
MODULES = (
    "_posixsubprocess", "_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters",
)  # fmt: skip


if typing.TYPE_CHECKING:  # the text of plain.py stands above this one
    from semalign.benchmarks.sandbox.plain import BYTES, pack, unpack


def prepare(fd: int, uid: int, strict: bool, roots: tuple[str, ...]) -> tuple:
    """Become the user ``uid``, take the limits and the program that come over the socket ``fd``, and set up the guard.

    ``strict``: the guard is all there is, and refuses files outside ``roots``. Returns (take, token, program, guard):
    ``take(size)`` reads exactly so many bytes.
    """
    read, write, leave, threads, sleep = posix.read, posix.write, posix._exit, _thread._count, time.sleep

    def take(size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            parts.append(read(fd, min(size, 1 << 20)) or leave(3))
            size -= len(parts[-1])
        return b"".join(parts)

    _thread.start_new_thread(int, ())  # from its first thread on, a process enters system calls by another path
    while threads():
        sleep(0.0001)
    if uid:
        posix.setgroups([])
        posix.setresgid(uid, uid, uid)
        posix.setresuid(uid, uid, uid)
    token = take(16)
    for pair in take(int.from_bytes(take(8), "big")).split(b","):
        what, value = map(int, pair.split(b":"))
        hard = resource.getrlimit(what)[1]
        value = value if hard == -1 else hard if value == -1 else min(value, hard)
        resource.setrlimit(what, (value, value))
    source = take(int.from_bytes(take(8), "big")).decode("utf-8", "surrogatepass")
    events, modules, starts, text, kind = EVENTS, MODULES, str.startswith, str, type

    def inside(path: object) -> bool:  # a real string without a way up, below a folder that may be read
        return kind(path) is text and ".." not in path and starts(path, roots)  # type: ignore[operator, arg-type]

    def refused(event: str, args: tuple) -> bool:
        if event in events or starts(event, ("ctypes.", "socket.")):
            return True
        if event == "import":
            return args[0] in modules or (args[1] is not None and not inside(args[1]))
        if not strict:
            return False
        if event == "open":
            return not (inside(args[0]) and args[2] & 0o1103 == 0)  # to read, not to create
        if event in ("os.listdir", "os.scandir"):
            return not inside(args[0])
        return starts(event, ("os.", "shutil."))

    def guard(event, args, refused=refused, write=write, leave=leave):  # type: ignore[no-untyped-def]
        try:
            verdict = refused(event, args)
        except BaseException:
            verdict = True
        if verdict:
            write(2, b"\nrefused: " + f"{event} {args[:1]}"[:200].encode())
            leave(4)

    stub = type(sys)("_posixsubprocess")  # lets `import asyncio` work; starting a process does not
    stub.fork_exec = None
    sys.modules['_posixsubprocess'] = stub  # fmt: skip
    return take, token, source, guard


def run(fd: int, uid: int, strict: bool, roots: tuple[str, ...]) -> None:
    """Run the program that comes over the socket ``fd``, as the user ``uid``, and never return from one that fails."""
    read, write, leave, threads, sleep = posix.read, posix.write, posix._exit, _thread._count, time.sleep
    _, token, source, guard = prepare(fd, uid, strict, roots)
    join = "import sys\nt = sys.modules.get('threading')\nt and t._shutdown()"
    sys.addaudithook(guard)
    gate = iter(_functools.partial(read, fd, 1), b"")  # a C iterator: reads at the same stack depth every time
    try:
        write(fd, token)
        for _ in gate:
            exec(source, {})
            exec(join, {})
            while threads():
                sleep(0.005)
            write(fd, token)
    except BaseException as error:
        name = type(error).__name__
        try:  # noqa: SIM105 - contextlib's functions are Python's
            write(2, f"\n{name}: {error}"[:2000].encode("utf-8", "replace"))
        except BaseException:
            pass
        leave(1)


def answer(fd: int, uid: int, strict: bool, roots: tuple[str, ...]) -> None:
    """Run the program that comes over the socket ``fd``, then call its functions as asked and answer in plain values.

    Nothing here has to withstand the program: it can answer what it likes, and nothing else is in its reach.
    """
    take, token, source, guard = prepare(fd, uid, strict, roots)
    namespace: dict[str, typing.Any] = {}

    def say(kind: str, value: object, text: str = "") -> None:
        data = pack((kind, value, text))
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[posix.write(fd, data) :]

    def fail(error: BaseException) -> None:
        say("raised", type(error).__name__, str(error)[:2000])

    hook = sys.addaudithook
    hook(guard)
    posix.write(fd, token)
    take(1)
    try:
        exec(compile(source, "<solution>", "exec"), namespace)
    except BaseException as error:
        fail(error)
        posix._exit(1)
    say("value", None)
    while True:
        size = int.from_bytes(take(4), "big")
        try:
            if size > BYTES:
                posix._exit(1)
            name, args, options = unpack(take(size))
            say("value", namespace[name](*args, **options))
        except BaseException as error:
            fail(error)


def serve(fd: int, uid: int, strict: bool, roots: tuple[str, ...]) -> None:
    """Fork a process for every request that comes over the socket ``fd``, until it closes; then say what is left.

    A request, ``r`` to run a program or ``c`` to call its functions, carries two descriptors: the program's socket, and
    where it prints. The answer is ``same`` where the working folder is empty as before, else ``used``.
    """
    control = _socket.socket(fileno=fd)
    while True:
        asked, passed, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(8))
        if not asked:
            return
        channel, out = memoryview(passed[0][2]).cast("i")
        child = posix.fork()
        if not child:
            control.close()
            if asked == b"r":  # who has functions called ends this box with all its processes, as one group
                posix.setsid()
            posix.dup2(out, 1)
            posix.dup2(out, 2)
            posix.close(out)
            (answer if asked == b"c" else run)(channel, uid, strict, roots)
            posix._exit(5)
        posix.close(channel)
        posix.close(out)
        posix.waitpid(child, 0)
        try:
            if posix.getpid() == 1:  # of its own namespace: all others are what the program left
                posix.kill(-1, 9)
            while True:
                posix.waitpid(-1, 0)
        except (ChildProcessError, ProcessLookupError):
            pass
        control.send(b"used" if posix.listdir(".") else b"same")


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", tuple(sys.argv[4:]))
