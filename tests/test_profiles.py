"""Every profile of the book is valid, and what is wrong with another is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from semalign.benchmarks import PROTOCOLS
from semalign.classroom import corpora
from semalign.methods import REGISTRY
from semalign.profiles import FOLDER, Hub, Packaged, ProfileError, classroom_sizes, declared, load_profile

NAMES = ["classroom", "classroom-full", "codellama", "llama2", "olmo2", "qwen3", "smoke", "smollm2", "wizardcoder"]
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
def test_a_profile_loads_and_says_whose_programs_run_where(name: str) -> None:
    p = load_profile(name)
    ours = {p.teacher.source, p.student.source} <= {"random", "pico"}
    assert p.name == name
    assert p.allow_code_execution == ours  # the programs of anybody else's model wait for a decision
    assert p.isolation == ("rlimits" if ours else "namespace")


def test_the_sandbox_policy_follows_the_models_and_not_the_data() -> None:
    theirs = load_profile("smoke", student=STUDENT)
    assert theirs.data == "classroom" and theirs.isolation == "namespace"
    assert load_profile("smoke", fine_tuned_teachers={"one": STUDENT}).isolation == "namespace"


@pytest.mark.parametrize("name", NAMES)
def test_hub_models_are_pinned_where_a_commit_is_known(name: str) -> None:
    p = load_profile(name)
    for source in (p.teacher, p.student, p.semantics_model):
        if isinstance(source, Hub) and source.id not in (
            "codellama/CodeLlama-13b-Python-hf",
            "WizardLMTeam/WizardCoder-Python-13B-V1.0",
        ):
            assert len(source.revision) == 40 and int(source.revision, 16)


def test_rows_are_known_without_importing_them() -> None:
    assert set(declared("methods")) == set(REGISTRY)
    assert {name: tuple(row["protocols"]) for name, row in declared("benchmarks").items()} == PROTOCOLS
    assert all(row["colour"] == REGISTRY[name].colour for name, row in declared("methods").items())


def test_what_a_profile_leaves_out(tmp_path: Path) -> None:
    p = load_profile(written(tmp_path, sizes={"train": 7}, tasks=["mbpp", "mmlu"]))
    assert p.name == "mine" and p.semantics_model == Packaged(**STUDENT)  # type: ignore[arg-type]
    assert dict(p.sizes) == {"train": 7, "align": 80, "extract": 20, "validation": 100, "test": None}
    assert p.search.tasks == ["mbpp"] and p.protocol("mmlu") == "paper"


def test_changes_are_merged_and_checked(tmp_path: Path) -> None:
    p = load_profile(written(tmp_path, sizes={"train": 7}), sizes={"align": 3}, lr=0.5)
    assert (p.sizes.train, p.sizes.align, p.lr) == (7, 3, 0.5)
    assert p.changed(sizes={"train": 9}).sizes.align == 3
    tuned = p.changed(hyperparameters={"sft": {"lr": 0.25}})
    assert tuned.changed(hyperparameters={"sft": {"epochs": 3}}).hyperparameters == {"sft": {"lr": 0.25, "epochs": 3}}
    assert tuned.changed(hyperparameters={}).hyperparameters == {}
    assert p.changed(student={"source": "pico", "id": "pico-l"}).semantics_model.source == "packaged"
    with pytest.raises(ProfileError, match=r"^profile mine: lr: 'x' is refused"):
        p.changed(lr="x")


def test_a_model_folder_counts_from_the_profile(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, teacher={"source": "folder", "path": "models/big"}))
    assert profile.teacher.path == str(tmp_path / "models" / "big")  # type: ignore[union-attr]


def test_an_installation_without_profiles_says_how_to_install(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"'classroom', nor any other in .*: install .* pip install -e \., or give"):
        load_profile("classroom", folder=tmp_path)


def test_the_classroom_has_as_many_items_as_profiles_are_told() -> None:
    assert classroom_sizes() == corpora.SIZES
    load_profile("classroom", sizes=corpora.SIZES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epoch": 3}, "unknown key 'epoch', did you mean 'epochs'?; valid: teacher, student"),
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
        ({"name": "other"}, "the name is the file's: take the key 'name' out"),
        ({"teacher": {"id": "x"}}, "teacher: source is missing; it is one of hub, "),
        ({"teacher": {"source": "hub", "id": "a/b"}}, "teacher.revision is missing: add it"),
        ({"teacher": {"source": "hubb"}}, "teacher.source: 'hubb' is not one of hub, folder"),
        ({"teacher": {"source": "pico", "id": "pico-k"}}, "teacher.id: 'pico-k' is not one of "),
        ({"seeds": 3}, "seeds: 3 is refused: input should be a valid list"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] names one of them twice"),
        (
            {"lr": "3e-4"},
            "lr: '3e-4' is refused: input should be a valid number (yaml reads 3e-4 as text; write 3.0e-4)",
        ),
        ({"lr": float("nan")}, "lr: nan is refused: input should be a finite number"),
        ({"tasks": ["mmlu", "mmmlu"]}, "tasks.1: 'mmmlu' is not one of "),
        ({"methods": ["sftt"]}, "methods.0: 'sftt' is not one of "),
        ({"hyperparameters": {"sftt": {}}}, "hyperparameters: 'sftt' is not one of "),
        ({"tasks": ["mmlu"], "search": {"tasks": ["mbpp"]}}, "search.tasks.0: 'mbpp' is not one of mmlu"),
        ({"protocols": {"mmlu": "loud"}}, "protocols.mmlu: 'loud' is not one of paper, "),
        ({"allow_code_execution": "no"}, "allow_code_execution: 'no' is refused: input should be a valid boolean"),
        ({"layer": 0}, "layer: 0 is refused: input should be greater than or equal to 1"),
        ({"device": "gpu"}, "device: 'gpu' is refused: string should match pattern"),
        (
            {"data": "classroom", "sizes": {"train": 1_000_000}},
            "sizes.train: 1000000 is more than the 1000 that the classroom has: lower it",
        ),
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
    with pytest.raises(ProfileError, match=r"^there is no profile file absent/mine.yaml: correct the path$"):
        load_profile("absent/mine.yaml")


@pytest.mark.parametrize("text", ["", "- a list", "teacher: [", "\x00", "lr: 1.0\nlr: 2.0"])
def test_a_file_that_is_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"^(correct )?profile mine\.yaml(: the file must|, which is not)"):
        load_profile(path)


def test_profiles_by_name_in_another_folder(tmp_path: Path) -> None:
    written(tmp_path)
    assert load_profile("mine", tmp_path).description == "one"
    with pytest.raises(ProfileError, match=r"there are: mine$"):
        load_profile("yours", tmp_path)
