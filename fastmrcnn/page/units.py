"""The size of a pixel, and areas in square micrometres and the like."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fastmrcnn.errors import UserError

# As they are typed, and as they are shown. There are two signs for micro in Unicode.
UNITS = {"nm": "nm", "um": "µm", "µm": "µm", "μm": "µm", "mm": "mm", "cm": "cm", "m": "m", "km": "km"}
_THOUSAND = re.compile(r"[1-9]\d*,\d{3}")  # or one and a decimal comma: there is no telling
_FORM = re.compile(r"\s*([\d.,]+(?:[eE][+-]?\d+)?)\s*(\S+)\s*")


class PixelSize(NamedTuple):
    """Side of a pixel."""

    side: float
    unit: str  # as shown

    @property
    def ascii_unit(self) -> str:
        """For the head of a table that programs read."""
        return self.unit.replace("µ", "u")

    def area(self, pixels: float) -> float:
        """Of a number of pixels, in the unit's square."""
        return pixels * self.side * self.side


def parse_pixel_size(text: str) -> PixelSize:
    """`0.25um`, `0.25 µm`, `0,25 um`.

    Raises:
        UserError: it is not a number above 0 and a unit.
    """
    found = _FORM.fullmatch(text)
    unit = UNITS.get(found[2]) if found and not _THOUSAND.fullmatch(found[1]) else None
    try:
        side = float(found[1].replace(",", ".")) if found else math.nan
    except ValueError:
        side = math.nan
    if unit is None or not 0 < side < math.inf:
        raise UserError(
            f"pixel size {text.strip()!r}: give a number above 0 and a unit, such as 0.25um; "
            "units are nm, um, mm, cm, m and km"
        )
    return PixelSize(side, unit)


def area_unit(size: PixelSize | None) -> str:
    return "pixels" if size is None else f"{size.unit}²"


def shown_area(pixels: float, size: PixelSize | None) -> str:
    """A number of pixels, or the area that they cover, for people: at least three figures that count."""
    if size is None:
        return f"{pixels:,.0f}"
    area = size.area(pixels)
    if area >= 1000 or area == 0:
        return f"{area:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(area)))
    return f"{area:.{digits}f}" if area >= 1e-3 else f"{area:.3g}"
