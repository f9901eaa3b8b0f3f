"""Which of an image's numbers are black and white, where 8 bits do not say it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PixelRange = tuple[float, float]
"""The values of black and of white. Those beyond it are clipped."""

FULL: PixelRange = (0, 65535)  # of 16 bits
MAX_PIXELS = 178_956_970  # beyond which Pillow refuses an image of its own accord
_WHITES = [2**bits - 1 for bits in range(8, 33, 2)]  # 255, 1023, 4095, 16383, 65535 ...
_NEARLY_BLACK = 16  # images whose brightest value is below it would be black in 0..255
_SMALL_PART = 4  # values that stay within a quarter of the range are told


class Reading(NamedTuple):
    """How image files become pixels."""

    pixel_range: PixelRange | None = None
    """Of images that are not 8-bit; None: 0..65535, and floating point is refused."""
    max_pixels: int = MAX_PIXELS
    """Larger images are refused."""


AS_IT_IS = Reading()  # 16 bits as 0..65535


class Extent(NamedTuple):
    """Of the finite values of an image."""

    least: float
    most: float
    kind: str
    """Such as "16-bit", for messages."""
    floating: bool


class RangeNote(NamedTuple):
    """That an image does not fit the range with which it is read."""

    clipped: bool
    """It reaches beyond it; else it is a small part of it."""
    text: str


def extent_of(values: NDArray[Any], kind: str) -> Extent:
    """Of (H, W), or (H, W, C) whose fourth channel is alpha; (0, 0) if no value is finite."""
    values = values[:, :, :3] if values.ndim == 3 else values
    floating = values.dtype.kind == "f"
    if floating:
        values = values[np.isfinite(values)]
    if not values.size:
        return Extent(0, 0, kind, floating)
    return Extent(float(values.min()), float(values.max()), kind, floating)


def choose_range(sample: Sequence[Extent]) -> PixelRange:
    """The range that images are meant in, judged by some of them.

    0..1 for floating point within it; else the smallest of 0..255, 0..1023, 0..4095 ... that holds them;
    else, for negative values and those that would be nearly black in 0..255, from the least to the most.
    """
    least, most = min(one.least for one in sample), max(one.most for one in sample)
    if all(one.floating for one in sample) and least >= 0 and most <= 1:
        return (0, 1)
    white = next((white for white in _WHITES if most <= white), None)
    if least < 0 or white is None or _NEARLY_BLACK > most > least:
        return (least, most) if most > least else (least, least + 1)
    return (0, white)


def to_bytes(values: NDArray[Any], pixel_range: PixelRange) -> NDArray[np.uint8]:
    """Black becomes 0, white 255, what is beyond them and what is not finite is clipped; NaN is black."""
    low, high = pixel_range
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return _table(low, high)[values]
    return _scaled(values.astype(np.float64), low, high)


@functools.lru_cache(maxsize=4)
def _table(low: float, high: float) -> NDArray[np.uint8]:
    return _scaled(np.arange(65536, dtype=np.float64), low, high)


def _scaled(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    finite = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    return ((finite - low) * 255 / (high - low) + 0.5).astype(np.uint8)


def shown(pixel_range: PixelRange) -> str:
    """As 0..4095."""
    return "..".join(f"{value:.6g}" if value % 1 else f"{value:.0f}" for value in pixel_range)


def range_note(extent: Extent, chosen: PixelRange | None) -> RangeNote | None:
    """What to say of an image that was read with a range, or without one as 0..65535; None if it fits."""
    low, high = chosen or FULL
    values = f"{extent.kind} values {shown((extent.least, extent.most))}"
    if extent.least < low or extent.most > high:
        return RangeNote(True, f"{values} reach beyond {shown((low, high))} and are clipped")
    if (extent.most - low) * _SMALL_PART <= high - low:
        dark = f"{values} are read as {shown((low, high))}, of which they are a small, dark part"
        return RangeNote(False, dark)
    return None


def clipped_line(notes: Collection[str]) -> str:
    """Of images whose values were clipped while a loader ran, of each such a note."""
    first = next(iter(notes))
    others = f" (one of {len(notes)} such images)" if len(notes) > 1 else ""
    return f"{first}{others}; data.pixel_range=[black, white] sets the range"


def note_lines(notes: Sequence[tuple[str, RangeNote]]) -> list[str]:
    """A line for each kind of note, from those of images by name."""
    lines = []
    for clipped in (True, False):
        some = [(name, note.text) for name, note in notes if note.clipped == clipped]
        if some:
            others = f" (one of {len(some)} such images)" if len(some) > 1 else ""
            lines.append(f"{some[0][0]}: {some[0][1]}{others}")
    return lines
