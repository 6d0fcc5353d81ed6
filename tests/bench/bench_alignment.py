"""Layer-k training against the obvious alternative: a peft model that runs all of itself at every step.

    python tests/bench/bench_alignment.py [--quick]

Two tables: seconds for an epoch on the geometry of SmolLM2-135M (random weights), with the same batches, losses and
starting point, and peak memory of training with a teacher, each variant in a process of its own. The numbers go to
``results/bench/alignment.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from semalign.alignment import transfer
from semalign.lm.examples import Encoded, Example, TaskData, collate, encode, supervised
from semalign.lm.files import write_text
from semalign.lm.hooks import capture
from semalign.models import Pair
from semalign.supervision import Source, SupervisionCache
from semalign.training.config import TransferConfig
from semalign.training.loop import batches, scheduled_rate

SHAPES = {  # layers, width, MLP width, heads, key-value heads
    "135M": (30, 576, 1536, 9, 3),
    "360M": (32, 960, 2560, 15, 5),
}
VOCABULARY = 49152


class Numbers:
    """A tokenizer for texts that are token ids already, with EOS 0 and no BOS."""

    bos_token_id = None
    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()] if text != "a" else [1]}


def smollm2(size: str, seed: int) -> LlamaForCausalLM:
    """SmolLM2's geometry with seeded random weights, float32."""
    layers, width, inner, heads, groups = SHAPES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config).eval()


def task(examples: int, prompt: int, response: int) -> TaskData:
    """Random prompts of about ``prompt`` tokens and responses of about ``response``."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        n = int(torch.randint(3 * length // 4, 5 * length // 4 + 1, (), generator=generator))
        return " ".join(str(int(i)) for i in torch.randint(2, VOCABULARY, (n,), generator=generator))

    return TaskData("random", tuple(Example(text(prompt), text(response)) for _ in range(examples)))


def plain_peft(
    student: Any, data: Sequence[Encoded], cache: SupervisionCache, config: TransferConfig
) -> list[dict[str, float]]:
    """The paper's objective with peft as everyone writes it: whole model forward, logits everywhere, then backward.

    ``cache`` supplies the same targets h*, one source for each of ``config.layers``.
    """
    layers = config.layers or ()
    torch.manual_seed(config.seed)
    targets = [rf".*layers\.{k - 1}\..*\.{name}" for k in layers for name in config.lora_targets]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="|".join(targets))
    model = get_peft_model(student, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=config.lr, weight_decay=0.0)
    lengths = [len(e.input_ids) for e in data]
    plan = [b for e in range(config.epochs) for b in batches(lengths, config.batch, config.seed, e + 1)]
    log = []
    for step, examples in enumerate(plan, start=1):
        start, total = time.perf_counter(), 0.0
        n = len(cache.rows(examples))
        for at in range(0, len(examples), config.micro_batch):
            some = examples[at : at + config.micro_batch]
            batch = collate([data[i] for i in some], 0)
            mask = supervised(batch["labels"])
            with capture(student, [(k, config.interface) for k in layers]) as seen:
                out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            z = out.logits[mask]
            y = batch["labels"].roll(-1, dims=1)[mask]
            output = 1 - z.gather(1, y[:, None])[:, 0] / z.norm(dim=-1)
            cosines = [
                F.cosine_similarity(seen[k, config.interface][mask], cache.target(i, cache.rows(some))[0], dim=-1)
                for i, k in enumerate(layers)
            ]
            loss = ((1 - torch.stack(cosines)).mean(0) + output).sum() / n
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(config, step, len(plan))
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": total, "seconds": time.perf_counter() - start})
    return log


def speed(k: int, quick: bool) -> dict[str, float]:
    """Seconds for an epoch of both ways at layer ``k``, minimum over repeats, and how far the loss curves differ."""
    data, repeats = task(16 if quick else 32, 32, 32), 1 if quick else 3
    tokenizer: Any = Numbers()
    pair = Pair("smollm2", lambda: smollm2("135M", 1), lambda: smollm2("135M", 0), tokenizer)
    config = TransferConfig(
        layers=(k,), map=None, epochs=1, batch=8, micro_batch=8, target_dtype="float32",
        cache_folder=ROOT / "results" / "bench" / "supervision",
    )  # fmt: skip
    ours: list[dict[str, float]] = []
    plain: list[float] = []
    gap = 0.0
    for _ in range(repeats):
        result = transfer(pair, data, config)
        ours.append(result.cost)
        encoded = encode(tokenizer, data.train, max_length=config.max_length)
        cache = _cache(encoded, k, config)
        log = plain_peft(smollm2("135M", 0), encoded, cache, config)
        plain.append(sum(r["seconds"] for r in log))
        gap = max(gap, *(abs(a["loss"] - b["loss"]) for a, b in zip(result.log, log, strict=True)))
    train, inputs = min(c["train_s"] for c in ours), min(c["inputs_s"] for c in ours)
    return {
        "k": k,
        "plain_s": min(plain),
        "ours_s": train,
        "inputs_s": inputs,
        "ratio": min(plain) / train,
        "ratio_with_inputs_over_5_epochs": min(plain) / (train + inputs / 5),
        "largest_loss_difference": gap,
    }


def _cache(encoded: list[Encoded], k: int, config: TransferConfig) -> SupervisionCache:
    sources, root = [Source(k, k)], config.cache_folder or ""
    return SupervisionCache.build(root, smollm2("135M", 1), encoded, sources, dtype=config.target_dtype)


# ---------------------------------------------------------------------------------------------------- memory


def peak(variant: str, quick: bool) -> None:
    """Train in this process and print the peak resident bytes."""
    data = task(8 if quick else 16, 64, 64)
    config = TransferConfig(layers=(15,), teacher_layers=(16,), epochs=1, batch=8, micro_batch=8)
    tokenizer: Any = Numbers()
    pair = Pair("smollm2", lambda: smollm2("360M", 1), lambda: smollm2("135M", 0), tokenizer)
    if variant == "semalign":
        transfer(pair, data, config)
    else:
        _sft(pair, encode(tokenizer, data.train, max_length=512), config, variant)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _sft(pair: Pair, data: list[Encoded], config: TransferConfig, variant: str) -> None:
    """Cross entropy with LoRA on all layers (or one); with ``both``, a resident teacher adds a KL term."""
    teacher = pair.load_teacher() if variant == "both" else None
    layers = [config.layers[0] - 1] if variant == "sft_one_layer" and config.layers else None
    lora = LoraConfig(r=16, target_modules=list(config.lora_targets), layers_to_transform=layers)
    model: Any = get_peft_model(pair.load_student(), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=config.lr)
    for at in range(0, len(data), config.micro_batch):
        batch = collate(data[at : at + config.micro_batch], 0)
        out = model(**batch)
        loss = out.loss
        if teacher is not None:
            mask = supervised(batch["labels"])
            with torch.no_grad():
                goal = teacher(batch["input_ids"], batch["attention_mask"]).logits[mask].log_softmax(-1)
            loss = loss + F.kl_div(out.logits[mask].log_softmax(-1), goal, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def memory(quick: bool) -> dict[str, float]:
    """Peak bytes of each variant, in a fresh process."""
    found = {}
    for variant in ("sft", "sft_one_layer", "semalign", "both"):
        command = [sys.executable, __file__, "--peak", variant, *(["--quick"] if quick else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        found[variant] = float(done.stdout.split()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer examples, one repeat")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        peak(arguments.peak, arguments.quick)
        return {}
    depth = SHAPES["135M"][0]
    rows = [speed(k, arguments.quick) for k in (depth, depth // 2)]
    print("layer  plain peft s  ours s  inputs s  ratio  ratio with inputs  largest loss difference")
    for r in rows:
        print(
            f"{r['k']:>5} {r['plain_s']:>13.2f} {r['ours_s']:>7.2f} {r['inputs_s']:>9.2f} {r['ratio']:>6.1f} "
            f"{r['ratio_with_inputs_over_5_epochs']:>18.1f} {r['largest_loss_difference']:>24.1e}"
        )
    peaks = memory(arguments.quick)
    for variant, size in peaks.items():
        print(f"{variant:>14} {size / 2**30:6.2f} GiB  {size / peaks['sft']:5.2f} of sft")
    report = {"epoch": rows, "peak_bytes": peaks, "threads": torch.get_num_threads(), "quick": arguments.quick}
    write_text(ROOT / "results" / "bench" / "alignment.json", json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
