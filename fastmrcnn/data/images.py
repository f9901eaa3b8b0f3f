"""Decode images of any kind to what a person would see: 8 bits a channel, RGB, upright."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fastmrcnn.data.depth import depth_of, grey_numbers, read_numbers
from fastmrcnn.data.jpeg import ORIENTATION, decode_plain
from fastmrcnn.data.pixel_range import (
    AS_IT_IS,
    FULL,
    Extent,
    PixelRange,
    RangeNote,
    Reading,
    extent_of,
    range_note,
    to_bytes,
)
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.errors import UserError

SIDES_SWAPPED = (5, 6, 7, 8)
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
SIZE_SLACK = 1  # pixels by which an image's sides may differ from the annotations: Roboflow rounds them so
FLOATING_POINT = (
    "its pixels are floating-point numbers, whose white is unknown; save it with 8 or 16 bits, or train with "
    "data.pixel_range=[black, white]"
)
_DAMAGE = (  # what Pillow's decoders raise on damaged files
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_pillow_limit = threading.Lock()


class ImageError(Exception):
    """Why an image file cannot be used. Its kind: missing, unreadable, damaged or large."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Decoded(NamedTuple):
    pixels: NDArray[np.uint8]  # (H, W, 3)
    swapped: bool  # EXIF swapped width and height
    extent: Extent | None  # of the values of a file that is not 8-bit


def read_image(
    record: ImageRecord, memory: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.uint8], RangeNote | None]:
    """Pixels of a data set's image, (H, W, 3) uint8, and what there is to say of their values.

    If it is a pixel larger or smaller than the annotations say, as some programs round, its last row or
    column is cut off or repeated.

    Args:
        memory: flat; the pixels may be put at its beginning, to save a copy.
    Raises:
        UserError: the file cannot be decoded, or its size is not the one in the annotations.
    """
    where = f"image {record.image_id} of {record.annotations}"
    decoded = _decode(record.path, record.reading, f"replace the file or remove {where}", memory)
    fault = size_fault(record, decoded.pixels.shape[1], decoded.pixels.shape[0], decoded.swapped)
    if fault:
        raise UserError(f"{where}: {fault}")
    return fitted(decoded.pixels, record.height, record.width), _range_note(decoded, record.reading)


def nearly(size: tuple[int, int], given: tuple[Any, Any]) -> bool:
    """Whether sides are what an annotation file says, a pixel more or less."""
    return all(
        type(stated) is int and abs(side - stated) <= SIZE_SLACK
        for side, stated in zip(size, given, strict=True)
    )


def fitted(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3): what is too much is cut off, and for the rest the last row and column repeated."""
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    missing = (max(height - rows, 0), max(width - columns, 0))
    return np.pad(pixels[:height, :width], [(0, missing[0]), (0, missing[1]), (0, 0)], mode="edge")


def read_pixels(path: str | Path, reading: Reading = AS_IT_IS) -> NDArray[np.uint8]:
    """Pixels of any image file, (H, W, 3) uint8, turned as its EXIF orientation says.

    Grey and palette images become RGB. Transparent pixels are laid on white. What is not 8-bit is scaled
    from `reading.pixel_range`, without one from 0..65535, to 0..255; a warning tells of values that reach
    beyond it, or that are dark in it.

    Raises:
        UserError: the file is missing, too large, or cannot be decoded.
    """
    pixels, note = read_noted(path, reading)
    if note is not None:
        warnings.warn(f"{path}: {note.text}", stacklevel=2)
    return pixels


def read_noted(path: str | Path, reading: Reading = AS_IT_IS) -> tuple[NDArray[np.uint8], RangeNote | None]:
    """As `read_pixels`, but what it warns of is returned; None: nothing."""
    decoded = _decode(Path(path), reading, "replace the file")
    return decoded.pixels, _range_note(decoded, reading)


def decode_noted(
    content: bytes, reading: Reading = AS_IT_IS, formats: tuple[str, ...] | None = None
) -> tuple[NDArray[np.uint8], RangeNote | None]:
    """As `read_noted`, of what stands in a file.

    Args:
        formats: those of Pillow's that are tried; None: all.
    Raises:
        ImageError: it is none of these, too large, or cannot be decoded.
    """
    decoded = _decoded(content, reading, formats)
    return decoded.pixels, _range_note(decoded, reading)


def read_extent(path: Path, max_pixels: int) -> Extent | None:
    """Of the values of an image; None if they fit into 8 bits. Raises ImageError."""
    with opened(path, max_pixels) as image:
        depth = depth_of(image)
        if depth is None:
            return None
        with opened(path, max_pixels) as again:
            return extent_of(read_numbers(image, again, depth), depth.kind)


@contextlib.contextmanager
def opened(
    source: Path | bytes, max_pixels: int, formats: tuple[str, ...] | None = None
) -> Iterator[ImageFile.ImageFile]:
    """The open image, not decoded yet. What goes wrong in the block too is an ImageError.

    Pillow's own limit of pixels, an error and before it a warning, is not in effect.

    Args:
        source: a file, or what stands in one.
        formats: those of Pillow's that are tried; None: all.
    """
    try:
        with _pillow_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(_stream(source), formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    "large",
                    f"has {width} x {height} = {width * height:,} pixels, more than data.max_pixels = "
                    f"{max_pixels:,}; cut it into tiles, or set data.max_pixels={width * height} "
                    f"(of predict: --max-pixels {width * height})",
                )
            yield image
    except FileNotFoundError:
        raise ImageError("missing") from None
    except UnidentifiedImageError:
        raise ImageError("unreadable", _unread_tiff(source)) from None
    except _DAMAGE as error:
        raise ImageError("damaged", " ".join(str(error).split()) or type(error).__name__) from None


def _decode(path: Path, reading: Reading, remedy: str, memory: NDArray[np.uint8] | None = None) -> Decoded:
    try:
        return _decoded(path, reading, memory=memory)
    except ImageError as fault:
        told = {
            "missing": f"no such image file; {remedy}",
            "unreadable": f"not an image file that can be read{fault}; {remedy}",
            "damaged": f"cannot be decoded ({fault}); {remedy}",
        }
        raise UserError(f"{path}: {told.get(fault.kind, str(fault))}") from None


def _decoded(
    source: Path | bytes,
    reading: Reading,
    formats: tuple[str, ...] | None = None,
    memory: NDArray[np.uint8] | None = None,
) -> Decoded:
    if formats is None or "JPEG" in formats:
        plain = decode_plain(source, reading.max_pixels, memory)
        if plain is not None:
            return Decoded(plain, False, None)
    with opened(source, reading.max_pixels, formats) as image:
        depth = depth_of(image)  # first: on looking for an orientation Pillow decodes a PNG
        swapped = image.getexif().get(ORIENTATION, 1) in SIDES_SWAPPED
        if depth is None or (depth.kind == "signed 8-bit" and reading.pixel_range is None):
            image.load()
            return Decoded(to_rgb(ImageOps.exif_transpose(image)), swapped, None)
        if depth.colour and reading.pixel_range in (None, FULL):  # the upper half of the bits will do
            image.load()
            pixels = to_rgb(ImageOps.exif_transpose(image))
            extent = Extent(int(pixels.min()) << 8, int(pixels.max()) << 8 | 255, depth.kind, False)
            return Decoded(pixels, swapped, extent)
        with opened(source, reading.max_pixels, formats) as again:
            numbers = read_numbers(image, again, depth)
        return Decoded(_scaled(numbers, reading.pixel_range), swapped, extent_of(numbers, depth.kind))


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _unread_tiff(source: Path | bytes) -> str:
    with contextlib.suppress(OSError):
        start = source[:4] if isinstance(source, bytes) else _start(source)
        if start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return " (a TIFF whose channels, bits or compression Pillow does not know)"
    return ""


def _start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(4)


def size_fault(record: ImageRecord, width: int, height: int, swapped: bool) -> str | None:
    """How the size of the upright image differs from the annotations beyond rounding, and what to do."""
    if (width, height) == (record.width, record.height):
        return None
    given = f"the annotations say width {record.width}, height {record.height}"
    if swapped and (height, width) == (record.width, record.height):
        return (
            f"{record.file_name} is turned by its EXIF orientation to width {width}, height {height}, but "
            f"{given}, as before turning; remove the orientation from the file if it was annotated so, or "
            "else annotate it upright"
        )
    if nearly((width, height), (record.width, record.height)):
        return None
    return (
        f"{record.file_name} has width {width}, height {height}, but {given}; perhaps it was resized "
        "after it was annotated"
    )


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an upright 8-bit image of any mode, (H, W, 3) uint8."""
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, coloured)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _range_note(decoded: Decoded, reading: Reading) -> RangeNote | None:
    return None if decoded.extent is None else range_note(decoded.extent, reading.pixel_range)


def _scaled(numbers: NDArray[Any], pixel_range: PixelRange | None) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image that is not 8-bit. Raises ValueError if its range is not known."""
    if pixel_range is None:
        if numbers.dtype.kind == "f":
            raise ValueError(FLOATING_POINT)
        if numbers.min() < FULL[0] or numbers.max() > FULL[1]:
            raise ValueError(f"its pixels range over {numbers.min()}..{numbers.max()}, more than 16 bits")
    scaled = to_bytes(numbers, pixel_range or FULL)
    if scaled.ndim == 2:
        return np.repeat(scaled[:, :, None], 3, axis=2)
    if scaled.shape[2] == 4:
        scaled[:, :, 3] = to_bytes(numbers[:, :, 3], FULL)  # opaque is opaque in any range
        return to_rgb(Image.fromarray(scaled))
    return scaled


def rgb_pixels(
    image: str | Path | NDArray[np.uint8] | Image.Image, reading: Reading = AS_IT_IS
) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB of whatever `predict` takes."""
    if isinstance(image, str | Path):
        return read_pixels(image, reading)
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        if upright.mode != "F" and not upright.mode.startswith("I"):
            return to_rgb(upright)
        numbers = grey_numbers(upright)
        kind = "floating-point" if upright.mode == "F" else "16-bit" if numbers.itemsize == 2 else "32-bit"
        note = range_note(extent_of(numbers, kind), reading.pixel_range)
        if note is not None:
            warnings.warn(f"the image's {note.text}", stacklevel=2)
        return _scaled(numbers, reading.pixel_range)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"pixels must be (h, w, 3) or (h, w) uint8, got {image.shape} {image.dtype}")
    return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
