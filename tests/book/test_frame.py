"""The interactive figure: what it shows without a script, and what a hand, a key, a phone and the dark do to it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, WITHOUT, Browser
from pages import BOOK, ROOT, contrast

FIGURE = (BOOK / "static/frame.html").read_text(encoding="utf-8")
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><title>figure</title><body>{}</body></html>'
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
S3 = math.degrees(math.atan2(0.8, 0.6))


def expected(bases: list[float], state: float) -> tuple[str, str]:
    """The two cosines that the figure shows, from angles in degrees."""
    S = np.array([[math.cos(math.radians(t)) for t in bases], [math.sin(math.radians(t)) for t in bases]])
    r = np.array([math.cos(math.radians(state)), math.sin(math.radians(state))])
    again = S @ S.T @ r
    values = np.linalg.eigvalsh(S @ S.T)
    cosine = again @ r / np.linalg.norm(again)
    return f"{cosine:.3f}", f"{1 / math.hypot(1, values.std() / values.mean()):.3f}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("figure") / "figure.html"
    path.write_text(PAGE.format(FIGURE), encoding="utf-8")
    return path


@pytest.fixture
def browser(page: Path) -> Iterator[Browser]:
    with Browser(page) as opened:
        yield opened


def shown(browser: Browser) -> tuple[str, str]:
    return browser.text('[data-part="cosine"]'), browser.text('[data-part="predicted"]')


def drawn(browser: Browser) -> dict[str, str]:
    """Every part of the picture as markup, whatever its spacing; the controls are the script's alone."""
    code = "JSON.stringify([...document.querySelectorAll('[data-part]')].filter(e => !e.closest('.controls'))"
    parts = json.loads(browser.ask(f"{code}.map(e => [e.dataset.part, e.outerHTML]))"))
    return {name: re.sub(r"\s+", " ", re.sub(r">\s+<", "><", html)) for name, html in parts if name != "status"}


def slide(browser: Browser, name: str) -> None:
    browser.ask(f"document.querySelector('input[data-part=\"{name}\"]').focus()")


def press(browser: Browser, which: str) -> None:
    browser.ask(f"document.querySelector('button[data-set=\"{which}\"]').click()")


def place(browser: Browser, angle: float, out: float = 1.0) -> tuple[float, float]:
    """Where on the screen a direction of the figure is."""
    code = "document.querySelector('[data-part=main]').getBoundingClientRect()"
    box = json.loads(browser.ask(f"JSON.stringify({code})"))
    unit = out * 100 * box["width"] / 430
    x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return box["x"] + box["width"] / 2 + unit * x, box["y"] + box["height"] / 2 - unit * y


def test_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|import\(", FIGURE)
    assert set(re.findall(r"https?://[^\s\"']+", FIGURE)) == {"http://www.w3.org/2000/svg"}


def test_the_marks_are_the_formulas() -> None:
    pico = json.loads((ROOT / "semalign/classroom/weights/pico-s/config.json").read_text())
    shapes = {
        "Llama-2 13B": (32000, 5120),
        "Llama-2 7B": (32000, 4096),
        "Pico": (pico["vocab_size"], pico["hidden_size"]),
        "SmolLM2": (49152, 576),
    }
    said = ", ".join(f"{name} {math.sqrt(m / (m + width - 1)):.3f}" for name, (m, width) in shapes.items())
    assert f">{said}</desc>" in FIGURE


def test_what_is_read_stands_out_from_its_ground_in_light_and_dark() -> None:
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", css)) for css in re.findall(r"\{( --ink[^}]*)\}", FIGURE)]
    assert len(themes) == 3 and themes[1] == themes[2]
    for colours in themes:
        assert min(contrast(colours[n], colours["paper"]) for n in ("ink", "faint", "state", "again", "base")) >= 4.5


def test_the_file_shows_the_worked_example() -> None:
    cosine, predicted = expected([0, 90, S3], 0)
    assert f'data-part="cosine">{cosine}<' in FIGURE and f'data-part="predicted">{predicted}<' in FIGURE


@in_a_browser
def test_without_a_script_it_is_the_same_picture(page: Path, browser: Browser) -> None:
    with Browser(page, scripts=False) as without:
        assert without.ask("document.querySelector('.controls').offsetHeight") == 0
        assert drawn(without) == drawn(browser)
    assert browser.ask("document.querySelector('.controls').offsetHeight") > 0


@in_a_browser
def test_the_sets_differ_as_their_spectra_do(browser: Browser) -> None:
    found = {}
    for which in ("tight", "random", "uneven", "mean"):
        press(browser, which)
        slide(browser, "m")
        browser.press("End")
        assert browser.text('[data-part="m-is"]') == "200"
        found[which] = float(browser.text('[data-part="predicted"]'))
    assert found["tight"] == 1.0 > found["random"] > 0.97 > found["uneven"] > found["mean"] > 0.70


@in_a_browser
def test_sliders_move_by_the_keyboard(browser: Browser) -> None:
    slide(browser, "r")
    browser.press("ArrowRight", 30)
    assert browser.text('[data-part="r-is"]') == "30°"
    assert shown(browser) == expected([0, 90, S3], 30)
    slide(browser, "i")
    browser.press("ArrowRight")
    slide(browser, "s")
    browser.press("ArrowRight", 2)
    assert shown(browser) == expected([0, 92, S3], 30)
    assert browser.text('[data-part="status"]') == "cosine {}, predicted {}".format(*expected([0, 92, S3], 30))


@in_a_browser
def test_bases_and_state_are_dragged(browser: Browser) -> None:
    browser.drag(place(browser, S3), place(browser, -90))
    assert shown(browser) == expected([0, 90, -90], 0) and shown(browser)[0] == "1.000"
    browser.drag(place(browser, 0, 1.3), place(browser, 45))
    cosine, predicted = shown(browser)
    assert abs(float(cosine) - float(expected([0, 90, -90], 45)[0])) < 0.01 and predicted == "0.949"
    browser.drag(place(browser, 200, 0.5), place(browser, 20))
    assert shown(browser) == (cosine, predicted), "what is no handle does not move"


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_follows_the_theme(page: Path, dark: bool) -> None:
    ground = "getComputedStyle(document.querySelector('.sa-frame')).backgroundColor"
    with Browser(page, width=390, dark=dark) as phone:
        assert phone.ask("document.documentElement.scrollWidth") == 390
        assert (phone.ask(ground) == "rgb(255, 255, 255)") is not dark
        phone.ask("document.documentElement.dataset.theme = 'light'")
        light = phone.ask(ground)
        phone.ask("document.documentElement.dataset.theme = 'dark'")
        assert light == "rgb(255, 255, 255)" != phone.ask(ground), "the book's own switch comes first"
