"""A profile's chapters at its models' true shapes on this machine's GPU, with random weights and few examples.

    python tests/cluster/rehearsal.py [--profile llama2] [--chapters NAME ...] [--folder DIR] [--quick]

Models of the shapes of the profile's teacher and student are written below ``--folder`` (39 GB for Llama-2;
``/dev/shm`` where the host's memory has room), and every chapter loads them from there as a run would. The chapters run
one after another, each as a job of its own, on gsm8k alone: on its questions in the folder that ``SEMALIGN_DATA``
names, or on the classroom's, which are short. Of their texts every byte is a token, and they are cut at the length that
the plan assumes. Told of each is how long it took and the most that PyTorch held of the card, beside what ``make plan``
says of it without what CUDA itself takes. Without a GPU a sentence is all there is; ``--quick`` tries the steps on a
CPU with models of four narrow layers, for which no number means anything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]

from bench_card import model_of, shapes  # noqa: E402

from semalign.models import byte_tokenizer  # noqa: E402
from semalign.planning import plan as planning  # noqa: E402
from semalign.profiles import load_profile  # noqa: E402

CHAPTERS = [
    "00_models_and_data", "01_semantics", "02_importance", "03_pairing", "04_alignment", "10_similarity",
    "16_below_the_layer",
]  # fmt: skip
WATCH = """
import os, sys, threading, time


def watch():
    most = 0
    while True:
        torch = sys.modules.get("torch")
        if hasattr(torch, "cuda") and hasattr(torch.cuda, "max_memory_allocated") and torch.cuda.is_initialized():
            if torch.cuda.max_memory_allocated() > most:
                most = torch.cuda.max_memory_allocated()
                with open(os.path.join(os.environ["REHEARSAL"], str(os.getpid())), "w") as file:
                    file.write(str(most))
        time.sleep(0.2)


threading.Thread(target=watch, daemon=True).start()
"""
"""What each of the processes runs beside its work as its ``sitecustomize``: it keeps the peak in a file."""


def main() -> int:
    """Run it; the exit status is 0 where every chapter ran and kept to its plan, or where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="llama2")
    parser.add_argument("--chapters", nargs="*", default=CHAPTERS, help="with all that they read, in their order")
    parser.add_argument("--folder", default=None, help="where the models and results go; a temporary folder")
    parser.add_argument("--quick", action="store_true", help="narrow models on a CPU")
    given = parser.parse_args()
    if not given.quick and not torch.cuda.is_available():
        print("nothing is rehearsed: torch sees no GPU here; --quick tries the steps on a CPU")
        return 0
    p, device = load_profile(given.profile), "cpu" if given.quick else "cuda"
    failed = []
    with tempfile.TemporaryDirectory(prefix="semalign-rehearsal-", dir=given.folder) as name:
        folder, sources = Path(name), {}
        for seed, (who, shape) in enumerate(zip(("teacher", "student"), shapes(p, given.quick), strict=True)):
            begun, size = time.monotonic(), planning.SIZES[p.dtype] * shape.parameters
            sources[who] = {"source": "folder", "path": str(folder / who)}
            model_of(shape, seed, getattr(torch, p.dtype), device).save_pretrained(folder / who)
            byte_tokenizer().save_pretrained(folder / who)
            print(f"{who}: {size / 1e9:.1f} GB written in {time.monotonic() - begun:.0f} s", flush=True)
        torch.cuda.empty_cache()
        small = p.model_dump(mode="json", exclude_unset=True, exclude={"name", "semantics_model"}) | sources
        small |= {"tasks": ["gsm8k"], "seeds": [0], "methods": ["none", "sft", "semalign"], "fine_tuned_teachers": {}}
        small |= {"sizes": {"train": 16, "align": 8, "extract": 4, "validation": 8, "test": 4}, "epochs": 1}
        small |= {"regimes": {"examples": [8], "steps": 4, "tasks": ["gsm8k"]}, "semantics_texts": 4, "others": 1}
        small |= {"search": {"draws": 1, "tasks": ["gsm8k"]}, "max_new_tokens": 16, "device": device}
        small |= {"max_length": planning.longest(p)}
        small |= {} if os.environ.get("SEMALIGN_DATA") else {"data": "classroom"}
        file, results = folder / "rehearsal.yaml", folder / "results"
        file.write_text(yaml.safe_dump(small))
        (folder / "sitecustomize.py").write_text(WATCH)
        paths = os.pathsep.join([name, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        for chapter in given.chapters:
            peaks, begun = folder / "peaks" / chapter, time.monotonic()
            peaks.mkdir(parents=True)
            done = subprocess.run(
                [sys.executable, "-m", "semalign.pipeline", "notebook", chapter, str(file), "--results", str(results)],
                env={**os.environ, "PYTHONPATH": paths, "REHEARSAL": str(peaks)},
            )
            peak = max((float(kept.read_text()) for kept in peaks.iterdir()), default=0.0)
            said = planning.chapter_memory(p, chapter).gpu - planning.SPARE if chapter in planning.CHAPTERS else 0.0
            if done.returncode or peak > 1.06 * said > 0:
                failed.append(chapter)
            against = f", planned {said / 1e9:.1f}" if said else ""
            print(f"{chapter}: {time.monotonic() - begun:.0f} s, {peak / 1e9:.1f} GB{against}", flush=True)
    print(f"{len(given.chapters)} chapters at the shapes of {p.name}; failed or above the plan: {failed or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
