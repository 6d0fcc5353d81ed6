"""Profiles: a yaml file says who teaches whom, on what, and how much; its values are the notebooks' parameters."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "profiles"
"""Where the book's own profiles are."""


class ProfileError(ValueError):
    """A profile is unknown, unreadable, or says something that no profile can say; the message names it and the fix."""


@dataclass(frozen=True)
class Profile:
    """One run of the book. Keys are those of ``profile.schema.json``; the defaults are those of a small run on a CPU.

    ``teacher``, ``student``, ``smaller_student`` and ``semantics_model`` are model sources, see
    :func:`semalign.models.load_model`.
    """

    name: str
    description: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    semantics_model: dict[str, Any]
    smaller_student: dict[str, Any] | None = None
    semantics_texts: int = 20
    data: str = "benchmarks"
    tasks: list[str] = field(default_factory=lambda: ["mmlu", "gsm8k", "humaneval", "mbpp"])
    seeds: list[int] = field(default_factory=lambda: [0])
    sizes: dict[str, int | None] = field(default_factory=dict)
    max_length: int = 256
    batch_size: int = 16
    eval_batch_size: int = 8
    device: str = "auto"
    dtype: str = "float32"
    layer: int | None = None
    interface: str = "mlp"
    map: str = "paper"
    lr: float = 3e-4
    lrs: dict[str, float] = field(default_factory=dict)
    epochs: int = 5
    fine_tuned_teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: list[str] = field(default_factory=lambda: ["none", "sft", "semalign"])
    primary: str = "answers"
    search: dict[str, Any] = field(default_factory=dict)
    mmlu_protocol: str = "paper"
    others: int = 0
    max_new_tokens: int | None = None
    trial_jobs: bool = True
    allow_code_execution: bool = False


SIZES: dict[str, int | None] = {"train": 1000, "align": 80, "extract": 20, "validation": 100, "test": None}
"""Examples of each split where a profile is silent: those of the paper's setup, and every test item."""


def load_profile(name_or_path: str | Path, folder: Path = FOLDER) -> Profile:
    """Read and check one profile: ``folder/NAME.yaml`` by its name, or any yaml file by its path.

    A path within the profile (``source: folder``) counts from the folder that the profile lies in.

    Raises:
        ProfileError: no such profile (the message lists those there are), no yaml, an unknown key (the message
            names the nearest valid one) or a value that the schema refuses.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ProfileError(_unknown(str(name_or_path), path))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {path.name} is not yaml: {' '.join(str(error).split())}") from None
    _check(content, path.name)
    named = [content[k] for k in ("teacher", "student", "smaller_student", "semantics_model") if content.get(k)]
    for source in [*named, *content.get("fine_tuned_teachers", {}).values()]:
        if source["source"] == "folder":
            source["path"] = str((path.parent / Path(source["path"]).expanduser()).resolve())
    content.setdefault("semantics_model", dict(content["student"]))
    content["sizes"] = {**SIZES, **content.get("sizes", {})}
    chosen = Profile(name=path.stem, **content)
    return replace(chosen, search={"draws": 8, "tasks": chosen.tasks[:1], **chosen.search})


def parameters(profile: Profile) -> dict[str, Any]:
    """All that a profile says, but its name, as plain values for papermill: strings, numbers, lists and mappings."""
    values = asdict(profile)
    del values["name"]
    return values


def _unknown(asked: str, path: Path) -> str:
    if path.parent != FOLDER and Path(asked).suffix:
        return f"there is no profile file {asked}"
    names = sorted(p.stem for p in path.parent.glob("*.yaml"))
    return f"there is no profile {asked!r}{_nearest(asked, names)}; there are: {', '.join(names) or 'none'}"


def _nearest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""


def _check(content: object, name: str) -> None:
    """Raise the most telling error of ``content`` against the schema: unknown keys first, as they explain the rest."""
    schema = json.loads(resources.files("semalign").joinpath("profile.schema.json").read_text(encoding="utf-8"))
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(content))
    for error in sorted(errors, key=lambda e: (e.validator != "additionalProperties", list(map(str, e.absolute_path)))):
        raise ProfileError(f"profile {name}: {_sentence(error)}")


def _sentence(error: jsonschema.ValidationError) -> str:
    where = ".".join(str(part) for part in error.absolute_path)
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        schema: Any = error.schema
        valid = list(schema["properties"])
        key = next(str(k) for k in instance if k not in valid)
        path = f"{where}.{key}" if where else key
        return f"unknown key {path!r}{_nearest(key, valid)}; valid: {', '.join(valid)}"
    hint = ""
    if isinstance(instance, str) and _is_number(instance):
        hint = " (yaml reads 3e-4 as text; write 3.0e-4)"
    return f"{where or 'the file'}: {error.message}{hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
