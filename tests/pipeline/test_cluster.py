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
from semalign.planning.plan import job_needs, method_memory
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
    trial, chapter = job_needs(p, "trial"), job_needs(p, "05_mmlu")
    assert trial["mem_mb"] * 1e6 > largest and chapter["mem_mb"] * 1e6 > largest
    assert 30 <= trial["runtime"] < chapter["runtime"]
    small = job_needs(load_profile("smoke"), "trial")
    assert small["mem_mb"] < trial["mem_mb"] and small["runtime"] == 30
    assert job_needs(p.changed(teacher={"source": "hub", "id": "a/b", "revision": "c"}), "trial") == {}


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
