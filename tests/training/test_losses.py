"""The losses against their definitions: known answers, full logits, and gradients in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, toy_data
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from semalign.lm.examples import collate, supervised
from semalign.lm.hooks import logits_of
from semalign.lm.parts import head_weight
from semalign.supervision import Source, SupervisionCache
from semalign.training import losses
from semalign.training.losses import DIVERGENCES, LAYER_LOSSES, divergence, head_factor, output_loss


def student() -> Any:
    return tiny_llama(3, hidden=32, seed=2)


def test_layer_losses_have_their_known_answers() -> None:
    h, norm = torch.randn(6, 8), torch.full((6,), 3.0)
    torch.testing.assert_close(LAYER_LOSSES["cosine"](5 * h, h, norm, [6]), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(LAYER_LOSSES["cosine"](-h, h, norm, [6]), torch.full((6,), 2.0))
    torch.testing.assert_close(LAYER_LOSSES["mse"](3 * h, h, norm, [6]), torch.zeros(6))
    torch.testing.assert_close(LAYER_LOSSES["mse"](6 * h, h, norm, [6]), torch.ones(6))
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q[:8]
    torch.testing.assert_close(
        LAYER_LOSSES["relational"](h, h @ rotation, norm, [2, 4]), torch.zeros(6), atol=1e-6, rtol=0
    )
    a, b = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # centred Gram of a: +-1/2, of b: 0
    torch.testing.assert_close(LAYER_LOSSES["relational"](a, b, norm[:2], [2]), torch.full((2,), 0.25))


def test_relational_loss_sees_each_sequence_alone() -> None:
    a, b, norm = torch.randn(5, 4), torch.randn(5, 7), torch.ones(5)
    whole = LAYER_LOSSES["relational"](a, b, norm, [2, 3])
    parts = [LAYER_LOSSES["relational"](a[s], b[s], norm[s], [n]) for s, n in ((slice(2), 2), (slice(2, 5), 3))]
    torch.testing.assert_close(whole, torch.cat(parts))


def gemma2() -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(**small, **heads, final_logit_softcapping=0.05)).eval()


@pytest.mark.parametrize(("make", "factored"), [(student, True), (gemma2, False)])
def test_cosine_with_the_onehot_is_that_of_the_models_logits(make: Callable[[], Any], factored: bool) -> None:
    model = make()
    ids, labels = torch.randint(3, 97, (1, 9)), torch.randint(3, 97, (9,))
    onehot = F.one_hot(labels, 97).float()
    expected = 1 - F.cosine_similarity(model(ids).logits[0], onehot, dim=-1)
    factor = head_factor(model)
    assert (factor is not None) == factored
    final = model.get_decoder()(ids).last_hidden_state[0]
    torch.testing.assert_close(
        output_loss("cosine", final, labels, lambda h: logits_of(model, h), head_weight(model), factor=factor),
        expected,
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", ["ce", "kl", "reverse_kl", "jsd"])
def test_output_losses_in_chunks_equal_the_plain_ones_with_gradients(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, goal, data = student(), tiny_llama(4, hidden=48, seed=1), toy_data(4)
    cache = SupervisionCache.build(tmp_path, goal, data, [Source(1, 1)], dtype="float32", top_k=97)
    batch = collate(data, 0)
    mask, rows = supervised(batch["labels"]), cache.rows(range(4))
    labels = batch["labels"].roll(-1, dims=1)[mask]
    final = model.get_decoder()(batch["input_ids"]).last_hidden_state[mask].detach().requires_grad_()
    z = model.lm_head(final)
    if kind == "ce":
        expected = F.cross_entropy(z, labels, reduction="none")
    else:
        logp, logq = goal(batch["input_ids"]).logits[mask].log_softmax(-1).detach(), z.log_softmax(-1)
        middle = (0.5 * logp.exp() + 0.5 * logq.exp()).log()
        parts = {"kl": [(logp, logq)], "reverse_kl": [(logq, logp)], "jsd": [(logp, middle), (logq, middle)]}[kind]
        expected = torch.stack([(a.exp() * (a - b)).sum(-1) for a, b in parts]).mean(0)
    (gradient,) = torch.autograd.grad(expected.sum(), final)
    for budget in (2**24, 3 * 97):
        monkeypatch.setattr(losses, "LOGITS", budget)
        found = output_loss(
            kind, final, labels, model.lm_head, head_weight(model), teacher=cache.teacher_top(rows), vocabulary=97
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), final)[0], gradient, atol=1e-5, rtol=1e-3)


def test_top_k_kl_is_zero_for_the_teacher_itself_and_never_above_the_full_one() -> None:
    z, other = 3 * torch.randn(5, 50), 3 * torch.randn(5, 50)
    logp = z.log_softmax(-1)
    full = (logp.exp() * (logp - other.log_softmax(-1))).sum(-1)
    for k in (1, 8, 50):
        top, index = logp.topk(k)
        tail = 1 - top.exp().sum(-1) if k < 50 else torch.zeros(5)
        for kind in DIVERGENCES:
            own = divergence(kind, z, top, index, tail)
            torch.testing.assert_close(own, torch.zeros(5), atol=1e-5, rtol=0)
            assert (divergence(kind, other, top, index, tail) > 0).all()
        part = divergence("kl", other, top, index, tail)
        assert (part <= full + 1e-5).all()
    torch.testing.assert_close(part, full, atol=1e-5, rtol=1e-4)


def test_fisher_loss_is_the_divergence_of_the_logits_to_second_order() -> None:
    h, target, head = torch.randn(7, 6), torch.randn(7, 6), torch.randn(11, 6)
    norm = target.norm(dim=-1)
    unit = torch.nn.functional.normalize(target, dim=-1)
    for step, tolerance in ((1e-2, 3e-2), (1e-3, 3e-3)):
        moved = (target + step * h).double()
        p, q = (target.double() @ head.double().T).log_softmax(-1), (moved @ head.double().T).log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1)
        found = LAYER_LOSSES["fisher"](moved, unit.double(), norm.double(), [7], head.double())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
