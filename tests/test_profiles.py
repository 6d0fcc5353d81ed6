"""Every profile of the book is valid, and what is wrong with another is said in one sentence."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from semalign.profiles import FOLDER, Profile, ProfileError, load_profile, parameters

NAMES = ["classroom", "classroom-full", "codellama", "llama2", "olmo2", "qwen3", "smoke", "smollm2", "wizardcoder"]
SCHEMA = json.loads(resources.files("semalign").joinpath("profile.schema.json").read_text())
STUDENT = {"source": "packaged", "id": "smollm2-135m-instruct"}
SMALL = {"description": "one", "teacher": {"source": "pico", "id": "pico-l"}, "student": STUDENT}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def refusal(folder: Path, **changes: object) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(written(folder, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_books_profiles_are_these() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_profile_loads_and_its_parameters_are_plain(name: str) -> None:
    profile = load_profile(name)
    given = parameters(profile)
    assert profile.name == name and "name" not in given
    assert json.loads(json.dumps(given)) == given
    assert profile.sizes.keys() == SCHEMA["properties"]["sizes"]["properties"].keys()
    ours = {profile.teacher["source"], profile.student["source"]} <= {"random", "pico"}
    assert profile.allow_code_execution == ours  # the programs of anybody else's model wait for a decision


@pytest.mark.parametrize("name", NAMES)
def test_hub_models_are_pinned_where_a_commit_is_known(name: str) -> None:
    profile = load_profile(name)
    for source in (profile.teacher, profile.student, profile.semantics_model):
        if source["source"] == "hub" and source["id"] not in (
            "codellama/CodeLlama-13b-Python-hf",
            "WizardLMTeam/WizardCoder-Python-13B-V1.0",
        ):
            assert len(source["revision"]) == 40 and int(source["revision"], 16)


def test_schema_and_profile_have_the_same_keys() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {f.name for f in dataclasses.fields(Profile)} - {"name"} == SCHEMA["properties"].keys()


def test_what_a_profile_leaves_out(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, sizes={"train": 7}))
    assert profile.name == "mine" and profile.semantics_model == STUDENT
    assert profile.sizes == {"train": 7, "align": 80, "extract": 20, "validation": 100, "test": None}
    jsonschema.validate(parameters(profile), SCHEMA)


def test_a_model_folder_counts_from_the_profile(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, teacher={"source": "folder", "path": "models/big"}))
    assert profile.teacher["path"] == str(tmp_path / "models" / "big")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epoch": 3}, "unknown key 'epoch', did you mean 'epochs'?; valid: description, teacher"),
        ({"sizes": {"trian": 3}}, "unknown key 'sizes.trian', did you mean 'train'?; valid: train, align"),
        (
            {"teacher": {"source": "pico", "idd": "pico-l"}},
            "unknown key 'teacher.idd', did you mean 'id'?; valid: source, id",
        ),
        (
            {"student": {"source": "random", "seed": 0, "config": {"model_type": "llama", "hiden_size": 8}}},
            "unknown key 'student.config.hiden_size', did you mean 'hidden_size'?; valid: model_type",
        ),
        ({"zzz": 1}, "unknown key 'zzz'; valid: "),
        ({"teacher": {"id": "x"}}, "teacher: 'source' is a required property"),
        ({"teacher": {"source": "hub", "id": "a/b"}}, "teacher: 'revision' is a required property"),
        ({"teacher": {"source": "hubb"}}, "teacher.source: 'hubb' is not one of ['hub', "),
        ({"seeds": 3}, "seeds: 3 is not of type 'array'"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] has non-unique elements"),
        ({"lr": "3e-4"}, "lr: '3e-4' is not of type 'number' (yaml reads 3e-4 as text; write 3.0e-4)"),
        ({"tasks": ["mmlu", "mmmlu"]}, "tasks.1: 'mmmlu' is not one of ['mmlu', "),
        ({"allow_code_execution": "no"}, "allow_code_execution: 'no' is not of type 'boolean'"),
        ({"layer": 0}, "layer: 0 is less than the minimum of 1"),
        ({"device": "gpu"}, "device: 'gpu' does not match "),
    ],
)
def test_a_wrong_profile_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    assert refusal(tmp_path, **changes).startswith(f"profile mine.yaml: {said}")


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("clasroom")
    assert (
        str(caught.value) == f"there is no profile 'clasroom', did you mean 'classroom'?; there are: {', '.join(NAMES)}"
    )
    with pytest.raises(ProfileError, match=r"^there is no profile file absent/mine.yaml$"):
        load_profile("absent/mine.yaml")


@pytest.mark.parametrize("text", ["", "- a list", "teacher: [", "\x00"])
def test_a_file_that_is_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(
        ProfileError, match=r"^profile mine\.yaml(: the file: .* is not of type 'object'| is not yaml: )"
    ):
        load_profile(path)


def test_profiles_by_name_in_another_folder(tmp_path: Path) -> None:
    written(tmp_path)
    assert load_profile("mine", tmp_path).description == "one"
    with pytest.raises(ProfileError, match=r"there are: mine$"):
        load_profile("yours", tmp_path)
