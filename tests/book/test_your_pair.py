"""The program for a reader's own pair, run as it stands on two small models in folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pages
import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from semalign.lm.parts import layer_parameters
from semalign.models import byte_tokenizer


def test_the_program_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    shapes = {"my-teacher": (4, 48), "my-student": (3, 32)}
    for seed, (folder, (layers, width)) in enumerate(shapes.items()):
        tiny_llama(layers, width, len(tokenizer), seed).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    rows = [{"prompt": f"{n} + 1 = ", "response": str(n + 1)} for n in range(36)]
    (tmp_path / "my-examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (program,) = pages.code(pages.text("your_pair"))
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    exec(compile(program, "your pair", "exec"), {"__name__": "your_pair"})

    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == ["none", "sft", "sft_layer", "semalign"]
    assert "(1, 2, 3)" in lines["sft"]
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "my-student")
    for name, line in lines.items():
        after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"student-{name}").named_parameters())
        changed = {n for n, p in before.named_parameters() if not torch.equal(p, after[n])}
        named = [int(k) for k in re.findall(r"\d+", line[line.index("(") : line.index(")")])]
        assert changed <= {p for k in named for p in layer_parameters(before, k)}
        assert bool(changed) is (name != "none")
    assert len(re.findall(r"\d", lines["semalign"][lines["semalign"].index("(") : lines["semalign"].index(")")])) == 1
