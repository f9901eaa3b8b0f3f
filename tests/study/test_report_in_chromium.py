"""The report in a browser: nothing sticks out, every picture is there, nothing is asked of a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium, programs, requested, resize
from made_up_runs import made_up_report

pytestmark = pytest.mark.slow

STICKING_OUT = """
    const wide = window.innerWidth;
    return [...document.querySelectorAll("main *")].filter(one => {
        const box = one.getBoundingClientRect();
        return !one.closest(".wide") && (box.right > wide + 1 || box.left < -1);
    }).map(one => one.outerHTML.slice(0, 80));
"""
BROKEN = "return [...document.images].filter(one => !one.complete || one.naturalWidth === 0).length"
COLOURS = """
    const style = getComputedStyle(document.body);
    return [style.color, style.backgroundColor];
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    programs()
    with chromium(tmp_path_factory.mktemp("browser")) as window:
        yield window


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, window: Any) -> Path:
    return made_up_report(tmp_path_factory.mktemp("report"))


def brightness(colour: str) -> float:
    """Of rgb(r, g, b), 0..255."""
    numbers = [float(word) for word in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 3


@pytest.mark.parametrize("name", ["report.html", "report.zh.html"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_is_whole(window: Any, folder: Path, name: str, width: int, dark: bool) -> None:
    resize(window, width, 900, dark=dark)
    requested(window)
    window.get((folder / name).as_uri())
    assert window.execute_script("return document.documentElement.scrollWidth") <= width
    assert window.execute_script(STICKING_OUT) == []
    assert window.execute_script("return document.images.length") > 10
    assert window.execute_script(BROKEN) == 0
    text, page = (brightness(colour) for colour in window.execute_script(COLOURS))
    assert abs(text - page) > 128
    assert (page < text) == dark
    assert all(address.startswith(("file:", "data:", "blob:")) for address in requested(window))
    tables = window.find_elements("css selector", ".wide table")
    assert tables
    heights = {cell.size["height"] for cell in tables[0].find_elements("css selector", "th")}
    assert len(heights) == 1  # no cell of a head is broken into lines


def test_what_the_page_shows_is_not_one_colour(window: Any, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    resize(window, 1280, 900)
    window.get((folder / "report.html").as_uri())
    window.execute_script("document.images[0].scrollIntoView({block: 'center'})")
    picture = tmp_path / "page.png"
    window.save_screenshot(str(picture))
    with Image.open(picture) as shot:
        colours = shot.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 50
