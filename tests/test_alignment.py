"""Training layer k: against full-model references, for what must not change, and for what a run survives."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.bench_alignment import plain_peft
from tiny import FAMILIES, ODD, Letters, tiny_llama, toy_data
from transformers import GPT2Config, GPT2LMHeadModel

from semalign import alignment
from semalign.alignment import transfer
from semalign.lm.examples import Example, TaskData, collate, encode, supervised
from semalign.lm.hooks import partial_decoder
from semalign.models import Pair
from semalign.supervision import Source, SupervisionCache
from semalign.training import loop
from semalign.training.config import DivergedError, TransferConfig, TransferResult
from semalign.training.loop import batches

K = 2


def teacher() -> Any:
    return tiny_llama(4, hidden=48, seed=1)


def student() -> Any:
    return tiny_llama(3, hidden=32, seed=2)


def make_pair(load_teacher: Callable[[], Any] = teacher, load_student: Callable[[], Any] = student) -> Pair:
    tokenizer: Any = Letters()
    return Pair("tiny", load_teacher, load_student, tokenizer)


def task(n: int = 12, validation: int = 0, seed: int = 0) -> TaskData:
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        size = int(torch.randint(low, high, (), generator=generator))
        return "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (size,), generator=generator))

    examples = tuple(Example(text(2, 8), text(1, 7)) for _ in range(n + validation))
    return TaskData("toy", examples[:n], validation=examples[n:])


def settings(**changes: Any) -> TransferConfig:
    return TransferConfig(**{"layers": (K,), "epochs": 2, "batch": 4, "micro_batch": 4, "lr": 1e-2, **changes})


def losses(result: TransferResult, split: str = "train") -> list[float]:
    return [r["loss"] for r in result.log if r["split"] == split]


def changed(result: TransferResult, before: Any) -> set[str]:
    old = dict(before.named_parameters())
    return {n for n, p in result.student.named_parameters() if not torch.equal(p, old[n])}


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------- what may change


MATRICES = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
OTHERS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")


@pytest.mark.parametrize(("trained", "names"), [("lora", MATRICES), ("layer", MATRICES + OTHERS)])
def test_every_parameter_outside_layer_k_is_bit_identical(trained: str, names: tuple[str, ...]) -> None:
    result = transfer(make_pair(), task(), settings(trained=trained))
    assert changed(result, student()) == {f"model.layers.{K - 1}.{n}.weight" for n in names} == set(result.trained)
    assert type(result.student) is type(student())
    assert result.student.state_dict().keys() == student().state_dict().keys()
    assert all(p.requires_grad for p in result.student.parameters())


def watched_steps(patch: pytest.MonkeyPatch) -> tuple[Callable[[], Any], list[dict[str, float]]]:
    """A loader of students, and for each optimizer step the size of every gradient of the last of them, by name."""
    models: list[Any] = []
    steps: list[dict[str, float]] = []
    step = torch.optim.AdamW.step

    def load() -> Any:
        models.append(student())
        return models[-1]

    def spy(self: Any, *args: Any) -> Any:
        of_last = models[-1].named_parameters()
        steps.append({n: float(p.grad.abs().sum()) for n, p in of_last if p.grad is not None})
        return step(self, *args)

    patch.setattr(torch.optim.AdamW, "step", spy)
    return load, steps


@pytest.mark.parametrize("trained", ["lora", "layer"])
def test_gradients_reach_layer_k_only(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, steps = watched_steps(monkeypatch)
    transfer(make_pair(load_student=load), task(), settings(trained=trained))
    reached = {n for sizes in steps for n in sizes}
    assert reached and all(n.startswith(f"model.layers.{K - 1}.") for n in reached)


def test_teacher_and_student_are_never_in_memory_together() -> None:
    alive: list[tuple[str, weakref.ref[Any]]] = []

    def load(role: str, make: Callable[[], Any]) -> Callable[[], Any]:
        def loader() -> Any:
            assert not [r for r, model in alive if model() is not None], f"{role} is loaded while another model lives"
            model = make()
            alive.append((role, weakref.ref(model)))
            return model

        return loader

    result = transfer(make_pair(load("teacher", teacher), load("student", student)), task(), settings(layers=None))
    gc.collect()
    assert [r for r, _ in alive] == ["student", "teacher", "student"]
    assert [model() for _, model in alive if model() is not None] == [result.student]


# --------------------------------------------------------------------------------- equal to the plain computation


@pytest.mark.parametrize(("layers", "interface"), [((3,), "mlp"), ((2,), "residual"), ((1, 3), "attention")])
def test_the_loss_curve_is_that_of_a_peft_model_run_in_full(
    tmp_path: Path, layers: tuple[int, ...], interface: str
) -> None:
    config = settings(layers=layers, teacher_layers=layers, map=None, interface=interface, cache_folder=tmp_path)
    twin = lambda: tiny_llama(3, hidden=32, seed=1)  # noqa: E731 (a loader)
    pair = make_pair(load_teacher=twin)
    result = transfer(pair, task(), config)
    data = encode(pair.tokenizer, task().train, max_length=64)
    cache = SupervisionCache.build(tmp_path, twin(), data, [Source(k, k, point=interface) for k in layers])
    assert cache.teacher_tokens == 0, "the same targets"
    reference = [r["loss"] for r in plain_peft(student(), data, cache, config)]
    assert losses(result) == pytest.approx(reference, abs=1e-4)
    assert reference[-1] < reference[0] - 0.05


GPT2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
TINY: dict[str, Callable[[], Any]] = {**FAMILIES, "gpt2": lambda: GPT2LMHeadModel(GPT2)}


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_running_from_cached_inputs_equals_the_full_forward(
    family: str, first: int, in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, data = TINY[family]().eval(), toy_data(5)
    monkeypatch.setattr(loop, "IN_MEMORY", 0 if in_file else 2**30)
    batch = collate([data[3], data[0], data[1]], 0)
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = model.get_decoder()(batch["input_ids"], attention_mask=mask).last_hidden_state
        read = loop.layer_inputs(model, data, first, tmp_path, batch_tokens=25)
        with partial_decoder(model, first, 3) as forward:
            found = forward(read([3, 0, 1]), mask)
        again = model.get_decoder()(batch["input_ids"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    assert torch.equal(again, expected), "the model is whole again"


def test_an_architecture_with_more_than_a_stream_between_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> Callable[[Any], torch.Tensor]:
        length = len(encode(make_pair().tokenizer, task().train[:1], max_length=64)[0].labels)
        return lambda examples: torch.randn(len(examples), length, 32)

    monkeypatch.setattr(loop, "layer_inputs", wrong)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported"):
        transfer(make_pair(), task(), settings())


@pytest.mark.parametrize("kind", ["cosine", "relational"])
def test_accumulated_micro_batches_equal_the_big_batch(kind: str) -> None:
    big, small = (transfer(make_pair(), task(), settings(layer_loss=kind, micro_batch=m)) for m in (4, 1))
    assert losses(small) == pytest.approx(losses(big), abs=1e-6)
    for p, q in zip(big.student.parameters(), small.student.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- knowledge


def planted(names: tuple[str, ...] = MATRICES, rank: int = 4) -> Any:
    """The student plus a random LoRA delta on ``names`` in layer K."""
    model, generator = student(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(f"model.layers.{K - 1}.{name}.weight")
            left, right = (torch.randn(s, generator=generator) for s in ((len(weight), rank), (rank, weight.shape[1])))
            weight += 0.3 * left @ right / math.sqrt(rank)
    return model


@torch.no_grad()
def divergence(goal: Any, model: Any, examples: tuple[Example, ...]) -> float:
    """KL(goal || model) in nats a supervised position."""
    found = []
    for e in encode(make_pair().tokenizer, examples, max_length=64):
        p, q = (m(e.input_ids[None]).logits[0][supervised(e.labels)].log_softmax(-1) for m in (goal, model))
        found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


PLANTED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"interface": "residual"}, MATRICES),
    ({"interface": "residual", "output_loss": "kl"}, MATRICES),
    ({"interface": "stream", "layer_loss": "mse", "output_loss": "none"}, MATRICES),
    # this interface cannot see the attention's delta
    ({"interface": "mlp", "layer_loss": "mse", "output_loss": "none"}, MATRICES[2:]),
]


@pytest.mark.parametrize(("changes", "names"), PLANTED)
def test_a_planted_teacher_is_recovered(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    """Held-out KL to the teacher falls by at least half, although the labels are random text."""
    data, held_out = task(128, seed=1), task(32, seed=2).train
    goal = planted(names)
    config = settings(teacher_layers=(K,), map="logit", epochs=8, batch=16, micro_batch=16, lr=5e-3, **changes)
    result = transfer(make_pair(load_teacher=lambda: planted(names)), data, config)
    before, after = (divergence(goal, m, held_out) for m in (student(), result.student))
    print(changes, before, after)
    assert before > 0.1
    assert after < before / 2


# -------------------------------------------------------------------------- which layers, and the teacher's side


def test_the_default_layer_is_the_partner_of_the_most_important_teacher_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def scores(model: Any, batch: dict[str, torch.Tensor], *, point: str, reduce: str) -> torch.Tensor:
        seen.append(len(batch["input_ids"]))
        return torch.tensor([0.1, 0.2, 0.9, 0.3])  # l* = 3; l(k) = 1, 2, 4 for 4 and 3 layers, so k = 3

    monkeypatch.setattr(alignment, "layer_attribution", scores)
    data = TaskData("toy", task(6).train, align=task(3).train, extract=task(5).train)
    result = transfer(make_pair(), data, settings(layers=None, epochs=1, micro_batch=2))
    assert {n.split(".")[2] for n in result.trained} == {"2"}
    assert sum(seen) == 5, "the extract split decides"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": (3, 1)}, [(1, 1, 0.0), (4, 4, 0.0)]),
        ({"layers": (3, 1), "teacher_layers": (2, 3)}, [(3, 3, 0.0), (2, 2, 0.0)]),
        ({"layers": (2,), "interpolate": True}, [(2, 3, pytest.approx(2 / 3))]),
    ],
)
def test_sources_follow_the_depth_rule_the_given_layers_or_the_interpolation(
    tmp_path: Path, changes: dict[str, Any], expected: list[Any]
) -> None:
    transfer(make_pair(), task(4), settings(epochs=1, cache_folder=tmp_path, interface="attention", **changes))
    (manifest,) = tmp_path.glob("*/manifest.json")
    sources = json.loads(manifest.read_text())["sources"]
    assert [(s["low"], s["high"], s["mix"]) for s in sources] == expected
    assert {s["point"] for s in sources} == {"attention"}


def test_a_given_matrix_and_folded_gains_change_the_targets(tmp_path: Path) -> None:
    def gained() -> Any:
        model = teacher()
        with torch.no_grad():
            model.model.norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
        return model

    pair = make_pair(load_teacher=gained)
    changes: tuple[dict[str, Any], ...] = ({}, {"fold_gain": True}, {"map": "logit"}, {"map": torch.ones(32, 48)})
    for c in changes:
        transfer(pair, task(3), settings(epochs=1, cache_folder=tmp_path, **c))
    assert len(list(tmp_path.glob("*/manifest.json"))) == len(changes)


def test_the_teachers_vocabulary_may_be_padded() -> None:
    pair = make_pair(load_teacher=lambda: tiny_llama(4, hidden=48, vocab=105, seed=1))
    with pytest.warns(UserWarning, match="97"):
        result = transfer(pair, task(), settings(output_loss="kl", epochs=4))
    assert losses(result)[-1] < losses(result)[0]


def test_a_second_run_finds_the_supervision_of_the_first(tmp_path: Path) -> None:
    first, second = (transfer(make_pair(), task(), settings(cache_folder=tmp_path, seed=s)) for s in (0, 1))
    data = encode(make_pair().tokenizer, task().train, max_length=64)
    assert first.cost["teacher_tokens"] == sum(len(e.input_ids) for e in data)
    assert second.cost["teacher_tokens"] == 0
    assert first.cost["student_tokens"] == 2 * first.cost["teacher_tokens"]
    assert first.cost["trainable_parameters"] == 16 * (4 * 32 + 2 * (32 + 64))
    assert first.cost["cached_bytes_per_token"] > 2 * 32


# --------------------------------------------------------------------------------------------- schedule and order


def test_frontier_is_one_layer_after_another() -> None:
    both = transfer(make_pair(), task(), settings(layers=(1, 3), schedule="frontier"))
    lower = transfer(make_pair(), task(), settings(layers=(1,)))
    upper = transfer(make_pair(load_student=lambda: copy.deepcopy(lower.student)), task(), settings(layers=(3,)))
    assert losses(both) == losses(lower) + losses(upper)
    assert same_weights(both.student, upper.student)
    assert [r["stage"] for r in both.log] == [1] * len(lower.log) + [2] * len(upper.log)


def test_batches_hold_every_example_once_and_neighbours_in_length() -> None:
    lengths = torch.randint(1, 100, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    epoch = batches(lengths, 8, seed=3, epoch=1)
    assert sorted(i for b in epoch for i in b) == list(range(70)) and len(epoch) == math.ceil(70 / 8)
    assert epoch == batches(lengths, 8, seed=3, epoch=1) != batches(lengths, 8, seed=3, epoch=2)
    assert epoch != batches(lengths, 8, seed=4, epoch=1)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch]
    assert sorted(spread)[-2] < 40, "a random batch of 8 spans about 78; only the last few examples may"


def test_validation_losses_follow_each_epoch_and_change_nothing() -> None:
    watched, alone = (transfer(make_pair(), task(8, validation=n), settings()) for n in (3, 0))
    assert [r["split"] for r in watched.log] == ["validation", *["train", "train", "validation"] * 2]
    assert [r["step"] for r in watched.log if r["split"] == "validation"] == [0, 2, 4]
    assert losses(watched) == pytest.approx(losses(alone), abs=1e-6)
    records = [r for r in watched.log if r["split"] == "train"]
    assert all(r["loss"] == pytest.approx(r["layer_loss"] + r["output_loss"], abs=1e-6) for r in records)
    assert all(r["layer_loss"] == pytest.approx(1 - r["cos"], abs=1e-5) and r["norm_ratio"] > 0 for r in records)


def test_what_is_not_watched_is_not_read_and_the_student_is_the_same() -> None:
    watched, alone = (transfer(make_pair(), task(8, validation=3), settings(watch=w)) for w in (True, False))
    assert [r for r in watched.log if r["split"] == "train"] == alone.log
    assert same_weights(watched.student, alone.student)


def test_fisher_loss_trains() -> None:
    result = transfer(
        make_pair(), task(), settings(layer_loss="fisher", interface="stream", output_loss="none", epochs=6)
    )
    found = [r["layer_loss"] for r in result.log if r["split"] == "train"]
    assert found[-1] < 0.9 * found[0]


def test_relational_loss_needs_no_map_between_widths() -> None:
    result = transfer(make_pair(), task(), settings(map=None, layer_loss="relational", output_loss="none", epochs=6))
    assert losses(result)[-1] < 0.8 * losses(result)[0]


def test_weights_scale_the_two_terms() -> None:
    (first, *_) = transfer(make_pair(), task(), settings(layer_weight=0.5, output_weight=3.0)).log
    assert first["loss"] == pytest.approx(0.5 * first["layer_loss"] + 3.0 * first["output_loss"], abs=1e-5)


# ------------------------------------------------------------------------------------ what a run survives


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    a, b, c = (transfer(make_pair(), task(), settings(seed=s)) for s in (7, 7, 8))
    assert same_weights(a.student, b.student) and a.log == b.log
    assert not same_weights(a.student, c.student)


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    step, calls = torch.optim.AdamW.step, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise Interrupted
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)


@pytest.mark.parametrize(("number", "trained"), [(3, "lora"), (6, "layer"), (10, "lora")])
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, trained: str
) -> None:
    config: dict[str, Any] = {"layers": (1, 3), "schedule": "frontier", "checkpoint_every": 2, "trained": trained}
    data = task(12, validation=2)  # 3 steps an epoch, 6 a stage, 12 in all
    whole = transfer(make_pair(), data, settings(**config))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, number)
        transfer(make_pair(), data, settings(**config, folder=tmp_path))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12 - (number - 1) // 2 * 2 + 1)  # resumes where it stopped: one more step would raise
        resumed = transfer(make_pair(), data, settings(**config, folder=tmp_path))
    assert same_weights(whole.student, resumed.student)
    assert whole.log == resumed.log and whole.trained == resumed.trained
    assert whole.cost["student_tokens"] == resumed.cost["student_tokens"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)  # a finished run does not train again
        again = transfer(make_pair(), data, settings(**config, folder=tmp_path))
    assert same_weights(whole.student, again.student)


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path: Path) -> None:
    transfer(make_pair(), task(), settings(folder=tmp_path))
    for other in (settings(folder=tmp_path, lr=1e-3), settings(folder=tmp_path, map="logit")):
        with pytest.raises(ValueError, match="belongs to other inputs"):
            transfer(make_pair(), task(), other)


def test_an_error_while_saving_leaves_the_old_checkpoint_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes
    config = settings(folder=tmp_path, checkpoint_every=2)

    def half(path: Path, content: bytes) -> int:
        if path.name.startswith(".checkpoint") and (tmp_path / "checkpoint.pt").exists():
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        transfer(make_pair(), task(), config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "supervision"]
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, history = torch.optim.AdamW.step, []
    name = f"model.layers.{K - 1}.mlp.up_proj.weight"
    models: list[Any] = []

    def load() -> Any:
        models.append(student())
        return models[-1]

    def poison(self: Any, *args: Any) -> None:
        history.append(models[-1].get_parameter(name).detach().clone())
        step(self, *args)
        if len(history) == 4:
            models[-1].get_parameter(name).data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    message = r"stopped at step 5 of 6 \(epoch 2\) with loss nan on the batch of examples \["
    with pytest.raises(DivergedError, match=message) as caught:
        transfer(make_pair(load_student=load), task(), settings(trained="layer", folder=tmp_path))
    good = caught.value.student.get_parameter(name)
    assert torch.equal(good, history[3]), "the weights that gave the last finite loss"
    assert torch.equal(torch.load(tmp_path / "last_good.pt")[name], good)


def test_a_diverging_loss_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"trained": "layer", "layer_loss": "mse", "output_loss": "none", "lr": 20.0, "warmup": 1.0, "epochs": 8}
    with pytest.raises(DivergedError, match=r"epoch [2-8]") as caught:
        transfer(make_pair(), task(), settings(**changes))
    assert all(torch.isfinite(p).all() for p in caught.value.student.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_loss": "huber"}, "layer_loss='huber' is not one of cosine, mse, relational, fisher"),
        ({"interface": "logits"}, "interface"),
        ({"teacher_layers": (1, 2)}, "one teacher layer for each"),
        ({"layers": (4,)}, r"layers=\(4,\) must name different layers of a student of 3"),
        ({"layers": (1, 1)}, "different layers"),
        ({"teacher_layers": (9,)}, "not in a teacher of 4 layers"),
        ({"lora_targets": ("c_fc",)}, "has no c_fc: choose among those .* down_proj, gate_proj"),
        ({"lora_targets": ("up_proj", "c_fc")}, "layer 2 of a LlamaForCausalLM has no c_fc"),
        ({"lora_targets": ()}, "must name linear modules"),
        ({"adapters": "pissa", "lora_rank": 33}, "PiSSA has no rank 33 in up_proj, whose rank is at most 32"),
        ({"map": None}, r"\(D_S, D_T\) = \(32, 48\)"),
        ({"map": torch.ones(48, 32)}, r"\(D_S, D_T\) = \(32, 48\)"),
    ],
)
def test_refuses_what_it_cannot_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer(make_pair(), task(), settings(**changes))


def test_adapters_that_a_library_refuses_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_arguments: object) -> None:
        raise ValueError("up_proj is fused with gate_proj.\nMore of it.")

    monkeypatch.setattr(loop, "get_peft_model", refuses)
    said = (
        r"^lora_targets=.* cannot be adapted in a LlamaForC\w+ \(up_proj is .* gate_proj\): choose others, or trained"
    )
    with pytest.raises(ValueError, match=said):
        loop._attach(tiny_llama(), (2,), TransferConfig())


def test_refuses_a_task_without_training_examples() -> None:
    with pytest.raises(ValueError, match="task empty has no training examples"):
        transfer(make_pair(), TaskData("empty", ()), settings())


def test_defaults_are_the_papers() -> None:
    c = TransferConfig()
    assert (c.batch, c.lr, c.epochs, c.lora_rank, c.map, c.interface) == (64, 3e-4, 5, 16, "paper", "mlp")
    assert (c.layer_loss, c.output_loss, c.layer_weight, c.output_weight) == ("cosine", "cosine", 1.0, 1.0)
    assert c.lora_targets == ("up_proj", "down_proj", "v_proj", "o_proj")


# -------------------------------------------------------------------------------- what the baselines ask of it


def test_labels_alone_need_no_teacher() -> None:
    def forbidden() -> Any:
        raise AssertionError("the teacher was loaded")

    result = transfer(
        make_pair(forbidden), task(validation=2), settings(layers="all", layer_weight=0.0, output_loss="ce")
    )
    assert result.cost["teacher_tokens"] == 0
    assert {n.split(".")[2] for n in changed(result, student())} == {"0", "1", "2"}


def test_the_layer_that_trains_on_labels_alone_can_be_the_attributed_one() -> None:
    chosen = transfer(make_pair(), task(), settings(layers=None))
    plain = transfer(make_pair(), task(), settings(layers=None, layer_weight=0.0, output_loss="ce"))
    assert plain.trained == chosen.trained and plain.cost["teacher_tokens"] == 0


def test_the_label_weight_adds_the_cross_entropy_to_any_output_loss() -> None:
    def first(**changes: Any) -> dict[str, Any]:
        return transfer(make_pair(), task(), settings(epochs=1, layer_weight=0.0, **changes)).log[0]

    ce, kl = first(output_loss="ce")["loss"], first(output_loss="kl", label_weight=0.0)["loss"]
    both = first(output_loss="kl", label_weight=0.5)
    assert both["loss"] == pytest.approx(kl + 0.5 * ce, rel=1e-5)
    assert both["label_loss"] == pytest.approx(ce, rel=1e-5)
    alone = transfer(make_pair(), task(), settings(layer_weight=0.0, output_loss="none", label_weight=1.0))
    plain = transfer(make_pair(), task(), settings(layer_weight=0.0, output_loss="ce"))
    assert same_weights(alone.student, plain.student)


@pytest.mark.parametrize("targets", ["random", "scrambled"])
def test_a_control_has_the_length_of_the_target_and_another_direction(targets: str) -> None:
    quick = {"epochs": 2, "lr": 0.0, "output_loss": "none", "batch": 12, "micro_batch": 5}
    true = transfer(make_pair(), task(), settings(**quick))
    control = transfer(make_pair(), task(), settings(**quick, targets=targets))
    again = transfer(make_pair(), task(), settings(**quick, targets=targets))
    assert losses(control)[0] == pytest.approx(losses(control)[1], rel=1e-5)  # the same targets at every epoch
    assert losses(control) == losses(again)
    assert abs(losses(control)[0] - losses(true)[0]) > 1e-3
    if targets == "random":  # its length is the target's, position by position
        assert control.log[0]["norm_ratio"] == pytest.approx(true.log[0]["norm_ratio"], rel=1e-5)


def test_an_identity_projection_that_does_not_move_is_no_projection() -> None:
    plain = transfer(make_pair(), task(), settings(lr=0.0))
    same = transfer(make_pair(), task(), settings(lr=0.0, projection=torch.eye(32)))
    assert losses(plain) == pytest.approx(losses(same), rel=1e-5)


@pytest.mark.parametrize("trained", ["lora", "layer"])
def test_a_learned_projection_compares_in_the_teachers_width_and_leaves_no_trace(trained: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(48, 32) / 32**0.5
    config = settings(map=None, projection=start, output_loss="none", trained=trained, epochs=12)
    result = transfer(make_pair(), task(), config)
    assert losses(result)[-1] < 0.8 * losses(result)[0]
    assert set(dict(result.student.named_parameters())) == set(dict(student().named_parameters()))
    assert torch.equal(start, config.projection)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="projection is"):
        transfer(make_pair(), task(), settings(map=None, projection=start.T))


def test_a_projection_resumes_with_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"map": None, "projection": torch.randn(48, 32), "checkpoint_every": 1, "epochs": 2}
    whole = transfer(make_pair(), task(), settings(**config))
    real = loop._save_checkpoint

    def killed(run: Any, folder: Path, state: dict[str, Any]) -> None:
        real(run, folder, state)
        if state["step"] == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_save_checkpoint", killed)
        transfer(make_pair(), task(), settings(**config, folder=tmp_path))
    resumed = transfer(make_pair(), task(), settings(**config, folder=tmp_path))
    assert same_weights(whole.student, resumed.student)
    with pytest.raises(ValueError, match="belongs to other inputs"):
        transfer(make_pair(), task(), settings(**{**config, "projection": torch.randn(48, 32)}, folder=tmp_path))


def given_adapters(rank: int = 16) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    names = [n for n, m in student().named_modules() if n.rsplit(".", 1)[-1] in TransferConfig.lora_targets]
    shapes = {n: student().get_submodule(n).weight.shape for n in names if f"layers.{K - 1}." in n}
    return {n: (0.1 * torch.randn(a, rank), 0.1 * torch.randn(rank, b)) for n, (a, b) in shapes.items()}


@pytest.mark.parametrize("adapters", ["pissa", given_adapters()])
def test_an_adapters_start_does_not_change_the_function(adapters: Any) -> None:
    ids = torch.randint(3, 97, (2, 9))
    still = transfer(make_pair(), task(), settings(adapters=adapters, lr=0.0))
    torch.testing.assert_close(still.student(ids).logits, student()(ids).logits, atol=1e-4, rtol=1e-4)
    trained = transfer(make_pair(), task(), settings(adapters=adapters))
    zero = transfer(make_pair(), task(), settings())
    assert not same_weights(trained.student, zero.student)
    assert losses(trained)[0] == pytest.approx(losses(zero)[0], rel=1e-3)


def test_adapters_must_name_the_trained_modules() -> None:
    some = dict(list(given_adapters().items())[1:])
    with pytest.raises(ValueError, match="adapters must name the trained modules"):
        transfer(make_pair(), task(), settings(adapters=some))


def test_layers_are_all_or_numbers() -> None:
    with pytest.raises(ValueError, match='neither "all" nor'):
        TransferConfig(layers="every")


MISSING = {
    "phi3": ("up_proj, v_proj", "gate_up_proj, o_proj, qkv_proj"),
    "glm4": ("up_proj", "gate_up_proj"),
    "gptj": ("up_proj, down_proj, o_proj", "fc_in, fc_out"),
    "mixtral": ("up_proj, down_proj", "k_proj, o_proj"),
    "opt": ("up_proj, down_proj, o_proj", "fc1, fc2"),
}


@pytest.mark.parametrize("family", MISSING)
def test_lora_targets_that_a_layer_lacks_in_part_are_refused(family: str) -> None:
    missing, held = MISSING[family]
    quick = settings(layer_weight=0.0, output_loss="ce", epochs=1)
    with pytest.raises(ValueError, match=f"has no {missing}: choose among those which hold its weights, .*{held}"):
        transfer(make_pair(load_student=lambda: ODD[family]().eval()), task(4), quick)
    taken = {"phi3": ("gate_up_proj", "qkv_proj"), "gptj": ("fc_in", "out_proj")}.get(family)
    if taken:
        result = transfer(
            make_pair(load_student=lambda: ODD[family]().eval()), task(4), settings(
                layer_weight=0.0, output_loss="ce", epochs=1, lora_targets=taken
            ),
        )  # fmt: skip
        assert {n.split(".")[-2] for n in result.trained} == set(taken)


def test_reverse_kl_reads_the_whole_vocabulary_where_it_fits_and_says_so_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"layer_weight": 0.0, "output_loss": "reverse_kl", "epochs": 1, "batch": 12, "micro_batch": 12, "lr": 0.0}
    whole = transfer(make_pair(), task(), settings(**quick, top_k=8, target_dtype="float32"))
    examples = encode(make_pair().tokenizer, task().train, max_length=64)
    expected, positions = 0.0, 0
    for e in examples:
        logq, logp = (
            m(e.input_ids[None]).logits[0][supervised(e.labels)].log_softmax(-1).detach()
            for m in (student(), teacher())
        )
        expected, positions = expected + float((logq.exp() * (logq - logp)).sum()), positions + len(logq)
    assert whole.log[0]["output_loss"] == pytest.approx(expected / positions, rel=1e-4)
    monkeypatch.setattr(alignment, "WHOLE_CACHE", 1000)
    with pytest.warns(UserWarning, match=r"reads 8 of 97 tokens, which hold \d\d\.\d% of the teacher's probability"):
        part = transfer(make_pair(), task(), settings(**quick, top_k=8))
    assert part.log[0]["output_loss"] < 0.9 * whole.log[0]["output_loss"]
