"""The book's own Sphinx extension: docstrings as markup, headers that head something, pages described and light."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

LITERAL = re.compile(r"(``.*?``)")
LONGEST = 200
"""Characters of a page's description."""


def as_markup(lines: list[str], *, named: bool = False) -> list[str]:
    """A docstring's lines as reStructuredText.

    Args:
        lines: the docstring. Its ``|h|`` is a length, which the markup would take for the name of a substitution.
        named: it belongs to an attribute, a value of a module or a property: a colon in its first sentence separates no
            type from its description, as napoleon would read it.
    """
    escaped = ["".join(_bars(part) for part in LITERAL.split(line)) for line in lines]
    return ["..", "", *escaped] if named else escaped  # an empty comment: the first line is what napoleon splits


def _bars(part: str) -> str:
    return part if LITERAL.fullmatch(part) else part.replace("|", r"\|")


def for_screen_readers(body: str) -> str:
    """A page's markup without what a screen reader stumbles over.

    A table's header that says nothing is a plain cell, and the entries of a bibliography are those of a list.
    """
    body = body.replace('role="doc-biblioentry"', 'role="listitem"')
    return re.sub(r"<th\b([^>]*)>((?:\s|&nbsp;|<p>|</p>)*)</th>", r"<td\1></td>", body)


def description(text: str) -> str:
    """The beginning of a page's first words, cut between two of them."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else words[: LONGEST + 1].rpartition(" ")[0].rstrip(",;:") + " …"


def without_icon_script(page: str) -> str:
    """A page that draws its icons by the theme's font alone; its script, of 1.5 MB, would draw them a second time."""
    return re.sub(r'\s*<script src="[^"]*fontawesome[^"]*"></script>', "", page)


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_markup(lines, named=what in ("attribute", "data", "property"))


def _page(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if doctree is None:
        return
    from docutils import nodes

    context["body"] = for_screen_readers(context.get("body", ""))
    found = [node for node in doctree.findall(nodes.admonition) if "finding" in node.get("classes", [])]
    paragraphs = [p for node in found or [doctree] for p in node.findall(nodes.paragraph) if p.astext().strip()]
    if paragraphs:
        said = html.escape(description(paragraphs[0].astext()))
        context["metatags"] = f'{context.get("metatags", "")}<meta name="description" content="{said}" />\n'


def _sources(app: Any) -> list[Any]:
    """Leave out of the list of sources the modules that have none, as Python's own: their links would be dead."""
    known = getattr(app.env, "_viewcode_modules", {})
    app.env._viewcode_modules = {name: entry for name, entry in known.items() if entry}
    return []


def _finished(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        before = path.read_text(encoding="utf-8")
        if (after := without_icon_script(before)) != before:
            path.write_text(after, encoding="utf-8")
    for path in Path(app.outdir).glob("_static/vendor/fontawesome/*/js/*"):
        path.unlink()


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; docstrings are prepared before napoleon, of priority 500, reads them."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.connect("html-page-context", _page)
    app.connect("html-collect-pages", _sources, priority=400)
    app.connect("build-finished", _finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
