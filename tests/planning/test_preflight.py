"""What is refused before the first model loads, on every route, and in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semalign import benchmarks, models, report
from semalign.benchmarks import sandbox
from semalign.lm.examples import Example, TaskData
from semalign.pipeline import __main__ as cli
from semalign.pipeline import notebooks
from semalign.planning import preflight as before
from semalign.profiles import Profile, ProfileError, load_profile

ROOT = notebooks.ROOT
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Profile:
    """A profile of the hub on a machine that has all it needs: a token, room, isolation and the data."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 0, 10**15))
    monkeypatch.setattr(sandbox, "active_level", lambda: "namespace")
    monkeypatch.setattr(benchmarks, "load_items", lambda task: [{}] * 4)
    two = (Example("q", "a"),) * 2
    monkeypatch.setattr(benchmarks, "task_data", lambda task: TaskData(task, two, two, two, two))
    monkeypatch.setattr(before, "nvidia_devices", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(before.GPU, raising=False)
    monkeypatch.delenv(before.CHECKED, raising=False)
    return load_profile("llama2", allow_code_execution=True)


def test_what_has_all_it_needs_passes(hub: Profile, tmp_path: Path) -> None:
    before.before_models(hub, tmp_path)
    before.before_models(hub.changed(sizes=before.FEWEST), tmp_path)


def no_token(m: pytest.MonkeyPatch) -> None:
    m.delenv("HF_TOKEN")
    m.setenv("HF_TOKEN_PATH", "/nowhere")
    m.setattr("huggingface_hub.get_token", lambda: None)


def no_room(m: pytest.MonkeyPatch) -> None:
    m.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 0, 10**9))


def no_isolation(m: pytest.MonkeyPatch) -> None:
    m.setattr(sandbox, "active_level", lambda: "rlimits")


def nothing_to_validate_on(m: pytest.MonkeyPatch) -> None:
    two = (Example("q", "a"),) * 2
    m.setattr(benchmarks, "task_data", lambda task: TaskData(task, two, two, two, two if task == "mmlu" else ()))


def given_a_gpu(m: pytest.MonkeyPatch) -> None:
    m.setenv(before.GPU, "1")


def beside_a_gpu(m: pytest.MonkeyPatch) -> None:
    m.setattr(before, "nvidia_devices", lambda: ["/dev/nvidia0"])


@pytest.mark.parametrize(
    ("changes", "prepare", "said"),
    [
        ({"sizes": {"test": 3}}, None, ["3 in test", "sizes: test", "4 or more"]),
        (
            {"teacher": {"source": "folder", "path": "/nowhere"}},
            None,
            ["/nowhere", "no config.json", "save_pretrained"],
        ),
        ({"layer": 41}, None, ["layer 41", "give 1 to 40"]),
        ({"sizes": {"validation": 1}}, None, ["1 in validation", "sizes: validation", "2 or more"]),
        ({"allow_code_execution": False}, None, ["humaneval and mbpp", "allow_code_execution: true"]),
        ({}, no_token, ["meta-llama/Llama-2-13b-chat-hf", "gated", "HF_TOKEN"]),
        ({}, no_room, ["GB", "1.0 GB are free", "HF_HOME", "TMPDIR"]),
        ({}, no_isolation, ["in namespaces alone", "install bubblewrap"]),
        ({}, nothing_to_validate_on, ["gsm8k has examples too few, 0 in validation:", "SEMALIGN_DATA"]),
        ({"device": "cuda"}, None, ["device: cuda", "make setup"]),
        ({}, given_a_gpu, ["was given a GPU", "make setup"]),
        ({}, beside_a_gpu, ["machine with an NVIDIA GPU", "make setup"]),
    ],
)
def test_what_is_missing_is_one_sentence_with_its_remedy(
    hub: Profile,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    prepare: Callable[[pytest.MonkeyPatch], None] | None,
    said: list[str],
) -> None:
    if prepare:
        prepare(monkeypatch)
    with pytest.raises((ValueError, RuntimeError)) as refused:
        before.before_models(hub.changed(**changes), tmp_path)
    message = str(refused.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and (": " in message or "; " in message)


def test_a_job_that_needs_no_gpu_is_not_asked_for_one(hub: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(before.GPU, "0")
    monkeypatch.setattr(before, "nvidia_devices", lambda: ["/dev/nvidia0"])
    before.before_models(hub.changed(device="cuda"))


def test_a_card_that_is_not_there_is_refused_by_its_number(hub: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before.before_models(hub.changed(device="cuda:0"))
    with pytest.raises(ProfileError, match="torch sees 1 of them"):
        before.before_models(hub.changed(device="cuda:1"))


def test_what_is_there_of_the_results_has_its_room(
    hub: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before, "in_cache", lambda model: True)
    kept, _ = before.kept_bytes(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda at: Usage(10**15, 0, kept - 1000))
    with pytest.raises(ProfileError, match="for results"):
        before.before_models(hub, tmp_path, elsewhere=True)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "one.json").write_bytes(bytes(1000))
    before.before_models(hub, tmp_path, elsewhere=True)


def test_who_trains_nothing_needs_no_room_for_it(hub: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "in_cache", lambda model: True)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/dev/shm")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: Usage(10**15, 0, 0 if Path(at) == Path("/dev/shm") else 10**15)
    )
    with pytest.raises(ProfileError, match="TMPDIR"):
        before.before_models(hub, tmp_path)
    before.before_models(hub, tmp_path, elsewhere=True)
    before.disks(hub, None, trains=False)


def test_a_profile_that_leaves_the_device_open_is_of_the_processor_where_there_is_no_gpu(
    hub: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.device == "auto" and before.on_cpu(hub) and not before.on_cpu(hub.changed(device="cuda"))
    beside_a_gpu(monkeypatch)
    assert not before.on_cpu(hub) and before.on_cpu(hub.changed(device="cpu"))


def test_a_gpu_too_small_for_a_part_of_a_run_is_refused_before_it(
    hub: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before.memory(hub, notebooks.chapters_of(hub))  # no GPU is here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gigabytes, fits in ((80, True), (40, False)):
        card = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number, card=card: card)
        with contextlib.nullcontext() if fits else pytest.raises(ProfileError, match="this one has 40: do what"):
            before.memory(hub, notebooks.chapters_of(hub))


def test_prompts_that_leave_no_room_are_refused_without_a_model() -> None:
    p = load_profile("smoke", tasks=["gsm8k"], search={"tasks": ["gsm8k"]}, regimes={"tasks": ["gsm8k"]})
    cli.lengths(p)
    with pytest.raises(ProfileError, match=r"profile smoke: in train of gsm8k, 4 of 4 examples.*: raise max_length"):
        cli.lengths(p.changed(max_length=8))


def test_a_cluster_leaves_device_and_sandbox_to_its_jobs(hub: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    no_isolation(monkeypatch)
    before.before_models(hub.changed(device="cuda"), elsewhere=True)
    nothing_to_validate_on(monkeypatch)
    with pytest.raises(ProfileError, match="examples too few, 0 in validation"):
        before.before_models(hub, elsewhere=True)


def test_data_are_read_once_a_run(hub: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(before.CHECKED, before.checked(hub))
    nothing_to_validate_on(monkeypatch)
    before.before_models(hub)
    with pytest.raises(ProfileError):  # of other tasks nothing has been seen
        before.before_models(hub.changed(tasks=["gsm8k"], search={"tasks": ["gsm8k"]}, regimes={"tasks": ["gsm8k"]}))


def test_a_model_in_the_cache_needs_neither_token_nor_room(
    hub: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_token(monkeypatch)
    monkeypatch.setattr(before, "in_cache", lambda model: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 0, 2 * 10**10))
    before.before_models(hub, tmp_path)


REFUSED = "allow_code_execution: true"


def test_every_route_refuses_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("load_model", "load_pair", "_open"):
        monkeypatch.setattr(models, name, lambda *_, **__: pytest.fail("a model was loaded"))
    for words in (
        ["run", "smollm2"],
        ["check", "smollm2", "--results", str(tmp_path)],
        ["notebook", "01_semantics", "smollm2", "--results", str(tmp_path)],
        ["trial", "smollm2", "gsm8k", "sft", "0", "--results", str(tmp_path)],
        ["tune", "smollm2"],
    ):
        assert cli.main(words) == 1
        assert REFUSED in capsys.readouterr().err, words
    with pytest.raises(ProfileError, match=REFUSED):  # what papermill and Jupyter call by the notebook's first cell
        report.opened("smollm2", tmp_path, {})


def test_snakemake_by_itself_refuses_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "notebooks", "--cores", "1", "--nolock", "-n", "--config"]
    done = subprocess.run(
        [*command, "profile=smollm2", f"results={tmp_path}"], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode and REFUSED in done.stdout + done.stderr


def test_humaneval_keeps_examples_to_validate_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MBPP's own 464 examples to learn from: all splits of both tasks, and validation beside them."""
    rows = [
        {
            "task_id": i,
            "text": f"Write f{i}.",
            "code": f"def f{i}():\n    return {i}",
            "test_list": [f"assert f{i}() == {i}"],
        }
        for i in range(1, 975)
    ]
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp" / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("SEMALIGN_DATA", str(tmp_path))
    for task in ("humaneval", "mbpp"):
        data = benchmarks.task_data(task)
        assert len(data.validation) >= 46 and data.train and data.align and data.extract
        splits = [set(getattr(data, name)) for name in ("train", "align", "extract", "validation")]
        assert sum(map(len, splits)) == len(set().union(*splits)) == 464
