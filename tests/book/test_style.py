"""The book's style: links stand out from plain and from zebra rows, and what the pages are built with is there."""

from __future__ import annotations

import re

import pytest
import yaml
from pages import BOOK, ROOT, contrast

CSS = (BOOK / "_static" / "book.css").read_text(encoding="utf-8")
GROUND = {"light": "#ffffff", "dark": "#14181e"}  # the theme's own


def colours(theme: str) -> dict[str, str]:
    rule = re.search(rf'html\[data-theme="{theme}"\] \{{(.*?)\}}', CSS, re.DOTALL)
    assert rule
    return dict(re.findall(r"--pst-color-([\w-]+): (#[0-9a-f]{6});", rule[1]))


@pytest.mark.parametrize("theme", GROUND)
def test_links_stand_out_from_every_row(theme: str) -> None:
    own = colours(theme)
    for ground in (GROUND[theme], own["table-row-zebra-high-bg"], own["table-row-hover-bg"]):
        assert contrast(own["link"], ground) >= 4.5


@pytest.mark.parametrize("theme", GROUND)
def test_zebra_rows_can_be_told_from_the_ground_in_grey(theme: str) -> None:
    assert contrast(GROUND[theme], colours(theme)["table-row-zebra-high-bg"]) > 1.05


def test_what_the_configuration_names_is_there() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    sphinx = config["sphinx"]["config"]
    (folder,) = sphinx["html_static_path"]
    assert all((ROOT / folder / name).is_file() for name in [*sphinx["html_css_files"], *sphinx["html_js_files"]])
    assert (ROOT / config["html"]["favicon"]).is_file()
