"""What is fetched for nodes without a network, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import errors

from semalign import benchmarks, models
from semalign.lm.examples import Example, TaskData
from semalign.models import ModelUnavailable
from semalign.pipeline import __main__ as cli
from semalign.planning import preflight
from semalign.profiles import Hub


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "download", lambda source: Path("/cache", source.id))
    monkeypatch.setattr(benchmarks, "load_items", lambda task: [{}, {}])
    one = (Example("q", "a"),)
    monkeypatch.setattr(benchmarks, "task_data", lambda task: TaskData(task, one))
    monkeypatch.setattr(cli, "disks", lambda p, results, trains: None)


def test_every_model_and_every_task_is_fetched_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "smollm2"]) == 0
    said = capsys.readouterr().out.splitlines()
    models_of = [f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("360M", "135M")]
    assert [line.split()[0] for line in said[:-1]] == [*models_of, "mmlu:", "gsm8k:", "humaneval:", "mbpp:"]
    assert "HF_HUB_OFFLINE=1" in said[-1]


def test_what_cannot_be_had_is_one_sentence_and_the_rest_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(source: Hub) -> Path:
        asked.append(source.id)
        if "360M" in source.id:
            raise ModelUnavailable(f"the hub cannot be reached and {source.id} is not in its cache")
        return Path("/cache")

    def items(task: str) -> list[dict[str, str]]:
        if task == "mbpp":
            raise benchmarks.DataError("mbpp could not be had from the hub")
        return [{}]

    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr(benchmarks, "load_items", items)
    assert cli.main(["fetch", "smollm2"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and len(asked) == 2
    assert "SmolLM2-360M-Instruct is not in its cache" in said and "mbpp could not be had" in said


def test_a_gated_model_without_a_token_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(preflight, "in_cache", lambda model: False)
    monkeypatch.setattr(models, "download", lambda source: pytest.fail("something was fetched"))
    assert cli.main(["fetch", "llama2"]) == 1
    assert "set HF_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]])
def test_one_format_of_a_model_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str]) -> None:
    monkeypatch.undo()
    taken: list[list[str]] = []
    monkeypatch.setattr(models.HfApi, "list_repo_files", lambda self, id, revision: names)
    monkeypatch.setattr(
        models, "snapshot_download", lambda id, revision, allow_patterns: (taken.append(allow_patterns), tmp_path)[1]
    )
    assert models.download(Hub(source="hub", id="a/b", revision="c")) == tmp_path
    assert ("*.bin" in taken[0]) == ("model.safetensors" not in names)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def unreachable(*_: object, **__: object) -> None:
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(models.HfApi, "list_repo_files", unreachable)
    with pytest.raises(ModelUnavailable, match="the hub cannot be reached and a/b"):
        models.download(Hub(source="hub", id="a/b", revision="c"))
