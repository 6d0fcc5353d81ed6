"""How much the chapters train beside the tables of the benchmarks, counted from a profile alone.

A test holds the counts against the trials that a whole run left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from semalign.profiles import Profile


@dataclass(frozen=True)
class Work:
    """So many trainings on one task, each on ``examples`` that are read ``reads`` times in all, in an epoch once each.

    ``answers``: afterwards the questions of the test are answered. ``teacher``: the model is a teacher.
    Without examples nothing trains, and the model only answers.
    """

    task: str
    trainings: int
    examples: int = 0
    reads: float = 0.0
    answers: bool = False
    teacher: bool = False


DECISIVE = ("sft", "sft_layer", "semalign_tuned", "twin", "scrambled_tokens")
"""The methods that the chapter on students trains whatever the profile's are."""
MOST = 500
"""At most so many of the map's training examples have the chapters that go on from it."""


def most_examples(p: Profile) -> int:
    """How many training examples the chapters that go on from the map have: its largest number, or :data:`MOST`."""
    return min(MOST, max(p.regimes.examples))


def step_size(p: Profile, examples: int) -> int:
    """Examples of a step of the map of regimes: of few those that the profile trains on, four at most, of many more."""
    return min(4, p.batch_size) if examples <= 128 else 2 ** math.ceil(math.log2(examples / 32))


def in_steps(p: Profile, examples: int, steps: float) -> float:
    """Examples that so many steps of the map of regimes read, in two epochs or more."""
    return max(2.0 * examples, steps * step_size(p, examples))


def _alignment(p: Profile, depth: int) -> list[Work]:
    return [Work(p.tasks[0], 4 * len(p.seeds), p.sizes.train, p.epochs * p.sizes.train)]


def _gates(p: Profile, depth: int) -> list[Work]:
    return [Work(p.tasks[0], 1 + len(p.seeds), p.sizes.train, 2 * p.epochs * p.sizes.train)]


def _fine_tuned(p: Profile, depth: int) -> list[Work]:
    fine, reads = len(p.fine_tuned_teachers), p.epochs * p.sizes.train
    students = [Work(t, fine * len(p.seeds), p.sizes.train, reads, answers=True) for t in p.code_tasks]
    return [*students, *(Work(t, fine, answers=True, teacher=True) for t in p.code_tasks)]


def _ways_of_asking(p: Profile, depth: int) -> list[Work]:
    # The classroom's questions are asked in two ways; neither teacher nor student trains.
    ways = 2 if p.data == "classroom" else 1
    return [Work("mmlu", ways, answers=True, teacher=who) for who in (True, False) if "mmlu" in p.tasks]


def _reach(p: Profile, depth: int) -> list[Work]:
    # Ten answers to each of twenty questions, which are about as many as the test has.
    return [Work("humaneval", 1, answers=True, teacher=who) for who in (True, False) if "humaneval" in p.tasks]


def _similarity(p: Profile, depth: int) -> list[Work]:
    return [Work(p.tasks[0], 3, p.sizes.train, p.epochs * p.sizes.train)]


def _ablations(p: Profile, depth: int) -> list[Work]:
    n = p.searched.sizes.train
    counts = [c for c in (50, 100, 250, 500, 1000) if c <= 2 * n] or [n]
    # What is changed but layers, at most five partners, and the layers beside the chosen one.
    varied = 32 + 5 + depth - 1
    return [Work(p.tasks[0], *one) for one in ((varied, n, p.epochs * n), *((3, c, p.epochs * c) for c in counts))]


def _controls(p: Profile, depth: int) -> list[Work]:
    n = p.searched.sizes.train
    students = Work(p.tasks[0], 18 + 4 * bool(p.smaller_student), n, p.epochs * n)
    return [students, Work(p.tasks[0], 1, n, p.epochs * n, teacher=True)]


def _students(p: Profile, depth: int) -> list[Work]:
    decisive, contest = ({*p.seeds, *seeds} for seeds in (p.decisive_seeds, p.contest_seeds))
    rest = [m for m in p.methods if m not in (*DECISIVE, "none")]
    students = len(p.students)
    wanted = len(DECISIVE) * len(decisive) * students + len(rest) * len(contest) * students
    done = sum(m != "none" for m in p.methods) * len(p.seeds)  # by the tables
    reads = p.epochs * p.sizes.train
    return [Work(t, wanted - done, p.sizes.train, reads, answers=True) for t in p.tasks]


def _rivals(p: Profile, depth: int) -> list[Work]:
    return [Work(p.tasks[0], 3, p.sizes.train, p.epochs * p.sizes.train)]


def _regimes(p: Profile, depth: int) -> list[Work]:
    kinds, students = 1 + bool(p.kin_teachers), len(p.students)
    cells = students * (2 + 5 * kinds)  # labels ask no teacher, and so none of a kind
    return [
        Work(t, cells, n, in_steps(p, n, p.regimes.steps), answers=True)
        for t, counts in p.regimes.counts.items()
        for n in counts
    ]


def _search(p: Profile, depth: int) -> list[Work]:
    n, seeds = p.searched.sizes.train, len(p.seeds)
    reads = p.epochs * n
    tried = [Work(t, 3 * p.search.draws * min(2, seeds), n, reads) for t in p.search.tasks]
    chosen = [Work(t, 6 * seeds, n, reads, answers=True) for t in p.search.tasks]
    return [*tried, *chosen, *(Work(t, 1, answers=True, teacher=True) for t in p.search.tasks)]


def _below(p: Profile, depth: int) -> list[Work]:
    drawn = max(1, min(3, p.search.draws // 4))
    trainings = (5 * drawn if drawn > 1 else 0) + 7 * min(3, p.search.draws) * len(p.students)
    examples = min(64, p.sizes.train)
    reads = in_steps(p, examples, min(32, p.regimes.steps))
    return [Work(t, trainings, examples, reads) for t in p.search.tasks]


def _causal(p: Profile, depth: int) -> list[Work]:
    n = min(32, max(p.regimes.examples))
    trainings, reads = 6 * min(2, len(p.seeds)) * len(p.students), in_steps(p, n, min(120, p.regimes.steps))
    return [Work(t, trainings, n, reads, answers=True) for t in p.regimes.tasks]


def _lenses(p: Profile, depth: int) -> list[Work]:
    students, n = len(p.students), most_examples(p)
    reads = in_steps(p, n, p.regimes.steps / 2)
    of_states = students * (7 + 2 * bool(p.kin_teachers))
    return [
        work
        for t in p.regimes.tasks
        for work in (Work(t, 8 * students, n, reads, answers=True), Work(t, of_states, n, reads))
    ]


def _gaps(p: Profile, depth: int) -> list[Work]:
    students, n = len(p.students), most_examples(p)
    saturated = bool(p.smaller_student) and getattr(p.smaller_student, "id", "").startswith("pico")
    others = bool(p.smaller_student) + saturated  # rungs of a smaller student
    rungs = students * (1 + len(p.fine_tuned_teachers) + bool(p.kin_teachers)) + others
    alone = (students + others) * (1 + p.search.whole_layers)
    reads = in_steps(p, n, p.regimes.steps)
    return [Work(t, 2 * rungs + alone, n, reads, answers=True) for t in p.regimes.tasks]


def _version_two(p: Profile, depth: int) -> list[Work]:
    n = min(32, max(p.regimes.examples))
    trainings = 11 * min(2, len(p.seeds)) * len(p.students)
    reads = depth * in_steps(p, n, min(16, p.regimes.steps))  # every layer is a stage
    return [Work(t, trainings, n, reads) for t in p.regimes.tasks]


WORK: dict[str, Callable[[Profile, int], list[Work]]] = {
    "04_alignment": _alignment,
    "04b_gates": _gates,
    "05_mmlu": _ways_of_asking,
    "07_humaneval": _reach,
    "09_fine_tuned_teachers": _fine_tuned,
    "10_similarity": _similarity,
    "11_ablations": _ablations,
    "12_controls": _controls,
    "12b_students": _students,
    "13_rivals": _rivals,
    "13b_regimes": _regimes,
    "14_search": _search,
    "16_below_the_layer": _below,
    "17_causal": _causal,
    "18_pairing_from_outputs": _lenses,
    "19_larger_gaps": _gaps,
    "20_version_two": _version_two,
}
"""What each chapter trains, by the profile and the student's number of layers."""


def beside_tables(p: Profile, depth: int, chapters: Iterable[str]) -> dict[str, list[Work]]:
    """What the chapters train that are no table of a benchmark; ``depth`` is the student's number of layers."""
    return {name: WORK[name](p, depth) for name in chapters if name in WORK}
