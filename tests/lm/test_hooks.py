"""Taps: what is read at each point adds up to the stream that transformers reports."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import APART, FAMILIES, ODD, tiny_llama, toy_data
from torch import nn

from semalign.attribution import layer_attribution, objective, skip_loss
from semalign.lm.examples import collate
from semalign.lm.hooks import capture, check_head, check_sublayers, skip_layers
from semalign.lm.parts import decoder, decoder_layers, norm_gain

WHOLE = {**FAMILIES, **{name: make for name, make in ODD.items() if name not in APART}}


@pytest.mark.parametrize("family", WHOLE)
def test_captured_points_add_up_to_the_reference_stream(family: str) -> None:
    torch.manual_seed(0)
    model = WHOLE[family]().eval()
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


@pytest.mark.parametrize("family", ["glm4", "afmoe", "granite", "gpt_neo"])
def test_a_sublayer_is_scored_by_what_it_adds(family: str) -> None:
    """The stream is the sum of what is added, so its gradient is that of every addend."""
    torch.manual_seed(0)
    model, batch = ODD[family]().eval(), collate(toy_data(3), 0)
    for point in ("mlp", "attention"):
        with torch.enable_grad(), capture(model, [(3, "stream"), (3, point)]) as seen:
            (gradient,) = torch.autograd.grad(objective(model, batch), [seen[3, "stream"]])
        if point == "mlp":  # behind it nothing but the sum; attention's addend the MLP reads too
            expected = (gradient * seen[3, "mlp"]).sum()
            assert layer_attribution(model, batch, point="mlp")[2] == pytest.approx(float(expected.detach()), abs=1e-6)
        assert layer_attribution(model, batch, point=point).abs().min() > 0


@pytest.mark.parametrize("family", APART)
def test_layers_without_two_sublayers_are_refused_at_these_and_read_as_a_whole(family: str) -> None:
    torch.manual_seed(0)
    model, batch = ODD[family]().eval(), collate(toy_data(3), 0)
    with pytest.raises(ValueError, match=f"{type(decoder_layers(model)[0]).__name__}: read it at stream or residual"):
        layer_attribution(model, batch, point="mlp")
    assert layer_attribution(model, batch, reduce="abs").min() > 0


def test_names_that_do_not_add_up_are_refused_once_and_for_each_model() -> None:
    class Halved(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp, self.inner = inner.self_attn, inner.mlp, inner

        def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            out: torch.Tensor = (self.inner(hidden_states, *args, **kwargs) + hidden_states) / 2
            return out

    model = tiny_llama()
    check_sublayers(model)
    check_sublayers(tiny_llama().bfloat16())
    strange = tiny_llama()
    strange.model.layers[1] = Halved(strange.model.layers[1])
    for _ in range(2):
        with pytest.raises(ValueError, match="MLP of layer 2 of a LlamaForCausalLM do not add up"):
            layer_attribution(strange, collate(toy_data(2), 0), point="attention")


@pytest.mark.parametrize("family", ["gpt_neo", "bloom", "falcon", "mpt", "opt"])
def test_a_skipped_layer_is_a_layer_left_out_whatever_layers_return(family: str) -> None:
    torch.manual_seed(0)
    model, batch = ODD[family]().eval(), collate(toy_data(3), 0)
    rises = skip_loss(model, batch)
    layers = decoder_layers(model)
    with torch.no_grad(), capture(model, [(1, "input"), (3, "stream")]) as seen, skip_layers(model, [1, 2, 3]):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        torch.testing.assert_close(seen[1, "input"], seen[3, "stream"])
    with torch.no_grad():
        whole = objective(model, batch)
        del layers[1]
        assert float(rises[1]) == pytest.approx(float(objective(model, batch) - whole), abs=1e-5)
    assert rises.isfinite().all() and rises.abs().min() > 0


@pytest.mark.parametrize("family", ["olmo", "nanochat"])
def test_a_norm_without_a_weight_has_the_gain_one(family: str) -> None:
    assert torch.equal(norm_gain(ODD[family]().eval()), torch.ones(32))


def test_a_gain_stored_less_one_keeps_its_digits() -> None:
    torch.manual_seed(0)
    model = FAMILIES["gemma3"]().bfloat16().eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(-0.02, 0.02)
    gain = norm_gain(model)
    assert gain.dtype == torch.float32
    assert torch.equal(gain, 1 + model.model.norm.weight.detach().float())  # 1 + w in bfloat16 is 4e-3 off


class Changed(nn.Module):
    """A layer that hands on something else than its inner one does."""

    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        return self.change(self.inner(hidden_states, *args, **kwargs))


def test_a_layer_that_hands_on_no_stream_is_refused_by_its_number() -> None:
    model = tiny_llama()
    model.model.layers[1] = Changed(model.model.layers[1], lambda out: {"states": out})
    with (
        capture(model, [(2, "stream")]),
        pytest.raises(ValueError, match="layer 2 of a LlamaForCausalLM gives dict at"),
    ):
        model.model.layers[1](torch.randn(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))


def test_what_was_not_computed_is_refused_by_its_name() -> None:
    model = tiny_llama()
    with (
        capture(model, [(3, "stream")]) as seen,
        pytest.raises(ValueError, match="the stream of layer 3 of a LlamaFor"),
    ):
        seen[3, "stream"]


def test_a_loss_without_a_gradient_at_some_layer_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1] = Changed(model.model.layers[1], torch.Tensor.detach)
    with pytest.raises(ValueError, match="the loss of a LlamaForCausalLM has no gradient at layer 1: choose"):
        layer_attribution(model, collate(toy_data(2), 0))


@pytest.mark.parametrize("family", WHOLE)
def test_logits_are_the_head_on_the_final_states(family: str) -> None:
    torch.manual_seed(0)
    check_head(WHOLE[family]().eval())


def test_logits_that_are_not_the_head_on_the_final_states_are_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    check_head(model)  # part of the head, wherever it is called
    strange = tiny_llama()
    strange.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits * 3) or out)
    for _ in range(2):
        with pytest.raises(ValueError, match="the logits of a LlamaForCausalLM are not its head on"):
            check_head(strange)


def test_a_decoder_may_change_its_embeddings_in_place() -> None:
    def doubles(_layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].mul_(2)

    model, batch = tiny_llama(), collate(toy_data(2), 0)
    model.model.layers[0].register_forward_pre_hook(doubles)
    twice = tiny_llama()
    with torch.no_grad():
        twice.model.embed_tokens.weight.mul_(2)
    torch.testing.assert_close(layer_attribution(model, batch), layer_attribution(twice, batch))


def test_a_model_that_takes_itself_for_its_decoder_has_one_inside() -> None:
    model = tiny_llama()
    model.get_decoder = lambda: model  # type: ignore[method-assign]
    assert decoder(model) is model.model and len(decoder_layers(model)) == 3
