"""What the profile for SLURM asks for, and what of a run on a cluster can be seen without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from semalign.pipeline import __main__ as cli
from semalign.pipeline import notebooks
from semalign.pipeline.notebooks import chapters_of, trial_file, trial_jobs, trials_of
from semalign.planning.plan import LEAST, job_needs, method_memory, on_card, shape_of, trials_need
from semalign.profiles import ProfileError, load_profile

ROOT = notebooks.ROOT
CONFIG = yaml.safe_load((ROOT / "clusters/slurm/config.yaml").read_text())
SNAKEFILE = (ROOT / "Snakefile").read_text()


def test_the_profile_asks_for_nothing_that_the_plugin_refuses() -> None:
    assert CONFIG["executor"] == "slurm" and CONFIG["nolock"] is True and CONFIG["cores"] >= 1
    assert "slurm_extra" not in CONFIG["default-resources"]


def test_jobs_are_given_what_the_plan_says() -> None:
    p = load_profile("llama2")
    largest = max(method_memory(p, m).host for m in p.methods)
    trials = trials_need(p, "gsm8k", p.methods)
    assert trials["mem_mb"] * 1e6 > largest and trials["runtime"] > LEAST
    alone = [trials_need(p, "gsm8k", [method]) for method in p.methods]
    assert trials["mem_mb"] == max(of["mem_mb"] for of in alone)
    assert len({of["mem_mb"] for of in alone}) > 1  # and a job of others asks for no more than these take
    twice = trials_need(p, "gsm8k", [*p.methods, *p.methods])
    assert twice["mem_mb"] == trials["mem_mb"] and abs(twice["runtime"] - 2 * trials["runtime"]) <= 1
    small = trials_need(load_profile("smoke"), "gsm8k", ["teacher", "sft"])
    assert small["mem_mb"] < trials["mem_mb"] and small["runtime"] == LEAST
    assert trials_need(p.changed(teacher={"source": "hub", "id": "a/b", "revision": "c"}), "gsm8k", ["sft"]) == {}


def test_each_trial_of_the_chapters_is_in_one_job_with_others_of_its_task() -> None:
    p = load_profile("llama2")
    wanted = {path for name in chapters_of(p) for path in trials_of(p, name)}
    jobs = trial_jobs(p, 15)
    made = [trial_file(task, *of) for task, trials in jobs for of in trials]
    assert sorted(made) == sorted(wanted)
    assert all(0 < len(trials) <= 15 for _, trials in jobs)
    # No job more than the tasks' trials need, and alone where each is to be.
    of_task = Counter(path.partition("/")[0] for path in wanted)
    assert len(jobs) == sum(-(-often // 15) for often in of_task.values()) and min(of_task.values()) > 15
    assert len(trial_jobs(p, 1)) == len(wanted)
    assert trial_jobs(p.changed(trial_jobs=False), 15) == []
    for together in (0, -1, "five"):
        with pytest.raises(ProfileError, match=f"together={together} is no number of trials for a job: give 1 or more"):
            trial_jobs(p, together)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp"])
def test_a_tables_chapter_is_given_time_for_its_trials_only_where_they_are_no_jobs(name: str) -> None:
    p = load_profile("llama2")
    assert p.trial_jobs and trials_of(p, name)
    of_jobs, alone = job_needs(p, name), job_needs(p.changed(trial_jobs=False), name)
    task = name.partition("_")[2]
    jobs = [trials_need(p, of, [m for m, _ in trials]) for of, trials in trial_jobs(p, 15) if of == task]
    assert of_jobs["runtime"] == LEAST and all(of_jobs["mem_mb"] <= job["mem_mb"] for job in jobs)
    assert abs(alone["runtime"] - sum(job["runtime"] for job in jobs)) <= of_jobs["runtime"] + len(jobs)
    assert alone["mem_mb"] >= max(job["mem_mb"] for job in jobs)
    # Two of them ask the teacher and the untouched student in another way, and so load both.
    asks = name in ("05_mmlu", "07_humaneval")
    assert (of_jobs["mem_mb"] * 1e6 > method_memory(p, "none").host) == asks
    assert asks or of_jobs["mem_mb"] <= 5000


def test_a_chapter_that_only_reads_the_trials_of_jobs_needs_no_gpu() -> None:
    p = load_profile("llama2")
    tables = ("05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp")
    assert [name for name in tables if on_card(p, name)] == ["05_mmlu", "07_humaneval"]  # where the teacher answers
    assert all(on_card(p.changed(trial_jobs=False), name) for name in tables)
    assert on_card(p, "04b_gates") and on_card(p, "09_fine_tuned_teachers") and not on_card(p, "03_pairing")


def test_trials_that_chapters_share_are_counted_where_they_are_no_jobs() -> None:
    p = load_profile("llama2")
    for name in ("04b_gates", "09_fine_tuned_teachers"):
        of_jobs, alone = job_needs(p, name), job_needs(p.changed(trial_jobs=False), name)
        assert LEAST < of_jobs["runtime"] < alone["runtime"] and of_jobs["mem_mb"] == alone["mem_mb"]


def test_chapters_that_load_no_model_are_given_the_least() -> None:
    p = load_profile("llama2")
    for name in ("03_pairing", "15_paper_against_ours", "90_cost", "91_pico", "92_smollm2", "93_full_run"):
        assert job_needs(p, name) == {"mem_mb": 5000, "runtime": LEAST}
    teacher = 2e-6 * shape_of(p.teacher).parameters
    assert teacher < job_needs(p, "00_models_and_data")["mem_mb"] < job_needs(p, "12b_students")["mem_mb"]


def test_a_clusters_job_does_not_end_with_who_submitted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli.OWNERS:
        monkeypatch.setenv(name, "here:1")
    cli.disown()
    assert not set(cli.OWNERS) & set(os.environ)
    assert "if REMOTE:\n    disown()" in SNAKEFILE


def test_the_slurm_test_says_in_a_sentence_where_it_cannot_run() -> None:
    done = subprocess.run(
        [sys.executable, "tests/cluster/slurm.py"], cwd=ROOT, env={**os.environ, "PATH": "/nowhere"}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("the SLURM test is skipped: ") and len(done.stdout.splitlines()) == 1
