"""What decides a rerun, what a profile leaves out, and bad input."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from jupyter_client.manager import AsyncKernelManager
from transformers import PreTrainedModel
from working_copy import command, copy_to

from semalign import models
from semalign.lm.files import read_json, write_json
from semalign.methods import REGISTRY
from semalign.pipeline import __main__ as cli
from semalign.pipeline import book, notebooks
from semalign.profiles import FOLDER, Profile, load_profile
from semalign.report import load_metrics, save_metrics
from semalign.study import trials, tuning
from semalign.study.kept import codes_path, version_of

ROOT, ORDER = notebooks.ROOT, notebooks.ORDER


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_to(tmp_path_factory.mktemp("repository") / "copy")


def python(root: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, text=True, capture_output=True, check=True
    ).stdout.strip()


def digests_in(root: Path) -> dict[str, str]:
    code = "import json; from semalign import pipeline, profiles; "
    code += "print(json.dumps(pipeline.digests(profiles.load_profile('smoke'))))"
    return dict(json.loads(python(root, code)))


def after(name: str) -> set[str]:
    direct = {n for n, chapter in ORDER.items() if name in chapter.reads}
    return direct.union(*(after(n) for n in direct)) if direct else set()


def test_digest_ignores_outputs_and_follows_sources(copy: Path) -> None:
    path = copy / "notebooks/02_importance.ipynb"
    clean = digests_in(copy)
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if c.cell_type == "code")
    cell.execution_count, cell.outputs = 7, [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(notebook, path)
    assert digests_in(copy) == clean
    cell.source += "\n# another thought"
    nbformat.write(notebook, path)
    assert {n for n, d in digests_in(copy).items() if d != clean[n]} == {"02_importance", *after("02_importance")}
    clean = digests_in(copy)
    with open(copy / "book/claims.yaml", "a") as file:
        file.write("# another thought\n")
    assert {n for n, d in digests_in(copy).items() if d != clean[n]} == {"15_paper_against_ours"}
    clean = digests_in(copy)
    (copy / "book/full_run/more.json").write_text("{}")
    assert {n for n, d in digests_in(copy).items() if d != clean[n]} == {"15_paper_against_ours", "93_full_run"}
    (copy / "book/full_run/more.json").unlink()


def finished(results: Path, p: Profile, *, stamped: bool) -> None:
    for name, value in notebooks.digests(p).items():
        metrics, executed = results / f"metrics/{name}.json", results / f"notebooks/{name}.ipynb"
        for path in (metrics, executed):
            path.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text("{}")
        shutil.copy(ROOT / f"notebooks/{name}.ipynb", executed)
        if stamped:
            notebooks.stamp(metrics, value)


def stale(p: Profile, results: Path) -> set[str]:
    """The finished notebooks whose stamp is not that of today."""
    values, outputs = notebooks.digests(p), (results / "metrics").glob("*.json")
    return {o.stem for o in outputs if not o.with_name(f"{o.name}.{values[o.stem]}").exists()}


def test_a_finished_folder_can_be_handed_on_and_what_changed_runs_again(tmp_path: Path) -> None:
    p = load_profile("smoke")
    finished(tmp_path, p, stamped=True)
    assert stale(p, tmp_path) == set()
    assert stale(p.changed(lr=0.5), tmp_path) == set(notebooks.chapters_of(p))
    notebooks.stamp(tmp_path / "metrics/03_pairing.json", "0123456789abcdef")
    notebooks.adopt(tmp_path, notebooks.digests(p))
    assert stale(p, tmp_path) == {"03_pairing"}


def test_a_folder_without_digests_is_judged_by_its_cells(tmp_path: Path) -> None:
    p = load_profile("smoke")
    finished(tmp_path, p, stamped=False)
    executed = tmp_path / "notebooks/03_pairing.ipynb"
    executed.write_text(executed.read_text().replace("report.load_artefact(", "report.load_artefact(  ", 1))
    (tmp_path / "notebooks/02_importance.ipynb").write_text("no notebook")
    notebooks.adopt(tmp_path, notebooks.digests(p))
    assert stale(p, tmp_path) == {"02_importance", "03_pairing"}


def test_what_was_run_by_hand_does_not_count_as_a_runs(tmp_path: Path) -> None:
    p = load_profile("smoke")
    finished(tmp_path, p, stamped=True)
    by_hand = tmp_path / "metrics/03_pairing.json"
    for profile, runs_again in (("smoke, but for seeds=[1]", True), ("smoke", False)):
        save_metrics(by_hand, {"pair": [1, 2]}, seeds=[1], profile=profile)
        assert stale(p, tmp_path) == {"03_pairing"}
        notebooks.adopt(tmp_path, notebooks.digests(p))
        assert stale(p, tmp_path) == ({"03_pairing"} if runs_again else set())


def test_a_notebook_that_fails_does_not_count_as_finished(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics/03_pairing.json"
    save_metrics(metrics, {}, seeds=[0], profile="smoke")
    notebooks.stamp(metrics, "0123456789abcdef")
    with pytest.raises(notebooks.NotebookFailed, match="run the notebook 02_importance with these results first"):
        notebooks.run_notebook("03_pairing", "smoke", tmp_path)
    assert list(metrics.parent.iterdir()) == []


def test_a_trials_job_finds_the_file_of_before(tmp_path: Path) -> None:
    """Snakemake deletes what a job declares as its output, and a trial's own key decides whether it is made again."""
    mine, results = tmp_path / "mine.yaml", tmp_path / "results"
    mine.write_text(yaml.safe_dump({**yaml.safe_load((FOLDER / "smoke.yaml").read_text()), "trial_jobs": True}))
    end = notebooks.run_digest(load_profile(str(mine)))
    all_of_mmlu = ("none", "sft", "teacher", "semalign")
    stamps = [f"{results}/artefacts/trials/mmlu/{method}-0.json.{end}" for method in all_of_mmlu]
    words = [stamps[0], "-n", "--cores", "1", "--nolock", "--config", f"profile={mine}", f"results={results}"]
    for together, expected in (["together=1"], stamps[:1]), (["together=2"], stamps[:2]), ((), stamps):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", *words, *together], cwd=ROOT, text=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert re.findall(r"output: (.*)", done.stdout) == [", ".join(expected)], done.stderr[-2000:]


def test_snakemake_reruns_the_stale_and_nothing_else(copy: Path) -> None:
    p = load_profile("smoke")
    finished(copy / "results/smoke", p, stamped=False)
    dry = [sys.executable, "-m", "snakemake", "notebooks", "--cores", "1", "--nolock", "--config", "profile=smoke"]
    dry += ["--rerun-triggers", "software-env", "--dry-run"]

    def planned() -> str:
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(dry, cwd=copy, env=environment, text=True, capture_output=True)
        return done.stdout + done.stderr

    for name in ("02_importance", "03_pairing"):  # an earlier test changed the first, and the second reads from it
        shutil.copy(copy / f"notebooks/{name}.ipynb", copy / f"results/smoke/notebooks/{name}.ipynb")
    assert "Nothing to be done" in (said := planned()), said[-3000:]
    path = copy / "notebooks/03_pairing.ipynb"
    before = path.read_text()
    path.write_text(before.replace("report.load_artefact(", "report.load_artefact(  ", 1))
    said = planned()
    path.write_text(before)
    assert "rule notebook_03_pairing:" in said and "rule notebook_02_importance:" not in said


def test_an_unknown_profile_is_one_sentence_and_leaves_nothing(copy: Path) -> None:
    done = command(copy, "run", "clasroom")
    assert done.returncode == 1
    assert "clasroom" in done.stdout and "classroom" in done.stdout and "Traceback" not in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert not (copy / "results/clasroom").exists()


@pytest.mark.parametrize("number", ["0", "-2", "two", "", "1.5"])
def test_a_number_of_cores_that_is_none_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "tune"):
        with pytest.raises(SystemExit):
            cli.main([verb, "smoke", f"--cores={number}"])
        assert f"{number!r} is no number of cores: give 1 or more, or all" in capsys.readouterr().err
    assert cli.cores_of("all") == "all" and cli.cores_of("2") == "2"


@pytest.mark.parametrize("seed", ["-1", "1.5", "one"])
def test_a_seed_that_is_none_is_refused(seed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["trial", "smoke", "mmlu", f"--results={tmp_path}", "--", "none", "0", "sft", seed]) == 1
    assert f"{seed!r} is no seed: give 0 or a whole number above it" in capsys.readouterr().err
    assert cli.main(["trial", "smoke", "mmlu", "none", "0", "sft", f"--results={tmp_path}"]) == 1
    assert "'sft' has no seed after it: give each method's seed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_job_makes_its_trials_one_after_another_and_keeps_those_before_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: the teacher as judge comes in once for all of them."""
    loaded: list[str] = []

    def counted(p: Profile) -> models.Pair:
        pair = models.load_pair(p)

        def teacher() -> PreTrainedModel:
            loaded.append(pair.name)
            return pair.load_teacher()

        return replace(pair, load_teacher=teacher)

    monkeypatch.setattr(trials, "load_pair", counted)
    words = ["trial", "smoke", "mmlu", "none", "0", "none", "1", "nine", "0", "none", "2", f"--results={tmp_path}"]
    assert cli.main(words) == 1
    folder = tmp_path / "artefacts/trials/mmlu"
    stamp = notebooks.run_digest(load_profile("smoke"))
    made = {f"none-{seed}.json{end}" for seed in (0, 1) for end in ("", f".{stamp}")}
    assert {path.name for path in folder.iterdir()} == made
    assert len(loaded) == 1


def test_what_the_system_refuses_is_said_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "results"
    taken.write_text("a file")
    for verb in (["trial", "smoke", "mmlu", "none", "0"], ["notebook", "03_pairing", "smoke"], ["book", "smoke"]):
        assert cli.main([*verb, "--results", str(taken)]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("semalign: ") and str(taken) in said[0], said
        assert re.search(r": (make room|correct the path), or ", said[0]), said


def test_a_book_of_a_folder_without_a_run_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["book", "smoke", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"there are no metrics at {tmp_path}" in said[0]
    with pytest.raises(FileNotFoundError) as absent:
        (tmp_path / "main_figure.svg").read_text()
    assert cli.said_of(absent.value) == f"{tmp_path}/main_figure.svg is missing: correct the path, or run what makes it"


def test_results_that_cannot_be_written_are_refused_with_their_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    (tmp_path / "taken").write_text("a file")
    assert cli.main(["run", "smoke", "--results", str(tmp_path / "taken" / "below")]) == 1
    assert "taken is a file: choose another folder for the results" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cli.main(["run", "smoke", "--results", str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} belongs to {tmp_path.owner()} and cannot be written: have it given to you" in said


def test_a_second_run_over_the_same_results_is_refused(tmp_path: Path) -> None:
    cli.lock(str(tmp_path))
    code = f"from semalign.pipeline.__main__ import lock; lock({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode != 0 and f"another run is writing to {tmp_path}" in done.stderr


def test_what_is_started_ends_with_its_owner_and_not_with_a_number_of_another_host() -> None:
    code = "import time; from semalign.pipeline.__main__ import watch_owners; watch_owners(); time.sleep(30)"
    sleeper = subprocess.Popen(["sleep", "60"])
    away, here = (f"{host}:{sleeper.pid}" for host in ("elsewhere", socket.gethostname()))
    watching, elsewhere = (
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "SEMALIGN_RUN": said})
        for said in (here, away)
    )
    try:
        sleeper.kill()
        sleeper.wait()
        assert watching.wait(timeout=15) == 1
        assert elsewhere.poll() is None
    finally:
        watching.kill()
        elsewhere.kill()


@pytest.mark.parametrize("killed", ["semalign.pipeline run", "snakemake notebooks"])
def test_whatever_is_killed_of_a_run_nothing_goes_on(tmp_path: Path, killed: str) -> None:
    """A kernel works; ``run`` or Snakemake is killed; three seconds later none of the tree is left."""
    words = ["run", "smoke", "--cores", "1", "--until", "notebooks", "--results", str(tmp_path)]
    run = subprocess.Popen(
        [sys.executable, "-m", "semalign.pipeline", *words], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    root, tree = psutil.Process(run.pid), list[psutil.Process]()
    try:
        for _ in range(600):
            tree = [root, *root.children(recursive=True)]
            if any("ipykernel" in " ".join(_words(one)) for one in tree):
                break
            time.sleep(0.1)
        assert any("semalign.pipeline.forks" in " ".join(_words(one)) for one in tree)
        victim = next(one for one in tree if killed in " ".join(_words(one)))
        victim.kill()
        run.wait(timeout=10) if victim.pid == run.pid else None
        _, left = psutil.wait_procs([one for one in tree if one.pid != run.pid], timeout=3)
        assert [_words(one) for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        for one in tree:
            with contextlib.suppress(psutil.Error):
                one.kill()
        run.wait(timeout=10)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_snakemake_needs_no_home_and_asks_for_a_gpu_where_models_are_loaded(copy: Path, tmp_path: Path) -> None:
    given = ["profile=smoke", "gpu=1", f"results={tmp_path}"]
    plan = [sys.executable, "-m", "snakemake", "notebooks", "--cores", "4", "--nolock", "--config", *given]
    environment = {**os.environ, "PYTHONPATH": str(copy), "HOME": "/proc/none"}
    done = subprocess.run([*plan, "--dry-run"], cwd=copy, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    asked = dict(re.findall(r"rule notebook_(\w+):.*?\bgpu=(\d)", done.stdout, re.DOTALL))
    without = {"03_pairing", "15_paper_against_ours", "90_cost", "91_pico", "92_smollm2", "93_full_run"}
    assert set(asked) == set(ORDER) and {name for name, gpus in asked.items() if gpus == "0"} == without


def test_the_users_settings_reach_no_page(tmp_path: Path) -> None:
    startup = tmp_path / "ipython/profile_default/startup/00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("print('a stray line')")
    junk = {"HOME": "/proc/none", "IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_PATH": "/none", "MPLBACKEND": "agg"}
    done = command(ROOT, "notebook", "91_pico", "smoke", "--results", str(tmp_path / "results"), **junk)
    assert done.returncode == 0, done.stdout
    outputs = [
        o for c in nbformat.read(tmp_path / "results/notebooks/91_pico.ipynb", 4).cells for o in c.get("outputs", [])
    ]
    assert sum("image/svg+xml" in o.get("data", {}) for o in outputs) == 2
    assert not [o for o in outputs if o.get("name") == "stderr" or "a stray line" in str(o)]


def test_kernels_talk_by_files_where_the_path_is_short_enough(tmp_path: Path) -> None:
    near = AsyncKernelManager(config=notebooks.sockets_of(Path("/tmp/t")))
    assert (near.transport, near.ip) == ("ipc", "/tmp/t/k")
    far = AsyncKernelManager(config=notebooks.sockets_of(tmp_path / ("deep" * 25)))
    assert far.transport == "tcp"


def test_a_profile_runs_the_chapters_whose_needs_it_meets_and_a_job_for_each_trial() -> None:
    p = load_profile(
        "classroom-full", tasks=["gsm8k"], methods=["none", "sft"], seeds=[0, 3], search={"tasks": ["gsm8k"]},
        regimes={"tasks": ["gsm8k"], "again": {"humaneval": []}}, trial_jobs=True,
    )  # fmt: skip
    absent = {"05_mmlu", "07_humaneval", "08_mbpp", "09_fine_tuned_teachers"}
    assert set(notebooks.missing(p)) == set(ORDER) - set(notebooks.chapters_of(p)) == absent
    assert notebooks.missing(p)["05_mmlu"] == "needs the task mmlu, which this profile leaves out"
    jobs = ["gsm8k/none-0.json", "gsm8k/sft-0.json", "gsm8k/sft-3.json", "gsm8k/teacher-0.json"]
    assert sorted(notebooks.trials_of(p, "06_gsm8k")) == jobs
    assert notebooks.trials_of(p, "04_alignment") == []
    programs = p.changed(tasks=["gsm8k", "mbpp"], methods=["none"])
    compared = ["none-0", "semalign-0", "semalign-3", "sft-0", "sft-3", "teacher-0"]
    assert sorted(notebooks.trials_of(programs, "09_fine_tuned_teachers")) == [f"mbpp/{m}.json" for m in compared]
    reads = notebooks.chapters_of(p)["15_paper_against_ours"].reads
    assert "06_gsm8k" in reads and not {"05_mmlu", "07_humaneval"} & set(reads)
    assert notebooks.trials_of(p.changed(trial_jobs=False), "06_gsm8k") == []


def test_links_to_chapters_that_are_left_out_become_their_titles() -> None:
    text = "See [](05_mmlu.ipynb), [here](../notebooks/05_mmlu.ipynb#a) and [](06_gsm8k.ipynb)."
    plain = book.without_links(text, {"05_mmlu": "needs the task mmlu"})
    assert plain.startswith("See MMLU") and "here (not in this run)" in plain and "[](06_gsm8k.ipynb)" in plain


def test_the_jobs_run_under_the_seeds_that_the_chapters_ask_for() -> None:
    p = load_profile("classroom-full", trial_jobs=True)
    asked = {m: list(trials.seeds_of(m, p.seeds)) for m in (trials.TEACHER, "none", *p.methods)}
    expected = {f"mmlu/{method}-{seed}.json" for method, seeds in asked.items() for seed in seeds}
    jobs = notebooks.trials_of(p, "05_mmlu")
    assert set(jobs) == expected and len(jobs) == len(expected)


def test_planning_a_run_loads_no_model_library() -> None:
    """Snakemake plans at every call, and a cluster's executor for every job."""
    code = (
        "import sys; from pathlib import Path; from semalign.pipeline import book, notebooks; "
        "from semalign.profiles import load_profile; p = load_profile('classroom'); values = notebooks.digests(p); "
        "notebooks.adopt(Path('none'), values); "
        "book.book_digest(values); [notebooks.trials_of(p, n) for n in notebooks.chapters_of(p)]; "
        "print('torch' in sys.modules)"
    )
    assert python(ROOT, code) == "False"


def test_somebody_elses_programs_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    assert cli.main(["run", "llama2"]) == 1
    said = capsys.readouterr().err
    assert "profile llama2 has humaneval and mbpp" in said and "allow_code_execution: true" in said


def test_a_finished_run_is_kept_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    names = [name for name in ORDER if name not in notebooks.KEPT_ELSEWHERE]
    for name in names[1:]:
        save_metrics(tmp_path / f"results/smoke/metrics/{name}.json", {"of": name}, seeds=[4], profile="smoke")
    assert cli.main(["keep", "smoke"]) == 1
    assert f"smoke has no numbers of {names[0]}: call make notebooks" in capsys.readouterr().err
    assert not (tmp_path / "book/full_run").exists()
    save_metrics(tmp_path / f"results/smoke/metrics/{names[0]}.json", {"of": names[0]}, seeds=[4], profile="smoke")
    assert cli.main(["keep", "smoke"]) == 0
    kept = {p.stem: load_metrics(p) for p in (tmp_path / "book/full_run").glob("*.json")}
    version, made = kept.pop("version")
    smoke = load_profile("smoke")
    assert version == version_of(smoke.methods, smoke.tasks) and (made["profile"], made["seeds"]) == ("smoke", [4])
    assert {name: numbers["of"] for name, (numbers, _) in kept.items()} == {name: name for name in names}


def test_trials_that_the_repository_keeps_are_a_runs_own_and_what_it_has_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    p, made = load_profile("smoke"), {"key": "k", "answers": {}, "validation": {}, "method": "sft"}
    folder = tmp_path / "results/smoke/artefacts"
    write_json(folder / "trials/mmlu/sft-0.json", made)
    write_json(folder / "regimes/mmlu/sft-8-0.json", made)
    write_json(folder / "pairing.json", {"key": "no trial"})
    (folder / "trials/mmlu/sft-1.json").write_text("{")
    assert cli.main(["keep", "smoke", "--trials"]) == 0
    assert Path(capsys.readouterr().out.strip()) == cli.archive_of(p) and not (tmp_path / "book/full_run").exists()
    assert set(read_json(codes_path(cli.archive_of(p)))["codes"]) == {"teacher", *p.methods}
    other = tmp_path / "elsewhere"
    write_json(other / "artefacts/trials/mmlu/sft-0.json", {**made, "method": "mine"})
    cli.take_kept(p, other)
    assert "1 trials are taken from book/trials/smoke.tar.xz" in capsys.readouterr().out
    read = {path.relative_to(other).as_posix(): read_json(path) for path in other.rglob("*.json")}
    assert {name: one["method"] for name, one in read.items()} == {
        "artefacts/trials/mmlu/sft-0.json": "mine", "artefacts/regimes/mmlu/sft-8-0.json": "sft",
    }  # fmt: skip
    cli.archive_of(p).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"smoke\.tar\.xz is damaged .*: take it from the repository again"):
        cli.take_kept(p, other)


def test_what_was_tuned_is_kept_with_its_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    mine = tmp_path / "mine.yaml"
    text = (FOLDER / "smoke.yaml").read_text()
    mine.write_text(text.replace("methods: [none, sft, semalign]", "methods: [none, sft, semalign, twin]"))
    monkeypatch.setattr(tuning, "DRAWS", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("concurrent.futures.ProcessPoolExecutor", ThreadPoolExecutor)
        assert cli.main(["tune", str(mine), "--cores", "1"]) == 0
    kept, made = load_metrics(tmp_path / "book/tuned/mine.json")
    assert set(kept["methods"]) == {"sft"} and made["profile"] == "mine"  # SemAlign stays as printed
    sft = kept["methods"]["sft"]
    scores = [one["score"] for one in sft["draws"]]
    assert len(scores) >= 2 and scores == sorted(scores, reverse=True)
    assert {**sft["chosen"], "score": scores[0]} == sft["draws"][0]
    monkeypatch.setattr(tuning, "tune", None)  # what has chosen is not tuned again
    assert cli.main(["tune", str(mine), "--cores", "1"]) == 0
    assert load_metrics(tmp_path / "book/tuned/mine.json")[0] == kept


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "book/tuned").glob("*.json"))])
def test_the_profiles_hyperparameters_are_those_that_were_chosen(name: str) -> None:
    kept, _ = load_metrics(ROOT / f"book/tuned/{name}.json")
    p = load_profile(name)
    for method, tried in kept["methods"].items():
        assert trials.hyperparameters(p, method, p.tasks[0]) == tried["chosen"], method
    for method in (m for m in p.methods if REGISTRY[m].follows):
        assert trials.hyperparameters(p, method, p.tasks[0]) == kept["methods"][REGISTRY[method].follows]["chosen"], (
            method
        )
