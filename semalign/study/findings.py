"""What a chapter found, in one sentence: from the numbers that it saved, and from nothing else.

The book puts it under the chapter's title, for the kept full run and for the run that made the page. A number that a
profile does not have leaves its part of the sentence out, and the whole sentence where it was about nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from semalign.report import entry

T = TypeVar("T")
Metrics = Mapping[str, Any]
"""What a chapter hands to :func:`semalign.report.save_metrics`."""


CALLED = "called"
"""Beside a chapter's metrics: what to call each task's data."""


class _Absent(Exception):
    """A number that the sentence is about is not among the metrics."""


def finding(chapter: str, metrics: Metrics, called: Mapping[str, str] | None = None) -> str:
    """The sentence of a chapter, such as ``"01_semantics"``; empty where it has none, or not the numbers for it.

    A task has the name that it is ``called`` by, where one is given.
    """
    if chapter not in FINDINGS:
        return ""
    try:
        return FINDINGS[chapter]({**metrics, CALLED: called or {}})
    except _Absent:
        return ""


def models_and_data(metrics: Metrics) -> str:
    """Chapter 00: how much smaller the student is."""
    teacher, student = ("pair", "teacher"), ("pair", "student")
    count = {who[1]: int(_number(metrics, *who, "parameters")) for who in (teacher, student)}
    shape = [int(_number(metrics, *who, what)) for what in ("layers", "width") for who in (student, teacher)]
    vocabulary = int(_number(metrics, *student, "vocabulary"))
    share = 100 * count["student"] / count["teacher"]
    return (
        f"The student has {share:.0f} % of the teacher's parameters ({count['student']:,} of {count['teacher']:,}), "
        f"{shape[0]} layers against {shape[1]} and a width of {shape[2]} against {shape[3]}; what they share is a "
        f"vocabulary of {vocabulary:,} tokens."
    )


def semantics(metrics: Metrics) -> str:
    """Chapter 01: the paper's bases against random ones."""
    bases, chance = (
        _number(metrics, "cosine_over_layers", kind, "mean") for kind in ("output side", "random")
    )  # fmt: skip
    word = "better" if chance > bases else "worse" if chance < bases else "as well"
    worst = _part(lambda: _number(metrics, "worst_self_transfer"))
    own = "" if worst is None else f" From a model to itself the paper's map keeps {worst:.3f} at worst."
    return (
        f"Recomposed from random bases a hidden state keeps a cosine of {chance:.3f} with itself, a mean over layers; "
        f"from the paper's output-side bases {bases:.3f}. Random bases do {word}.{own}"
    )


def importance(metrics: Metrics) -> str:
    """Chapter 02: how many layers one sentence of the paper names."""
    distinct, layers = (int(_number(metrics, name)) for name in ("distinct_choices", "n_teacher"))
    chosen, readings = int(_number(metrics, "critical_layer")), len(_mapping(metrics, "scores"))
    return (
        f"{readings} readings of the paper's sentence name {_count(distinct, 'layer')} of {layers} as the critical "
        f"one; the reading that this book goes on with names layer {chosen}."
    )


def pairing(metrics: Metrics) -> str:
    """Chapter 03: which pair is trained, and what the rule never reads."""
    layers, critical = (int(_number(metrics, name)) for name in ("n_teacher", "critical_layer"))
    teacher, student = _list(metrics, "pair")
    unread = layers - len(set(_list(metrics, "depths")))
    same = "which is the critical one" if teacher == critical else f"though layer {critical} is the critical one"
    return (
        f"Student layer {student} is trained towards teacher layer {teacher}, {same}; the depth rule never reads "
        f"{unread} of the teacher's {layers} layers."
    )


def alignment(metrics: Metrics) -> str:
    """Chapter 04: nearer to the target, and what it is worth."""
    rise = _rise(metrics, "semalign")
    random = _part(lambda: _rise(metrics, "random map"))
    beside = "" if random is None else f", a random map towards its own by {random:+.3f}"
    worth = _points(metrics, "against_sft_same_layer", "semalign")
    return (
        f"Training brings the layer nearer to its target by a cosine of {rise:+.3f}{beside}. In answer tokens that are "
        f"predicted right SemAlign differs from labels in the same layer by {worth}."
    )


def instrument(metrics: Metrics) -> str:
    """Chapter 04b: how many gates are passed."""
    gates = _mapping(metrics, "gates")
    failed = [name for name, gate in gates.items() if not _at(gate, "passed")]
    gain = _part(lambda: _number(gates, "positive control", "value"))
    said = "" if gain is None else f" Labels in all layers gain {100 * gain:+.1f} points on the task that decides."
    which = f" (not: {', '.join(failed)})" if failed else ""
    return f"{len(gates) - len(failed)} of {len(gates)} gates are passed{which}.{said}"


def facts(metrics: Metrics) -> str:
    """Chapter 05: do the facts of the teacher alone arrive?"""
    kinds = {"teacher": "only the teacher had read", "none": "nobody had read"}
    parts = [
        f"of facts that {said} by {_points(metrics, 'arrived', kind, 'semalign')}"
        for kind, said in kinds.items()
        if _has(metrics, "arrived", kind, "semalign")
    ]
    if not parts:
        return _gain(metrics)
    return f"SemAlign moves the share right {' and '.join(parts)}. {_gain(metrics)}"


def word_problems(metrics: Metrics) -> str:
    """Chapter 06: the plan or the arithmetic."""
    shares = {
        who: _number(metrics, "why", who, "another plan") / wrong
        for who in ("none", "semalign")
        if _has(metrics, "why", who, "right") and (wrong := 1 - _number(metrics, "why", who, "right")) > 0
    }
    if len(shares) < 2:
        return _gain(metrics)
    plan = [f"{100 * shares[who]:.0f} %" for who in ("none", "semalign")]
    return f"{_gain(metrics)} Of wrong answers {plan[0]} had another plan before, and {plan[1]} after SemAlign."


def completion(metrics: Metrics) -> str:
    """Chapter 07: why programs fail."""
    form = _part(lambda: [_form(metrics, who) for who in ("none", "semalign")])
    if form is None:
        return _gain(metrics)
    before, after = form
    share = f"{100 * before:.1f} % of the programs failed before, and {100 * after:.1f} % after it"
    return f"{_gain(metrics)} In form {share}."


def from_text(metrics: Metrics) -> str:
    """Chapter 08: how nearly right a wrong program is."""
    held = _part(lambda: [int(_number(metrics, "asserts", "semalign", n)) for n in ("some hold", "fail")])
    if held is None:
        return _gain(metrics)
    some, fail = held
    return f"{_gain(metrics)} Of {fail} programs that fail after SemAlign, {some} satisfy an assert."


def fine_tuned_teachers(metrics: Metrics) -> str:
    """Chapter 09: what a better teacher is worth."""
    tasks = _mapping(metrics, "fine_tuned_over_plain")
    said = [f"{_points(tasks, task)} on {_called(metrics, task)}" for task in tasks]
    if not said:
        raise _Absent
    return (
        "Against the plain teacher, those that were fine-tuned on code change the share that SemAlign's student "
        f"solves by {' and by '.join(said)}."
    )


def similarity(metrics: Metrics) -> str:
    """Chapter 10: how much a pattern says."""
    share = _number(metrics, "share_on_diagonal")
    own = _number(metrics, "summary", "semalign", "largest change")
    least = _number(metrics, "least_change_without_states")
    return (
        f"For {100 * share:.0f} % of the student's layers the most similar teacher layer is the one that the depth "
        f"rule gives. The largest change in the similarity of two layers is {own:.3f} by SemAlign, and {least:.3f} by "
        "training without states, the smaller of two."
    )


def ablations(metrics: Metrics) -> str:
    """Chapter 11: the paper's setting, and how many others add to labels."""
    table = _mapping(metrics, "table")
    paper = _points(table, "paper: as in the paper")
    others = [row for name, row in table.items() if not name.startswith(("no ", "paper:"))]
    above, below = _sides(others)
    return (
        f"Against labels in the same layer the paper's setting differs by {paper} of answer tokens predicted right. Of "
        f"{len(others)} other settings with states {above} lie above these labels and {below} below."
    )


def controls(metrics: Metrics) -> str:
    """Chapter 12: is a change that is known to be there recovered?"""
    names = {
        "the paper's": "the paper's method leaves {:.4f}",
        "residual, logit map": "the layer's whole contribution through the logit map {:.4f}",
        "KL alone": "the teacher's outputs alone {:.4f}",
    }
    before = _number(metrics, "planted", "before")
    said = [
        text.format(_number(metrics, "planted", name)) for name, text in names.items() if _has(metrics, "planted", name)
    ]
    if not said:
        raise _Absent
    return f"Of a planted change that is {before:.4f} nats away, {', '.join(said)}."


def students(metrics: Metrics) -> str:
    """Chapter 12b: taught, and by states."""
    verdicts = _mapping(metrics, "verdicts")
    taught, by_states = (sum(bool(_at(of, word)) for of in verdicts.values()) for word in ("taught", "by states"))
    twin = [f"{_points(metrics, 'differences', f'{task} / twin')} on {_called(metrics, task)}" for task in verdicts]
    return (
        f"SemAlign, tuned, lies above the untouched students on {taught} of {_count(len(verdicts), 'task')}, and owes "
        f"it to the teacher's states on {by_states}. Against its twin without the layer term it makes "
        f"{', '.join(twin)}.{_part(lambda: _contest(metrics)) or ''}"
    )


def _contest(metrics: Metrics) -> str:
    """Of chapter 12b: how many of the methods gain on every task, and which of them the most."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    for key, e in _mapping(metrics, "gains").items():
        of.setdefault(key.partition(" / ")[2], []).append(e)
    everywhere = [m for m, found in of.items() if all(_number(e, "low") > 0 for e in found)]
    mean = {m: sum(_number(e, "mean") for e in found) / len(found) for m, found in of.items()}
    best = max(mean, key=lambda m: mean[m])
    return (
        f" Of {_count(len(of), 'method')} {len(everywhere)} gain on every task, and the most `{best}` does: "
        f"{100 * mean[best]:+.1f} points in the mean over tasks."
    )


def rivals(metrics: Metrics) -> str:
    """Chapter 13: what is in the student that is saved."""
    own, released = (int(_number(metrics, "differing", name)) for name in ("laten", "laten_released"))
    moved = _part(lambda: _number(metrics, "moved"))
    start = "" if moved is None else f" The largest change of a logit by Seeking before its training is {moved:.1e}."
    return (
        f"LaTen as released saves a student in which {_count(released, 'weight')} of the untouched one differ, as "
        f"described one with {own:,}.{start}"
    )


def regimes(metrics: Metrics) -> str:
    """Chapter 13b: in how many cells states add something, and for which teacher."""
    added = _mapping(metrics, "added")
    above, below = _sides(added.values())
    ways = {
        "states first, then labels": "A warm-up by states adds",
        "states and labels, layer k": "In one layer, states beside labels add",
    }
    kinds = {"kin": "{} between kin", "wide": "{} across a width", "kin minus wide": "a difference of {}"}
    means = ""
    for way, begins in ways.items():
        said = [
            words.format(_points(metrics, "overall", f"{way} / {kind}"))
            for kind, words in kinds.items()
            if _has(metrics, "overall", f"{way} / {kind}")
        ]
        means += f" {begins} {', '.join(said)}." if said else ""
    cells = _count(len(added), "cell")
    return f"Of {cells} with states {above} lie above the same without states and {below} below.{means}"


def search(metrics: Metrics) -> str:
    """Chapter 14: does any configuration win?"""
    wins, caused, tasks = (len(_at(metrics, name)) for name in ("wins", "caused_by_states", "leads"))
    leads = [f"{_points(metrics, 'leads_over_tasks', f'best of {family}')}" for family in ("labels", "logits")]
    return (
        f"The best configuration with states beats labels and logits on {wins} of {_count(tasks, 'task')}, by its "
        f"states on {caused}. In answer tokens predicted right it leads labels by {leads[0]} and logits by {leads[1]}."
    )


def below_the_layer(metrics: Metrics) -> str:
    """Chapter 16: heads against the layer, and whether any two heads of the models are alike."""
    parts = [
        f"from {said} by {_points(metrics, 'differences', f'heads / {other}')}"
        for other, said in {"layer": "the whole layer", "labels": "labels alone", "other heads": "other heads'"}.items()
        if _has(metrics, "differences", f"heads / {other}")
    ]
    if not parts:
        raise _Absent
    cosines = _part(lambda: [_number(metrics, "pairing", "heads", of) for of in ("of_partners", "of_all")])
    beside = "" if cosines is None else f" Paired heads have a cosine of {cosines[0]:.3f}, all pairs {cosines[1]:.3f}."
    return f"In answer tokens predicted right, targets for each head differ {', '.join(parts)}.{beside}"


def pairing_from_outputs(metrics: Metrics) -> str:
    """Chapter 18: whom outputs choose, and what their choice is worth."""
    ways = ("lens", "lens, mapped", "swap")
    alike = [
        f"{100 * _number(metrics, 'agreement', way):.0f} % ({way})" for way in ways if _has(metrics, "agreement", way)
    ]
    worth = [f"{_points(metrics, 'against_depth', way)} ({way})" for way in ways if _has(metrics, "against_depth", way)]
    if not alike or not worth:
        raise _Absent
    control = _part(lambda: _points(metrics, "control"))
    between = "" if control is None else f" Between kin the right partners beat the same in reverse by {control}."
    alone = _part(lambda: ", ".join(f"{_points(metrics, 'alone', way)} ({way})" for way in ways))
    states = "" if alone is None else f" By states alone the difference in answer tokens predicted right is {alone}."
    return (
        f"Outputs choose the depth rule's partner for {', '.join(alike)} of student layers. Towards their choice "
        f"SemAlign, tuned, differs from itself with the depth rule by {', '.join(worth)}.{states}{between}"
    )


def larger_gaps(metrics: Metrics) -> str:
    """Chapter 19: what is carried across the largest gap, and whether it shrinks."""
    gains = {way: _points(metrics, "at_largest", way) for way in ("states", "logits", "labels")}
    trend = _part(lambda: _trend(metrics, "states / width"))
    shrinks = "" if trend is None else f" {trend}"
    return (
        f"Across the largest gap, {metrics.get('largest') or 'in width'}, states gain {gains['states']}, logits "
        f"{gains['logits']} and labels alone {gains['labels']}.{shrinks}"
    )


def _trend(metrics: Metrics, what: str) -> str:
    e = _mapping(metrics, "trend", what)
    slope, low, high = (10 * _number(e, name) for name in ("mean", "low", "high"))
    return (
        f"A tenth of the width less changes what states give in answer tokens by {slope:+.0f} % ({low:+.0f} to "
        f"{high:+.0f}) of the student's ceiling."
    )


def causes(metrics: Metrics) -> str:
    """Chapter 17: what the causal term is worth, with the wrong swaps beside it, and whether it is sound."""
    terms = {delta: _number(of, "causal") for delta, of in _mapping(metrics, "terms").items()}
    least = min(terms, key=lambda delta: terms[delta])
    names = {"labels": "labels in the same layer", "semantic": "the semantic term alone", "scrambled": "others' swaps"}
    said = [
        f"{text} {_points(metrics, 'differences', f'both minus {name}')}"
        for name, text in names.items()
        if _has(metrics, "differences", f"both minus {name}")
    ]
    if not said:
        raise _Absent
    return (
        f"In answers, a causal and a semantic term together make against {', against '.join(said)}. The causal term is "
        f"smallest at {100 * float(least):.0f} % of a planted change."
    )


def second_version(metrics: Metrics) -> str:
    """Chapter 20: what the layer terms add to KL, and how far the metrics are apart."""
    names = {"geometry": "the geometry adds", "curvature": "the curvature"}
    said = [
        f"{text} {_points(metrics, 'differences', f'{name} minus KL alone')}"
        for name, text in names.items()
        if _has(metrics, "differences", f"{name} minus KL alone")
    ]
    spread = 100 * _number(metrics, "spread_of_metrics")
    if len(said) < len(names):
        raise _Absent
    order = _part(lambda: _points(metrics, "differences", "frontier minus joint"))
    last = "" if order is None else f" Against as many steps of all layers at once the frontier makes {order}."
    return (
        f"In our reading of version 2, {' and '.join(said)} to KL, in answer tokens; from the best metric to the "
        f"worst it is {spread:.1f} points.{last}"
    )


def second_family(metrics: Metrics) -> str:
    """Chapter 21: random bases against the paper's, by family."""
    families, parts, ahead = _mapping(metrics, "families"), [], 0
    for name, of in families.items():
        chance, ours = _number(of, "cosine", "random", "mean"), _number(of, "cosine", "output side", "mean")
        parts.append(f"{chance:.3f} against {ours:.3f} in {name}")
        ahead += _number(of, "cosine", "random", "min") > _number(of, "cosine", "output side", "max")
    return (
        f"Recomposed from random bases a state keeps a cosine of {', '.join(parts)} from the paper's. Random bases do "
        f"better at every layer in {ahead} of the {len(families)} looked at."
    )


def two_vocabularies(metrics: Metrics) -> str:
    """Chapter 22: how much of a planted change comes over shared tokens, and what the real pair shares."""
    names = ("untouched", "one vocabulary", "shared tokens", "other positions")
    before, one, two, other = (_number(metrics, "planted", "left", name) for name in names)
    real = _part(
        lambda: (
            _number(metrics, "overlap", "Gemma to SmolLM2", "share"),
            _number(metrics, "overlap", "Gemma to SmolLM2", "of the student's positions that meet one"),
        )
    )
    shared = (
        ""
        if real is None
        else f" Gemma has {100 * real[0]:.0f} % of SmolLM2's tokens, and {100 * real[1]:.0f} % of the positions meet."
    )
    return (
        f"Of a planted change that is {before:.3f} nats away, states with one vocabulary leave {one:.3f}, states over "
        f"shared tokens {two:.3f}, and those of other positions {other:.3f}.{shared}"
    )


def claims(metrics: Metrics) -> str:
    """Chapter 15: how many claims hold."""
    counts = {word: int(n) for word, n in _mapping(metrics, "counts", "this run").items() if n}
    total = sum(counts.values())
    if not total:
        raise _Absent
    return f"Of {_count(total, 'claim')}: {', '.join(f'{n} {word}' for word, n in counts.items())}."


FINDINGS: dict[str, Callable[[Metrics], str]] = {
    "00_models_and_data": models_and_data,
    "01_semantics": semantics,
    "02_importance": importance,
    "03_pairing": pairing,
    "04_alignment": alignment,
    "04b_gates": instrument,
    "05_mmlu": facts,
    "06_gsm8k": word_problems,
    "07_humaneval": completion,
    "08_mbpp": from_text,
    "09_fine_tuned_teachers": fine_tuned_teachers,
    "10_similarity": similarity,
    "11_ablations": ablations,
    "12_controls": controls,
    "12b_students": students,
    "13_rivals": rivals,
    "13b_regimes": regimes,
    "14_search": search,
    "16_below_the_layer": below_the_layer,
    "17_causal": causes,
    "18_pairing_from_outputs": pairing_from_outputs,
    "19_larger_gaps": larger_gaps,
    "20_version_two": second_version,
    "21_second_family": second_family,
    "22_two_vocabularies": two_vocabularies,
    "15_paper_against_ours": claims,
}
"""The function of every chapter that has a finding."""


def _gain(metrics: Metrics) -> str:
    """What the four chapters on benchmarks have in common: the gain over the student, and over labels in the layer."""
    what = {"answers": "the share of right answers", "tokens": "the share of answer tokens predicted right"}
    measured = what.get(str(metrics.get("primary")))
    if measured is None:
        raise _Absent
    gain = _points(metrics, "gains", "none", "semalign")
    over = _part(lambda: _points(metrics, "gains", "sft_layer", "semalign"))
    beside = "" if over is None else f", and from labels in the same layer by {over}"
    lead = 100 * (_number(metrics, "scores", "teacher", "mean") - _number(metrics, "scores", "none", "mean"))
    return (
        f"In {measured} SemAlign differs from the untouched student by {gain}{beside}; the teacher's lead in answers "
        f"is {lead:+.1f} points."
    )


def _form(metrics: Metrics, who: str) -> float:
    return sum(_number(metrics, "why", who, how) for how in ("no program", "unknown name"))


def _rise(metrics: Metrics, name: str) -> float:
    """The mean rise of the cosine over seeds; rows are called NAME/SEED."""
    rows = [row for key, row in _mapping(metrics, "cosine").items() if key.rpartition("/")[0] == name]
    if not rows:
        raise _Absent
    return sum(_number(row, "after") - _number(row, "before") for row in rows) / len(rows)


def _at(metrics: Any, *path: str) -> Any:
    if (value := entry(metrics, path)) is None:
        raise _Absent(path)
    return value


def _called(metrics: Metrics, task: str) -> str:
    return str(metrics.get(CALLED, {}).get(task, task))


def _has(metrics: Metrics, *path: str) -> bool:
    return _part(lambda: _at(metrics, *path)) is not None


def _part(made: Callable[[], T]) -> T | None:
    """A part of a sentence that may be left out: None where its numbers are absent."""
    try:
        return made()
    except _Absent:
        return None


def _number(metrics: Any, *path: str) -> float:
    value = _at(metrics, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Absent(path)
    return float(value)


def _mapping(metrics: Any, *path: str) -> Mapping[str, Any]:
    value = _at(metrics, *path)
    if not isinstance(value, Mapping) or not value:
        raise _Absent(path)
    return value


def _list(metrics: Any, *path: str) -> list[Any]:
    value = _at(metrics, *path)
    if not isinstance(value, list | tuple) or not value:
        raise _Absent(path)
    return list(value)


def _points(metrics: Any, *path: str) -> str:
    """A difference of shares in points, with its interval; its mean is called ``mean`` or ``difference``."""
    e = _mapping(metrics, *path)
    mean = _number(e, "mean" if "mean" in e else "difference")
    return f"{100 * mean:+.1f} points ({100 * _number(e, 'low'):+.1f} to {100 * _number(e, 'high'):+.1f})"


def _sides(estimates: Iterable[Any]) -> tuple[int, int]:
    """How many intervals lie above zero, and how many below."""
    ends = [(_number(e, "low"), _number(e, "high")) for e in estimates]
    return sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
