"""The real transfer between two vocabularies: Gemma-3-270M to SmolLM2-135M on 200 GSM8K examples; an hour on a core.

``SEMALIGN_DATA=folder python tests/real/two_vocabularies.py`` writes ``book/two_vocabularies.json``, from where
chapter 22 draws it. Gemma has to be installed (``make gemma``), and the folder to hold GSM8K.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from semalign import report
from semalign.models import load_pair
from semalign.study import two_vocabularies as study

TRAIN, HELD_OUT = 200, 40


def main() -> None:
    start = time.perf_counter()
    data = study.word_problems(TRAIN, HELD_OUT)
    if data is None:
        sys.exit("SEMALIGN_DATA names no folder with GSM8K: set it")
    losses = study.arms(load_pair(study.REAL), data, study.SETTINGS, say=lambda text: print(text, flush=True))
    found = {
        "losses": losses,
        "train": len(data.train),
        "held_out": len(data.validation),
        "layer": study.SETTINGS.layers,
        "lr": study.SETTINGS.lr,
    }
    wall = time.perf_counter() - start
    report.save_metrics(
        report.BOOK / "two_vocabularies.json", found, seeds=[study.SETTINGS.seed], profile="none", wall_s=wall
    )


if __name__ == "__main__":
    main()
