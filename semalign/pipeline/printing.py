"""The whole book as one file for paper: the built pages one after another, with contents and page numbers."""

from __future__ import annotations

import html
import os
import posixpath
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""The commands that are looked for, in this order; ``CHROMIUM`` in the environment comes before them."""
PATIENCE = 900
"""Seconds for one printing of the whole book, formulas and all."""

STYLE = """
@page { size: A4; margin: 18mm 16mm 20mm; @bottom-center { content: counter(page); font: 9pt sans-serif; color: #333 } }
@page :first { @bottom-center { content: none } }
html { font-size: 13px; background: #fff }
body { margin: 0; background: #fff }
.bd-content { display: block }
article.page { break-before: page }
article.page section > h1 { margin-top: 0 }
.cover { padding-top: 30vh; text-align: center }
nav.toc-of-paper { break-before: page }
nav.toc-of-paper ol { list-style: none; margin: 0; padding: 0 }
nav.toc-of-paper li { display: flex; gap: 0.6em; padding: 0.12em 0 }
nav.toc-of-paper li.part { font-weight: 600; padding-top: 0.9em }
nav.toc-of-paper li a { flex: 1; text-decoration: none }
nav.toc-of-paper li span { min-width: 3em; text-align: right }
.controls, .onlyprint, .toctree-wrapper, button { display: none !important }
"""


@dataclass(frozen=True)
class Page:
    """A page of the book: the part that it begins, if it does, its path without a suffix, and its depth."""

    part: str
    path: str
    depth: int = 0


def pages_of(stage: Path) -> list[Page]:
    """The pages of a staged book in the order of its table of contents."""
    toc = yaml.safe_load((stage / "_toc.yml").read_text(encoding="utf-8"))
    found = [Page("", toc["root"])]
    for part in toc["parts"]:
        names = list(_nested(part["chapters"]))
        found += [Page(part["caption"] if not at else "", *one) for at, one in enumerate(names)]
    return found


def _nested(chapters: list[dict[str, Any]], depth: int = 0) -> Iterator[tuple[str, int]]:
    for chapter in chapters:
        yield chapter["file"], depth
        yield from _nested(chapter.get("sections", []), depth + 1)


def article(page: str) -> str:
    """What a built page says, without what stands around it and without its scripts."""
    found = re.search(r'<article class="bd-article">(.*)</article>', page, re.DOTALL)
    if not found:
        raise ValueError("this is no page of the book: it has no article")
    return re.sub(r"<script\b.*?</script>", "", found[1], flags=re.DOTALL)


def title_of(page: str) -> str:
    """A built page's title, as text."""
    found = re.search(r"<h1>(.*?)(?:<a class=\"headerlink|</h1>)", page, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", found[1])).strip() if found else ""


def anchor(path: str, name: str = "") -> str:
    """The name in the whole book of a page, or of a place in it."""
    return "--".join(part for part in (path.replace("/", "-"), name) if part)


def moved(body: str, path: str, inside: set[str], root: str) -> str:
    """A page's markup for a file that holds all of them.

    Args:
        body: the markup.
        path: the page's own path, such as ``notebooks/03_pairing``.
        inside: the paths of all pages that are in the file.
        root: where the built pages lie, as seen from the file.
    """
    folder = posixpath.dirname(path)

    def link(found: re.Match[str]) -> str:
        attribute, to = found[1], html.unescape(found[2])
        if re.match(r"[a-z][a-z0-9+.-]*:", to):
            return found[0]
        file, _, name = to.partition("#")
        target = posixpath.normpath(posixpath.join(folder, file)) if file else f"{path}.html"
        page = target.removesuffix(".html")
        if attribute.endswith("href") and page in inside:
            return f'{attribute}="#{anchor(page, name)}"'
        return f'{attribute}="{html.escape(f"{root}/{target}")}"'

    def several(found: re.Match[str]) -> str:
        return f'{found[1]}="{" ".join(anchor(path, name) for name in found[2].split())}"'

    body = re.sub(r'(?<=\s)(href|xlink:href|src)="([^"]*)"', link, body)
    body = re.sub(r'(?<=\s)(id|for|aria-labelledby|aria-describedby)="([^"]*)"', several, body)
    return re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{anchor(path, found[1])})", body)


def whole_book(stage: Path, numbers: Mapping[str, int] | None = None) -> str:
    """All built pages of a staged book as one page of html; ``numbers`` are those of the pages of paper, by path."""
    built, root = stage / "_build" / "html", "../html"
    found = [page for page in pages_of(stage) if (built / f"{page.path}.html").exists()]
    texts = {page.path: (built / f"{page.path}.html").read_text(encoding="utf-8") for page in found}
    titles = {path: title_of(text) for path, text in texts.items()}
    lines = []
    for page in found:
        if page.part:
            lines.append(f'<li class="part">{html.escape(page.part)}</li>')
        at = (numbers or {}).get(page.path, "")
        indent = f"padding-left: {1.2 * (1 + page.depth):.1f}em"
        name = html.escape(titles[page.path])
        lines.append(f'<li style="{indent}"><a href="#{anchor(page.path)}">{name}</a><span>{at}</span></li>')
    articles = [
        f'<article class="bd-article page" id="{anchor(path)}">{moved(article(text), path, set(texts), root)}</article>'
        for path, text in texts.items()
    ]
    name = html.escape(titles[found[0].path])
    return (
        f'<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>{name}</title>'
        f'{_head(texts, root)}<style>{STYLE}</style></head><body><main class="bd-main bd-content">'
        f'<h1 class="cover">{name}</h1><nav class="toc-of-paper"><h2>Contents</h2><ol>{"".join(lines)}</ol></nav>'
        f"{''.join(articles)}</main></body></html>"
    )


def _head(texts: Mapping[str, str], root: str) -> str:
    """The styles of all pages, and the scripts that set formulas: pages without formulas have none."""
    kept: dict[str, None] = {}
    for text in texts.values():
        head = text.partition("<head>")[2].partition("</head>")[0]
        styles = re.findall(r'<link\b[^>]*href="[^"]*\.css[^"]*"[^>]*>', head)
        formulas = re.findall(r"<script\b[^>]*>[^<]*MathJax.*?</script>|<script\b[^>]*mathjax[^>]*></script>", head)
        kept |= dict.fromkeys(re.sub(r'"\.\./', f'"{root}/', tag) for tag in [*styles, *formulas])
    return "".join(kept)


def page_numbers(pdf: bytes) -> dict[str, int]:
    """On which page each named place of a printed book is, counted from 1.

    Chromium writes the tree of pages and the table of names as plain objects, so that no reader of pdf is needed.
    """
    text = pdf.decode("latin-1")
    objects = {int(n): body for n, body in re.findall(r"(?:^|\n)(\d+) 0 obj\s*(.*?)endobj", text, re.DOTALL)}
    order: list[int] = []

    def walk(n: int) -> None:
        body = objects[n]
        if re.search(r"/Type\s*/Pages\b", body):
            kids = re.search(r"/Kids\s*\[(.*?)\]", body, re.DOTALL)
            for kid in re.findall(r"(\d+) 0 R", kids[1] if kids else ""):
                walk(int(kid))
        else:
            order.append(n)

    catalogue = next(body for body in objects.values() if re.search(r"/Type\s*/Catalog\b", body))
    tree = re.search(r"/Pages (\d+) 0 R", catalogue)
    walk(int(tree[1]) if tree else 0)
    place = {n: at for at, n in enumerate(order, start=1)}
    names = re.findall(r"/([^\s/\[\]<>]+) \[(\d+) 0 R /XYZ", text)
    return {name: place[int(n)] for name, n in names if int(n) in place}


def browser() -> str:
    """The command of a Chromium.

    Raises:
        RuntimeError: none is installed.
    """
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else []
    found = next((path for name in [*named, *BROWSERS] if (path := shutil.which(name))), None)
    if not found:
        raise RuntimeError("to print the book a Chromium is needed: install one, or name it in CHROMIUM")
    return found


def _print(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as own:
        command = [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={own}",
            "--no-pdf-header-footer", "--generate-pdf-document-outline", "--virtual-time-budget=600000",
            f"--print-to-pdf={target}", source.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    if done.returncode or not target.exists():
        raise RuntimeError(
            f"the browser did not print {source}, so choose another by CHROMIUM=path: {done.stdout[-500:]}"
        )


def print_book(stage: Path) -> Path:
    """Print a built book to ``stage/_build/pdf/book.pdf``: once to learn its page numbers, once with them.

    Raises:
        RuntimeError: the book is not built, or no browser could print it.
    """
    if not (stage / "_build" / "html" / "index.html").exists():
        raise RuntimeError(f"no book is built in {stage}: call make book first")
    folder = stage / "_build" / "pdf"
    folder.mkdir(parents=True, exist_ok=True)
    page, pdf = folder / "book.html", folder / "book.pdf"
    page.write_text(whole_book(stage), encoding="utf-8")
    _print(page, pdf)
    at = page_numbers(pdf.read_bytes())
    numbers = {one.path: at[anchor(one.path)] for one in pages_of(stage) if anchor(one.path) in at}
    page.write_text(whole_book(stage, numbers), encoding="utf-8")
    _print(page, pdf)
    return pdf
