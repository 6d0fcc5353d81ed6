"""Profiles: a yaml file says who teaches whom, on what, and how much; a typed value hands it down."""

from __future__ import annotations

import ast
import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

PACKAGE = Path(__file__).resolve().parent
FOLDER = PACKAGE.parent / "notebooks" / "profiles"
"""Where the book's own profiles are."""


class ProfileError(ValueError):
    """A profile is unknown, unreadable, or says something that no profile can say; the message names it and the fix."""


@functools.cache
def declared(wing: str) -> dict[str, dict[str, Any]]:
    """The rows of ``methods`` or ``benchmarks`` by name, with those of their values that are literals.

    They are read from the source and not imported: a plan of a run has to know the names, and must not load a model
    library to learn them.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted((PACKAGE / wing).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            target, value = assignment(node)
            if target == "METHODS" and isinstance(value, ast.Dict):
                pairs = zip(value.keys, value.values, strict=True)
                rows |= {
                    k.value: _literals(v) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(k.value, str)
                }
            elif target == "BENCHMARK":
                rows[path.stem] = _literals(value)
    return rows


def assignment(node: ast.stmt) -> tuple[str, ast.expr | None]:
    """The name that a statement assigns to, with or without a type, and the value; an empty name for any other."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id, node.value
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value
    return "", None


def _literals(call: ast.expr | None) -> dict[str, Any]:
    literals = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        try:
            literals[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:  # a function, or anything else that has to be run
            continue
    return literals


def pico_names() -> list[str]:
    """The Pico models that ship."""
    return sorted(path.parent.name for path in (PACKAGE / "classroom" / "weights").glob("*/config.json"))


@functools.cache
def classroom_sizes() -> dict[str, int]:
    """The most items that a subject of the classroom has, by split; read from the source, as :func:`declared`."""
    tree = ast.parse((PACKAGE / "classroom" / "corpora.py").read_text(encoding="utf-8"))
    found = next(value for target, value in map(assignment, tree.body) if target == "SIZES" and value is not None)
    return dict(ast.literal_eval(found))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Hub(_Strict):
    """A model of the hub at one revision."""

    source: Literal["hub"]
    id: str = Field(min_length=1)
    revision: str = Field(min_length=1)


class Folder(_Strict):
    """A folder that ``save_pretrained`` wrote; its path counts from the profile's own folder."""

    source: Literal["folder"]
    path: str = Field(min_length=1)


class Packaged(_Strict):
    """A model that a package carries."""

    source: Literal["packaged"]
    id: Literal["smollm2-135m-instruct", "gemma-3-270m"]


class Pico(_Strict):
    """A model that this project trained."""

    source: Literal["pico"]
    id: str

    @pydantic.field_validator("id")
    @classmethod
    def _ships(cls, name: str) -> str:
        return _one_of(name, pico_names())


class Shape(_Strict):
    """The shape of a model with random weights."""

    model_type: str
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)


class Random(_Strict):
    """Random weights of a given shape, over a token a byte."""

    source: Literal["random"]
    config: Shape
    seed: int = Field(ge=0)


Source = Annotated[Hub | Folder | Packaged | Pico | Random, Field(discriminator="source")]
"""Where a model comes from."""


KINDS: dict[str, Any] = {"hub": Hub, "folder": Folder, "packaged": Packaged, "pico": Pico, "random": Random}


def source_of(value: Mapping[str, Any] | Source) -> Source:
    """A model's source as a typed value.

    Raises:
        ProfileError: an unknown kind of source, or a key that it lacks or does not have.
    """
    if isinstance(value, BaseModel):
        return value
    try:
        return pydantic.TypeAdapter(Source).validate_python(dict(value))
    except pydantic.ValidationError as error:
        raise ProfileError(f"the model source {dict(value)}: {_sentence(error, Source)}") from None


class Sizes(_Strict):
    """Examples of each split of a task: those of the paper's setup; ``test``: None is every question."""

    train: int = Field(1000, ge=1)
    align: int = Field(80, ge=1)
    extract: int = Field(20, ge=1)
    validation: int = Field(100, ge=1)
    test: int | None = Field(None, ge=1)


class Regimes(_Strict):
    """Of the map of regimes: how many training examples, in how many steps, on which tasks (by default the first).

    ``again`` has further tasks of the map alone, on which what is found is looked for once more, and for each how many
    examples; with none it is out.
    """

    examples: list[Annotated[int, Field(ge=1)]] = Field([8, 32, 128], min_length=1)
    steps: int = Field(120, ge=2)  # optimizer steps of every cell, about
    tasks: list[str] = []
    again: dict[str, list[Annotated[int, Field(ge=1)]]] = {}

    @property
    def counts(self) -> dict[str, list[int]]:
        """By task of the map its numbers of examples, from few to many."""
        further = {task: sorted(examples) for task, examples in self.again.items() if examples}
        return {task: sorted(self.examples) for task in self.tasks} | further


class Search(_Strict):
    """How many configurations of each family are tried, and on which tasks (by default the profile's first).

    ``examples``: of training examples, there, in the controls, and where one ingredient is changed at a time; None: as
    many as elsewhere.

    ``whole_layers`` says whether all layers of the student may be trained whole at once, in float32, for which a large
    model needs more than one card: in the search, and as the ceiling of the larger gaps. Otherwise adapters are.
    """

    draws: int = Field(8, ge=1, le=48)
    examples: int | None = Field(None, ge=1)
    tasks: list[str] = []
    whole_layers: bool = True


class TrialSettings(_Strict):
    """What the result of one trial depends on, and so what its key covers: models, data, and how training goes."""

    teacher: Source
    student: Source
    vocabularies: Literal["same", "shared"] = "same"  # shared: two tokenizers, of which the common tokens count
    data: Literal["benchmarks", "classroom"] = "benchmarks"
    sizes: Sizes = Sizes()
    max_length: int = Field(256, ge=8)  # tokens of a prompt with its response
    batch_size: int = Field(16, ge=1)  # examples of one optimizer step
    eval_batch_size: int = Field(8, ge=1)  # examples in memory at once, where they are trained on or read
    device: str = Field("auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    layer: int | None = Field(None, ge=1)  # critical teacher layer; None takes the attributed one
    interface: Literal["stream", "residual", "mlp", "attention"] = "mlp"
    map: Literal["paper", "logit", "logit_centred", "tight", "procrustes"] = "paper"
    lr: float = Field(3e-4, gt=0)
    epochs: int = Field(5, ge=1)
    protocols: dict[str, str] = {}  # of the tasks that are not asked as in the paper
    max_new_tokens: int | None = Field(None, ge=1)  # at most so many an answer; None is the protocol's own number
    allow_code_execution: bool = False  # run the models' programs


class Profile(TrialSettings):
    """One run of the book; the defaults are those of a small run on a CPU."""

    name: str = ""
    description: str = Field(min_length=1)
    semantics_model: Source  # of figure 2; the student where a profile is silent
    smaller_student: Source | None = None  # another student of the same teacher, for the larger gap
    siblings: list[Source] = []  # students that differ from the student in their pretraining alone
    kin_teachers: list[Source] = []  # of the student and of each sibling: the same model, trained on
    semantics_texts: int = Field(20, ge=1, le=164)  # HumanEval prompts read for figure 2
    tasks: list[str] = Field(["mmlu", "gsm8k", "humaneval", "mbpp"], min_length=1)  # the first is worked through
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    decisive_seeds: list[Annotated[int, Field(ge=0)]] = []  # of the comparison over students; empty: as the others
    contest_seeds: list[Annotated[int, Field(ge=0)]] = []  # of all other methods over students; empty: as the others
    fine_tuned_teachers: dict[str, Source] = {}  # of table 2, by name; each has the teacher's vocabulary
    methods: list[str] = Field(["none", "sft", "semalign"], min_length=1)  # rows of table 1
    hyperparameters: dict[str, dict[str, Any]] = {}  # a method's own; what differs by task, ``by_task``
    primary: Literal["answers", "tokens", "loss"] = "answers"  # what verdicts rest on
    search: Search = Search()
    regimes: Regimes = Regimes()
    others: int = Field(0, ge=0)  # questions of each other task, for what was forgotten
    answer_batch_size: int | None = Field(None, ge=1)  # questions answered at once; None: as eval_batch_size
    trial_jobs: bool = True  # method x task x seed as jobs side by side, or inside the chapters

    @pydantic.field_validator("tasks", "seeds", "decisive_seeds", "contest_seeds", "methods")
    @classmethod
    def _different(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError(f"{values} names one of them twice: take one out")
        return values

    @pydantic.model_validator(mode="after")
    def _names_are_known(self) -> Profile:
        tasks, methods = declared("benchmarks"), declared("methods")
        for at, task in enumerate(self.tasks):
            _one_of(task, tasks, f"tasks.{at}")
        for at, method in enumerate(self.methods):
            _one_of(method, methods, f"methods.{at}")
        for method, given in self.hyperparameters.items():
            _one_of(method, methods, "hyperparameters")
            for task in given.get("by_task", {}):
                _one_of(task, tasks, f"hyperparameters.{method}.by_task")
        for key in ("search", "regimes"):
            for at, task in enumerate(getattr(self, key).tasks):
                _one_of(task, self.tasks, f"{key}.tasks.{at}")
        for task, examples in self.regimes.again.items():
            _one_of(task, self.tasks if examples else tasks, "regimes.again")
        if self.data == "classroom":
            for split, most in classroom_sizes().items():
                if (asked := getattr(self.sizes, split) or 0) > most:
                    raise ValueError(f"sizes.{split}: {asked} is more than the {most} that the classroom has: lower it")
        if self.kin_teachers and len(self.kin_teachers) != len(self.students):
            students = len(self.students)
            raise ValueError(
                f"kin_teachers are {len(self.kin_teachers)}, students {students}: give one teacher for each"
            )
        for task, protocol in self.protocols.items():
            _one_of(task, tasks, "protocols")
            _one_of(protocol, tasks[task]["protocols"], f"protocols.{task}")
        return self

    @property
    def students(self) -> list[Source]:
        """The student and its siblings."""
        return [self.student, *self.siblings]

    @property
    def answered_at_once(self) -> int:
        """How many questions are answered at once."""
        return self.answer_batch_size or self.eval_batch_size

    @property
    def code_tasks(self) -> list[str]:
        """Those of the tasks whose answers are programs."""
        return [task for task in self.tasks if declared("benchmarks")[task].get("programs")]

    @property
    def answering(self) -> list[Source]:
        """The models that answer questions, or whose students do."""
        named = [self.teacher, self.student, self.smaller_student, *self.siblings, *self.kin_teachers]
        return [model for model in (*named, *self.fine_tuned_teachers.values()) if model is not None]

    @property
    def models(self) -> list[Source]:
        """Every model that the profile names."""
        return [*self.answering, self.semantics_model]

    @property
    def isolation(self) -> str:
        """The least sandbox level: limits suffice for programs by models of ours, others' need namespaces."""
        ours = all(isinstance(model, Pico | Random) for model in self.answering)
        return "rlimits" if ours else "namespace"

    @property
    def searched(self) -> Profile:
        """The same profile with as many training examples as its ``search`` has."""
        return self.changed(sizes={"train": self.search.examples or self.sizes.train})

    def protocol(self, task: str) -> str:
        """How a task is asked."""
        return self.protocols.get(task, "paper")

    def changed(self, **changes: Any) -> Profile:
        """The same profile with other values, checked as it was.

        Raises:
            ProfileError: a value that no profile can have.
        """
        return _checked(_merged(self.model_dump(exclude_unset=True), changes), self.name)


def load_profile(name_or_path: str | Path, folder: Path = FOLDER, **changes: Any) -> Profile:
    """Read and check one profile: ``folder/NAME.yaml`` by its name, or any yaml file by its path.

    A path within the profile (``source: folder``) counts from the folder that the profile lies in. ``changes`` replace
    values of the file; where both are mappings, key by key, and an empty one leaves nothing of what was there.

    Raises:
        ProfileError: no such profile (the message lists those there are), no yaml, an unknown key (the message
            names the nearest valid one) or a value that a profile cannot have.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ProfileError(_unknown(str(name_or_path), path))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _NoRepeats)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"correct profile {path.name}, which is not yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ProfileError(
            f"profile {path.name}: the file must hold keys with values, and holds {type(content).__name__}"
        )
    if "name" in content:
        raise ProfileError(f"profile {path.name}: the name is the file's: take the key 'name' out")
    content = _merged(content, changes)
    named = [content.get(k) for k in ("teacher", "student", "smaller_student", "semantics_model")]
    teachers = content.get("fine_tuned_teachers")
    named += teachers.values() if isinstance(teachers, dict) else ()
    for more in (content.get(k) for k in ("siblings", "kin_teachers")):
        named += more if isinstance(more, list) else ()
    for source in named:
        if isinstance(source, dict) and source.get("source") == "folder" and isinstance(source.get("path"), str):
            source["path"] = str((path.parent / Path(source["path"]).expanduser()).resolve())
    return _checked(content, path.stem, path.name)


def _checked(content: dict[str, Any], name: str, called: str = "") -> Profile:
    content = {**content, "name": name}
    if "student" in content:
        content.setdefault("semantics_model", content["student"])
    tasks = content.get("tasks")
    for key in ("search", "regimes"):
        if isinstance(tasks, list) and isinstance(content.get(key, {}), dict):
            content[key] = {"tasks": tasks[:1], **content.get(key, {})}
    try:
        return Profile.model_validate(content)
    except pydantic.ValidationError as error:
        raise ProfileError(f"profile {called or name}: {_sentence(error, Profile)}") from None


class _NoRepeats(yaml.SafeLoader):
    """yaml that refuses a key given twice, of which the plain loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice: keep one of them")
        return super().construct_mapping(node, deep)


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in changes.items():
        both = value and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "source" not in value
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _unknown(asked: str, path: Path) -> str:
    if path.parent != FOLDER and Path(asked).suffix:
        return f"there is no profile file {asked}: correct the path"
    names = sorted(p.stem for p in path.parent.glob("*.yaml"))
    if not names:
        return (
            f"there is no profile {asked!r}, nor any other in {path.parent}: install the package from its folder by "
            "pip install -e ., or give a yaml file"
        )
    return f"there is no profile {asked!r}{_nearest(asked, names)}; there are: {', '.join(names)}"


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _one_of(word: str, words: Iterable[str], where: str = "") -> str:
    words = list(words)
    if word not in words:
        said = f"{word!r} is not one of {', '.join(words)}{_nearest(word, words)}"
        raise ValueError(f"{where}: {said}" if where else said)
    return word


def _rank(problem: Mapping[str, Any]) -> tuple[bool, bool, list[str]]:
    """Unknown keys explain the rest; what is wrong with the student is wrong with its copy for figure 2 too."""
    where = [str(part) for part in problem["loc"]]
    return problem["type"] != "extra_forbidden", where[:1] == ["semantics_model"], where


def _sentence(error: pydantic.ValidationError, root: Any) -> str:
    """The most telling error in one sentence."""
    first: Any = min(error.errors(), key=_rank)
    where, model = _place(first["loc"], root)
    if first["type"] == "extra_forbidden":
        valid = [name for name in model.model_fields if name != "name"]
        return f"unknown key {where!r}{_nearest(str(first['loc'][-1]), valid)}; valid: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{where} is missing: add it"
    if first["type"] == "value_error":
        said = str(first["ctx"]["error"])
        return f"{where}: {said}" if where else said
    if first["type"] == "union_tag_not_found":
        return f"{where}: source is missing; it is one of {', '.join(KINDS)}"
    if first["type"] == "union_tag_invalid":
        tag = first["ctx"]["tag"]
        return f"{where}.source: {tag!r} is not one of {', '.join(KINDS)}{_nearest(tag, KINDS)}"
    value, hint = first["input"], ""
    if isinstance(value, str) and _is_number(value):
        hint = " (yaml reads 3e-4 as text; write 3.0e-4)"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where or 'the file'}: {value!r} is refused: {message}{hint}"


def _place(location: tuple[int | str, ...], root: Any) -> tuple[str, Any]:
    """Where an error is, in the words of the file, and the model whose key it concerns."""
    model, parts, tagged = root, list[str](), False
    for part in location:
        if part in KINDS and not tagged:  # the tag of a union stands in the location and not in the file
            model, tagged = KINDS[str(part)], True
            continue
        parts.append(str(part))
        fields = getattr(model, "model_fields", {})
        inner = fields[part].annotation if part in fields else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return ".".join(parts), model


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
