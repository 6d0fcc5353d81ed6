"""The judge apart: tests run in a process of their own, the program in a box of its own, and plain values cross.

What the program can do is return values. It sees no test, no expected value and no verdict, and an object of its own
class, however it compares, does not cross. What remains is a limit of the benchmark: a program that recognises a call
and returns the value that it knows to be expected. Where a test itself gives its function something that is not plain,
or where the task is listed because its reference solution returns such a thing, tests and program share a process as
in :func:`run_programs`, which a program that means to can deceive; ``Outcome.judged`` says ``inside``.

Both sides are isolated from the machine where a tool for that works. The level ``rlimits`` guards the machine against
accidents, not against intent: it is for programs that our own models wrote.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import secrets
import select
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from semalign.benchmarks import sandbox
from semalign.benchmarks.sandbox import NOT_STARTED, Outcome, SandboxError
from semalign.benchmarks.sandbox.plain import pack, unpack

_TESTER = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("plain.py", "tester.py"))
CANNOT_CROSS = "cannot cross"


@dataclass(frozen=True)
class Task:
    """One program and what judges it.

    ``solution``: what a model wrote; ``head``: what the tests need of the question, such as its helper functions;
    ``tests``: lines that call functions of the solution by name; ``names``: those of them
    that are called as a built-in function is; ``whole``: solution and tests as one program, for
    where they have to share a process, which ``inside`` says beforehand.
    """

    solution: str
    tests: str
    head: str = ""
    names: tuple[str, ...] = ()
    whole: str = ""
    inside: bool = False


def judge(
    tasks: Sequence[Task], *, timeout_s: float = 5.0, memory_mb: int = 512, workers: int | None = None,
    isolation: str = "rlimits",
) -> list[Outcome]:  # fmt: skip
    """Judge every task, in parallel over the cores; outcomes in the same order. Limits are :func:`run_programs`'.

    Raises:
        SandboxError: the machine offers less isolation, or is not Linux.
        ValueError: an unknown level, or a limit that is not positive.
    """
    workers = workers or len(os.sched_getaffinity(0))
    limits = {"timeout_s": timeout_s, "memory_mb": memory_mb, "workers": workers, "isolation": isolation}
    sandbox.run_programs([], **limits)  # type: ignore[arg-type]  # checks what is asked
    tool = sandbox.active_tool()
    outcomes: list[Outcome] = _judge_all([t for t in tasks if not t.inside], tool, timeout_s, memory_mb, workers)
    apart = iter(outcomes)
    placed = [None if task.inside else next(apart) for task in tasks]
    shared = [i for i, o in enumerate(placed) if o is None or o.reason.startswith(CANNOT_CROSS)]
    again = sandbox.run_programs([tasks[i].whole for i in shared], **limits)  # type: ignore[arg-type]
    for i, outcome in zip(shared, again, strict=True):
        placed[i] = outcome
    return [outcome for outcome in placed if outcome is not None]


def _judge_all(
    tasks: Sequence[Task], tool: str | None, timeout_s: float, memory_mb: int, workers: int
) -> list[Outcome]:
    def opened(number: int, text: str | None = None) -> sandbox._Box:
        return sandbox._open_box(tool, number, text)

    idle: queue.SimpleQueue[tuple[int, list[sandbox._Box], list[sandbox._Box]]] = queue.SimpleQueue()
    for worker in range(workers):
        idle.put((worker, [], []))
    count = itertools.count()
    numbers = itertools.count(workers)  # a user for each box

    def one(task: Task) -> Outcome:
        worker, testers, boxes = idle.get()
        try:
            for _ in range(2):
                testers = testers or [opened(worker, _TESTER)]
                boxes = boxes or [opened(next(numbers))]
                box = boxes.pop()
                if next(count) + workers < len(tasks):  # the next task's box starts while this one is judged
                    boxes.append(opened(next(numbers)))
                outcome = _judge(task, testers[0], box, timeout_s, memory_mb)
                if outcome.reason != NOT_STARTED:
                    return outcome
                sandbox._close_box(testers.pop(), at_once=True)
            raise SandboxError(sandbox.cannot_start(tool))
        finally:
            idle.put((worker, testers, boxes))

    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(one, tasks))
        finally:
            pool.shutdown(cancel_futures=True)
            while not idle.empty():
                for left in itertools.chain(*idle.get()[1:]):
                    sandbox._close_box(left, at_once=True)


def _judge(task: Task, tester: sandbox._Box, box: sandbox._Box, timeout_s: float, memory_mb: int) -> Outcome:
    """Judge one task in a box that no program has used, and end the box."""
    try:
        solution = task.solution.encode("utf-8", "surrogatepass")
        limits = sandbox._limits(timeout_s, memory_mb, box.tool)
        job = pack((secrets.token_bytes(16), limits, solution, task.head, task.tests, task.names, float(timeout_s)))
    except ValueError as error:
        sandbox._close_box(box, at_once=True)
        return Outcome(False, f"stopped: {error}", 0.0, judged="apart")
    calls, asked = socket.socketpair()
    verdict, judged = socket.socketpair()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    started = time.monotonic()
    try:
        with calls, asked, judged, contextlib.suppress(OSError):
            socket.send_fds(box.control, [b"c"], [asked.fileno(), nowhere])
            socket.send_fds(tester.control, [b"t"], [calls.fileno(), judged.fileno()])
        os.close(nowhere)
        text = b""
        with verdict:
            with contextlib.suppress(OSError):
                verdict.sendall(len(job).to_bytes(4, "big") + job)
            poll = select.poll()
            poll.register(verdict, select.POLLIN)
            until = started + sandbox.START_S + timeout_s + 1
            while (left := until - time.monotonic()) > 0 and poll.poll(left * 1000):
                with contextlib.suppress(OSError):
                    part = verdict.recv(4096)
                    text += part
                    if part:
                        continue
                break
    finally:
        sandbox._close_box(box, at_once=True)
    if len(text) < 5:  # ended by its clock
        seconds = time.monotonic() - started
        reason = "timed out" if seconds >= timeout_s else "ended early"
        reason = NOT_STARTED if tester.process.poll() is not None else reason
        return Outcome(False, reason, min(seconds, timeout_s), judged="apart")
    reason, seconds = unpack(text[4:])
    return Outcome(reason == "passed", reason, seconds, judged="apart")
