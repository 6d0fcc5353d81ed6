"""The judge apart: right programs pass, no program decides its own verdict, harms, outlasts its limit or stays."""

# ruff: noqa: E501 - one program a line
from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_sandbox import HOSTILE, LASTING, TOOLS, _left, _processes, _works, outcomes_of

from semalign.benchmarks import sandbox
from semalign.benchmarks.answers import judged
from semalign.benchmarks.data import load_items
from semalign.benchmarks.sandbox import SandboxError, judging
from semalign.benchmarks.sandbox.judging import Task, judge
from semalign.benchmarks.sandbox.plain import DEPTH, pack, unpack

TESTS = "assert f(1) == 2\nassert f([2]) == [3]\nassert isinstance(f('a'), str)\nassert abs(f(1.5) - 2.5) < 1e-6"
RIGHT = """
def f(x):
    if isinstance(x, list): return [f(y) for y in x]
    return x + 'b' if isinstance(x, str) else x + 1
"""
EQUAL = "class E:\n def __eq__(self, o): return True\n __ne__ = __lt__ = __gt__ = __abs__ = __sub__ = __rsub__ = lambda s, *o: s\n def __bool__(self): return True\n __hash__ = None\n"
TIMEOUT = 1.0

CHEATS = {
    "equals everything": EQUAL + "def f(x): return E()",
    "a class that equals everything": "class M(type):\n def __eq__(s, o): return True\n def __instancecheck__(s, o): return True\n __hash__ = type.__hash__\nclass E(metaclass=M): pass\ndef f(x): return E",
    "a str that equals everything": "class S(str):\n def __eq__(s, o): return True\n __hash__ = str.__hash__\ndef f(x): return S('x')",
    "an int that equals everything": "class I(int):\n def __eq__(s, o): return True\n def __sub__(s, o): return 0\n __hash__ = int.__hash__\ndef f(x): return I(7)",
    "a float that equals everything": "class F(float):\n def __eq__(s, o): return True\n def __sub__(s, o): return 0.0\n __hash__ = float.__hash__\ndef f(x): return F('nan')",
    "a list that equals everything": "class L(list):\n def __eq__(s, o): return True\n def __iter__(s): raise SystemExit(0)\ndef f(x): return L()",
    "a dict with lying items": "class D(dict):\n def items(s): raise SystemExit(0)\n def __eq__(s, o): return True\ndef f(x): return D()",
    "a list of equals": EQUAL + "def f(x): return [E()]",
    "a set of equals": "class E:\n def __eq__(s, o): return True\n def __hash__(s): return 1\ndef f(x): return {E()}",
    "nan": "def f(x): return float('nan')",
    "inf": "def f(x): return float('inf')",
    "replaces builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = int\ndef f(x): return 0",
    "replaces math.isclose": "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0",
    "exits well": "import os\ndef f(x): os._exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "raises AssertionError": "def f(x): raise AssertionError",
    "raises an exception of its own": "class Passed(Exception): pass\ndef f(x): raise Passed('passed')",
    "raises a lying name": "class CannotCross(BaseException): pass\ndef f(x): raise CannotCross('cannot cross')",
    "raises what has an endless text": "class E(Exception):\n def __str__(s):\n  while True: pass\ndef f(x): raise E",
    "raises what exits": "class E(Exception):\n def __str__(s): import os; os._exit(0)\ndef f(x): raise E",
    "returns a function": "def f(x): return f",
    "returns a generator": "def f(x): yield 2",
    "returns itself for ever": "x = []\nx.append(x)\ndef f(y): return x",
    "returns a wide tree": "x = [0]\nfor _ in range(50): x = [x, x]\ndef f(y): return x",
    "returns too much": "def f(x): return 'x' * (64 << 20)",
    "returns a huge number": "def f(x): return 1 << (1 << 26)",
    "returns many collisions": "def f(x): return {i * (2 ** 61 - 1) for i in range(60000)}",
    "looks for the tests in frames": "import sys\ndef f(x):\n frame = sys._getframe()\n while frame:\n  for v in frame.f_locals.values():\n   if isinstance(v, str) and 'assert' in v: return eval(v)\n  frame = frame.f_back\n return 0",
    "changes its caller": "import sys\ndef f(x):\n sys._getframe(1).f_locals['say'] = print\n return 0",
    "says a verdict": "import os\nfor d in range(3, 20):\n try: os.write(d, b'\\0\\0\\0\\x20[\"passed\", 1.0]' * 9)\n except OSError: pass\ndef f(x): return 0",
    "answers before it is asked": "import json, os\nfor d in range(3, 20):\n try:\n  m = json.dumps({'tuple': ['value', {'int': '0x0'}, '']}).encode()\n  os.write(d, (len(m).to_bytes(4, 'big') + m) * 9)\n except OSError: pass\ndef f(x): return 0",
    "answers with no text": "import os\ndef f(x):\n for d in range(3, 20):\n  try: os.write(d, b'\\0\\0\\0\\1{')\n  except OSError: pass",
    "answers without an end": "import os\ndef f(x):\n while True:\n  for d in range(3, 20):\n   try: os.write(d, b'\\0\\x3f\\xff\\xff' + b'[' * 4000)\n   except OSError: pass",
    "answers with a deep text": "import os\ndef f(x):\n m = b'[' * 100000 + b']' * 100000\n for d in range(3, 20):\n  try: os.write(d, len(m).to_bytes(4, 'big') + m)\n  except OSError: pass",
    "answers with a great size": "import os\ndef f(x):\n for d in range(3, 20):\n  try: os.write(d, b'\\xff' * 9)\n  except OSError: pass",
    "answers with a code object": "import json, os\ndef f(x):\n for d in range(3, 20):\n  try:\n   m = json.dumps({'tuple': ['value', {'__import__': ['os']}, '']}).encode()\n   os.write(d, len(m).to_bytes(4, 'big') + m)\n  except OSError: pass",
    "closes its socket": "import os\nos.closerange(3, 64)\ndef f(x): return 2",
    "sleeps": "import time\ndef f(x): time.sleep(60)",
    "loops": "def f(x):\n while True: pass",
    "loops at once": "while True: pass",
    "catches everything and loops": "def f(x):\n while True:\n  try:\n   while True: pass\n  except BaseException: pass",
    "takes all memory": "def f(x):\n y = []\n while True: y.append(bytearray(10 ** 7))",
    "forks": "import os\ndef f(x):\n if os.fork() == 0:\n  while True: pass",
    "leaves a session": "import os\ntry: os.setsid()\nexcept OSError: pass\nif os.fork() == 0:\n os.setsid()\n while True: pass\ndef f(x): return 0",
    "kills all": "import os\ndef f(x): os.kill(-1, 9)",
    "kills its server": "import os\ndef f(x): os.kill(1, 9); os.kill(os.getppid(), 9)",
    "writes into its server": "import os\ndef f(x):\n for p in (1, os.getppid()): open(f'/proc/{p}/mem', 'wb')",
    "a thread that outlives": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef f(x): return 0",
    "unclosed string": 'def f(x): return 2\ny = """',
    "no function": "",
    "a function that is a class": "class f(int): pass",
    "changes json": "import json\njson.dumps = lambda *a, **k: 'true'\njson.loads = lambda *a, **k: ['f', [1], {}]\ndef f(x): return 0",
    "a lone surrogate": "def f(x): return '\\ud800'",
}  # fmt: skip


LASTING_CHEATS = {
    "raises what has an endless text", "returns a wide tree", "returns many collisions", "loops", "loops at once",
    "catches everything and loops",
}  # fmt: skip
"""Those that use a core until they are stopped."""


def run(tool: str | None, programs: list[str], timeout: float) -> list[sandbox.Outcome]:
    return judging._judge_all([Task(p, TESTS) for p in programs], tool, timeout, 256, 2)


def cheats_of(tool: str | None) -> dict[str, sandbox.Outcome]:
    """What becomes of the cheats, and of one that is right, by name."""
    return outcomes_of({**CHEATS, "right": RIGHT}, LASTING_CHEATS, TIMEOUT, partial(run, tool))


@pytest.mark.parametrize("tool", TOOLS)
def test_no_program_decides_its_own_verdict(tool: str | None, scratch: Path) -> None:
    others = _processes()
    started = time.monotonic()
    outcomes = cheats_of(tool)
    assert [n for n, o in outcomes.items() if o.passed] == ["right"] and set(outcomes) == {*CHEATS, "right"}
    assert all(o.judged == "apart" and o.seconds <= TIMEOUT + 1 for o in outcomes.values()), outcomes
    assert time.monotonic() - started < len(outcomes) * (TIMEOUT + 1)
    assert not _left(others)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("tool", TOOLS)
def test_hostile_programs_do_not_harm(tool: str | None, tmp_path: Path) -> None:
    canary = tmp_path / "outside" / "canary.txt"
    canary.parent.mkdir()
    canary.write_text("the canary sings")
    places = {"{canary}": str(canary), "{folder}": str(canary.parent), "{home}": str(Path.home())}
    programs = dict(HOSTILE)
    for key, value in places.items():
        programs = {name: program.replace(key, value) for name, program in programs.items()}
    others = _processes()
    outcomes = outcomes_of(programs, LASTING, 0.5, partial(run, tool))
    assert set(outcomes) == set(HOSTILE) and not [n for n, o in outcomes.items() if o.passed]
    assert (
        all(o.seconds <= 1.5 for o in outcomes.values())
        and canary.read_text() == "the canary sings"
        and not _left(others)
    )


AS_USER = """
import os, sys
from test_judging import cheats_of
assert os.geteuid() == 1000, os.geteuid()
for tool in sys.argv[1:]:
    print(tool, [n for n, o in cheats_of(tool).items() if o.passed])
"""


def test_no_program_of_an_ordinary_user_decides_its_own_verdict() -> None:
    if os.geteuid() != 0:
        pytest.skip("this is the ordinary user")
    tools = [tool for tool in ("bubblewrap", "unshare") if _works(tool)]
    if not tools:
        pytest.skip("neither bubblewrap nor unshare works here")
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", AS_USER, *tools]
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True)
    assert ran.stdout.splitlines() == [f"{tool} ['right']" for tool in tools], ran.stdout + ran.stderr


def test_one_program_does_not_decide_the_next() -> None:
    spoiler = "import builtins, sys\nbuiltins.len = builtins.abs = lambda x: 0\nsys.modules['math'] = None\nopen('left', 'w').write('x')\n"
    clean = "import math, os\nassert os.listdir('.') == []\n" + RIGHT
    outcomes = judge([Task(p, TESTS) for p in [spoiler + RIGHT, clean] * 3], workers=1)
    if sandbox.active_tool():
        assert [o.passed for o in outcomes[1::2]] == [True] * 3, outcomes


def test_what_raised_is_told() -> None:
    tests = (
        "try:\n    f(0)\nexcept ZeroDivisionError as error:\n    assert 'zero' in str(error)\nelse:\n    assert False\n"
    )
    outcomes = judge(
        [Task("def f(x): return 1 / x", tests), Task("def f(x): return x", tests), Task(RIGHT, "assert f(1) == 3")]
    )
    assert [o.passed for o in outcomes] == [True, False, False]
    assert outcomes[2].reason.startswith("stopped: AssertionError")


def test_a_task_whose_test_gives_a_function_is_judged_inside() -> None:
    solution, tests = "def f(g, x): return g(x)", "assert f(lambda x: x + 1, 1) == 2"
    (outcome,) = judge([Task(solution, tests, whole=f"{solution}\n{tests}")])
    assert outcome.passed and outcome.judged == "inside"
    (outcome,) = judge([Task(RIGHT, "assert f(1) == 2", whole=f"{RIGHT}\nassert f(1) == 2", inside=True)])
    assert outcome.passed and outcome.judged == "inside"


def test_less_isolation_than_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "active_tool", lambda: None)
    with pytest.raises(SandboxError, match="install bubblewrap"):
        judge([Task(RIGHT, TESTS)], isolation="namespace")
    assert judge([Task(RIGHT, TESTS)])[0].passed and judge([]) == []


PLAIN: list[Any] = [
    None, True, 0, -(1 << 5000), 1.5, math.inf, -0.0, 1 + 2j, "ä\ud800\0", b"\0\xff", bytearray(b"x"), [], [[1, (2,)]],
    (), {1, "a", (2, b"")}, frozenset({1}), {(1, 2): {"a": [None]}, True: 1.0},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN)
def test_plain_values_cross_as_they_are(value: Any) -> None:
    crossed = unpack(pack(value))
    assert crossed == value and type(crossed) is type(value)
    if not isinstance(value, set | frozenset):  # whose order is nobody's to keep
        assert repr(crossed) == repr(value)


def test_other_values_do_not_cross() -> None:
    assert math.isnan(unpack(pack(math.nan)))
    deep: list[Any] = []
    for _ in range(DEPTH + 1):
        deep = [deep]
    for bad in (len, object(), int, (x for x in ()), [map(int, "1")], {"a": lambda: 0}, range(3)):
        with pytest.raises(TypeError, match="cannot cross"):
            pack(bad)
    for bad in (deep, "x" * (5 << 20)):
        with pytest.raises(ValueError, match="cannot cross"):
            pack(bad)
    for text in (
        b"",
        b"[",
        b"[1]",
        b"1",
        b'{"eval": "1"}',
        b'{"int": 3}',
        b'{"int": "0x1", "float": "0x1"}',
        b'{"set": [{"list": []}]}',
        b"{}",
    ):
        with pytest.raises((ValueError, TypeError, KeyError)):
            unpack(text)


def test_canonical_solutions_of_humaneval_all_pass_apart() -> None:
    items = load_items("humaneval", "hub")
    outcomes = judge([judged("humaneval", item, item["canonical_solution"]) for item in items], timeout_s=20)
    assert [i["id"] for i, o in zip(items, outcomes, strict=True) if not o.passed] == []
    assert {o.judged for o in outcomes} == {"apart"}
