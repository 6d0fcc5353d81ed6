"""``python -m semalign.classroom [NAME ...]``: retrain Pico from nothing, resuming whatever a kill left."""

import sys
from pathlib import Path

import torch

from semalign.classroom.family import NAMES, RECIPES, WEIGHTS, make, score

WORK = Path("results/pico")

if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        print(f"== {name}", flush=True)
        make(name, WORK / "weights", WORK, "cuda" if torch.cuda.is_available() else "cpu")
        for what, share in score(name, WORK / "weights").items() if name in NAMES else ():
            print(f"{what:18} {share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})", flush=True)
    print(f"the models are in {WORK / 'weights'}; copy them to {WEIGHTS} to use them")
