"""The supervision cache: what it stores, what it is keyed by, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_llama, toy_data
from torch.nn import functional as F

from semalign.lm.examples import Encoded, supervised
from semalign.supervision import Source, SupervisionCache


def states(model: Any, example: Encoded, layer: int) -> torch.Tensor:
    """Reference: the stream after ``layer`` (before the final norm) at the supervised positions, from transformers."""
    seen = model(example.input_ids[None], output_hidden_states=True).hidden_states
    assert layer < len(seen) - 1, "the last of hidden_states is already normalised"
    return seen[layer][0][supervised(example.labels)].detach()


def test_targets_are_the_mapped_unit_teacher_states(tmp_path: Path) -> None:
    teacher, data, matrix = tiny_llama(4, hidden=48), toy_data(), torch.randn(32, 48)
    cache = SupervisionCache.build(
        tmp_path, teacher, data, [Source(2, 2, point="stream")], matrix=matrix, dtype="float32", batch_tokens=25
    )
    for i in (5, 0):
        h = states(teacher, data[i], 2)
        target, norm = cache.target(0, cache.rows([i]))
        torch.testing.assert_close(target, F.normalize(h, dim=-1) @ matrix.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm, h.norm(dim=-1), atol=1e-5, rtol=1e-4)
    both = cache.target(0, cache.rows([5, 0]))[0]
    assert torch.equal(both, torch.cat([cache.target(0, cache.rows([i]))[0] for i in (5, 0)]))


def test_float16_is_half_the_size_and_close(tmp_path: Path) -> None:
    teacher, data = tiny_llama(3), toy_data()
    full = SupervisionCache.build(tmp_path, teacher, data, [Source(3, 3)], dtype="float32")
    half = SupervisionCache.build(tmp_path, teacher, data, [Source(3, 3)], dtype="float16")
    rows = full.rows(range(len(data)))
    torch.testing.assert_close(full.target(0, rows)[0], half.target(0, rows)[0], atol=1e-3, rtol=1e-3)
    assert full.arrays["target_0"].nbytes == 2 * half.arrays["target_0"].nbytes
    assert half.bytes_per_token == pytest.approx(2 * 32 + 4 + 8 * 8 / len(rows))


def test_an_interpolated_source_is_the_lerp_of_its_layers(tmp_path: Path) -> None:
    teacher, data = tiny_llama(4), toy_data(3)
    sources = [Source(1, 2, 0.25, "stream"), Source(3, 3)]
    cache = SupervisionCache.build(tmp_path, teacher, data, sources, dtype="float32")
    h = torch.cat([0.75 * states(teacher, e, 1) + 0.25 * states(teacher, e, 2) for e in data])
    target, norm = cache.target(0, cache.rows([0, 1, 2]))
    torch.testing.assert_close(target * norm[:, None], h, atol=1e-5, rtol=1e-4)
    assert "target_1" in cache.arrays


def test_top_logits_and_tail_describe_the_teachers_distribution(tmp_path: Path) -> None:
    teacher, data = tiny_llama(3), toy_data(4)
    cache = SupervisionCache.build(tmp_path, teacher, data, [Source(1, 1)], dtype="float32", top_k=5, vocabulary=90)
    rows = cache.rows(range(4))
    logp, index, tail = cache.teacher_top(rows)
    expected = torch.cat(
        [teacher(e.input_ids[None]).logits[0, :, :90].log_softmax(-1)[supervised(e.labels)].detach() for e in data]
    )
    torch.testing.assert_close(logp, expected.topk(5).values, atol=1e-5, rtol=1e-4)
    assert torch.equal(index, expected.topk(5).indices)
    torch.testing.assert_close(tail, 1 - logp.exp().sum(-1), atol=1e-5, rtol=1e-4)


def test_the_teacher_stops_after_the_last_layer_needed(tmp_path: Path) -> None:
    teacher, ran = tiny_llama(4), []
    for number, layer in enumerate(teacher.model.layers, start=1):
        layer.mlp.register_forward_hook(lambda *_, n=number: ran.append(n))
    SupervisionCache.build(tmp_path, teacher, toy_data(2), [Source(2, 2)])
    assert set(ran) == {1, 2}
    teacher(torch.tensor([[3, 4]]))
    assert set(ran) == {1, 2, 3, 4}, "the teacher is whole again afterwards"


def test_found_again_without_running_the_teacher_and_keyed_by_everything(tmp_path: Path) -> None:
    data, eye = toy_data(3), torch.eye(32)

    def build(seed: int = 0, data: list[Encoded] = data, at: Source | None = None, **kw: Any) -> SupervisionCache:
        teacher = tiny_llama(3, seed=seed)
        return SupervisionCache.build(tmp_path, teacher, data, [at or Source(2, 2)], **{"matrix": eye, **kw})

    first, again = build(), build()
    assert first.teacher_tokens == sum(len(e.input_ids) for e in data) and again.teacher_tokens == 0
    assert first.folder == again.folder
    relabelled = [Encoded(data[0].input_ids, data[0].labels.roll(1)), *data[1:]]
    others = [
        build(seed=1),
        build(data=data[:2]),
        build(data=relabelled),
        build(at=Source(1, 1)),
        build(at=Source(1, 2, 0.5)),
        build(at=Source(2, 2, point="attention")),
        build(matrix=2 * eye),
        build(matrix=None),
        build(dtype="float32"),
        build(top_k=3),
        build(top_k=3, vocabulary=50),
    ]
    assert len({c.folder for c in (first, *others)}) == 1 + len(others)
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert manifest["key"] == first.key and manifest["arrays"]["target_0"]["shape"] == [first.arrays["offsets"][-1], 32]


def left_in(root: Path) -> list[Path]:
    """What is in a folder of caches, but for the file that builders lock."""
    return [p for p in root.iterdir() if p.name != ".lock"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "listed", "no folder", "link"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path: Path, damage: str) -> None:
    teacher, data = tiny_llama(3), toy_data(3)
    whole = SupervisionCache.build(tmp_path, teacher, data, [Source(2, 2)])
    expected, path = whole.target(0, whole.rows([0, 1, 2]))[0], whole.folder / "target_0.npy"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-8])
    elif damage == "remove":
        path.unlink()
    elif damage == "manifest":
        (whole.folder / "manifest.json").write_text("{")
    elif damage == "listed":
        manifest = json.loads((whole.folder / "manifest.json").read_text())
        (whole.folder / "manifest.json").write_text(json.dumps({**manifest, "arrays": list(manifest["arrays"])}))
    else:
        shutil.move(whole.folder, tmp_path / "elsewhere")
        whole.folder.write_text("a file") if damage == "no folder" else whole.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"damaged .* rebuilt"):
        rebuilt = SupervisionCache.build(tmp_path, teacher, data, [Source(2, 2)])
    assert torch.equal(rebuilt.target(0, rebuilt.rows([0, 1, 2]))[0], expected)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(OSError, match=rf"needs [\d,]+ bytes in {tmp_path}"):
            SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(2), [Source(2, 2)])
    assert not left_in(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"needs .* choose another folder"):
        SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(2), [Source(2, 2)])
    assert not left_in(tmp_path)


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    teacher, calls = tiny_llama(3), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")

    teacher.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        SupervisionCache.build(tmp_path, teacher, toy_data(4), [Source(2, 2)], batch_tokens=1)
    assert not left_in(tmp_path)


def test_a_killed_builder_leaves_no_cache_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's threads do not exist here
        teacher = tiny_llama(3)
        teacher.model.layers[1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        SupervisionCache.build(tmp_path, teacher, toy_data(3), [Source(2, 2)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [p.name[0] for p in left_in(tmp_path)] == ["."], "only the hidden partial folder"
    cache = SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(3), [Source(2, 2)])
    assert cache.teacher_tokens > 0 and left_in(tmp_path) == [cache.folder]


@pytest.mark.parametrize("source", [Source(0, 0), Source(2, 4), Source(1, 1, point="logits")])
def test_refuses_sources_that_do_not_exist(tmp_path: Path, source: Source) -> None:
    with pytest.raises(ValueError, match="teacher of 3 layers with points stream, residual, mlp, attention"):
        SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(2), [source])


def test_refuses_a_teacher_that_is_not_finite(tmp_path: Path) -> None:
    teacher = tiny_llama(3)
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite in float16"):
        SupervisionCache.build(tmp_path, teacher, toy_data(2), [Source(2, 2)])
    assert not left_in(tmp_path)


def test_rows_cover_every_supervised_position_once(tmp_path: Path) -> None:
    data = toy_data(5)
    cache = SupervisionCache.build(tmp_path, tiny_llama(3), data, [Source(2, 2)])
    assert np.array_equal(cache.rows(range(5)), np.arange(sum(int(supervised(e.labels).sum()) for e in data)))
