"""The pipeline: what decides a rerun, one scenario from a failing notebook to the built book, and bad input."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from semalign import pipeline
from semalign.profiles import load_profile
from semalign.report import load_metrics, save_metrics
from semalign.study import trials

ROOT = pipeline.ROOT
LEFT_OUT = shutil.ignore_patterns(
    ".venv", "results", ".git", ".snakemake", "__pycache__", ".*_cache", "*.egg-info", "build", "weights"
)


def command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "semalign.pipeline", *words],
        cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree without its results, so that notebooks can be broken."""
    root = tmp_path_factory.mktemp("repository") / "copy"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    if (ROOT / "semalign/classroom/weights").exists():
        (root / "semalign/classroom/weights").symlink_to(ROOT / "semalign/classroom/weights")
    return root


def edit(path: Path, cell: int, source: str) -> str:
    notebook = nbformat.read(path, as_version=4)
    before = notebook.cells[cell].source
    notebook.cells[cell].source = source
    nbformat.write(notebook, path)
    return before


def times(root: Path) -> dict[str, int]:
    return {p.stem: p.stat().st_mtime_ns for p in (root / "results/smoke/metrics").glob("*.json")}


def test_smoke_profile_from_a_failing_notebook_to_the_book(copy: Path) -> None:
    """A failing notebook names itself and keeps its traceback; the next call resumes there; a third runs nothing."""
    broken = copy / "notebooks/03_pairing.ipynb"
    at = next(i for i, c in reversed(list(enumerate(nbformat.read(broken, 4).cells))) if c.cell_type == "code")
    source = edit(broken, at, "raise ArithmeticError('the planted error')")
    failed = command(copy, "run", "smoke", "--cores", "1")
    assert failed.returncode != 0
    said = (
        f"notebook 03_pairing failed in cell {at + 1}: ArithmeticError: the planted error"  # one injected cell before
    )
    assert said in failed.stdout.replace(f"cell {at}:", f"cell {at + 1}:"), failed.stdout
    kept = (copy / "results/smoke/notebooks/03_pairing.ipynb").read_text()
    assert "ArithmeticError" in kept and "Traceback" in kept
    first = times(copy)
    assert set(first) == {"00_models_and_data", "01_semantics", "02_importance"} or set(first) == set(
        pipeline.ORDER
    ) - {
        "03_pairing",
        *(n for n, before in pipeline.ORDER.items() if "03_pairing" in before),
    }

    edit(broken, at, source)
    whole = command(copy, "run", "smoke", "--cores", "2")
    assert whole.returncode == 0, whole.stdout
    second = times(copy)
    assert set(second) == set(pipeline.ORDER)
    assert {n: second[n] for n in first} == first, "a finished notebook was run again"
    index = copy / "results/smoke/book/_build/html/index.html"
    assert str(index) in whole.stdout and index.exists()

    idle = command(copy, "run", "smoke", "--cores", "1")
    assert idle.returncode == 0 and times(copy) == second
    assert "cell 1/" not in idle.stdout


def test_every_page_says_how_it_was_made(copy: Path) -> None:
    html = copy / "results/smoke/book/_build/html"
    if not html.exists():
        pytest.fail("the scenario test above builds the book")
    for name in pipeline.ORDER:
        page = (html / "notebooks" / f"{name}.html").read_text()
        assert "How this page was made" in page
        for word in ("commit", "profile", "seeds", "torch", "smoke"):
            assert word in page.lower(), f"{name} does not say its {word}"
        _, provenance = load_metrics(copy / "results/smoke/metrics" / f"{name}.json")
        assert provenance["profile"] == "smoke"


def test_digest_ignores_outputs_and_follows_sources(copy: Path) -> None:
    path = copy / "notebooks/02_importance.ipynb"

    def digests() -> dict[str, str]:
        code = "import json; from semalign import pipeline; print(json.dumps(pipeline.digests('smoke')))"
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, text=True,
            capture_output=True, check=True,
        ).stdout  # fmt: skip
        return dict(__import__("json").loads(out))

    clean = digests()
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if c.cell_type == "code")
    cell.execution_count, cell.outputs = 7, [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(notebook, path)
    assert digests() == clean
    cell.source += "\n# another thought"
    nbformat.write(notebook, path)
    changed = {n for n, d in digests().items() if d != clean[n]}
    assert changed == {"02_importance", *_after("02_importance")}
    clean = digests()
    with open(copy / "book/claims.yaml", "a") as file:
        file.write("# another thought\n")
    assert {n for n, d in digests().items() if d != clean[n]} == {"15_paper_against_ours"}
    clean = digests()
    (copy / "book/full_run/more.json").write_text("{}")
    assert {n for n, d in digests().items() if d != clean[n]} == {"15_paper_against_ours", "93_full_run"}
    (copy / "book/full_run/more.json").unlink()


def _after(name: str) -> set[str]:
    direct = {n for n, before in pipeline.ORDER.items() if name in before}
    return direct.union(*(_after(n) for n in direct)) if direct else set()


def test_an_unknown_profile_is_one_sentence_and_leaves_nothing(copy: Path) -> None:
    done = command(copy, "run", "clasroom")
    assert done.returncode == 1
    assert "clasroom" in done.stdout and "classroom" in done.stdout and "Traceback" not in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert not (copy / "results/clasroom").exists()


def test_a_second_run_over_the_same_results_is_refused(tmp_path: Path) -> None:
    pipeline.lock(str(tmp_path))
    code = f"from semalign import pipeline; pipeline.lock({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode != 0 and f"another run is writing to {tmp_path}" in done.stderr


def test_a_killed_make_takes_the_notebook_with_it(tmp_path: Path) -> None:
    """The process that runs a notebook ends within two seconds once the watched process is gone."""
    sleeper = subprocess.Popen(["sleep", "60"])
    code = f"import time; from semalign import pipeline; pipeline._watch([{sleeper.pid}]); time.sleep(30)"
    watched = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        sleeper.kill()
        sleeper.wait()
        assert watched.wait(timeout=15) == 1
    finally:
        watched.kill()


def test_a_profile_runs_the_chapters_of_its_tasks_and_a_job_for_each_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = dataclasses.replace(load_profile("classroom-full"), tasks=["gsm8k"], methods=["none", "sft"], seeds=[0, 3])
    monkeypatch.setattr(pipeline, "load_profile", lambda _: small)
    assert set(pipeline.ORDER) - set(pipeline.notebooks_of("mine")) == {"05_mmlu", "07_humaneval", "08_mbpp"}
    jobs = ["gsm8k/none-0.json", "gsm8k/sft-0.json", "gsm8k/sft-3.json", "gsm8k/teacher-0.json"]
    assert sorted(pipeline.trials_of("mine", "06_gsm8k")) == jobs
    assert pipeline.trials_of("mine", "04_alignment") == []
    assert not {"05_mmlu", "07_humaneval"} & set(pipeline.notebooks_of("mine")["15_paper_against_ours"])
    assert "06_gsm8k" in pipeline.notebooks_of("mine")["15_paper_against_ours"]
    alone = dataclasses.replace(small, trial_jobs=False)
    monkeypatch.setattr(pipeline, "load_profile", lambda _: alone)
    assert pipeline.trials_of("mine", "06_gsm8k") == []


def test_the_jobs_run_under_the_seeds_that_the_chapters_ask_for() -> None:
    profile = load_profile("classroom-full")
    asked = {m: list(trials.seeds_of(m, profile.seeds)) for m in (trials.TEACHER, "none", *profile.methods)}
    expected = {f"mmlu/{method}-{seed}.json" for method, seeds in asked.items() for seed in seeds}
    jobs = pipeline.trials_of("classroom-full", "05_mmlu")
    assert set(jobs) == expected and len(jobs) == len(expected)


def test_planning_a_run_loads_no_model_library() -> None:
    """Snakemake plans at every call, and a cluster's executor for every job."""
    code = (
        "import sys; from semalign import pipeline; p = 'classroom'; pipeline.digests(p); pipeline.book_digest(p); "
        "[pipeline.trials_of(p, n) for n in pipeline.notebooks_of(p)]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"


def test_somebody_elses_programs_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    assert pipeline.main(["run", "llama2"]) == 1
    said = capsys.readouterr().err
    assert "profile llama2 has humaneval and mbpp" in said and "allow_code_execution: true" in said


def test_a_finished_run_is_kept_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    names = [name for name in pipeline.ORDER if name not in pipeline.KEPT_ELSEWHERE]
    for name in names[1:]:
        save_metrics(tmp_path / f"results/smoke/metrics/{name}.json", {"of": name}, seeds=[4], profile="smoke")
    assert pipeline.main(["keep", "smoke"]) == 1
    assert f"smoke has no numbers of {names[0]}: call make notebooks" in capsys.readouterr().err
    assert not (tmp_path / "book/full_run").exists()
    save_metrics(tmp_path / f"results/smoke/metrics/{names[0]}.json", {"of": names[0]}, seeds=[4], profile="smoke")
    assert pipeline.main(["keep", "smoke"]) == 0
    kept = {p.stem: load_metrics(p) for p in (tmp_path / "book/full_run").glob("*.json")}
    version, made = kept.pop("version")
    assert version == {"code": trials.code_key()} and (made["profile"], made["seeds"]) == ("smoke", [4])
    assert {name: numbers["of"] for name, (numbers, _) in kept.items()} == {name: name for name in names}


def test_rates_are_chosen_from_the_grid_and_stored_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    scores = {"sft": {"0.1": {"gsm8k": None}, "0.01": {"gsm8k": 0.7}, "0.001": {"gsm8k": 0.6}}}
    asked = []
    monkeypatch.setattr(trials, "grid", lambda settings, rates, folder: asked.append((rates, folder)) or scores)
    assert pipeline.main(["rates", "smoke"]) == 0
    assert asked == [(pipeline.RATES, tmp_path / "results/smoke/artefacts/rates")]
    stored, made = load_metrics(tmp_path / "book/rates/smoke.json")
    assert stored["scores"] == scores and stored["chosen"] == {"sft": 0.01}
    assert made["profile"] == "smoke" and stored["epochs"] == load_profile("smoke").epochs


@pytest.mark.parametrize("name", ["classroom", "classroom-full"])
def test_the_profiles_rates_are_those_that_were_chosen(name: str) -> None:
    stored, _ = load_metrics(ROOT / f"book/rates/{name}.json")
    profile = load_profile(name)
    own = {m: r for m, r in stored["chosen"].items() if r != profile.lr}
    assert profile.lrs == own
    assert {n: stored["examples"][n] for n in ("train", "validation")} == {
        n: profile.sizes[n] for n in ("train", "validation")
    }
