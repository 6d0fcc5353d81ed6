"""What chapters read of two models side by side: layer outputs, their similarity, and the divergence of the outputs."""

from __future__ import annotations

import pytest
import torch
from test_supervision import toy_data
from tiny import tiny_llama

from semalign.lm.examples import IGNORED
from semalign.study.analysis import cka_matrix, divergence_between, layer_outputs, linear_cka


def test_layer_outputs_are_the_streams_of_real_tokens() -> None:
    model, encoded = tiny_llama(seed=0).eval(), toy_data(3)
    outputs = layer_outputs(model, encoded)
    assert len(outputs) == model.config.num_hidden_layers
    assert {o.shape for o in outputs} == {(sum(len(e.input_ids) for e in encoded), model.config.hidden_size)}
    with torch.no_grad():
        alone = model(encoded[0].input_ids[None], output_hidden_states=True).hidden_states
    assert torch.allclose(outputs[0][: len(encoded[0].input_ids)], alone[1][0], atol=1e-5)
    added = layer_outputs(model, encoded, point="residual")
    assert torch.allclose(outputs[1] - outputs[0], added[1], atol=1e-5)


def test_the_matrix_of_similarities_has_a_row_for_each_of_the_first() -> None:
    x, y = layer_outputs(tiny_llama(seed=0), toy_data(4)), layer_outputs(tiny_llama(seed=1), toy_data(4))
    matrix = cka_matrix(x, y[:1])
    assert matrix.shape == (len(x), 1)
    assert float(matrix[1, 0]) == pytest.approx(linear_cka(x[1], y[0]))
    assert cka_matrix(x, x).diagonal().tolist() == pytest.approx([1.0] * len(x))


def test_divergence_is_zero_of_a_model_from_itself_and_textbook_otherwise() -> None:
    one, other, encoded = tiny_llama(seed=0).eval(), tiny_llama(seed=1).eval(), toy_data(3)
    assert divergence_between(one, one, encoded).mean().item() == pytest.approx(0, abs=1e-7)
    parts = []
    with torch.no_grad():
        for e in encoded:
            p, q = (m(e.input_ids[None]).logits[0, :-1].softmax(-1) for m in (one, other))
            parts.append((p * (p / q).log()).sum(-1)[e.labels[1:] != IGNORED].mean())
    assert divergence_between(one, other, encoded).mean().item() == pytest.approx(
        float(sum(parts)) / len(parts), rel=1e-4
    )
