"""The book: prose and executed notebooks laid side by side, and built with warnings as errors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml

from semalign.pipeline import forks, pages
from semalign.pipeline.notebooks import ROOT, chapters_of, contents, digest, missing
from semalign.planning.plan import markdown, plan
from semalign.profiles import Profile, ProfileError, load_profile

OPEN = "open"
"""The tag of a code cell that stays open on its page: one of the paper's own calls."""


def book_sources() -> list[str]:
    """The prose, configuration and static files of the book, relative to the repository."""
    kept = [p for p in (ROOT / "book").rglob("*") if p.is_file() and "_build" not in p.parts]
    return [p.relative_to(ROOT).as_posix() for p in [*sorted(kept), ROOT / "_config.yml", ROOT / "_toc.yml"]]


def book_digest(values: Mapping[str, str]) -> str:
    """The hash of all that determines the built book: its own sources, and the notebooks' digests ``values``."""
    return digest(values, contents(ROOT / path for path in book_sources()))


def stage_book(p: Profile, results: Path) -> Path:
    """Lay the prose, the executed notebooks and the configuration side by side, as the book's source folder.

    Pages keep their paths in the repository, which the launch buttons need. Chapters that the profile leaves out are
    named on a page of their own, and links to them become plain text. What :mod:`semalign.pipeline.pages` computes is
    put in its places.
    """
    stage = results / "book"
    shutil.rmtree(stage, ignore_errors=True)
    out = missing(p)
    (kept, _), run = pages.kept_run(), pages.run_numbers(p, results)
    parts = {
        "short": pages.in_short(p, kept, run),
        "data": pages.data_table(p),
        "findings": pages.findings_list(p, kept, run),
        "downloads": pages.downloads(stage / "book" / "numbers_of", p, run),
    }
    for path in book_sources():
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".md"):
            text = pages.filled((ROOT / path).read_text(encoding="utf-8"), parts)
            (stage / path).write_text(without_links(text, out), encoding="utf-8")
        else:
            shutil.copy(ROOT / path, stage / path)
    (stage / "_config.yml").write_text(_config((ROOT / "_config.yml").read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(results / "artefacts" / "main_figure.svg", stage / "book")
    (stage / "notebooks").mkdir()
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    for part in toc["parts"]:
        part["chapters"] = [c for c in part["chapters"] if Path(c["file"]).name not in out]
        for chapter in part["chapters"]:
            if chapter["file"].startswith("notebooks/"):
                chapter["title"] = pages.short_title(Path(chapter["file"]).name, p)
            elif chapter["file"] == "book/api":
                chapter["sections"] = _api(stage)
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]
    if out:
        lines = [f"- **{pages.title(name, p)}** {why}." for name, why in out.items()]
        page = "# Not in this run\n\nThese chapters need what the profile does not have:\n\n" + "\n".join(lines) + "\n"
        (stage / "book" / "left_out.md").write_text(page, encoding="utf-8")
        toc["parts"].append({"caption": f"Left out: {len(out)}", "chapters": [{"file": "book/left_out"}]})
    if page := plan_page(p):
        (stage / "book" / "plan.md").write_text(page, encoding="utf-8")
        toc["parts"].append({"caption": "What it needs", "chapters": [{"file": "book/plan"}]})
    (stage / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    for name in chapters_of(p):
        notebook = nbformat.read(results / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.metadata.tags = list(dict.fromkeys([*cell.metadata.get("tags", []), *_shown(cell)]))
                for data in (output["data"] for output in cell.outputs if "text/html" in output.get("data", {})):
                    data["text/html"] = pages.readable_tables(data["text/html"])
            elif out:
                cell.source = without_links(cell.source, out)
        notebook.cells[0].source = pages.with_title(notebook.cells[0].source, pages.title(name, p))
        added = [pages.finding_box(name, p, kept, run), pages.two_runs(name, p, kept, run)]
        notebook.cells[1:1] = [nbformat.v4.new_markdown_cell(without_links(text, out)) for text in added if text]
        notebook.cells.append(nbformat.v4.new_markdown_cell(_made(name, notebook, results)))
        nbformat.write(notebook, stage / "notebooks" / f"{name}.ipynb")
    return stage


def plan_page(p: Profile) -> str:
    """The page on what a profile needs, as markdown; empty where no model is of the hub, or one is unknown to plans."""
    if not any(model.source == "hub" for model in p.models):
        return ""
    try:
        return f"# What this profile needs\n\n{markdown(plan(p, chapters_of(p)))}"
    except ProfileError:
        return ""


def _shown(cell: nbformat.NotebookNode) -> list[str]:
    """How a code cell stands on its page: the paper's calls open, other code folded over its output, the rest not."""
    tags = cell.metadata.get("tags", [])
    if OPEN in tags:
        return []
    if "injected-parameters" in tags or not cell.outputs:
        return ["remove-cell"]
    return ["hide-input"]


def without_links(text: str, out: dict[str, str]) -> str:
    """Markdown whose links to the chapters in ``out`` are their titles, in plain text."""

    def plain(link: re.Match[str]) -> str:
        name = Path(link[2]).stem
        return f"{link[1] or pages.heading(name)} (not in this run)" if name in out else link[0]

    return re.sub(r"\[([^\]]*)\]\(([^)\s]*?\.ipynb)[^)]*\)", plain, text)


def _config(text: str) -> str:
    """The configuration without its launch buttons where the repository has no address that they could open."""
    config = yaml.safe_load(text)
    if not config.get("repository", {}).get("url"):
        config.pop("repository", None)
        config.pop("launch_buttons", None)
    return yaml.safe_dump(config, sort_keys=False)


def _api(stage: Path) -> list[dict[str, str]]:
    """The pages of the reference, written, as the table of contents lists them."""
    (stage / "book" / "api").mkdir(exist_ok=True)
    written = pages.api_pages()
    for name, text in written.items():
        (stage / "book" / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    return [{"file": f"book/api/{name}"} for name in written]


def _made(name: str, notebook: nbformat.NotebookNode, results: Path) -> str:
    """The block under a notebook that says how it was made."""
    from semalign.report import load_metrics, provenance_table

    _, provenance = load_metrics(results / "metrics" / f"{name}.json")
    seconds: Any = notebook.metadata.papermill.duration
    return f"## How this page was made\n\n{provenance_table({**provenance, 'wall_s': seconds})}\n"


def build_book(profile: str, results: Path) -> Path:
    """Build the staged book with warnings as errors; returns the path of its ``index.html``.

    Raises:
        RuntimeError: Sphinx warned or failed; its output has been printed.
    """
    stage = stage_book(load_profile(profile), results)
    command = [*forks.command(sys.executable, "semalign.pipeline.building"), str(stage)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    index = stage / "_build" / "html" / "index.html"
    if done.returncode or not index.exists():
        print(done.stdout)
        index.unlink(missing_ok=True)
        raise RuntimeError("the book did not build: mend what the warnings above name, which count as errors")
    return index
