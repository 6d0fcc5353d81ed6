"""axe-core, for the tests of a built book: one file of the npm registry, at one version, known by its hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "4.10.3"
SHA256 = "880970c081707360e64f34cea25ff91892f5bc95675b0776925b9709dd8a68bb"
CACHE = Path(os.environ.get("SEMALIGN_CACHE") or Path.home() / ".cache" / "semalign")
FILE = CACHE / f"axe-core-{VERSION}.min.js"
WITHOUT = f"axe-core {VERSION} is not at hand: make test-book fetches it where npm and its registry are"


def axe() -> str | None:
    """The script, or None where it was not fetched."""
    if not FILE.exists():
        return None
    script = FILE.read_bytes()
    if hashlib.sha256(script).hexdigest() != SHA256:
        raise RuntimeError(f"{FILE} is not axe-core {VERSION}: delete it")
    return script.decode()


def fetch() -> str:
    """Put the script where :func:`axe` looks for it; returns what to say."""
    npm = shutil.which("npm")
    if FILE.exists() or not npm:
        return "" if FILE.exists() else "npm is not installed: pages are checked without axe-core"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", f"axe-core@{VERSION}"], cwd=folder, capture_output=True, text=True
        )
        packed = Path(folder, f"axe-core-{VERSION}.tgz")
        if done.returncode or not packed.exists():
            return "npm cannot fetch axe-core: pages are checked without it"
        with tarfile.open(packed) as archive:
            member = archive.extractfile("package/axe.min.js")
            script = member.read() if member else b""
    if hashlib.sha256(script).hexdigest() != SHA256:
        return f"what npm calls axe-core {VERSION} has another hash: pages are checked without it"
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_bytes(script)
    return ""


if __name__ == "__main__":
    if said := fetch():
        print(said)
