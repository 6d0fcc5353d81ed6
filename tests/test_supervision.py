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
from tiny import tiny_llama
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from semalign.supervision import Encoded, Example, Source, SupervisionCache, capture, collate, encode, supervised


class Letters:
    """A tokenizer of one token a character, with BOS 1 and EOS 2, as far as ``encode`` needs one."""

    bos_token_id = 1
    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 90 + 3 for c in text]}


class NoBos(Letters):
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text, False)


def toy_data(n: int = 7, seed: int = 0, vocab: int = 97) -> list[Encoded]:
    """``n`` random examples of 3 to 6 prompt tokens and 1 to 5 response tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        prompt, response = (int(torch.randint(a, b, (), generator=generator)) for a, b in ((3, 7), (1, 6)))
        ids = torch.randint(3, vocab, (prompt + response,), generator=generator)
        found.append(Encoded(ids, torch.where(torch.arange(len(ids)) < prompt, -100, ids)))
    return found


def states(model: Any, example: Encoded, layer: int) -> torch.Tensor:
    """Reference: the stream after ``layer`` (before the final norm) at the supervised positions, from transformers."""
    seen = model(example.input_ids[None], output_hidden_states=True).hidden_states
    assert layer < len(seen) - 1, "the last of hidden_states is already normalised"
    return seen[layer][0][supervised(example.labels)].detach()


def test_encode_puts_bos_in_front_and_eos_after_the_response() -> None:
    tokenizer: Any = Letters()
    (encoded,) = encode(tokenizer, [Example("ab", "cd")], max_length=10)
    a, b, c, d = (ord(x) % 90 + 3 for x in "abcd")
    assert encoded.input_ids.tolist() == [1, a, b, c, d, 2]
    assert encoded.labels.tolist() == [-100, -100, -100, c, d, 2]
    assert supervised(encoded.labels).tolist() == [False, False, True, True, True, False]


def test_encode_adds_no_bos_where_the_tokenizer_adds_none_and_cuts_on_the_right() -> None:
    tokenizer: Any = NoBos()
    (encoded,) = encode(tokenizer, [Example("ab", "cdefg")], max_length=4)
    assert encoded.input_ids.tolist() == [ord(x) % 90 + 3 for x in "abcd"]


def test_encode_refuses_a_prompt_that_leaves_no_response_and_a_tokenizer_without_eos() -> None:
    tokenizer: Any = Letters()
    with pytest.raises(ValueError, match=r"example 1 .* raise max_length"):
        encode(tokenizer, [Example("a", "b"), Example("abcdef", "g")], max_length=5)
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no EOS"):
        encode(tokenizer, [Example("a", "b")], max_length=5)


def test_an_empty_prompt_without_bos_leaves_the_first_token_out() -> None:
    tokenizer: Any = NoBos()
    (encoded,) = encode(tokenizer, [Example("", "ab")], max_length=5)
    assert int(supervised(encoded.labels).sum()) == 2  # b and EOS: nothing comes before a


def test_collate_pads_right_and_ignores_the_padding() -> None:
    long, short = torch.tensor([5, 6, 7]), torch.tensor([8, 9])
    batch = collate([Encoded(long, torch.tensor([-100, 6, 7])), Encoded(short, short)], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]
    assert supervised(batch["labels"]).tolist() == [[True, True, False], [True, False, False]]


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GROUPS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, Any] = {
    "llama": lambda: tiny_llama(3),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NO_GROUPS)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_points_add_up_to_the_reference_stream(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    ids = torch.randint(3, 97, (2, 9))
    points = ("input", "stream", "residual", "attention", "mlp")
    with torch.no_grad(), capture(model, [(2, p) for p in points]) as seen:
        hidden = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[2, "input"], hidden[1])
    torch.testing.assert_close(seen[2, "stream"], hidden[2])
    torch.testing.assert_close(seen[2, "residual"], hidden[2] - hidden[1])
    torch.testing.assert_close(seen[2, "attention"] + seen[2, "mlp"], hidden[2] - hidden[1], atol=1e-5, rtol=1e-4)
    seen.clear()
    model(ids)
    assert not seen, "nothing is recorded outside"


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


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
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
    else:
        (whole.folder / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match=r"damaged .* rebuilt"):
        rebuilt = SupervisionCache.build(tmp_path, teacher, data, [Source(2, 2)])
    assert torch.equal(rebuilt.target(0, rebuilt.rows([0, 1, 2]))[0], expected)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(OSError, match=rf"needs [\d,]+ bytes in {tmp_path}"):
            SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(2), [Source(2, 2)])
    assert not list(tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"needs .* choose another folder"):
        SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(2), [Source(2, 2)])
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    teacher, calls = tiny_llama(3), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")

    teacher.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        SupervisionCache.build(tmp_path, teacher, toy_data(4), [Source(2, 2)], batch_tokens=1)
    assert not list(tmp_path.iterdir())


def test_a_killed_builder_leaves_no_cache_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's threads do not exist here
        teacher = tiny_llama(3)
        teacher.model.layers[1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        SupervisionCache.build(tmp_path, teacher, toy_data(3), [Source(2, 2)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [p.name[0] for p in tmp_path.iterdir()] == ["."], "only the hidden partial folder"
    cache = SupervisionCache.build(tmp_path, tiny_llama(3), toy_data(3), [Source(2, 2)])
    assert cache.teacher_tokens > 0 and list(tmp_path.iterdir()) == [cache.folder]


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
    assert not list(tmp_path.iterdir())


def test_rows_cover_every_supervised_position_once(tmp_path: Path) -> None:
    data = toy_data(5)
    cache = SupervisionCache.build(tmp_path, tiny_llama(3), data, [Source(2, 2)])
    assert np.array_equal(cache.rows(range(5)), np.arange(sum(int(supervised(e.labels).sum()) for e in data)))
