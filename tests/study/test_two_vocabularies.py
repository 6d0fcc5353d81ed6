"""What chapter 22 computes: on a retokenised Pico the truth is known, and controls do not have it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from semalign import classroom, report
from semalign.lm.parts import head_weight
from semalign.models import Pair
from semalign.study import two_vocabularies as study
from semalign.vocabularies import shared_tokens


@cache
def parts() -> tuple[Any, Any, Any]:
    student, tokenizer = classroom.load_pico("pico-s")
    return student, tokenizer, study.second_tokenizer()


@cache
def seen() -> study.Seen:
    student, tokenizer, second = parts()
    pair = Pair("twin", lambda: study.retokenised(student, tokenizer, second), lambda: student, tokenizer, second)
    return study.look(pair, classroom.task_data("humaneval").validation[:6])


def test_the_twin_keeps_the_rows_of_shared_tokens_and_averages_the_pieces_of_others() -> None:
    student, tokenizer, second = parts()
    twin, shared = study.retokenised(student, tokenizer, second), shared_tokens(second, tokenizer)
    ours, theirs = head_weight(student), head_weight(twin)
    assert len(theirs) == len(second) == 1024 and torch.equal(theirs[shared.teacher], ours[shared.student])
    assert torch.equal(theirs[second.eos_token_id], ours[tokenizer.eos_token_id])
    (other, *_) = sorted(set(range(5, 1024)) - set(shared.teacher.tolist()))
    pieces = tokenizer(second.decode([other]), add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    torch.testing.assert_close(theirs[other], ours[pieces].mean(0))
    with torch.no_grad():
        assert twin(torch.arange(5, 9)[None]).logits.shape == (1, 4, 1024)


def test_as_many_shared_tokens_as_the_stream_is_wide_find_a_known_turn_and_fewer_a_part_of_it() -> None:
    rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    found = study.recovered(rows, [6, 24, 400])
    assert found["logit"] == pytest.approx([(1 - 6 / 24) ** 0.5, 0, 0], abs=1e-6)
    assert found["procrustes"] == pytest.approx([(1 - 6 / 24) ** 0.5, 0, 0], abs=1e-6)
    assert found["paper"][-1] > 0.5 and found["shuffled"][-1] > 0.5


def test_looking_at_the_twin_finds_equal_heads_and_positions_where_both_read_the_same() -> None:
    one = seen()
    assert torch.equal(*one.heads) and len(one.states[0]) == len(one.states[1]) == 4
    assert all(len(h) == len(one.example) for side in one.states for h in side)
    assert one.example.unique().tolist() == list(range(6)) and all(0 < v <= 1 for v in one.covered.values())


def test_a_map_of_equal_rows_carries_every_logit_and_a_shuffled_one_does_not() -> None:
    table = study.carried(seen(), ["logit", "shuffled"])
    assert table.loc["logit"].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert table.loc["shuffled", "logit_cosine"] < 0.5


def test_mapped_states_resemble_the_students_own_at_their_place_alone() -> None:
    ways = study.by_layer(seen())
    assert set(ways) == set(study.WAYS) and all(layers.shape == (4, 6) for layers in ways.values())
    assert ways["mapped"].mean() > 0.8 and ways["other positions"].mean().abs() < 0.2
    assert ways["other tokens"].mean() < 0.3 and ways["ridge on states"].mean() > 0.5


def test_a_planted_change_comes_over_shared_tokens() -> None:
    found = {
        name: values.mean().item() for name, values in study.planted("pico-s", 12, 4, parts()[2], epochs=2).items()
    }
    assert list(found) == ["untouched", *study.KIN]
    assert found["shared tokens"] < 0.8 * found["untouched"] and found["one vocabulary"] < found["shared tokens"]
    assert found["shared tokens"] < min(found["other positions"], found["random directions"])


def test_a_kept_transfer_is_read_and_an_absent_one_is_said(tmp_path: Path) -> None:
    losses, said = study.kept_transfer(tmp_path / "none.json")
    assert losses == {} and "tests/real/two_vocabularies.py" in said and study.against(losses) == {}
    kept = {"losses": {"states over shared tokens": [1.0, 2.0], "labels alone": [1.1, 2.3]}}
    kept |= {"train": 2, "held_out": 2, "layer": [25], "lr": 1e-3}  # type: ignore[dict-item]
    report.save_metrics(tmp_path / "kept.json", kept, seeds=[0], profile="none")
    losses, said = study.kept_transfer(tmp_path / "kept.json")
    assert "states over shared tokens 1.5000" in said and json.loads((tmp_path / "kept.json").read_text())
    assert study.against(losses)["minus labels alone"]["mean"] == pytest.approx(0.2)


def test_real_word_problems_are_short_and_asked_for_by_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEMALIGN_DATA", raising=False)
    assert study.word_problems(2, 2) is None
    (tmp_path / "gsm8k").mkdir()
    rows = [
        {"question": f"What is {i} and 1?" + " x" * 300 * (i % 2), "answer": f"It is {i + 1}.\n#### {i + 1}"}
        for i in range(300)
    ]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SEMALIGN_DATA", str(tmp_path))
    data = study.word_problems(5, 3)
    assert data is not None and len(data.train) == 5 and len(data.validation) <= 3
    assert all(len(e.prompt) + len(e.response) <= study.CHARACTERS for e in (*data.train, *data.validation))
