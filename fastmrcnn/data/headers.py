"""What image files are, told by their headers: no pixel is decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageFile

from fastmrcnn.data.depth import CHANNELS, HEIGHT, WIDTH, Depth, depth_of
from fastmrcnn.data.images import SIDES_SWAPPED, WITH_ALPHA, ImageError, opened, size_fault
from fastmrcnn.data.jpeg import ORIENTATION
from fastmrcnn.data.records import ImageRecord, Problems


class Header(NamedTuple):
    """What is known of an image file before it is decoded."""

    size: tuple[int, int]
    """Width and height, once it is upright."""
    swapped: bool
    """EXIF swaps width and height."""
    turned: bool
    """EXIF turns or mirrors it."""
    pages: bool
    """It has several, of which the first is read."""
    alpha: bool
    extra_channels: bool
    """It has some beside colour and alpha, which are not read."""
    depth: Depth | None
    """None: 8 bits a channel, or fewer."""


def read_header(path: Path, max_pixels: int) -> Header:
    """Look at an image file without decoding it. Raises ImageError."""
    with opened(path, max_pixels) as image:
        depth = depth_of(image)
        orientation = _orientation(path, image)
        swapped = orientation in SIDES_SWAPPED
        tags, (width, height) = getattr(image, "tag_v2", {}), image.size
        done = (width, height) != (tags.get(WIDTH, width), tags.get(HEIGHT, height))  # newer Pillows, in TIFF
        return Header(
            size=(height, width) if swapped and not done else (width, height),
            swapped=swapped,
            turned=orientation in range(2, 9),
            pages=bool(getattr(image, "is_animated", False)),
            alpha=image.mode in WITH_ALPHA or "transparency" in image.info,
            extra_channels=tags.get(CHANNELS, 1) > len(image.getbands()),
            depth=depth,
        )


def check_headers(records: Iterable[ImageRecord], problems: Problems) -> list[tuple[ImageRecord, Header]]:
    """Compare the sizes in the files' headers with the annotations; no pixel is decoded.

    Returns:
        The headers that could be read.
    """
    headers = []
    for record in records:
        try:
            header = read_header(record.path, record.reading.max_pixels)
        except ImageError as fault:
            told = {
                "missing": f"{record.file_name} is gone",
                "unreadable": f"{record.file_name} is not an image file that can be read{fault}",
                "large": f"{record.file_name} {fault}",
            }
            problems.add(
                "image", record.image_id, told.get(fault.kind, f"{record.file_name}: {fault}"), fault.kind
            )
            continue
        found = size_fault(record, *header.size, header.swapped)
        if found:
            problems.add("image", record.image_id, found, f"size {header.swapped}")
        headers.append((record, header))
    return headers


def _orientation(path: Path, image: ImageFile.ImageFile) -> Any:
    """EXIF's, whatever a file may give as such, of an image that need not be decoded for it.

    Pillow decodes a PNG to find what comes after its pixels; that is done only if something does, or if the
    file is damaged.
    """
    if image.format == "PNG" and _is_plain_png(path):
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    return image.getexif().get(ORIENTATION, 1)


def _is_plain_png(path: Path) -> bool:
    """Whether a PNG is whole by its checksums, and has no EXIF or text behind its first pixels."""
    pixels = False
    with path.open("rb") as stream:
        stream.seek(8)
        while len(start := stream.read(8)) == 8:
            length, name = struct.unpack(">I4s", start)
            content, checksum = stream.read(length), stream.read(4)
            if zlib.crc32(name + content).to_bytes(4, "big") != checksum:
                return False
            if pixels and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return False
            if name == b"IEND":
                return True
            pixels = pixels or name == b"IDAT"
    return False
