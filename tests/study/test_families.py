"""What chapter 21 computes of a model of any family, against the functions of the first chapter and known answers."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, Letters

from semalign import semantics
from semalign.attribution import layer_attribution
from semalign.lm.examples import Example, collate, encode
from semalign.lm.hooks import capture
from semalign.lm.parts import embedding_weight, head_weight
from semalign.profiles import load_profile
from semalign.study import families

EXAMPLES = [Example("abc", "defg"), Example("hij", "kl")]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_frame_operators_are_those_of_the_bases(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "CHUNK", 10)  # several chunks
    model = FAMILIES[family]()
    found = families.frame_operators(model)
    bases = {
        "output side": semantics.semantic_bases(head_weight(model), kind="dual"),
        "input side": semantics.semantic_bases(embedding_weight(model), kind="primal"),
    }
    for name, s in bases.items():
        torch.testing.assert_close(found[name], s @ s.T, rtol=1e-3, atol=1e-3)
    assert found["random"].trace() == pytest.approx(97, rel=1e-5)


def test_recomposition_is_the_mean_cosine_of_every_layer() -> None:
    model, ids = FAMILIES["gemma3"](), torch.arange(3, 12)[None]
    operators = families.frame_operators(model)
    found = families.recomposition(model, [ids, ids[:, :4]], operators)
    with torch.no_grad(), capture(model, [(2, "stream")]) as seen:
        whole = []
        for one in (ids, ids[:, :4]):
            model(one)
            whole.append(seen[2, "stream"][0])
    r = torch.cat(whole)
    expected = torch.cosine_similarity(r, r @ operators["input side"], dim=-1).mean().item()
    assert found["input side"][1] == pytest.approx(expected, abs=1e-5) and len(found["random"]) == 3


def test_random_bases_do_what_theory_predicts_and_a_flat_spectrum_returns_every_state() -> None:
    assert families.predicted(262_144, 640) == pytest.approx(0.9988, abs=1e-4)
    assert families.predicted(49_152, 576) == pytest.approx(0.9942, abs=1e-4)
    assert families.spectrum(3 * torch.eye(5)).tolist() == pytest.approx([1.0] * 5)
    values = families.spectrum(torch.diag(torch.tensor([1.0, 3.0])))
    assert values.tolist() == pytest.approx([1.5, 0.5])


def test_facts_say_that_the_logit_map_returns_a_state_and_the_papers_does_not() -> None:
    model, ids = FAMILIES["gemma3"](), torch.arange(3, 12)[None]
    found = families.facts(model, [ids], families.frame_operators(model))
    assert (found["layers"], found["width"], found["vocabulary"]) == (3, 32, 97)
    assert found["self_transfer"]["logit"] == pytest.approx(1, abs=1e-4) and found["self_transfer"]["paper"] < 0.999
    assert set(found["curves"]) == set(found["spectra"]) == set(found["expected"]) == set(families.BASES)


def test_attributions_add_up_examples_by_their_positions() -> None:
    model, tokenizer = FAMILIES["gemma3"](), Letters()
    found = families.attributions(model, tokenizer, EXAMPLES)
    encoded = encode(tokenizer, EXAMPLES, max_length=64)  # type: ignore[arg-type]
    parts = [layer_attribution(model, collate([e], 0), reduce="abs") for e in encoded]
    assert found["abs"] == pytest.approx((5 * parts[0] + 3 * parts[1]).tolist(), rel=1e-4)
    assert found["signed"][-1] == pytest.approx(0, abs=1e-3 * max(found["abs"]))


def test_a_layer_is_like_itself() -> None:
    cka = families.own_cka(FAMILIES["gemma3"](), Letters(), EXAMPLES)
    assert cka.shape == (3, 3) and cka.diagonal().tolist() == pytest.approx([1, 1, 1])


def test_gemma_is_looked_at_where_it_is_installed_and_the_first_model_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    classroom, smoke = load_profile("classroom"), load_profile("smoke")
    for there in (True, False):
        monkeypatch.setattr(families, "is_installed", lambda name, there=there: there)
        assert list(families.models_of(classroom)) == ["smollm2-135m-instruct", *(["gemma-3-270m"] * there)]
        assert list(families.models_of(smoke)) == ["random weights"]
    assert "make gemma" in families.TERMS and "ai.google.dev/gemma/terms" in families.TERMS
