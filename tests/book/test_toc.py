"""The table of contents: every page and every chapter once, in the order in which the chapters run."""

from __future__ import annotations

import pages
import yaml

from semalign.pipeline.notebooks import ORDER

TOC = yaml.safe_load((pages.ROOT / "_toc.yml").read_text())
FILES = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]


def test_every_page_of_prose_is_in_it_once() -> None:
    found = sorted(f for f in [TOC["root"], *FILES] if f.startswith("book/"))
    assert found == sorted(f"book/{path.stem}" for path in pages.BOOK.glob("*.md"))


def test_every_chapter_is_in_it_once() -> None:
    assert sorted(f.removeprefix("notebooks/") for f in FILES if f.startswith("notebooks/")) == sorted(ORDER)


def test_a_chapter_stands_after_those_that_it_reads() -> None:
    place = {f.removeprefix("notebooks/"): at for at, f in enumerate(FILES)}
    for name, chapter in ORDER.items():
        assert all(place[read] < place[name] for read in chapter.reads), name


def test_figures_drawn_in_the_page_are_files_of_the_book() -> None:
    drawn = [
        line for name in ("method", "frame") for line in pages.text(name).splitlines() if line.startswith(":file:")
    ]
    assert len(drawn) == 2 and all((pages.BOOK / line.split()[1]).is_file() for line in drawn)
