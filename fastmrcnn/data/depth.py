"""The numbers in image files whose values do not fit into 8 bits."""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

# TIFF tags
WIDTH, HEIGHT, BITS, CHANNELS, PLANES, FORMAT = 256, 257, 258, 277, 284, 339
_SIGNED = 2  # of FORMAT
_SEPARATE = 2  # of PLANES

# How Pillow's decoders are told to take the upper half of 16 bits, and how they are made to take the lower:
# as if the two bytes came in the other order. N is a little-endian machine's, or a big-endian one's, order.
_COLOUR = re.compile(r"(RGBX?|RGBA);16([BLN])")
_OTHER_HALF = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


class Depth(NamedTuple):
    kind: str
    """For messages."""
    colour: bool = False
    """16 bits a channel, of which Pillow gives the upper 8."""


def depth_of(image: Image.Image) -> Depth | None:
    """What an image that was opened and not yet decoded holds; None: 8 bits a channel, or fewer.

    Raises:
        ValueError: Pillow would read other numbers than those that are there.
    """
    tags = getattr(image, "tag_v2", {})
    bits, signed = _first(tags.get(BITS, 8)), _first(tags.get(FORMAT, 1)) == _SIGNED
    rawmode = _rawmode(image)
    if tags.get(PLANES) == _SEPARATE and bits > 8 and tags.get(CHANNELS, 1) > 1:
        raise ValueError(
            f"its channels of {bits} bits lie one after the other, which Pillow misreads; save it interleaved"
        )
    if image.mode == "F":
        return Depth("floating-point")
    if image.mode.startswith("I;16"):
        return Depth("16-bit")
    if image.mode == "I":
        return Depth("signed 16-bit" if bits == 16 else "16-bit" if image.format == "PPM" else "32-bit")
    if image.mode == "L" and bits == 8 and signed:
        return Depth("signed 8-bit")
    if rawmode == "LA;16B" or _COLOUR.fullmatch(rawmode):
        return Depth("16-bit", colour=True)
    return None


def grey_numbers(image: Image.Image) -> NDArray[Any]:
    """(H, W) of an upright grey image, in the type that the file has."""
    numbers = np.asarray(image)
    if image.mode.startswith("I;16"):
        return numbers.astype(np.uint16, copy=False)  # in this machine's byte order
    return numbers


def read_numbers(image: Image.Image, again: ImageFile.ImageFile, depth: Depth) -> NDArray[Any]:
    """The numbers of an image, upright: (H, W), or (H, W, 3 or 4) in colour.

    Args:
        image: opened.
        again: the same, opened a second time and not decoded.
    """
    tags = getattr(image, "tag_v2", {})
    bits, signed = _first(tags.get(BITS, 8)), _first(tags.get(FORMAT, 1)) == _SIGNED
    if not depth.colour:
        numbers = grey_numbers(_upright(image))
        if image.mode == "L":
            return numbers.view(np.int8)
        if image.mode == "I" and bits == 32 and not signed:
            return np.ascontiguousarray(numbers).view(np.uint32)
        return numbers
    if _rawmode(again) == "LA;16B":  # read as if its four bytes a pixel were four channels
        again.tile = [_with_rawmode(tile, "RGBA") for tile in again.tile]
        grey_alpha = np.asarray(_upright(again)).view(">u2").astype(np.uint16)
        return grey_alpha[:, :, [0, 0, 0, 1]]
    lower = _COLOUR.sub(lambda found: f"{found[1]};16{_OTHER_HALF[found[2]]}", _rawmode(again))
    again.tile = [_with_rawmode(tile, lower) for tile in again.tile]
    high, low = np.asarray(_upright(image)), np.asarray(_upright(again))
    return high.astype(np.uint16) << 8 | low


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image)


def _rawmode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return found if isinstance(found, str) else ""


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    codec, extents, offset, arguments = tile
    rest = arguments[1:] if isinstance(arguments, tuple) else None
    return type(tile)(codec, extents, offset, rawmode if rest is None else (rawmode, *rest))


def _first(value: Any) -> int:
    return int(value[0]) if isinstance(value, tuple) else int(value)
