"""Taps: what is read at each point adds up to the stream that transformers reports."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES

from semalign.lm.hooks import capture


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
