from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation
from tiny import tiny_llama, toy_data
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from semalign.attribution import layer_attribution, neuron_attribution, objective, of_each, skip_loss
from semalign.lm.examples import IGNORED, Encoded, collate
from semalign.lm.hooks import check_sublayers
from semalign.lm.parts import decoder_layers, sublayers

BUILDS: list[Callable[[], nn.Module]] = [
    tiny_llama,
    lambda: tiny_llama(tie_word_embeddings=True, num_key_value_heads=2),
    lambda: Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            head_dim=8,
            vocab_size=97,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval(),
    lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=32)).eval(),
]


def encoded(seed: int, length: int, prompt: int) -> Encoded:
    ids = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:prompt] = IGNORED
    return Encoded(ids, labels)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return collate([encoded(0, 12, 5), encoded(1, 7, 3), encoded(2, 9, 2)], 0)


def captum(model: nn.Module, batch: dict[str, Tensor], module: nn.Module, *, entering: bool = False) -> Tensor:
    """Gradient x activation (B, T, D) of a module, at its output or at what is ``entering``, as Captum computes it."""

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return loss[None]  # Captum wants outputs it can count

    # An attention module returns a tuple with None in it, which Captum refuses; its last projection is its output.
    module = (
        getattr(module, "o_proj", getattr(module, "c_proj", module)) if "Attention" in repr(type(module)) else module
    )
    out = LayerGradientXActivation(forward, module).attribute(batch["input_ids"], attribute_to_layer_input=entering)
    return (out[0] if isinstance(out, tuple) else out).detach()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("point", ["stream", "mlp", "attention"])
def test_equals_captum_layer_by_layer(build: Callable[[], nn.Module], point: str, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = build()
    modules = [layer if point == "stream" else sublayers(layer)[point == "mlp"] for layer in decoder_layers(model)]
    products = torch.stack([captum(model, batch, module) for module in modules])
    wanted = {
        "signed": products.sum((1, 2, 3)),
        "abs": products.abs().sum((1, 2, 3)),
        "l2": products.square().sum((1, 2, 3)).sqrt(),
    }
    for reduce, scores in wanted.items():
        got = layer_attribution(model, batch, point=point, reduce=reduce)
        assert got.shape == (3,)
        assert (got - scores).abs().max() < 1e-5 * max(1, scores.abs().max())
    tokens = layer_attribution(model, batch, point=point, per_token=True)
    assert tokens.shape == (3, *batch["input_ids"].shape)
    assert torch.allclose(tokens, products.sum(-1), atol=1e-5)
    assert torch.allclose(
        layer_attribution(model, batch, point=point, reduce="l2", per_token=True), products.norm(dim=-1), atol=1e-5
    )


def test_residual_is_the_change_of_the_stream_times_the_gradient_of_the_output(batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    with torch.enable_grad():
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
            output_hidden_states=True,
        )  # fmt: skip
        inner = [*out.hidden_states[:-1]]  # the last of them is behind the final norm
        gradients = torch.autograd.grad(out.loss, inner[1:])
    for k, gradient in enumerate(gradients, start=1):
        wanted = (gradient * (inner[k] - inner[k - 1])).detach().sum()
        assert layer_attribution(model, batch, point="residual")[k - 1] == pytest.approx(float(wanted), abs=1e-6)
    mlp, attention = (layer_attribution(model, batch, point=p)[-1] for p in ("mlp", "attention"))
    residual = layer_attribution(model, batch, point="residual")[-1]
    assert residual != pytest.approx(float(mlp), abs=1e-3)
    assert residual != pytest.approx(float(attention), abs=1e-3)


def test_the_signed_sum_at_the_last_stream_is_zero_under_rms_norm(batch: dict[str, Tensor]) -> None:
    """RMSNorm ignores its input's length, so the gradient there has no part along the activation, token by token."""
    model = tiny_llama()
    signed = layer_attribution(model, batch, per_token=True)
    size = layer_attribution(model, batch, reduce="abs", per_token=True)
    assert signed[-1].abs().max() < 1e-4 * size[-1].max()
    assert signed[:-1].abs().amax((1, 2)).min() > 1e-2 * size[-1].max()  # of the last layer only
    assert layer_attribution(model, batch, point="mlp")[-1].abs() > 1e-3  # and of the stream only


def test_examples_one_by_one_add_up_to_their_batch() -> None:
    model, data = tiny_llama(), toy_data(5)
    whole = collate(data, 0)
    assert len({len(e.input_ids) for e in data}) > 1  # so that the batch is padded
    for reduce in ("signed", "abs", "l2"):
        parts = of_each(model, data, partial(layer_attribution, reduce=reduce))
        put = parts.norm(dim=0) if reduce == "l2" else parts.sum(0)
        assert len(parts) == 5
        torch.testing.assert_close(put, layer_attribution(model, whole, reduce=reduce), rtol=1e-4, atol=1e-5)
    for read in (skip_loss, neuron_attribution):
        torch.testing.assert_close(of_each(model, data, read).sum(0), read(model, whole), rtol=1e-4, atol=1e-5)


def test_padding_contributes_nothing(batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    padded = {name: nn.functional.pad(t, (0, 6), value=IGNORED if name == "labels" else 0) for name, t in batch.items()}
    for point in ("stream", "residual", "mlp", "attention"):
        for reduce in ("signed", "abs", "l2"):
            got = layer_attribution(model, padded, point=point, reduce=reduce)
            assert torch.allclose(got, layer_attribution(model, batch, point=point, reduce=reduce), atol=1e-5)
    tokens = layer_attribution(model, padded, reduce="abs", per_token=True)
    assert tokens[:, padded["attention_mask"] == 0].abs().max() == 0
    assert torch.allclose(neuron_attribution(model, padded), neuron_attribution(model, batch), atol=1e-6)
    assert torch.allclose(skip_loss(model, padded), skip_loss(model, batch), atol=1e-5)


def test_scores_of_a_batch_are_weighted_means_of_its_examples() -> None:
    """The objective is a mean over supervised positions, and positions of other examples have no part in a token's."""
    model, parts = tiny_llama(), [encoded(0, 12, 5), encoded(1, 7, 3)]
    weights = torch.tensor([7.0, 4.0]) / 11
    singles = torch.stack([layer_attribution(model, collate([part], 0)) for part in parts])
    assert torch.allclose(layer_attribution(model, collate(parts, 0)), weights @ singles, atol=1e-5)


def test_skip_loss_is_the_loss_of_a_model_without_the_layer(batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    rises = skip_loss(model, batch)
    layers = list(decoder_layers(model))
    with torch.no_grad():
        whole = objective(model, batch)
        for k in range(3):
            model.model.layers = nn.ModuleList([layer for i, layer in enumerate(layers) if i != k])
            assert float(rises[k]) == pytest.approx(float(objective(model, batch) - whole), abs=1e-5)
    assert rises.abs().min() > 1e-4


def test_neurons_are_scored_at_the_input_of_down_proj(batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    got = neuron_attribution(model, batch)
    assert got.shape == (3, 64)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    check_sublayers(model)  # before the hooks: it runs without gradients
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    with torch.enable_grad():
        objective(model, batch).backward()
    wanted = torch.stack([(h * h.grad).sum((0, 1)) for h in seen])
    assert torch.allclose(got, wanted, atol=1e-6)
    mlp = layer_attribution(model, batch, point="mlp")  # down_proj is linear: its neurons share out the MLP's score
    assert torch.allclose(got.sum(1), mlp, atol=1e-5)
    with pytest.raises(ValueError, match=r"no mlp\.down_proj"):
        neuron_attribution(BUILDS[-1](), batch)


@pytest.mark.parametrize("score", [layer_attribution, skip_loss, neuron_attribution])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(score: Callable[..., Tensor], fails: bool, batch: dict[str, Tensor]) -> None:
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    if fails:
        broken = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        with pytest.raises(ValueError, match="no supervised position"):
            score(model, broken)
    else:
        first = score(model, batch)
        assert not first.requires_grad
        assert torch.equal(first, score(model, batch))  # without the dropout of training mode
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])


def test_a_model_without_gradients_and_a_caller_without_grad_mode_work(batch: dict[str, Tensor]) -> None:
    model = tiny_llama()
    wanted = layer_attribution(model, batch)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(layer_attribution(model, batch), wanted)


def test_one_forward_and_one_backward(batch: dict[str, Tensor]) -> None:
    model, calls = tiny_llama(), {"forward": 0, "backward": 0}
    first = model.model.layers[0].mlp

    def forward(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
        calls["forward"] += 1
        out.register_hook(lambda gradient: calls.__setitem__("backward", calls["backward"] + 1))

    check_sublayers(model)  # eight tokens, once for a model
    first.register_forward_hook(forward)
    layer_attribution(model, batch, point="attention")
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize(
    ("options", "said"), [({"point": "head"}, "'head'.*stream, residual"), ({"reduce": "max"}, "'max'.*signed")]
)
def test_unknown_options_are_refused(options: dict[str, str], said: str, batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=said):
        layer_attribution(tiny_llama(), batch, **options)


def test_a_batch_follows_its_model_to_another_device(batch: dict[str, Tensor]) -> None:
    """The meta device stands for a GPU: a product of tensors of two devices raises there too."""

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(97, 97, device="meta"))

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Any:
            assert input_ids.device == self.weight.device
            assert attention_mask is None or attention_mask.device == self.weight.device
            masked.append(attention_mask is not None)
            return SimpleNamespace(logits=self.weight[input_ids])

    masked: list[bool] = []
    for given in (batch, {name: tensor.flip(1) for name, tensor in batch.items()}):
        assert objective(Elsewhere(), given).device.type == "meta"
    assert masked == [False, True]
