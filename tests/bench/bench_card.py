"""A profile's plan against a card: bytes at the peak and seconds of every kind of step, at the models' true shapes.

    python tests/bench/bench_card.py [--profile llama2] [--minutes 8] [--only WORD ...] [--quick]

Weights are random and made on the card, in the profile's type; examples are texts of as many tokens as the plan
assumes, the longest for memory and the means for seconds. Both tables give what was measured over what ``make plan``
says: memory as PyTorch counts it, without what CUDA itself takes, and rates as shares of an H100's peak by the plan's
own count of operations. What needs more memory than there is says so. Without an NVIDIA GPU a sentence is all there is;
``--quick`` runs the same on a CPU with models of four narrow layers, for which no number means anything. The numbers
go to ``results/bench/card.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from semalign import alignment, attribution, supervision
from semalign.benchmarks.engine import SharedPrefixLM
from semalign.lm.examples import Example, TaskData, collate, encode
from semalign.lm.files import write_text
from semalign.lm.parts import fingerprint, head_weight
from semalign.methods import REGISTRY
from semalign.methods.registry import run
from semalign.models import Pair, byte_tokenizer
from semalign.planning import plan as planning
from semalign.profiles import Profile, load_profile
from semalign.semantics import semantic_map
from semalign.study import trials
from semalign.supervision import Source, SupervisionCache

SMALL = planning.Shape("llama", 64, 160, 4, 4, 4, 16, 320, False)
RATES = planning._file()["cards"]["H100"]
ELSEWHERE = {"gkd": {"new_tokens": 32}, "oprd": {"new_tokens": 32}}  # what takes long and needs no more memory for it


def letters(draw: random.Random, n: int) -> str:
    """A text of so many tokens, a byte each."""
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=n))


def shapes(p: Profile, quick: bool) -> tuple[planning.Shape, planning.Shape]:
    """Those of a profile's teacher and student, or ``quick`` ones: four narrow layers each."""
    if quick:
        return SMALL, replace(SMALL, width=48, mlp=128, head=12)
    return planning.shape_of(p.teacher), planning.shape_of(p.student)


def model_of(s: planning.Shape, seed: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of this shape with random weights, made where it stays."""
    config: Any = AutoConfig.for_model(
        s.type, hidden_size=s.width, intermediate_size=s.mlp, num_hidden_layers=s.layers, head_dim=s.head,
        num_attention_heads=s.heads, num_key_value_heads=s.groups, vocab_size=s.vocabulary,
        tie_word_embeddings=s.tied, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Card:
    """The machine, the pair's shapes, and what was measured on it so far."""

    def __init__(self, p: Profile, quick: bool, minutes: float) -> None:
        self.p, self.device = p, "cpu" if quick else "cuda"
        self.teacher, self.student = shapes(p, quick)
        self.dtype = getattr(torch, p.dtype)
        torch.backends.cuda.enable_cudnn_sdp(False)  # as where models are loaded
        self.tokenizer, self.end = byte_tokenizer(), time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.pair = Pair(
            "random", lambda: self.made(self.teacher, 0), lambda: self.made(self.student, 1), self.tokenizer
        )

    def made(self, s: planning.Shape, seed: int) -> PreTrainedModel:
        """A model of this shape with random weights, made where it stays."""
        return model_of(s, seed, self.dtype, self.device)

    def data(self, examples: int, prompt: int, answer: int, seeds: int = 2) -> TaskData:
        """Texts of so many tokens, a byte each."""
        draw = random.Random(0)

        def some(n: int) -> tuple[Example, ...]:
            return tuple(Example(letters(draw, prompt - 1), letters(draw, answer - 1)) for _ in range(n))

        return TaskData("random", some(examples), some(seeds), some(seeds), some(seeds))

    def peak(self) -> float:
        """Bytes at the peak since :meth:`clear`."""
        return float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else 0.0

    def clear(self) -> None:
        """Free what nobody holds, and begin to count anew."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def clocked(self) -> Iterator[list[float]]:
        """Gives a list that holds the seconds of the body after it."""
        spent: list[float] = []
        self.wait()
        start = time.perf_counter()
        yield spent
        self.wait()
        spent.append(time.perf_counter() - start)

    def wait(self) -> None:
        """Until the card has done what it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measured(self, name: str, what: Callable[[], dict[str, Any]]) -> None:
        """One row of the tables; what fails is a row too."""
        self.clear()
        left = self.end - time.monotonic()
        if left < 0:
            print(f"{name}: no time left", flush=True)
            return
        start = time.perf_counter()
        try:
            row = {"name": name, **what()}
        except torch.OutOfMemoryError as error:
            row = {"name": name, "failed": f"out of memory at {self.peak() / 1e9:.1f} GB: {str(error)[:120]}"}
        except Exception as error:
            traceback.print_exc()
            row = {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        row["took_s"] = time.perf_counter() - start
        self.rows.append(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def memory(card: Card, name: str, examples: int) -> dict[str, Any]:
    """The peak of one method on examples of the longest length, over the largest of the plan's steps but answering."""
    p = card.p
    longest = planning.longest(p)
    config = replace(trials.config_of(p, 0), epochs=max(1, REGISTRY[name].least_epochs), batch=examples, watch=False)
    if planning.WAYS[name].layers == "k":  # the worst that attribution can choose, which has a row of its own
        config = replace(config, layers=(1,))
    data = card.data(examples, longest // 2, longest - longest // 2)
    steps = {k: v for k, v in planning.method_steps(p, name).items() if k != "answering"}
    card.clear()
    result = run(
        REGISTRY[name], card.pair, data, config, {**p.hyperparameters.get(name, {}), **ELSEWHERE.get(name, {})}
    )
    peak, said = card.peak(), max(steps.values(), default=0.0)
    row = {"peak_gb": peak / 1e9, "planned_gb": said / 1e9, "step": max(steps, key=lambda k: steps[k], default="")}
    row |= {"ratio": peak / said if said else 0.0, "wall_s": result.cost["wall_s"]}
    del result
    return row


def answering(card: Card, shape: planning.Shape, prompt: int, new: int) -> dict[str, Any]:
    """A batch that writes: its peak over the plan's, and seconds of a step over those of the plan."""
    p, model = card.p, card.made(shape, 1)
    lm = SharedPrefixLM(pretrained=model, tokenizer=card.tokenizer, batch_size=p.answered_at_once, max_length=4096)
    draw = random.Random(1)
    requests = []
    for _ in range(p.answered_at_once):
        text = letters(draw, prompt - 1)
        given = (text, {"until": ["###"], "max_gen_toks": new, "do_sample": False})
        requests.append(type("Request", (), {"args": given})())
    calls: list[float] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(time.perf_counter()))
    card.clear()
    with card.clocked() as spent:
        lm.generate_until(requests)
    hook.remove()
    steps, first = len(calls), calls[1] - calls[0] if len(calls) > 1 else 0.0
    size = planning.SIZES[p.dtype]
    said = shape.parameters * size + planning.cache(shape, p.answered_at_once, prompt + new, size)
    step = (spent[0] - first) / max(1, steps - 1)
    planned = planning.step_seconds(shape, size, RATES)
    return {
        "steps": steps, "step_s": step, "planned_step_s": planned, "ratio_s": step / planned,
        "peak_gb": card.peak() / 1e9, "planned_gb": said / 1e9, "ratio": card.peak() / said,
    }  # fmt: skip


def scoring(card: Card, shape: planning.Shape, prompt: int, questions: int) -> dict[str, Any]:
    """Questions whose choices are scored: operations a second, by the plan's count."""
    lm = SharedPrefixLM(
        pretrained=card.made(shape, 1), tokenizer=card.tokenizer, batch_size=card.p.answered_at_once, max_length=4096
    )
    draw = random.Random(1)
    asked = []
    for i in range(questions):
        context = [draw.randrange(3, 259) for _ in range(prompt)]
        asked += [((str(i), ""), context, [token]) for token in (10, 11, 12, 13)]
    lm._loglikelihood_tokens(asked[: 4 * card.p.answered_at_once])
    with card.clocked() as spent:
        lm._loglikelihood_tokens(asked)
    return rate("reads", 2 * shape.parameters * questions * prompt, spent[0])


def rate(kind: str, flops: float, seconds: float) -> dict[str, Any]:
    """Seconds, the share of an H100's peak that they are, and how many times those of the plan."""
    share = flops / seconds / (RATES["peak"] * 1e12)
    return {"seconds": seconds, "tflops": flops / seconds / 1e12, "share": share, "ratio_s": RATES[kind] / share}


def lengths(card: Card) -> dict[str, Any]:
    """Milliseconds in which the student reads padded batches of one length, and of a new one each, by the backend.

    cuDNN's attention plans anew for every length that it has not met.
    """
    model, found = card.pair.load_student(), {}
    for name, allowed in {"others": False, "cudnn": True}.items():
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        for what, sizes in {"one": [64] * 8, "new": range(65 + 8 * allowed, 73 + 8 * allowed)}.items():
            batches = [torch.full((8, size), 5, device=card.device) for size in sizes]
            masks = [torch.ones_like(batch) for batch in batches]
            for mask in masks:
                mask[0, -1] = 0
            with torch.no_grad():
                model(batches[0][:, :64], attention_mask=masks[0][:, :64], use_cache=False)
                with card.clocked() as spent:
                    for batch, mask in zip(batches, masks, strict=True):
                        model(batch, attention_mask=mask, use_cache=False)
            found[f"{name}_{what}_ms"] = 1e3 * spent[0] / len(batches)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def training(card: Card, name: str, examples: int, prompt: int, answer: int) -> dict[str, Any]:
    """One epoch of a method on examples of mean length: the loop alone, by the plan's count for all layers."""
    config = replace(trials.config_of(card.p, 0), epochs=1, watch=False)
    data = card.data(examples, prompt, answer)
    result = run(REGISTRY[name], card.pair, data, config, {})
    tokens, spent = result.cost["student_tokens"], result.cost["train_s"]
    kind = "all_layers" if planning.WAYS[name].layers == "all" else "one_layer"
    row = rate(kind, 4 * tokens * card.student.parameters, spent)
    return {**row, "tokens": tokens, "tokens_a_second": tokens / spent, "inputs_s": result.cost["inputs_s"]}


def teaching(card: Card, examples: int, prompt: int, answer: int, top_k: int) -> dict[str, Any]:
    """The teacher's one pass over examples, with targets of a layer in its middle or log-probabilities of the last."""
    teacher = card.pair.load_teacher()
    encoded = encode(card.tokenizer, card.data(examples, prompt, answer).train, max_length=card.p.max_length)
    matrix = torch.randn(card.student.width, card.teacher.width, device=card.device)
    source = [] if top_k else [Source(card.teacher.layers // 2, card.teacher.layers // 2)]
    with tempfile.TemporaryDirectory() as folder, card.clocked() as spent:
        SupervisionCache.build(
            folder, teacher, encoded, source, matrix=None if top_k else matrix, top_k=top_k,
            vocabulary=card.student.vocabulary,
        )  # fmt: skip
    tokens = sum(len(e.input_ids) for e in encoded)
    return {
        **rate("reads", 2 * card.teacher.parameters * tokens, spent[0]),
        "tokens": tokens,
        "peak_gb": card.peak() / 1e9,
    }


def attributing(card: Card, examples: int, prompt: int, answer: int) -> dict[str, Any]:
    """Layer attribution of the teacher, an example at a time."""
    teacher = card.pair.load_teacher()
    data, config = card.data(2, prompt, answer, seeds=examples), trials.config_of(card.p, 0)
    card.clear()
    with card.clocked() as spent:
        alignment.attributed(card.pair, teacher, data, config)
    tokens = examples * (prompt + answer)
    s, size = card.teacher, planning.SIZES[card.p.dtype]
    said = s.parameters * size + planning.attribution(s, prompt + answer, size)
    row = rate("attributed", 6 * s.parameters * tokens, spent[0])
    return {
        **row,
        "tokens": tokens,
        "peak_gb": card.peak() / 1e9,
        "planned_gb": said / 1e9,
        "ratio": card.peak() / said,
    }


def loading(card: Card) -> dict[str, Any]:
    """The student from the host's memory to the card, and the print of its weights by which trials know it."""
    s, size = card.student, planning.SIZES[card.p.dtype]
    model = card.made(s, 1).cpu()
    with card.clocked() as moved:
        model.to(card.device)
    with card.clocked() as printed:
        fingerprint(model)
    gigabytes = s.parameters * size / 1e9
    return {"to_card_gb_s": gigabytes / moved[0], "fingerprint_gb_s": gigabytes / printed[0], "gb": gigabytes}


def mapping(card: Card, kind: str) -> dict[str, Any]:
    """One map between the heads."""
    heads = [head_weight(load()).clone() for load in (card.pair.load_teacher, card.pair.load_student)]
    card.clear()
    with card.clocked() as spent:
        semantic_map(*heads, kind=kind)
    return {"seconds": spent[0], "peak_gb": card.peak() / 1e9}


def skipping(card: Card) -> dict[str, Any]:
    """What chapter 02 measures of a teacher: the loss without each layer, and the score of every neuron."""
    teacher = card.pair.load_teacher()
    encoded = encode(card.tokenizer, card.data(8, 110, 140).train, max_length=card.p.max_length)
    batch = collate(encoded, 0, card.device)
    with card.clocked() as skipped:
        attribution.skip_loss(teacher, batch)
    with card.clocked() as scored:
        attribution.over_examples(teacher, encoded, attribution.neuron_attribution)
    return {"skip_loss_s": skipped[0], "neurons_s": scored[0], "peak_gb": card.peak() / 1e9}


def main() -> int:
    """Measure what there is time for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="llama2")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="narrow models on a CPU")
    given = parser.parse_args()
    if not given.quick and not torch.cuda.is_available():
        print("the plan is not measured here: torch sees no NVIDIA GPU; --quick runs the steps on a CPU")
        return 0
    p = load_profile(given.profile)
    card = Card(p, given.quick, given.minutes)
    # A print of 26 GB takes longer than any step here; it has a row of its own.
    supervision.fingerprint = alignment.fingerprint = lambda model: f"random {len(head_weight(model)[0])}"  # type: ignore[assignment]
    if card.device == "cuda":
        print(
            torch.cuda.get_device_name(), torch.__version__, f"{torch.cuda.mem_get_info()[1] / 1e9:.1f} GB", flush=True
        )
    many, few = (8, 2) if given.quick else (128, p.eval_batch_size)
    longest = 40 if given.quick else planning.longest(p)
    rows: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("seconds: training, all layers (sft)", lambda: training(card, "sft", many, 110, 140)),
        ("seconds: training, layer k (semalign)", lambda: training(card, "semalign", many, 110, 140)),
        ("seconds: the teacher's pass, states", lambda: teaching(card, many, 110, 140, 0)),
        ("seconds: the teacher's pass, logits", lambda: teaching(card, many, 110, 140, 64)),
        ("seconds: attribution", lambda: attributing(card, 4 if given.quick else 20, 110, 140)),
        ("seconds: the student writes", lambda: answering(card, card.student, 110, 8 if given.quick else 100)),
        ("seconds: the teacher writes", lambda: answering(card, card.teacher, 110, 8 if given.quick else 100)),
        ("seconds: the student scores choices", lambda: scoring(card, card.student, 130, many)),
        ("seconds: new lengths", lambda: lengths(card)),
        ("seconds: loading", lambda: loading(card)),
        ("seconds: the paper's map", lambda: mapping(card, "paper")),
        ("seconds: the map by rotation", lambda: mapping(card, "procrustes")),
        ("seconds: layers left out, neurons", lambda: skipping(card)),
        ("memory: attribution", lambda: attributing(card, 2, longest // 2, longest - longest // 2)),
        ("memory: the student writes", lambda: answering(card, card.student, longest, 4 if given.quick else 24)),
        ("memory: the teacher writes", lambda: answering(card, card.teacher, longest, 4 if given.quick else 24)),
    ]
    # Random weights end no answer, so that nothing would be learned from what a teacher writes.
    names = [m for m in [*p.methods, *REGISTRY] if m not in ("none", "seq_kd") and REGISTRY[m].vocabularies == "same"]
    slow = [m for m in dict.fromkeys(names) if m.startswith(("seeking", "laten"))]
    for name in [*(m for m in dict.fromkeys(names) if m not in slow), *slow]:
        rows.append((f"memory: method {name}", lambda name=name: memory(card, name, few)))  # type: ignore[misc]
    for name, what in rows:
        if not given.only or any(word in name for word in given.only):
            card.measured(name, what)
    file = ROOT / "results/bench/card.json"
    about = {
        "profile": p.name,
        "card": torch.cuda.get_device_name() if card.device == "cuda" else "a rehearsal on a CPU",
    }
    write_text(file, json.dumps({**about, "torch": torch.__version__, "rows": card.rows}, indent=1))
    failed = [row["name"] for row in card.rows if "failed" in row]
    print(f"{len(card.rows)} rows in {file.relative_to(ROOT)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
