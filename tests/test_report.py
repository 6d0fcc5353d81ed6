"""Metrics come back as they were saved, say what made them, and are never half-written; colours can be told apart."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from semalign import report
from semalign.methods import REGISTRY
from semalign.profiles import FOLDER, ProfileError, load_profile
from semalign.report import BASIS_COLOURS, load_metrics, provenance_table, save_metrics, use_style


def save(path: Path, metrics: dict[str, Any], **more: Any) -> None:
    save_metrics(path, metrics, **{"seeds": [0, 1], "profile": "smoke", **more})


def test_metrics_come_back_with_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "01.json"
    given = {
        "a": torch.tensor([[1.5, 2.0]]),
        "b": np.float32(0.5),
        "c": (1, None, "x", True),
        "d": {3: torch.tensor(7)},
    }
    save(path, given, wall_s=12.3)
    metrics, made = load_metrics(path)
    assert metrics == {"a": [[1.5, 2.0]], "b": 0.5, "c": [1, None, "x", True], "d": {"3": 7}}
    assert (made["profile"], made["seeds"], made["wall_s"]) == ("smoke", [0, 1], 12.3)
    assert (
        made["packages"]["torch"] == torch.__version__.split("+")[0] or made["packages"]["torch"] == torch.__version__
    )
    assert made["packages"].keys() == {"semalign", "torch", "transformers", "peft", "lm-eval"}
    assert made["cores"] >= 1 and made["cpu"] and made["python"].count(".") == 2 and made["date"].endswith("UTC")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), r"^metrics\.deep\[1\]\.x is nan: store None"),
        (torch.tensor(float("inf")), r"^metrics\.deep\[1\]\.x is inf: store None"),
        (np.array([1.0, np.nan]), r"^metrics\.deep\[1\]\.x\[1\] is nan"),
        ({1, 2}, r"^metrics\.deep\[1\]\.x is a set, which json cannot hold"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path: Path, value: Any, said: str) -> None:
    path = tmp_path / "01.json"
    save(path, {"old": 1})
    with pytest.raises(ValueError, match=said):
        save(path, {"deep": [0, {"x": value}]})
    assert load_metrics(path)[0] == {"old": 1}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "01.json"
    save(path, {"old": 1})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        save(path, {"new": 2})
    assert load_metrics(path)[0] == {"old": 1}
    assert list(tmp_path.glob("*.json")) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"metrics": {}}'])
def test_what_is_no_metrics_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "01.json"
    with pytest.raises(ValueError, match=r"there are no metrics at .*01\.json: run the notebook"):
        load_metrics(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"01\.json is not a metrics file: delete it"):
        load_metrics(path)


needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


@needs_git
def test_commit_and_uncommitted_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository of its own: before its first commit, right after it, and with a change."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def origin() -> tuple[str, bool]:
        save(tmp_path.parent / "out.json", {})
        made = load_metrics(tmp_path.parent / "out.json")[1]
        return made["commit"], made["dirty"]

    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert origin() == ("unknown", False)
    git("init", "-q")
    assert origin() == ("unknown", False)
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert origin() == (head, False)
    (tmp_path / "file").write_text("2")
    assert origin() == (head, True)
    monkeypatch.setenv("PATH", "")
    assert origin() == ("unknown", False)


def test_provenance_table_says_all_and_is_a_table(tmp_path: Path) -> None:
    save(tmp_path / "01.json", {}, wall_s=61.7)
    made = load_metrics(tmp_path / "01.json")[1]
    table = provenance_table({**made, "commit": "0123456789abcdef", "dirty": True, "gpu": "NVIDIA H100"})
    assert all(line.count("|") == 3 for line in table.splitlines()) and table.splitlines()[1] == "|---|---|"
    for said in ("| commit | 0123456789ab with uncommitted changes |", "| seeds | 0, 1 |", "| profile | smoke |",
                 "| GPU | NVIDIA H100 |", "| wall time | 62 s |", f"torch {made['packages']['torch']}"):  # fmt: skip
        assert said in table
    clean = provenance_table({**made, "commit": "0123456789abcdef", "dirty": False, "gpu": None, "wall_s": None})
    assert "| commit | 0123456789ab |" in clean and "GPU" not in clean and "wall time" not in clean


SHOWN = {name for path in FOLDER.glob("*.yaml") for name in load_profile(path.stem).methods}
METHOD_COLOURS = {name: row.colour for name, row in REGISTRY.items() if name in SHOWN}
"""Of the methods that some profile's figures draw together; the others stand in chapters of their own."""

# What the three kinds of dichromats see, in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]])


def lab(colour: str, vision: Any) -> NDArray[np.float64]:
    """CIELAB of a colour as someone sees it."""
    c = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(np.array(vision) @ linear, 0, 1) / [0.95047, 1, 1.08883]
    fx, fy, fz = (np.cbrt(v) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [METHOD_COLOURS, BASIS_COLOURS], ids=["methods", "bases"])
def test_any_two_colours_can_be_told_apart_and_all_show_on_white(colours: dict[str, str], vision: str) -> None:
    seen = {name: lab(colour, VISION[vision]) for name, colour in colours.items()}
    assert lab("#ffffff", VISION[vision])[0] == pytest.approx(100, abs=0.5)
    for a, b in itertools.combinations(colours, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, (a, b)  # the best found for 22 colours is 18, all of them new
    assert all(s[0] < 90 for s in seen.values())


def test_every_method_and_basis_has_a_colour() -> None:
    assert BASIS_COLOURS.keys() == {"dual", "primal", "tight", "random"}
    assert len({row.colour for row in REGISTRY.values()}) == len(REGISTRY)


def test_style_draws_the_same_svg_twice(tmp_path: Path) -> None:
    matplotlib.use("agg")
    use_style()
    from matplotlib import pyplot

    def draw() -> str:
        figure, axes = pyplot.subplots()
        axes.plot([0, 1], [0, 1])
        figure.savefig(tmp_path / "a.svg", metadata={"Date": None})
        pyplot.close(figure)
        return (tmp_path / "a.svg").read_text()

    assert draw() == draw()
    assert not matplotlib.rcParams["axes.spines.top"]


def test_json_on_disk_is_for_people_too(tmp_path: Path) -> None:
    save(tmp_path / "01.json", {"accuracy": 0.25})
    assert '\n  "accuracy": 0.25' in (tmp_path / "01.json").read_text()


@needs_git
def test_a_repository_around_an_unpacked_archive_lends_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(report, "ROOT", tmp_path / "zip")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "zip" / "semalign" / "report.py"))
    (tmp_path / "zip" / "semalign").mkdir(parents=True)
    save_metrics(tmp_path / "m.json", {"a": 1}, seeds=[0], profile="x")
    assert load_metrics(tmp_path / "m.json")[1]["commit"] == "unknown"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"changes": None}, "changes is None: give values of the profile by name"),
        ({"changes": "seeds"}, "changes is 'seeds': give values"),
        ({"changes": {"name": "mine"}}, "changes is {'name': 'mine'}: give values"),
        ({"changes": {"folder": "/x"}}, "changes is {'folder': '/x'}: give values"),
        ({"changes": {1: 2}}, "unknown key '1'"),
        ({"profile": None}, "profile is None: give the name of a profile"),
        ({"results": "/proc/none"}, "no results can go to /proc/none .*: give another folder"),
        ({"results": __file__}, "no results can go to .*test_report.py .*: give another folder"),
    ],
)
def test_a_notebooks_parameters_are_refused_in_one_sentence(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=said) as refused:
        report.opened(**{"profile": "smoke", "results": tmp_path / "mine", "changes": {}, **given})
    assert "\n" not in str(refused.value)


def test_what_an_earlier_notebook_left_comes_back_or_that_notebook_is_named(tmp_path: Path) -> None:
    (tmp_path / "artefacts").mkdir()
    with pytest.raises(ValueError, match=r"importance\.json: run the notebook 02_importance with these results first"):
        report.load_artefact(tmp_path, "importance.json", of="02_importance")
    report.save_artefact(tmp_path, "importance.json", {"critical_layer": 3})
    assert report.load_artefact(tmp_path, "importance.json", of="02_importance")["critical_layer"] == 3
    whole = (tmp_path / "artefacts/importance.json").read_text()
    (tmp_path / "artefacts/importance.json").write_text(whole[:-9])
    with pytest.raises(ValueError, match="run the notebook 02_importance"):
        report.load_artefact(tmp_path, "importance.json", of="02_importance")


def test_a_notebooks_parameters_are_opened_and_a_profiles_values_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, folder = report.opened("smoke", tmp_path / "mine", {"seeds": [4]})
    assert (p.name, p.seeds, folder) == ("smoke", [4], (tmp_path / "mine").resolve())
    assert (folder / "metrics").is_dir() and report.named(p, {"seeds": [4]}) == "smoke, but for seeds=[4]"
    monkeypatch.setattr(sys.modules["__main__"], "teacher", {"source": "pico", "id": "pico-l"}, raising=False)
    with pytest.raises(ProfileError, match="teacher are values of a profile and no parameters: give -p profile NAME"):
        report.opened("smoke", tmp_path / "mine", {})


def test_a_figure_calls_data_by_their_name() -> None:
    classroom, hub = load_profile("classroom"), load_profile("smollm2")
    assert (report.data_name(classroom, "mmlu"), report.data_name(hub, "mmlu")) == ("Pico facts", "MMLU")
