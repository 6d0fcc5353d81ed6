"""``python -m semalign.classroom [NAME ...]``: retrain Pico from nothing, resuming whatever a kill left."""

import sys
from pathlib import Path

import torch

from semalign.classroom.family import NAMES, WEIGHTS, make

WORK = Path("results/pico")

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}", flush=True)
        make(name, WORK / "weights", WORK, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"the models are in {WORK / 'weights'}; copy them to {WEIGHTS} to use them")
