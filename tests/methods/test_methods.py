"""The registry of methods: what all of them owe, and what sets each of the simple ones apart."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_alignment import changed, losses, make_pair, same_weights, settings, student, task, teacher
from tiny import Letters, tiny_llama
from torch.nn import functional as F

from semalign import alignment
from semalign.lm.examples import Example, TaskData, collate, encode
from semalign.lm.parts import head_weight
from semalign.methods import REGISTRY, seq_kd, ted
from semalign.methods.settings import SFT, logit_kd, pissa
from semalign.models import Pair
from semalign.training import loop
from semalign.training.config import TransferConfig, TransferResult

COSTS = {
    "wall_s", "inputs_s", "train_s", "peak_memory_bytes", "teacher_tokens", "student_tokens", "trainable_parameters",
    "cached_bytes_per_token",
}  # fmt: skip
NAMES = sorted(REGISTRY)
OF_THE_TABLE = {
    "none",
    "sft",
    "logit_kd",
    "seq_kd",
    "fitnets",
    "ted",
    "semalign",
    "seeking",
    "laten",
    "fdd",
    "gkd",
    "oprd",
}


class Spelled(Letters):
    """Letters that can also be read back."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr((i - 3 - 33) % 90 + 33) for i in ids)


def ending_teacher() -> Any:
    """A teacher that ends its answers: the head's row of EOS points where its final states do on average."""
    model = teacher()
    with torch.no_grad():
        final = model.get_decoder()(torch.randint(3, 97, (8, 12))).last_hidden_state.mean((0, 1))
        model.lm_head.weight[2] += 0.6 * final / final.norm()
    return model


def pair() -> Pair:
    return replace(make_pair(ending_teacher), tokenizer=Spelled())  # type: ignore[arg-type]


def data() -> TaskData:
    whole = task(10)
    return replace(whole, align=whole.train[:4], extract=whole.train[4:7])


def few(name: str) -> TransferConfig:
    """As few epochs as a method can have."""
    return settings(layers=(2,), epochs=REGISTRY[name].least_epochs)


@cache
def done(name: str, again: int = 0) -> TransferResult:
    return REGISTRY[name].transfer(pair(), data(), few(name))


def test_the_registry_holds_every_method_of_the_table() -> None:
    assert set(REGISTRY) >= OF_THE_TABLE
    assert all(m.title and m.data and m.trains and m.teacher for m in REGISTRY.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_method_reports_the_same_costs_and_is_deterministic(name: str) -> None:
    first, second = done(name), done(name, again=1)
    assert set(first.cost) == COSTS and all(v >= 0 for v in first.cost.values())
    assert same_weights(first.student, second.student)
    assert type(first.student) is type(student()) and not first.student.training


@pytest.mark.parametrize("name", NAMES)
def test_every_method_changes_what_it_says(name: str) -> None:
    found = changed(done(name), student())
    layers = {int(n.split(".")[2]) + 1 for n in found}
    assert done(name).layers == tuple(sorted(layers))
    expected = {"nothing": set(), "LoRA on all layers": {1, 2, 3}}.get(REGISTRY[name].trains, {2})
    if REGISTRY[name].trains in ("hypernetwork", "injected vectors"):
        expected = set() if name == "laten_released" else {1, 2, 3}
    assert layers == expected
    assert all(n.split(".")[-2] in TransferConfig.lora_targets for n in found)


@pytest.mark.parametrize("name", NAMES)
def test_no_method_changes_the_student_that_it_was_given(name: str) -> None:
    held = [student(), ending_teacher()]  # a pair that hands out its own objects, copied by nobody
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in held]
    lent = replace(pair(), load_student=lambda: _copy(held[0]), load_teacher=lambda: held[1])
    REGISTRY[name].transfer(lent, data(), few(name))
    for model, old in zip(held, before, strict=True):
        assert all(torch.equal(p, old[n]) for n, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _copy(model: Any) -> Any:
    new = student()
    new.load_state_dict(model.state_dict())
    return new


@pytest.mark.parametrize("name", ["semalign", "seq_kd", "gkd", "fdd", "ted", "laten"])
def test_an_example_that_is_too_long_is_left_out_and_nothing_else_changes(name: str) -> None:
    long = Example("x" * 600, "y")
    whole = data()
    watched = (*whole.validation, whole.train[0], long)
    more = replace(whole, train=(long, *whole.train), extract=(*whole.extract, long), validation=watched)
    with pytest.warns(UserWarning, match="left out"):
        result = REGISTRY[name].transfer(pair(), more, few(name))
    assert same_weights(result.student, done(name).student)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none"}))
def test_every_transfer_is_called_alike(name: str) -> None:
    parameters = list(inspect.signature(REGISTRY[name].transfer).parameters.values())
    assert [p.name for p in parameters[:3]] == ["pair", "data", "config"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:])


def test_teachers_are_asked_only_by_the_methods_that_say_so() -> None:
    for name in NAMES:
        used = done(name).cost["teacher_tokens"] > 0
        assert used == (REGISTRY[name].teacher not in ("-", "chooses k")), name


def test_sft_is_what_peft_does_on_the_whole_model() -> None:
    config, base = settings(), student()
    torch.manual_seed(config.seed)
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(config.lora_targets))
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=config.lr, weight_decay=0.0)
    encoded = encode(pair().tokenizer, data().train, max_length=64)
    lengths = [len(e.input_ids) for e in encoded]
    plan = [b for e in (1, 2) for b in loop.batches(lengths, config.batch, config.seed, e)]
    reference = []
    for step, some in enumerate(plan, start=1):
        batch = collate([encoded[i] for i in some], 0)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        reference.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = loop.scheduled_rate(config, step, len(plan))
        optimizer.step()
    assert losses(SFT(pair(), data(), config)) == pytest.approx(reference, abs=1e-4)


def test_logit_kd_halves_labels_and_divergence() -> None:
    first = logit_kd(pair(), data(), settings(epochs=1)).log[0]
    assert first["loss"] == pytest.approx((first["output_loss"] + first["label_loss"]) / 2, rel=1e-5)
    jsd = logit_kd(pair(), data(), settings(epochs=1), divergence="jsd").log[0]
    assert 0 < jsd["output_loss"] < first["output_loss"] / 2


def test_logit_kd_of_the_student_itself_has_nothing_to_say() -> None:
    own = replace(pair(), load_teacher=student)
    first = logit_kd(own, data(), settings(epochs=1, top_k=97, target_dtype="float32")).log[0]
    assert first["output_loss"] == pytest.approx(0.0, abs=1e-5)


def test_fitnets_and_relational_need_no_map_between_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a map was computed")

    monkeypatch.setattr(alignment, "semantic_map", forbidden)
    for method in ("fitnets", "relational"):
        result = REGISTRY[method].transfer(pair(), data(), settings(epochs=8))
        assert result.log[-1]["layer_loss"] < result.log[0]["layer_loss"]
    names = ("fitnets", "relational")
    trained = [REGISTRY[name].transfer(pair(), data(), settings(epochs=1)).cost for name in names]
    assert trained[0]["trainable_parameters"] - trained[1]["trainable_parameters"] == 48 * 32


def test_pissa_trains_the_principal_part_of_each_weight() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rate = settings(layers=(2,), lora_rank=4, epochs=1, batch=64, lr=3e-4)
    result = pissa(pair(), data(), rate)
    delta = (result.student.get_parameter(name) - student().get_parameter(name)).detach()
    u, _, v = torch.linalg.svd(student().get_parameter(name).detach())
    left, right = u[:, :4] @ u[:, :4].T, v[:4].T @ v[:4]
    inside = left @ delta + delta @ right - left @ delta @ right
    assert (delta - inside).norm() < 0.05 * delta.norm()  # to first order dB A + B dA stays in the two spaces


def test_a_warm_up_is_states_alone_and_then_labels_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts: list[TransferConfig] = []
    transfer = alignment.transfer

    def watched(own: Pair, examples: TaskData, config: TransferConfig) -> TransferResult:
        parts.append(config)
        return transfer(own, examples, config)

    monkeypatch.setattr(alignment, "transfer", watched)
    config = settings(epochs=3, folder=tmp_path)
    result = REGISTRY["warm_up"].transfer(pair(), data(), config)
    said = [(c.layer_weight > 0, c.output_loss, c.epochs, c.layers) for c in parts]
    assert said == [(True, "none", 1, "all"), (False, "ce", 2, "all")]
    # the labels go on from where the states led, and nothing is left of the layer term
    alone = REGISTRY["sft"].transfer(pair(), data(), settings(epochs=2))
    steps = [row for row in result.log if "output_loss" in row]
    assert steps[-1]["output_loss"] != pytest.approx(alone.log[-1]["output_loss"])
    assert result.cost["student_tokens"] == pytest.approx(1.5 * alone.cost["student_tokens"])
    with pytest.raises(ValueError, match="two epochs or more: got 1"):
        REGISTRY["warm_up"].transfer(pair(), data(), settings(epochs=1))


def test_answers_are_those_of_plain_greedy_decoding() -> None:
    model, lent = ending_teacher(), pair()
    examples = [Example(p, "ignored") for p in ("abc", "zy", "hello", "q", "mnopq")]
    answers, tokens = seq_kd.generate(model, lent, examples, 12, 64)
    read = 0
    for example, answer in zip(examples, answers, strict=True):
        ids = [1] + [ord(c) % 90 + 3 for c in example.prompt]
        read += len(ids) + 1
        written: list[int] = []
        while len(written) < 12 and (not written or written[-1] != 2):
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert answer == (lent.tokenizer.decode(written[:-1]) if written[-1] == 2 else None)
        read += len(written) - (written[-1] == 2)
    assert tokens == read
    assert any(a is None for a in answers) or any(a for a in answers)


def test_seq_kd_is_sft_on_the_answers_and_reads_no_response() -> None:
    result = seq_kd.transfer(pair(), data(), settings(epochs=1))
    blind = replace(data(), train=tuple(Example(e.prompt, "other") for e in data().train))
    assert same_weights(result.student, seq_kd.transfer(pair(), blind, settings(epochs=1)).student)
    answers, _ = seq_kd.generate(ending_teacher(), pair(), data().train, 128, 512)
    told = replace(
        data(), train=tuple(Example(e.prompt, a) for e, a in zip(data().train, answers, strict=True) if a is not None)
    )
    assert same_weights(result.student, SFT(pair(), told, settings(epochs=1)).student)
    assert result.log[0]["answers"] == len(told.train)


def test_seq_kd_refuses_a_teacher_that_never_ends() -> None:
    def endless() -> Any:
        model = teacher()
        with torch.no_grad():
            model.lm_head.weight[2] = 0.0
            model.lm_head.weight[4] = -model.lm_head.weight[3]  # one of the two is above 0, and so above EOS
        return model

    lent = replace(pair(), load_teacher=endless)
    with pytest.raises(ValueError, match="none of the teacher's answers ends within 2 tokens"):
        seq_kd.transfer(lent, data(), settings(), new_tokens=2)


def test_a_filter_learns_what_states_say_about_the_next_token() -> None:
    model = student()
    torch.manual_seed(0)
    labels = torch.randint(3, 97, (400,))
    states = F.normalize(head_weight(model)[labels] @ torch.randn(32, 48), dim=-1) * 48**0.5
    before = [p.detach().clone() for p in model.parameters()]
    found, loss = ted.task_filter(states, labels, model, 300, 1e-2, 0)
    assert found.shape == (32, 48) and loss < 2.5  # chance is log 97 = 4.6
    noise = ted.task_filter(torch.randn(400, 48), labels, model, 300, 1e-2, 0)[1]
    assert noise > loss + 1.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_ted_refuses_several_layers() -> None:
    with pytest.raises(ValueError, match="TED filters one layer pair"):
        ted.transfer(pair(), data(), settings(layers=(1, 2)))


def test_methods_differ_from_semalign_in_what_they_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, TransferConfig] = {}

    def catch(_pair: Pair, _data: TaskData, config: TransferConfig) -> TransferResult:
        raise StopIteration(config)

    monkeypatch.setattr(alignment, "transfer", catch)
    base = settings()
    for name in ("logit_map", "random_target", "scrambled_tokens", "sft_layer", "relational", "fitnets", "twin"):
        with pytest.raises(StopIteration) as caught:
            REGISTRY[name].transfer(pair(), data(), base)
        seen[name] = caught.value.value
    different = {
        name: {f.name for f in fields(base) if getattr(base, f.name) != getattr(config, f.name)}
        for name, config in seen.items()
    }
    assert different == {
        "logit_map": {"map"},
        "random_target": {"targets"},
        "scrambled_tokens": {"targets"},
        "sft_layer": {"layer_weight", "output_loss"},
        "twin": {"layer_weight"},
        "relational": {"map", "layer_loss", "output_loss"},
        "fitnets": {"map", "projection", "output_loss"},
    }


def scaled_teacher(scale: float) -> Any:
    """The same function, with a stream ``scale`` times as long."""
    model = tiny_llama(4, hidden=48, seed=1, rms_norm_eps=1e-12)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                p.mul_(scale)
    return model


def test_ted_does_not_see_the_unit_of_a_stream() -> None:
    def first(scale: float) -> dict[str, Any]:
        lent = replace(pair(), load_teacher=lambda: scaled_teacher(scale))
        return ted.transfer(lent, data(), settings(epochs=1), filter_steps=60).log[1]

    plain = first(1.0)["layer_loss"]
    for scale in (0.1, 10.0):
        assert first(scale)["layer_loss"] == pytest.approx(plain, rel=1e-2)


def test_ted_runs_in_bfloat16() -> None:
    lent = replace(pair(), load_teacher=lambda: teacher().bfloat16(), load_student=lambda: student().bfloat16())
    result = ted.transfer(lent, data(), settings(epochs=1), filter_steps=20)
    assert result.student.dtype == torch.bfloat16
    whole = ted.transfer(pair(), data(), settings(epochs=1), filter_steps=20)
    assert result.log[1]["loss"] == pytest.approx(whole.log[1]["loss"], rel=0.05)
