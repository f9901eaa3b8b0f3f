"""The size of a pixel, as people write it, and areas."""

from __future__ import annotations

import pytest

from fastmrcnn.errors import UserError
from fastmrcnn.page.units import PixelSize, area_unit, parse_pixel_size, shown_area


@pytest.mark.parametrize(
    ("text", "side", "unit"),
    [
        ("0.25um", 0.25, "µm"),
        (" 0,25 \N{MICRO SIGN}m ", 0.25, "µm"),
        ("0.25\N{GREEK SMALL LETTER MU}m", 0.25, "µm"),
        ("0,125 um", 0.125, "µm"),
        ("2.5e2 nm", 250, "nm"),
        ("1mm", 1, "mm"),
        ("10 m", 10, "m"),
    ],
)
def test_sizes(text: str, side: float, unit: str) -> None:
    assert parse_pixel_size(text) == PixelSize(side, unit)


@pytest.mark.parametrize(
    "text", ["0.25", "um", "0um", "-1um", "1 inch", "1e999 m", "1.2.3um", "1,000 um", "nan um"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"such as 0\.25um; units are nm"):
        parse_pixel_size(text)


def test_areas() -> None:
    size = PixelSize(0.25, "µm")
    assert size.area(16) == 1
    assert (area_unit(size), area_unit(None), size.ascii_unit) == ("µm²", "pixels", "um")
    assert [shown_area(pixels, None) for pixels in (0, 7, 12345)] == ["0", "7", "12,345"]
    assert [shown_area(pixels, size) for pixels in (0, 1, 16, 1600, 1598, 10**6)] == [
        "0",
        "0.0625",
        "1.00",
        "100",
        "99.9",
        "62,500",
    ]
    assert shown_area(1, PixelSize(1e-3, "m")) == "1e-06"
