"""The smoke profile on this machine's GPU in bfloat16, every chapter, and its trials against those of the CPU.

``python tests/cluster/card.py [--device cuda] [--at-once N] [--until CHAPTER ...]``. Chapters run side by side, as many
as ``--at-once``, since the models are small. A trial on the GPU has to have the loss of the same trial in float32 on
the CPU within two hundredths. Without a GPU one sentence says so and nothing is tested.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from semalign.lm.files import read_json  # noqa: E402
from semalign.profiles import load_profile  # noqa: E402
from semalign.study import trials  # noqa: E402

BOUND = 0.02
"""How far a mean loss may lie from the CPU's, relatively: bfloat16 has 8 bits, and an example some ten positions."""


def main() -> int:
    """Run it; the exit status is 0 where every chapter ran and every loss is near, or where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--until", nargs="*", default=[], help="chapters, by name; all of them by default")
    given = parser.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        print("the GPU test is skipped: torch sees no GPU here")
        return 0
    with tempfile.TemporaryDirectory(prefix="semalign-card-") as name:
        folder = Path(name)
        smoke = yaml.safe_load((ROOT / "notebooks/profiles/smoke.yaml").read_text())
        on_card = {**smoke, "device": given.device, "dtype": "bfloat16"}
        profile, results = folder / "smoke.yaml", folder / "results"
        profile.write_text(yaml.safe_dump(on_card))
        command = [
            sys.executable, "-m", "snakemake", *([f"notebook_{n}" for n in given.until] or ["notebooks"]),
            "--cores", str(4 * given.at_once), "--resources", f"gpu={given.at_once}", "--nolock", "--keep-going",
            "--directory", str(ROOT), "--rerun-triggers", "software-env", "--quiet", "rules", "host", "reason",
            "--config", f"profile={profile}", f"results={results}",
        ]  # fmt: skip
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        failed = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode
        ran = sorted(path.stem for path in (results / "metrics").glob("*.json"))
        here, apart, count = load_profile("smoke"), [], 0
        for path in sorted((results / "artefacts/trials").glob("*/*.json")):
            theirs = read_json(path)
            if theirs["variant"]:
                continue
            ours = trials.run_trial(here, theirs["task"], theirs["method"], theirs["seed"], folder / "cpu")
            for i, (a, b) in enumerate(zip(ours["validation"]["loss"], theirs["validation"]["loss"], strict=True)):
                count += 1
                if abs(a - b) > BOUND * a:
                    apart.append(f"{path.parent.name}/{path.stem}, example {i}: {a:.4f} on the CPU, {b:.4f} on the GPU")
        print(f"{len(ran)} chapters ran on {given.device}; {count} losses compared, {len(apart)} apart")
        print("\n".join(apart))
        return int(bool(failed or apart or not ran))


if __name__ == "__main__":
    sys.exit(main())
