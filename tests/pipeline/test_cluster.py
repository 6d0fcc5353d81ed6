"""What the profile for SLURM asks for, and what of a run on a cluster can be seen without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml

from semalign.pipeline import __main__ as cli
from semalign.pipeline import notebooks
from semalign.pipeline.notebooks import trials_of
from semalign.planning.plan import LEAST, job_needs, method_memory, shape_of
from semalign.profiles import load_profile

ROOT = notebooks.ROOT
CONFIG = yaml.safe_load((ROOT / "clusters/slurm/config.yaml").read_text())
SNAKEFILE = (ROOT / "Snakefile").read_text()


def test_the_profile_asks_for_nothing_that_the_plugin_refuses() -> None:
    assert CONFIG["executor"] == "slurm" and CONFIG["nolock"] is True and CONFIG["cores"] >= 1
    assert "slurm_extra" not in CONFIG["default-resources"]
    (group,) = re.findall(r'group:\s+"([^"]+)"', SNAKEFILE)
    (components,) = CONFIG["group-components"]
    assert components.startswith(f"{group}=") and int(components.partition("=")[2]) > 1
    (limit,) = CONFIG["resources"]
    assert limit == "turn=1" and CONFIG["set-resource-scopes"] == ["turn=local"] and "turn=1" in SNAKEFILE


def test_jobs_are_given_what_the_plan_says() -> None:
    p = load_profile("llama2")
    largest = max(method_memory(p, m).host for m in p.methods)
    trial = job_needs(p, "trial")
    assert trial["mem_mb"] * 1e6 > largest and trial["runtime"] >= 30
    small = job_needs(load_profile("smoke"), "trial")
    assert small["mem_mb"] < trial["mem_mb"] and small["runtime"] == 30
    assert job_needs(p.changed(teacher={"source": "hub", "id": "a/b", "revision": "c"}), "trial") == {}


@pytest.mark.parametrize("name", ["05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp"])
def test_a_tables_chapter_is_given_time_for_its_trials_only_where_they_are_no_jobs(name: str) -> None:
    p = load_profile("llama2")
    assert p.trial_jobs and trials_of(p, name)
    of_jobs, alone = job_needs(p, name), job_needs(p.changed(trial_jobs=False), name)
    trial = job_needs(p, "trial")
    assert of_jobs["runtime"] == LEAST and of_jobs["mem_mb"] < trial["mem_mb"]
    assert alone["runtime"] > 10 * trial["runtime"] and alone["mem_mb"] >= trial["mem_mb"]
    # Two of them ask the teacher and the untouched student in another way, and so load both.
    asks = name in ("05_mmlu", "07_humaneval")
    assert (of_jobs["mem_mb"] * 1e6 > method_memory(p, "none").host) == asks
    assert asks or of_jobs["mem_mb"] <= 5000


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
