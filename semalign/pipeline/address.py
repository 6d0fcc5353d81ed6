"""What follows from the repository's address, which stands in ``_config.yml``: the cell that Colab needs.

Colab opens a notebook without the repository around it. The second cell of every notebook fetches it there, and does
nothing elsewhere; while there is no address there is no such cell.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import yaml

from semalign.lm.files import write_text

COLAB = "colab"
"""The cell's id and tag."""
CELL = """# Colab opens this notebook alone: there the book's code is fetched and installed. Elsewhere nothing happens.
import os, subprocess, sys

if "google.colab" in sys.modules:
    book = "/content/semalign-book"
    if not os.path.exists(book):
        subprocess.run(["git", "clone", "-q", "--depth", "1", "--branch", "BRANCH", "URL", book], check=True)
        with open(f"{book}/requirements.lock") as lock, open("/tmp/locked.txt", "w") as kept:
            kept.writelines(line for line in lock if not line.startswith("torch=="))  # Colab's own fits its cards
        locked = ["--no-deps", "-r", "/tmp/locked.txt", "-e", book]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *locked], check=True)
        print("installed: choose Runtime, Restart session, and run the notebook from its top")
    sys.path.insert(0, book)
    os.chdir(f"{book}/notebooks")"""


def colab_cell(config: Path) -> str:
    """The source of the cell by the address in a ``_config.yml``; empty where it has none.

    Raises:
        ValueError: the address is not one that git can clone from over https.
    """
    repository = yaml.safe_load(config.read_text(encoding="utf-8")).get("repository", {})
    url, branch = str(repository.get("url") or ""), str(repository.get("branch") or "main")
    if not url:
        return ""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.netloc or any(sign in url + branch for sign in "\"'\\ {}"):
        raise ValueError(f"repository.url {url!r} in {config.name} is no address: give one as https://host/owner/name")
    return CELL.replace("URL", url).replace("BRANCH", branch)


def write_cells(config: Path, notebooks: Path) -> list[Path]:
    """Bring the cell of every notebook of a folder in line with the address; returns those that changed.

    Raises:
        ValueError: as :func:`colab_cell`.
    """
    source, changed = colab_cell(config), []
    for path in sorted(notebooks.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        others = [cell for cell in notebook.cells if COLAB not in cell.metadata.get("tags", [])]
        own = nbformat.v4.new_code_cell(source, id=COLAB, metadata={"tags": [COLAB, "remove-cell"]})
        cells = [*others[:1], own, *others[1:]] if source else others
        if cells != notebook.cells:
            notebook.cells = cells
            write_text(path, nbformat.writes(notebook) + "\n")
            changed.append(path)
    return changed
