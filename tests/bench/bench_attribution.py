"""Attribution of all layers in one backward pass against Captum, which takes a forward and a backward pass a layer.

    python tests/bench/bench_attribution.py [--quick]

The geometry is SmolLM2-135M's (30 layers, 576 wide) with random weights, then other depths of it. Both sides score the
same objective, and their scores are compared. The numbers go to ``results/bench/attribution.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from semalign.attribution import layer_attribution
from semalign.lm.files import write_text
from semalign.lm.parts import decoder_layers


def smollm2(depth: int, vocabulary: int) -> LlamaForCausalLM:
    """SmolLM2-135M's geometry at some depth, seeded random weights, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=depth,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config).eval()


def random_batch(vocabulary: int, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, the second half of which is supervised."""
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_captum(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """The signed score of each layer (L,), a layer at a time."""

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())[None]

    layers = decoder_layers(model)
    return torch.stack([LayerGradientXActivation(loss, x).attribute(batch["input_ids"]).detach().sum() for x in layers])


def timed(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float, float]:
    """A call's result, and its least wall and processor seconds."""
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return result, min(wall), min(cpu)


def measure(depth: int, vocabulary: int, rows: int, length: int, repeats: int) -> dict[str, float]:
    """Both sides on one model and batch."""
    model, batch = smollm2(depth, vocabulary), random_batch(vocabulary, rows, length)
    layer_attribution(model, batch)  # the first pass of a process pays for its memory
    ours, wall, cpu = timed(lambda: layer_attribution(model, batch), 2 * repeats)
    theirs, their_wall, their_cpu = timed(lambda: by_captum(model, batch), repeats)
    row = {
        "layers": depth,
        "ours_s": wall,
        "captum_s": their_wall,
        "times_faster": their_wall / wall,
        "times_faster_cpu": their_cpu / cpu,
        "largest_difference": float((ours - theirs).abs().max()),
    }
    print(
        f"{depth:>6} {wall:>8.2f} {their_wall:>9.2f} {row['times_faster']:>7.1f} {row['times_faster_cpu']:>7.1f} "
        f"{row['largest_difference']:>12.1e}",
        flush=True,
    )
    return row


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small vocabulary and few tokens, one repeat")
    arguments = parser.parse_args(argv)
    shape = (1000, 1, 16, 1) if arguments.quick else (49152, 2, 128, 2)
    print(f"{'layers':>6} {'ours s':>8} {'captum s':>9} {'faster':>7} {'cpu':>7} {'difference':>12}")
    rows = [measure(depth, *shape) for depth in (30, 15, 8, 4)]
    report = {"depths": rows, "threads": torch.get_num_threads(), "quick": arguments.quick}
    write_text(ROOT / "results" / "bench" / "attribution.json", json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
