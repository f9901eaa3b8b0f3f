"""JPEG files as most cameras and programs write them, straight from libjpeg-turbo into an array.

Pillow decodes with the same library, and copies twice on its way to an array. What is not plain here (more
than 8 bits, CMYK, arithmetic coding, turned by EXIF, damaged) is left to Pillow, and with it what is said of
it. The pixels are the same: both take the accurate transform and smooth chroma.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = 0x0112  # EXIF tag
START = b"\xff\xd8\xff"
_HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # all kinds; the three are tables
_APP1, _SCAN = 0xE1, 0xDA
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/"


class PlainJpeg(NamedTuple):
    height: int
    width: int


def decode_plain(
    source: Path | bytes, max_pixels: int, memory: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8] | None:
    """Pixels of a plain JPEG, (H, W, 3) uint8 RGB; None: it is none, or simplejpeg is not there.

    Args:
        source: a file, or what stands in one.
        max_pixels: larger ones are not decoded either.
        memory: flat; the pixels are put at its beginning, if it is large enough.
    """
    library = _library()
    content = _content(source) if library is not None else None
    plain = None if content is None else plain_jpeg(content)
    if library is None or plain is None or plain.height * plain.width > max_pixels:
        return None
    size = 3 * plain.height * plain.width
    room = memory[:size] if memory is not None and memory.size >= size else None
    try:
        pixels: NDArray[np.uint8] = library.decode_jpeg(content, colorspace="RGB", buffer=room)
    except ValueError:  # also on what libjpeg only warns of
        return None
    return pixels if pixels.shape == (plain.height, plain.width, 3) else None


def plain_jpeg(content: bytes) -> PlainJpeg | None:
    """Size of a JPEG of 8 bits, grey or of three colours, Huffman-coded and upright, by what stands before
    its pixels; None of anything else."""
    found: PlainJpeg | None = None
    try:
        for marker, segment in _segments(content):
            if marker in _FRAMES:
                bits, height, width, channels = struct.unpack_from(">BHHB", segment)
                plain = marker in _HUFFMAN and bits == 8 and channels in (1, 3) and height * width > 0
                if found or not plain:
                    return None
                found = PlainJpeg(height, width)
            elif marker == _APP1 and _may_be_turned(segment):
                return None
            elif marker == _SCAN:
                return found
    except struct.error:
        return None
    return None


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with what they carry, up to the first that carries nothing or is not where it should be."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # one of several that fill up
            place += 1
            continue
        length = int.from_bytes(content[place + 2 : place + 4], "big")
        if marker in (0x00, 0x01, 0xD8, 0xD9) or 0xD0 <= marker <= 0xD7 or length < 2:
            return
        yield marker, content[place + 4 : place + 2 + length]
        place += 2 + length


def _may_be_turned(segment: bytes) -> bool:
    """Whether metadata may give another orientation than upright, where Pillow looks for one."""
    if segment.startswith(_XMP):
        return b"Orientation" in segment
    if not segment.startswith(_EXIF):
        return False
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ORIENTATION, 1) != 1
    except Exception:  # whatever Pillow may think of it
        return True


def _content(source: Path | bytes) -> bytes | None:
    """All of it, if it begins as a JPEG."""
    if isinstance(source, bytes):
        return source if source.startswith(START) else None
    try:
        with open(source, "rb", buffering=0) as stream:
            if stream.read(len(START)) != START:
                return None
            stream.seek(0)
            return stream.readall()
    except OSError:
        return None


@functools.cache
def _library() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
