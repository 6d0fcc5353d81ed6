"""Ten figures of a run with one sentence each, as one file of html that needs nothing else: for a talk or a lesson."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from semalign.pipeline import pages
from semalign.pipeline.notebooks import chapters_of
from semalign.profiles import Profile

DECK: tuple[tuple[str, str, int], ...] = (
    ("01_semantics", "fig-recomposition", 0),
    ("03_pairing", "fig-stacks", 0),
    ("04_alignment", "fig-comparison", -1),
    ("04b_gates", "fig-positive-control", 0),
    ("05_mmlu", "fig-mmlu-known", 0),
    ("07_humaneval", "fig-humaneval-why", -1),
    ("12_controls", "fig-controls", 0),
    ("12b_students", "fig-students", 0),
    ("13b_regimes", "fig-regimes", 0),
    ("15_paper_against_ours", "fig-verdicts", 0),
)
"""Chapter, name of the figure in its notebook, and which sentence of the chapter's finding is about it."""

STYLE = """
:root { color-scheme: light }
body { background: #fff; color: #111; font: 16px/1.4 system-ui, sans-serif; margin: 0; scroll-snap-type: y mandatory }
html { scroll-snap-type: y mandatory }
section { box-sizing: border-box; display: flex; flex-direction: column; gap: 1.5vh; height: 100vh; padding: 4vh 5vw;
          scroll-snap-align: start }
h1, h2 { font-size: clamp(1.1rem, 3.2vmin, 2rem); margin: 0; font-weight: 600; color: #441166 }
p.says { font-size: clamp(1rem, 3.4vmin, 2.1rem); margin: 0; max-width: 60em }
img { flex: 1; min-height: 0; object-fit: contain; width: 100% }
p.caption { color: #444; font-size: clamp(0.7rem, 1.8vmin, 1rem); margin: 0 }
footer { color: #444; display: flex; font-size: 0.8rem; justify-content: space-between }
@page { size: 297mm 167mm; margin: 0 }
@media print { section { break-after: page; height: 167mm } }
"""

SCRIPT = """
const slides = [...document.querySelectorAll("section")];
const at = () => Math.round(scrollY / innerHeight);
addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 }[event.key];
  const to = event.key === "Home" ? 0 : event.key === "End" ? slides.length - 1 : by ? at() + by : undefined;
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  slides[Math.max(0, Math.min(slides.length - 1, to))].scrollIntoView();
});
"""


def sentence(text: str, which: int) -> str:
    """One sentence of a text, counted from 0, or from the end; a point within a number ends none."""
    found = re.split(r"(?<=\.)\s+(?=[A-Z0-9])", text.strip())
    return found[which]


def figure(notebook: nbformat.NotebookNode, name: str) -> tuple[str, str, str] | None:
    """A figure of an executed notebook by its name: its svg, its caption and its alternative text."""
    for cell in notebook.cells:
        said: Mapping[str, Any] = cell.metadata.get("mystnb", {})
        if said.get("figure", {}).get("name") != name:
            continue
        for output in cell.outputs:
            if "image/svg+xml" in output.get("data", {}):
                return output.data["image/svg+xml"], said["figure"]["caption"], said.get("image", {}).get("alt", "")
    return None


def deck(p: Profile, results: Path) -> str:
    """The slides of a run: a title, then each figure of :data:`DECK` that the run has."""
    run, shown = pages.run_numbers(p, results), []
    for chapter, name, which in DECK:
        if chapter not in chapters_of(p):
            continue
        found = figure(nbformat.read(results / "notebooks" / f"{chapter}.ipynb", as_version=4), name)
        if not found:
            continue
        svg, caption, alt = found
        _, said = pages.findings_of(chapter, p, {}, run)
        shown.append((pages.title(chapter, p), sentence(said or caption, which if said else 0), svg, caption, alt))
    total = len(shown) + 1
    opening = f"{len(shown)} figures from the run of the profile {p.name}, each with what its chapter found."
    keys = "Arrow keys turn the slides."
    parts = [_section(1, total, f'<h1>SemAlign, reproduced</h1><p class="says">{html.escape(opening)} {keys}</p>')]
    for at, (title, says, svg, caption, alt) in enumerate(shown, start=2):
        image = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        parts.append(
            _section(
                at,
                total,
                f'<h2>{html.escape(title)}</h2><p class="says">{html.escape(says)}</p>'
                f'<img src="{image}" alt="{html.escape(alt)}"><p class="caption">{html.escape(caption)}</p>',
            )
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SemAlign, reproduced: slides</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>"
    )


def _section(at: int, total: int, inner: str) -> str:
    return f"<section>{inner}<footer><span>SemAlign, reproduced</span><span>{at} / {total}</span></footer></section>"


def make_slides(p: Profile, results: Path) -> Path:
    """Write the slides of a finished run to ``results/book/_build/slides.html``.

    Raises:
        RuntimeError: a chapter of the run is not finished.
    """
    absent = [name for name in chapters_of(p) if not (results / "metrics" / f"{name}.json").exists()]
    if absent:
        raise RuntimeError(f"{results} has no numbers of {', '.join(absent)}: call make notebooks first")
    target = results / "book" / "_build" / "slides.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(deck(p, results), encoding="utf-8")
    return target
