"""A built book, page by page: its links, and in a browser what a phone, the dark, a keyboard and axe-core find."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe import WITHOUT as WITHOUT_AXE
from axe import axe
from browser import CHROMIUM, WITHOUT, Browser

NAMED = os.environ.get("SEMALIGN_BOOK", "")
BUILT = Path(NAMED)
pytestmark = pytest.mark.skipif(not NAMED, reason="no built book is named: make test-book checks one")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
themes = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
PHONE, DESK = 390, 1400


class Links(HTMLParser):
    """What a page links to and loads, and the names that it can be linked by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.names |= {value for name in ("id", "name") if (value := said.get(name))}
        if target := said.get("href") if tag in ("a", "area", "link") else said.get("src"):
            (self.links if tag in ("a", "area") else self.loaded).append(target)


def parsed() -> dict[Path, Links]:
    pages = [path for path in sorted(BUILT.rglob("*.html")) if "_static" not in path.parts]
    return {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in pages}


def shown() -> list[Path]:
    """The pages that a reader turns: not the index, the search and the listings of source."""
    return sorted(path for folder in ("book", "notebooks") for path in (BUILT / folder).rglob("*.html"))


def test_no_link_inside_the_book_is_dead() -> None:
    found, dead = parsed(), []
    assert len(found) > 20
    for page, links in found.items():
        for link in {*links.links, *links.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            name = unquote(parts.fragment)
            if not target.exists() or (name and target in found and name not in found[target].names):
                dead.append(f"{page.relative_to(BUILT.resolve())}: {link}")
    assert not dead, "\n".join(dead)


def test_pages_load_nothing_from_elsewhere() -> None:
    away = {link for links in parsed().values() for link in links.loaded if urlsplit(link).netloc}
    assert away == set()


@pytest.fixture(scope="module")
def browsers() -> Iterator[dict[bool, Browser]]:
    first = shown()[0]
    with Browser(first) as light, Browser(first, dark=True) as dark:
        yield {False: light, True: dark}


WIDE = "document.documentElement.scrollWidth"
UNREACHABLE = """
[...document.querySelectorAll('.bd-article *')].filter(e => {
  const how = getComputedStyle(e);
  return e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && ['auto', 'scroll'].includes(how.overflowX)
    && e.tabIndex !== 0 && !e.querySelector('a, button, input, [tabindex="0"]');
}).map(e => `${e.tagName}.${e.className}`)
"""
NAMELESS = "[...document.querySelectorAll('.bd-article th')].filter(e => !e.textContent.trim()).length"
FAINT = """
(() => {
  const part = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('.bd-article :is(a, td, th, figcaption span, summary p)')].filter(e => {
    if (!e.textContent.trim() || !e.getClientRects().length || e.classList.contains('headerlink')) return false;
    const [high, low] = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map(e => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 30)}`).slice(0, 5);
})()
"""


@in_a_browser
@themes
def test_a_phone_shows_every_page_whole_and_what_scrolls_is_reached_by_the_keyboard(
    browsers: dict[bool, Browser], dark: bool
) -> None:
    browser, faults = browsers[dark], []
    browser.resize(PHONE)
    for page in shown():
        browser.open(page)
        browser.ask("new Promise(done => setTimeout(done, 150))")
        if (width := int(browser.ask(WIDE))) > PHONE:
            faults.append(f"{page.name} is {width} pixels wide")
        faults += [f"{page.name}: {e} scrolls and cannot be reached" for e in browser.ask(UNREACHABLE)]
    assert not faults, "\n".join(faults)


@in_a_browser
@themes
def test_words_stand_out_from_their_ground_and_headers_have_a_name(browsers: dict[bool, Browser], dark: bool) -> None:
    browser, faults = browsers[dark], []
    browser.resize(DESK)
    for page in shown():
        browser.open(page)
        faults += [f"{page.name}: {e} is faint" for e in browser.ask(FAINT)]
        if nameless := int(browser.ask(NAMELESS)):
            faults.append(f"{page.name}: {nameless} headers without a name")
    assert not faults, "\n".join(faults)


@in_a_browser
@themes
def test_axe_finds_no_violation(browsers: dict[bool, Browser], dark: bool) -> None:
    if (script := axe()) is None:
        pytest.skip(WITHOUT_AXE)
    browser, faults = browsers[dark], []
    browser.resize(DESK)
    asked = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
    told = ".then(r => r.violations.map(v => `${v.id}: ${v.nodes.length}, as ${v.nodes[0].target}`))"
    for page in shown():
        browser.open(page)
        browser.ask(script)
        faults += [f"{page.name}: {said}" for said in browser.ask(f"axe.run(document, {json.dumps(asked)}){told}")]
    assert not faults, "\n".join(faults)
