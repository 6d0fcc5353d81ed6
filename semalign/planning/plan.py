"""What a profile needs, from the configurations of its models alone: memory, disk, tokens and hours, before it runs.

The largest part of the memory of a backward pass is what the forward pass keeps for it: :func:`kept_for_backward`
states that by layer, and a test holds it against the tensors that PyTorch saves. What is assumed of prompts and of
cards stands in ``configurations.yaml``. Nothing here loads a model library.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from semalign.planning.work import DECISIVE, WORK, Work, beside_tables
from semalign.profiles import PACKAGE, Folder, Hub, Packaged, Pico, Profile, ProfileError, Random, Source, declared

FILE = Path(__file__).with_name("configurations.yaml")
CARDS = (40, 80)
"""The memory of the cards that plans speak of, in GB of 10^9 bytes; 40 GiB are 42.9 of these, which leaves a margin."""
SPARE = 1.5e9  # bytes that CUDA, its kernels and the allocator's gaps take on a card
HOST = 4e9  # bytes of Python, its libraries and the data
LEAST = 30  # minutes that a job is given at least
LOGITS = 3 * 4 * 2**24  # logits in memory at once, with their softmax and its gradient, float32
RANK = 16
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


PACKAGED = {
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma-3-270m": "google/gemma-3-270m",
}
"""Which of the hub's models a package carries."""


@functools.cache
def _file() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def configurations() -> dict[str, dict[str, Any]]:
    """What is known of the hub's models that the shipped profiles name, by their id, each with its source."""
    return dict(_file()["models"])


@dataclass(frozen=True)
class Shape:
    """A decoder: D ``width``, F ``mlp``, L ``layers``, ``heads``, ``groups`` of keys, width of a ``head``, m tokens."""

    type: str
    width: int
    mlp: int
    layers: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices and norms of one layer."""
        queries, keys = self.heads * self.head, self.groups * self.head
        more = {"olmo2": queries + keys, "qwen3": 2 * self.head, "gemma3_text": 2 * (self.width + self.head)}
        norms = 2 * self.width + more.get(self.type, 0)
        return 2 * self.width * (queries + keys) + 3 * self.width * self.mlp + norms

    @property
    def parameters(self) -> int:
        """Numbers in the whole model; a head that is the embedding counts once."""
        return self.layers * self.layer_parameters + (2 - self.tied) * self.vocabulary * self.width + self.width


def shape_of(source: Source) -> Shape:
    """The shape of a profile's model.

    Raises:
        ProfileError: a model of the hub that no configuration is kept of, or a folder without one.
    """
    if isinstance(source, Random):
        given = source.config.model_dump(exclude_none=True)
        return _of_config({"vocab_size": 259, "tie_word_embeddings": False, **given})
    if isinstance(source, Pico | Folder):
        path = Path(source.path) if isinstance(source, Folder) else PACKAGE / "classroom" / "weights" / source.id
        try:
            return _of_config(json.loads((path / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            raise ProfileError(
                f"{path} has no config.json that a plan can read ({error!r}): give a model's folder"
            ) from None
    name = PACKAGED[source.id] if isinstance(source, Packaged) else source.id
    if name not in configurations():
        raise ProfileError(
            f"plans know no configuration of {name}: add the numbers of its config.json to {FILE.name}, or copy the "
            "model here and use source: folder"
        )
    kept = configurations()[name]
    return Shape(**{key: kept[key] for key in Shape.__dataclass_fields__})


def longest(p: Profile) -> int:
    """Tokens of the longest example in a micro-batch of a profile, as plans assume."""
    return min(p.max_length, int(_file()["longest"]))


def _of_config(config: dict[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        type=config["model_type"], width=config["hidden_size"], mlp=config["intermediate_size"],
        layers=config["num_hidden_layers"], heads=heads, groups=config.get("num_key_value_heads") or heads,
        head=config.get("head_dim") or config["hidden_size"] // heads, vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
    )  # fmt: skip


def kept_for_backward(s: Shape, tokens: int, size: int, *, layers: int, trained: str = "") -> int:
    """Bytes that the forward pass of ``layers`` layers keeps for a backward pass over ``tokens`` padded tokens.

    Two norms keep their float32 input and its scale; attention its queries, keys and values, its output and the log-sum
    of every row; the MLP the gate before and after its activation and the other factor. Norms of queries and keys keep
    these in float32.

    Args:
        size: bytes a number of the model's type.
        trained: ``lora`` adds what enters the adapters, in the type of the model, to which autocast brings it on a
            card; ``layer`` what enters the seven matrices.
    """
    queries, keys = s.heads * s.head, s.groups * s.head
    kept = 2 * (4 * s.width + 4) + 2 * (queries + keys) * size + 4 * s.heads + 3 * s.mlp * size
    if s.type in ("qwen3", "olmo2"):
        kept += 4 * (queries + keys) + 4 * (s.heads + s.groups if s.type == "qwen3" else 2)
    if trained == "lora":
        kept += size * (2 * s.width + queries + s.mlp + 4 * RANK)
    elif trained == "layer":
        kept += size * (2 * s.width + queries + s.mlp)
    return layers * tokens * kept


@dataclass(frozen=True)
class Way:
    """What of a method decides its memory and time: what it reads of the teacher, and what it trains of the student."""

    teacher: str = "none"  # none, chooses (attribution alone), states, top (log-probabilities), all, weights, writes
    layers: str = "k"  # k, all, or none
    states: int = 1  # layers of the teacher whose states are kept; 0: those of every student layer
    head: bool = False  # the teacher's norm and head stay beside the student
    passes: int = 1  # through the student in a step, of such a part of a micro-batch, and kept for the backward pass
    students: int = 1  # on the card while one of them trains


WAYS: dict[str, Way] = {
    "none": Way(layers="none"),
    "sft": Way(layers="all"),
    "sft_layer": Way("chooses"),
    "pissa": Way(layers="all"),
    "logit_kd": Way("top", "all"),
    "fitnets": Way("states"),
    "relational": Way("states"),
    "semalign": Way("states"),
    "semalign_tuned": Way("states"),
    "twin": Way("chooses"),
    "logit_map": Way("states"),
    "random_target": Way("states"),
    "scrambled_tokens": Way("states"),
    "ted": Way("all"),
    "fdd": Way("all", "all", 4, head=True),
    "seq_kd": Way("writes", "all"),
    "seeking": Way("weights", "all"),
    "laten": Way("weights", "all"),
    "laten_released": Way("weights", "all"),
    "laten_direct": Way("weights", "all"),
    "warm_up": Way("states", "all", 0, students=2),
    "gkd": Way("all", "all"),
    "oprd": Way("all", "all", 0),
    "align_heads": Way("states"),
    "align_neurons": Way("states"),
    "scrambled_heads": Way("states"),
    "interchange": Way("all", passes=2),
    "semantic_and_causal": Way("all", passes=2),
    "scrambled_pairs": Way("all", passes=2),
    "geometry_frontier": Way("all", "all", 0),
    "fisher_frontier": Way("all", "all", 0),
    "across": Way("states"),
}
"""By method, what :func:`method_memory` and :func:`method_seconds` read of it."""


@dataclass(frozen=True)
class Held:
    """What a chapter runs, a method at a time, and how many teachers and students it holds beside."""

    methods: tuple[str, ...] = ()
    teachers: int = 0
    students: int = 0
    scores: bool = False  # examples are attributed beside these models, and the models are gone when a method runs
    read: str = ""  # the split of which the states of all layers of the teacher are on the card at once
    most: float = math.inf  # examples of it
    both: bool = False  # the student beside it then
    full: bool = False  # all layers may train whole, where the profile's search has it
    taught: bool = False  # the teacher is trained itself: adapters on all its layers, halved micro-batches
    asks: bool = False  # the teacher and the untouched student answer beside the trials, one after the other
    looks: tuple[str, ...] = ()  # models by themselves: the profile's of the first chapters, or a package's
    copies: int = 0  # float32 matrices of the size of such a model's head in the host's memory
    shares: Literal["", "task", "controls", "programs"] = ""  # which trials with others, see :func:`trials_shared`


FIRST = "semantics_model"  # the name in `looks` of the model of the profile that the first chapters look at
CHAPTERS: dict[str, Held] = {
    "00_models_and_data": Held(teachers=1),
    "01_semantics": Held(looks=(FIRST,), copies=10),
    "02_importance": Held(teachers=1, scores=True),
    "04_alignment": Held(("semalign", "sft_layer")),
    "05_mmlu": Held(("*",), asks=True, shares="task"),
    "06_gsm8k": Held(("*",), shares="task"),
    "07_humaneval": Held(("*",), asks=True, shares="task"),
    "08_mbpp": Held(("*",), shares="task"),
    "04b_gates": Held(("none", "sft"), shares="controls"),
    "09_fine_tuned_teachers": Held(("none", "sft", "semalign"), shares="programs"),
    "10_similarity": Held(("semalign", "sft", "logit_kd"), read="validation", most=40),
    "11_ablations": Held(("semalign", "logit_kd"), read="extract", both=True),
    "12_controls": Held(("semalign", "sft", "logit_kd"), students=1, taught=True),
    "12b_students": Held(("*", "none", *DECISIVE)),
    "13_rivals": Held(("seeking", "laten"), students=1),
    "13b_regimes": Held(("sft", "logit_kd", "warm_up")),
    "14_search": Held(("logit_kd", "semalign"), full=True),
    "16_below_the_layer": Held(("semalign", "align_heads", "align_neurons"), teachers=1, students=1, scores=True),
    "17_causal": Held(("sft_layer", "semantic_and_causal"), students=1),
    "18_pairing_from_outputs": Held(("semalign",), read="train", most=40),
    "19_larger_gaps": Held(("sft", "logit_kd", "semalign"), full=True),
    "20_version_two": Held(("geometry_frontier", "fisher_frontier")),
    "21_second_family": Held(looks=(FIRST, "gemma-3-270m"), copies=4, scores=True),
    "22_two_vocabularies": Held(looks=("gemma-3-270m", "smollm2-135m-instruct"), copies=6),
}
"""The chapters that load models, and what they hold; the others read what these left, or load Pico at most."""


@dataclass(frozen=True)
class Need:
    """Bytes at the peak, on the card and in the host's memory, and which step the card's peak is in."""

    gpu: float
    host: float
    step: str


def method_steps(p: Profile, name: str) -> dict[str, float]:
    """Bytes on the card in each step of one method of a profile, without :data:`SPARE`; an answering student is one."""
    t, s, size, way = shape_of(p.teacher), shape_of(p.student), SIZES[p.dtype], WAYS[name]
    most = longest(p)
    theirs, ours = t.parameters * size, s.parameters * size
    rows, whole = p.answered_at_once, most + (p.max_new_tokens or 512)
    steps: dict[str, float] = {"answering": ours + cache(s, rows, whole, size)}
    if way.teacher in ("chooses", "states", "all") and p.layer is None:
        steps["attribution"] = theirs + attribution(t, most, size)
    # By itself: of its states or log-probabilities, and with every method as the judge of what the student says.
    maps = 8 * 3 * (t.width**2 + s.width**2) + s.vocabulary * s.width * size if way.teacher in ("states", "all") else 0
    steps["teacher's pass"] = theirs + maps + 2048 * 4 * (t.mlp + t.width) * size + 256 * t.vocabulary * 12
    if way.teacher == "writes":
        steps["teacher's answers"] = theirs + cache(t, rows, whole, size)
    if way.teacher == "weights":
        whole = kept_for_backward(t, most, size, layers=t.layers, trained="layer")
        steps["teacher's gradients"] = theirs + whole + 4 * 3 * t.width * t.mlp + most * t.vocabulary * 12
    if way.layers != "none":
        tokens = max(1, p.eval_batch_size // way.passes) * most
        step = training(s, tokens, size, layers=s.layers, every=way.layers == "all", passes=way.passes)
        steps["training"] = way.students * ours + step
        steps["training"] += t.vocabulary * t.width * size * way.head
    return steps


def method_memory(p: Profile, name: str) -> Need:
    """The peak of one method of a profile, on the card by :func:`method_steps` and in the host's memory.

    Where more was counted on a card than the steps say, it is what was counted; :data:`SPARE` is on top of either.
    """
    t, s, size, way = shape_of(p.teacher), shape_of(p.student), SIZES[p.dtype], WAYS[name]
    # The student waits there while the teacher comes in to judge.
    theirs, beside = t.parameters * size, s.parameters * size
    if way.teacher == "weights":  # scores of the matrices that are cut, where the card has no room for them
        beside = max(beside, 4 * t.layers * t.width * (2 * t.mlp + (t.heads + t.groups) * t.head))
    host = theirs + beside + HOST
    steps = method_steps(p, name)
    if name in (counted := measured(p)):
        trains = max((step for step in steps if step != "answering"), key=lambda step: steps[step])
        steps[trains] = max(steps[trains], 1e9 * counted[name])
    step = max(steps, key=lambda name: steps[name])
    return Need(steps[step] + SPARE, host, step)


def measured(p: Profile) -> dict[str, float]:
    """GB at the peak of training that were counted on a card, by method, where the pair has the shapes of that pair."""
    counted = _file()["measured"]
    pair = [shape_of(Hub(source="hub", id=counted[name], revision="main")) for name in ("teacher", "student")]
    same = pair == [shape_of(p.teacher), shape_of(p.student)] and p.eval_batch_size == counted["eval_batch_size"]
    same = same and p.dtype == "bfloat16" and longest(p) == _file()["longest"]
    return dict(counted["methods"]) if same else {}


def attribution(s: Shape, tokens: int, size: int) -> float:
    """Bytes beside the weights of gradient x activation at every layer: kept tensors, states, gradients and logits."""
    states = 2 * s.layers * tokens * s.width * size
    return kept_for_backward(s, tokens, size, layers=s.layers) + states + tokens * s.vocabulary * (size + 12)


def training(
    s: Shape, tokens: int, size: int, *, layers: int, every: bool, full: bool = False, passes: int = 1
) -> float:
    """Bytes beside the weights of a step of the loop: of adapters, or with ``full`` of whole layers in float32."""
    inside = layers if every else 1
    kept = kept_for_backward(s, tokens, size, layers=inside, trained="layer" if full else "lora")
    kept += kept_for_backward(s, tokens, size, layers=layers - inside)
    numbers = inside * (s.layer_parameters if full else RANK * (4 * s.width + 2 * s.mlp + 2 * s.heads * s.head))
    # float32: the value or its master, its gradient, AdamW's two moments, and the last good value
    return passes * kept + numbers * 20 + 4 * tokens * s.width * 2 + LOGITS


def cache(s: Shape, rows: int, tokens: int, size: int) -> float:
    """Bytes beside the weights of ``rows`` that are written up to ``tokens``: keys and values, and float32 logits."""
    return rows * (2 * s.layers * s.groups * s.head * size * tokens + 12 * s.vocabulary)


def chapter_memory(p: Profile, name: str) -> Need:
    """The peak of a chapter: its largest method beside what it holds.

    Of a table's trials nothing where the profile has ``trial_jobs``: they are jobs of their own then.
    """
    held, t, s, size = CHAPTERS[name], shape_of(p.teacher), shape_of(p.student), SIZES[p.dtype]
    runs = dict.fromkeys(m for named in _methods_of(p, held) for m in (p.methods if named == "*" else [named]))
    needs = [method_memory(p, m) for m in runs] or [Need(SPARE, HOST, "reading")]
    needs += [_looked_at(p, model, held) for model in held.looks if model == FIRST or _has_second_family(p)]
    if held.asks:
        most = longest(p) + (p.max_new_tokens or 512)
        asked = t.parameters * size + cache(t, p.answered_at_once, most, size) + SPARE
        needs.append(Need(asked, t.parameters * size + HOST, "teacher's answers"))
    largest = max(needs, key=lambda need: need.gpu)
    beside = held.teachers * t.parameters * size + held.students * s.parameters * size
    gpu, step = largest.gpu + beside * (not held.scores), largest.step
    if held.scores and held.teachers:
        gpu, step = max((gpu, step), (beside + attribution(t, longest(p), size) + SPARE, "attribution"))
    if held.read:
        examples = min(held.most, getattr(p.sizes, held.read))
        states = t.layers * examples * longest(p) * t.width * size
        models = t.parameters + s.parameters * held.both
        gpu, step = max((gpu, step), (models * size + states + SPARE, "states of all layers"))
    if held.full and p.search.whole_layers:
        gpu, step = max((gpu, step), (_trained(s, p, full=True), "whole layers in training"))
    if held.taught:
        halved = p.changed(eval_batch_size=max(1, p.eval_batch_size // 2))
        gpu, step = max((gpu, step), (_trained(t, halved), "the teacher in training"))
    loaded = t.parameters * size + HOST if held.teachers else 0.0  # a model comes to a card through the host's memory
    return Need(gpu, max(loaded, *(need.host for need in needs)), step)


def on_card(p: Profile, name: str) -> bool:
    """Whether a chapter computes with models of the profile, and so where the profile says."""
    held = CHAPTERS.get(name)
    return held is not None and bool(_methods_of(p, held) or not held.methods)


def _methods_of(p: Profile, held: Held) -> tuple[str, ...]:
    """The methods that a chapter runs itself: of a table's none that are jobs, but the student that it asks beside."""
    if p.trial_jobs and held.shares == "task":
        return ("none",) if held.asks else ()
    return held.methods


def _has_second_family(p: Profile) -> bool:
    """Whether Gemma is looked at where it is installed: it is not in runs of random models."""
    return not isinstance(p.semantics_model, Random)


def _looked_at(p: Profile, model: str, held: Held) -> Need:
    """The peak of a chapter that looks at one model by itself, and at its head in the host's memory."""
    s = shape_of(p.semantics_model if model == FIRST else Hub(source="hub", id=PACKAGED[model], revision="main"))
    size, most = SIZES[p.dtype], longest(p)
    beside = attribution(s, most, size) if held.scores else most * s.vocabulary * (size + 4)
    host = s.parameters * size + held.copies * 4 * s.vocabulary * s.width + HOST
    return Need(s.parameters * size + beside + SPARE, host, "attribution" if held.scores else "reading")


def _trained(s: Shape, p: Profile, *, full: bool = False) -> float:
    """Bytes of a model and of its training in all layers."""
    size, tokens = SIZES[p.dtype], p.eval_batch_size * longest(p)
    return s.parameters * size + training(s, tokens, size, layers=s.layers, every=True, full=full) + SPARE


def downloads(names: Iterable[str]) -> int:
    """Bytes of the files of these models of the hub, as far as plans know them."""
    kept = configurations()
    shapes = {n: Shape(**{key: kept[n][key] for key in Shape.__dataclass_fields__}) for n in names if n in kept}
    return sum(s.parameters * kept[n]["stored"] for n, s in shapes.items())


def positions(p: Profile, task: str) -> tuple[int, int]:
    """Tokens and supervised positions of a task's training and validation examples."""
    asked = _file()["questions"].get(task) or {"prompt": p.max_length // 2, "answer": p.max_length // 2}
    examples = p.sizes.train + p.sizes.validation
    return examples * min(p.max_length, asked["prompt"] + asked["answer"]), examples * asked["answer"]


def kept_bytes(p: Profile) -> tuple[int, int]:
    """Bytes on disk: of what a run keeps among its results, and of one trial's own files while it trains.

    The results hold the teacher's log-probabilities of the watched examples, the supervision of chapter 04 and small
    files; a trial the inputs of its lowest trained layer and the targets of the layers that its method reads.
    """
    try:
        t, s = shape_of(p.teacher), shape_of(p.student)
    except ProfileError:  # a model that no plan knows
        return 0, 0
    size = SIZES[p.dtype]
    tokens, rows = (max(of) for of in zip(*(positions(p, task) for task in p.tasks), strict=True))
    kept = 50_000_000 + len(p.tasks) * rows * 64 * 6 + 3 * rows * s.width * 2
    states = max((s.layers if WAYS[m].states == 0 else WAYS[m].states) for m in p.methods)
    return kept, tokens * s.width * size + rows * states * max(s.width, t.width) * 2


def method_seconds(p: Profile, name: str, task: str, card: str) -> float:
    """Seconds of one trial on a card, by its rates: loading, the teacher's pass, training, and answering the test."""
    t, s, way, rates = shape_of(p.teacher), shape_of(p.student), WAYS[name], _file()["cards"][card]
    asked = _asked(task)
    tokens, _ = positions(p, task)
    # A student that trains is loaded for its head and again; the teacher, for what is asked of it, and as the judge.
    students, teachers = 1 + (way.layers != "none"), 1 + (way.teacher != "none")
    seconds = _loaded(p, students * s.parameters + teachers * t.parameters)
    read = 0.0
    if way.teacher in ("states", "all", "top"):
        read += 2 * t.parameters * tokens
    if way.teacher in ("chooses", "states", "all", "weights"):
        attributed = 6 * t.parameters * p.sizes.extract * (asked["prompt"] + asked["answer"])
        seconds += _computed(attributed, rates, "attributed")
    if way.layers != "none":
        trained = tokens * p.sizes.train / (p.sizes.train + p.sizes.validation)
        where = "all_layers" if way.layers == "all" else "one_layer"
        seconds += _computed(4 * p.epochs * trained * s.parameters, rates, where)
        read += 2 * tokens * s.parameters
    seconds += _computed(read, rates, "reads") + _answered(p, s, task, rates)
    if way.teacher == "writes":
        seconds += _written(p, t, p.sizes.train, asked["answer"], rates)
    for other in p.tasks if p.others else ():
        if other != task and (of := _file()["questions"].get(other)):
            seconds += _written(p, s, p.others, of["written"], rates)
    return seconds


def judged_seconds(p: Profile, task: str, card: str) -> float:
    """Seconds of the teacher's pass over a task's validation examples, which all of its trials are compared with."""
    asked = _asked(task)
    flops = 2 * shape_of(p.teacher).parameters * p.sizes.validation * (asked["prompt"] + asked["answer"])
    return _computed(flops, _file()["cards"][card], "reads")


def work_seconds(p: Profile, work: Work, card: str) -> float:
    """Seconds of a chapter's trainings of one kind: as of SemAlign in :func:`method_seconds`, by the same rates.

    A training of which nothing else is known runs forward and backward through the whole student, with adapters.
    """
    t, s, rates = shape_of(p.teacher), shape_of(p.student), _file()["cards"][card]
    asked, model = _asked(task=work.task), t if work.teacher else s
    tokens = min(p.max_length, asked["prompt"] + asked["answer"])
    seconds, models = _computed(4 * work.reads * tokens * model.parameters, rates, "all_layers"), model.parameters
    if work.reads:
        read = 2 * (t.parameters + s.parameters) * (work.examples + p.sizes.validation) * tokens
        seconds += _computed(read, rates, "reads")
        models += t.parameters + s.parameters
    seconds += _loaded(p, models)
    return work.trainings * (seconds + (_answered(p, model, work.task, rates) if work.answers else 0.0))


def _asked(task: str) -> dict[str, Any]:
    """Tokens of a task's prompt, its reference answer and what is written to it, and how many questions it has."""
    return dict(_file()["questions"].get(task) or {"prompt": 100, "answer": 50, "written": 50, "questions": 100})


def _computed(flops: float, rates: dict[str, float], kind: str) -> float:
    return flops / (rates["peak"] * 1e12 * rates[kind])


def _loaded(p: Profile, parameters: int) -> float:
    """Seconds until so many numbers are on the card."""
    return SIZES[p.dtype] * parameters / (_file()["machine"]["load"] * 1e9)


def _answered(p: Profile, s: Shape, task: str, rates: dict[str, float]) -> float:
    """Seconds in which a model answers the test questions of a task."""
    asked = _asked(task)
    questions = p.sizes.test or asked["questions"]
    new = min(asked["written"], p.max_new_tokens or asked["written"])
    read = _computed(2 * s.parameters * questions * asked["prompt"], rates, "reads")
    return read + _written(p, s, questions, new, rates)


def _written(p: Profile, s: Shape, questions: int, new: int, rates: dict[str, float]) -> float:
    """Seconds to write ``new`` tokens to each question, in batches: each step reads the weights once."""
    return math.ceil(questions / p.answered_at_once) * new * step_seconds(s, SIZES[p.dtype], rates)


def step_seconds(s: Shape, size: int, rates: dict[str, float]) -> float:
    """Seconds of a decoding step of a model whose numbers have ``size`` bytes."""
    read = s.parameters * size / (rates["bandwidth"] * 1e12 * rates["reached"])
    return max(read, s.layers * _file()["machine"]["layer_step"])


@dataclass(frozen=True)
class Plan:
    """Everything that :func:`plan` found of a profile.

    ``measured``: by method, see :func:`measured`. ``hours``: by card, of the ``trials`` of the tables; ``beside``: by
    card, of what each chapter trains beside them.
    """

    profile: str
    measured: dict[str, float]
    methods: dict[str, Need]
    chapters: dict[str, Need]
    downloads: float
    kept: float
    scratch: float
    tokens: int
    hours: dict[str, float]
    beside: dict[str, dict[str, float]]
    trials: int
    mends: list[str] = field(default_factory=list)

    @property
    def whole(self) -> dict[str, float]:
        """Hours of the whole run, by card."""
        return {card: hours + sum(self.beside[card].values()) for card, hours in self.hours.items()}


def plan(p: Profile, chapters: Iterable[str] = tuple({**CHAPTERS, **WORK})) -> Plan:
    """What a profile needs, from configurations alone.

    Args:
        chapters: those that the profile runs.

    Raises:
        ProfileError: a model that no plan knows.
    """
    seeded = {m: p.seeds if declared("methods")[m].get("seeded", True) else p.seeds[:1] for m in p.methods}
    trials = [(task, m) for task in p.tasks for m, own in seeded.items() for _ in own]
    cards, depth = list(_file()["cards"]), shape_of(p.student).layers
    teacher = [Work(task, 1, answers=True, teacher=True) for task in p.tasks]
    hours = {
        card: sum(
            [
                *(method_seconds(p, m, t, card) for t, m in trials),
                *(work_seconds(p, w, card) for w in teacher),
                *(judged_seconds(p, t, card) for t in p.tasks),
            ]
        )
        / 3600
        for card in cards
    }
    beside = {
        card: {
            name: sum(work_seconds(p, w, card) for w in works) / 3600
            for name, works in beside_tables(p, depth, chapters).items()
        }
        for card in cards
    }
    methods = {m: method_memory(p, m) for m in p.methods}
    of = {name: chapter_memory(p, name) for name in chapters if name in CHAPTERS}
    kept, scratch = kept_bytes(p)
    ids = {m.id for m in p.models if m.source == "hub"}
    tokens = sum(positions(p, task)[0] * p.epochs for task, m in trials if WAYS[m].layers != "none")
    found = Plan(p.name, measured(p), methods, of, downloads(ids), kept, scratch, tokens, hours, beside, len(trials))
    found.mends.extend(_mends(p, found))
    return found


def _told(hours: dict[str, float]) -> str:
    """A sum, and its largest parts."""
    largest = sorted(hours, key=lambda name: -hours[name])[:4]
    return f"{sum(hours.values()):.0f}: " + ", ".join(f"`{n}` {hours[n]:.1f}" for n in largest)


def trials_shared(p: Profile, name: str) -> list[tuple[str, str, int]]:
    """The trials that a chapter shares with others: task, method or ``teacher``, and under how many seeds.

    With ``trial_jobs`` they are jobs of their own, as the pipeline says, and else made in the first chapter of them.
    """
    shares = CHAPTERS[name].shares if name in CHAPTERS else ""
    tasks = {"": [], "task": [name.partition("_")[2]], "controls": p.tasks, "programs": p.code_tasks}[shares]
    methods = {"controls": ["none", "sft"], "programs": ["teacher", "none", "sft", "semalign"]}.get(
        shares, list(dict.fromkeys(["teacher", "none", *p.methods]))
    )
    rows = declared("methods")
    seeds = {m: len(p.seeds) if m in rows and rows[m].get("seeded", True) else 1 for m in methods}
    return [(task, m, seeds[m]) for task in tasks for m in methods]


def _trial_seconds(p: Profile, task: str, method: str, card: str) -> float:
    """Seconds of a method's trial, or of the teacher's, which only answers and is read."""
    if method == "teacher":
        return work_seconds(p, Work(task, 1, answers=True, teacher=True), card) + judged_seconds(p, task, card)
    return method_seconds(p, method, task, card)


def job_needs(p: Profile, name: str) -> dict[str, int]:
    """What a cluster is asked for a chapter: ``mem_mb``, and ``runtime`` in minutes.

    A quarter more memory and twice the time of the plan, and half an hour at least, for its own work, with the trials
    that it reads where the profile has no ``trial_jobs``. A chapter that loads no model of the profile has the memory
    of Python, and that half an hour. Nothing where a plan knows no configuration of a model.
    """
    try:
        host = chapter_memory(p, name).host if name in CHAPTERS else HOST
        beside = beside_tables(p, shape_of(p.student).layers, [name]).get(name, [])
        seconds = sum(work_seconds(p, work, "A100") for work in beside)
        if not p.trial_jobs:
            seconds += sum(often * _trial_seconds(p, task, m, "A100") for task, m, often in trials_shared(p, name))
    except ProfileError:
        return {}
    return _with_margin(host, seconds)


def trials_need(p: Profile, task: str, methods: Sequence[str]) -> dict[str, int]:
    """As :func:`job_needs`, for a job that makes trials of ``methods`` on a task, one after another."""
    try:
        seconds = sum(_trial_seconds(p, task, m, "A100") for m in methods)
        # The teacher alone is what every trial has for its judge.
        host = max(method_memory(p, "none" if m == "teacher" else m).host for m in methods)
    except ProfileError:
        return {}
    return _with_margin(host, seconds)


def _with_margin(host: float, seconds: float) -> dict[str, int]:
    return {"mem_mb": int(1.25 * host / 1e6), "runtime": max(LEAST, math.ceil(2 * seconds / 60))}


def _mends(p: Profile, found: Plan) -> list[str]:
    """What does not fit, and the setting that mends it, a sentence each."""
    said = []
    for what, needs in (("method", found.methods), ("chapter", found.chapters)):
        for name, need in needs.items():
            for card in CARDS:
                if need.gpu > card * 1e9:
                    said.append(f"{what} {name} does not fit {card} GB ({need.step}): {_remedy(p, name, what, card)}")
    return said


def _remedy(p: Profile, name: str, what: str, card: int) -> str:
    """The setting with which it fits this card, or else where it does."""

    def needed(changed: Profile) -> float:
        return (method_memory(changed, name) if what == "method" else chapter_memory(changed, name)).gpu

    settings: dict[str, dict[str, Any]] = {}
    for key, now in (("answer_batch_size", p.answered_at_once), ("eval_batch_size", p.eval_batch_size)):
        settings |= {f"{key}: {b}": {key: b} for b in (32, 16, 8, 4, 2, 1) if b < now}
    settings["search: {whole_layers: false}"] = {"search": {"whole_layers": False}}
    settings["dtype: bfloat16"] = {"dtype": "bfloat16"}
    for setting, changes in settings.items():
        if needed(p.changed(**changes)) <= card * 1e9:
            return f"set {setting}"
    larger = next((c for c in CARDS if c > card and needed(p) <= c * 1e9), None)
    if larger:
        return f"take a card of {larger} GB"
    return "take it out of methods" if what == "method" else f"no setting mends it, it takes {needed(p) / 1e9:.0f} GB"


def markdown(found: Plan) -> str:
    """A plan as markdown: a table of memory, one of the rest, and a list of what does not fit."""
    lines = [
        f"What profile `{found.profile}` needs, by the configurations of its models and the rates named below.",
        "",
        "| step | card, GB | host, GB | peak is in | 40 GB | 80 GB |" + (" counted |" if found.measured else ""),
        "|---|---|---|---|---|---|" + ("---|" if found.measured else ""),
    ]
    for what, needs in (("method", found.methods), ("chapter", found.chapters)):
        for name, need in needs.items():
            fits = " | ".join("fits" if need.gpu <= card * 1e9 else "**no**" for card in CARDS)
            said = f" {found.measured[name]:.1f} |" if name in found.measured else " |" if found.measured else ""
            row = f"| {what} `{name}` | {need.gpu / 1e9:.1f} | {need.host / 1e9:.1f} | {need.step} | {fits} |{said}"
            lines.append(row)
    kinds = ("reads", "attributed", "all_layers", "one_layer")
    rates = [
        f"{name}: {', '.join(f'{kind} {card[kind]:.0%}'.replace('_', ' ') for kind in kinds)} "
        f"of {card['peak']} TFLOP/s, {card['reached']:.0%} of {card['bandwidth']} TB/s"
        for name, card in _file()["cards"].items()
    ]
    machine = _file()["machine"]
    larger = "the larger of what is planned and what was counted" if found.measured else "what is planned"
    lines += [
        "",
        f"GB are 10^9 bytes. On the card stands {larger}, with {SPARE / 1e9:g} GB on top for CUDA itself, and it fits "
        "where that is at most 40 or 80 GB. A card that is sold as one of 40 GB has 40 GiB, 42.9 GB, and so a margin.",
    ]
    if found.measured:
        lines += [
            "",
            f"Counted: the peak of training on an {_file()['measured']['card']} with random weights, in GB as PyTorch "
            "counts them; answers are not in it.",
        ]
    lines += [
        "",
        "| whole run | |",
        "|---|---|",
        f"| downloads | {found.downloads / 1e9:.1f} GB |",
        f"| kept among the results | {found.kept / 1e9:.2f} GB |",
        f"| a trial's own files while it trains (`TMPDIR`) | {found.scratch / 1e9:.1f} GB |",
        f"| trials of the tables | {found.trials} |",
        f"| tokens read in their training | {found.tokens / 1e6:.0f} million |",
        *(f"| hours of these trials on one {card} | {hours:.0f} |" for card, hours in found.hours.items()),
        *(f"| hours of what chapters train beside them on one {c} | {_told(of)} |" for c, of in found.beside.items()),
        *(f"| hours of the whole run on one {card} | {hours:.0f} |" for card, hours in found.whole.items()),
        f"| rates, of the H100 measured | {'; '.join(rates)} |",
        f"| around a card, assumed | {1e3 * machine['layer_step']:g} ms a layer for each step of decoding, "
        f"{machine['load']:g} GB/s of weights |",
        "",
    ]
    lines += [f"- {said}." for said in found.mends] or ["Everything fits either card."]
    return "\n".join(lines) + "\n"
