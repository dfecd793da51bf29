"""The pages of the report: one file without script, the same bytes every time, and how a browser shows them."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Page, browser
from html_page import Read
from reported import HOSTILE

from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation
from rq_compile.reporting.maps import BOUNDS
from rq_compile.reporting.page import page


@pytest.mark.parametrize("name", ["full", "swept", "bare", "large", "whole", "hostile", "hostile bare"])
def test_it_is_one_file_without_script(pages: dict[str, Path], name: str) -> None:
    content = pages[name].read_text()
    read = Read(content)
    assert not {"script", "img", "iframe", "object"} & read.tags
    assert not [attribute for attribute, _ in read.attributes if attribute.startswith("on") or attribute == "src"]
    assert all(value[0] == "#" or value == "data:," for attribute, value in read.attributes if attribute == "href")
    assert not re.search(r"url\(|@import", content.split("</style>")[0])
    assert len(content) < 2_500_000


def test_hostile_names_are_shown_as_they_are(pages: dict[str, Path]) -> None:
    shown = " ".join(HOSTILE.split())
    assert Read(pages["hostile"].read_text()).text.count(shown) > 5


def test_the_same_documents_give_the_same_bytes(documents: tuple[Manifest, Evaluation, Bench], pages: dict[str, Path]) -> None:
    assert page("model.onnx", *documents) == pages["full"].read_text()


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", ["full", "swept", "bare", "large", "whole", "hostile"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_without_a_complaint_and_fits(tab: Page, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    tab.open(pages[name], width=width, scheme=scheme)
    assert tab.complaints == []
    assert tab.requests == [pages[name].as_uri()]
    assert tab.evaluate("typeof pwned") == "undefined"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Only the contents of scrollable frames, which the keyboard can reach too, extend beyond the edge.
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .unseen') && "
    assert tab.evaluate(outside + f"e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80))") == []
    assert tab.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex == 0 && e.ariaLabel)")
    assert tab.evaluate("[...document.querySelectorAll('svg')].every(e => e.ariaHidden == 'true' || e.ariaLabel)")
    if width == 390 and name == "large":
        assert tab.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.map .scroll'))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_to_read(tab: Page, pages: dict[str, Path], scheme: str) -> None:
    tab.open(pages["full"], scheme=scheme)
    paper = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for part in ("body", ".lede", ".figures b", ".figures dd", ".eyebrow", "summary", "thead th", ".facts dt"):
        assert contrast(luminance(tab.evaluate(f"getComputedStyle(document.querySelector('{part}')).color")), paper) >= 4.5, part
    pairs = tab.evaluate(
        "[...document.querySelectorAll('.numbers text')].map(e => [getComputedStyle(e).fill, getComputedStyle("
        "e.closest('.cells').querySelector('.' + e.classList[0].slice(3))).fill, e.classList[0]])"
    )
    assert len(pairs) > 10
    for text, cell, kind in pairs:
        assert contrast(luminance(text), luminance(cell)) >= 4.5, kind


def test_every_tone_is_stronger_than_the_one_before(tab: Page, pages: dict[str, Path]) -> None:
    """Colour is not the only cue: in shades of grey, the order is the same."""
    for scheme, sign in (("light", -1), ("dark", 1)):
        tab.open(pages["full"], scheme=scheme)
        tones = tab.evaluate(
            "[...document.querySelectorAll('.legend')[0].querySelectorAll('rect')].map(e => getComputedStyle(e).fill)"
        )
        values = [sign * luminance(fill) for fill in tones]
        assert len(values) == len(BOUNDS) + 1
        assert values[1:] == sorted(values[1:])


def test_printed_it_hides_nothing(tab: Page, pages: dict[str, Path]) -> None:
    tab.open(pages["full"])
    height = "document.querySelector('details table').getBoundingClientRect().height"
    visible = "document.querySelector('details table').checkVisibility()"
    assert not tab.evaluate(visible)
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.evaluate(visible)
        assert tab.evaluate(height) > 50
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")


def luminance(colour: str) -> float:
    """The luminance of ``rgb(...)``, as defined by WCAG 2."""
    parts = np.asarray(re.findall(r"[\d.]+", colour)[:3], float) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)
