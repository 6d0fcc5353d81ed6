"""What chapters read of two models side by side: layer outputs, their similarity, and the divergence of the outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_supervision import toy_data
from tiny import tiny_llama

from semalign.lm.examples import IGNORED, Encoded, supervised
from semalign.study.reading import by_example, divergence_between, layer_outputs, read_out
from semalign.supervision import SupervisionCache


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


def test_read_out_is_the_models_own_loss_token_by_token() -> None:
    model = tiny_llama()
    examples = []
    for seed, (length, prompt) in enumerate([(9, 4), (5, 2), (7, 6)]):
        ids = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:prompt] = IGNORED
        examples.append(Encoded(ids, labels))
    found = read_out(model, examples, batch=2)
    assert found["example"].tolist() == [0] * 5 + [1] * 3 + [2]
    means = by_example(found["loss"], found["example"])
    with torch.no_grad():
        for i, (example, mean) in enumerate(zip(examples, means, strict=True)):
            out = model(example.input_ids[None], labels=example.labels[None])
            assert float(mean) == pytest.approx(float(out.loss), abs=1e-5)
            places = (example.labels[1:] != IGNORED).nonzero()[:, 0]
            mine = found["example"] == i
            assert torch.equal(found["predicted"][mine], out.logits[0, places].argmax(-1))
    answers = torch.cat([e.labels[e.labels != IGNORED] for e in examples])
    assert torch.equal(found["right"], found["predicted"] == answers)


def test_a_model_agrees_with_its_own_distribution(tmp_path: Path) -> None:
    model, other, data = tiny_llama(2, seed=1), tiny_llama(2, seed=2), toy_data(5)
    top = SupervisionCache.build(tmp_path, model, data, (), top_k=97, vocabulary=97, dtype="float32")
    own = read_out(model, data, batch=2, teacher=top)
    assert own["agree"].all() and float(own["kl"].abs().max()) < 1e-5
    found = read_out(other, data, batch=3, teacher=top)
    ids, labels = data[0].input_ids[None], data[0].labels
    p, q = (m(ids).logits[0][supervised(labels)].log_softmax(-1) for m in (model, other))
    torch.testing.assert_close(found["kl"][: len(p)], (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(found["agree"][: len(p)], p.argmax(-1) == q.argmax(-1))
    direct = divergence_between(model, other, data)
    assert direct[0].item() == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean().detach()), abs=1e-5)
    assert float(divergence_between(model, model, data).abs().max()) < 1e-6 and direct.shape == (5,)
