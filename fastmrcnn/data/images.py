"""Decode images of any kind to what a person would see: 8 bits a channel, RGB, upright."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastmrcnn.data.records import ImageRecord, Problems
from fastmrcnn.errors import UserError

_ORIENTATION = 0x0112  # EXIF tag
_FLOATING_POINT = "its pixels are floating-point numbers, whose white is unknown; save it with 8 or 16 bits"
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


def read_image(record: ImageRecord) -> NDArray[np.uint8]:
    """Pixels of a data set's image, (H, W, 3) uint8.

    Raises:
        UserError: the file cannot be decoded, or its size is not the one in the annotations.
    """
    where = f"image {record.image_id} of {record.annotations}"
    pixels, turned = _decode(record.path, f"replace the file or remove {where}")
    fault = _size_fault(record, pixels.shape[1], pixels.shape[0], turned)
    if fault:
        raise UserError(f"{where}: {fault}")
    return pixels


def check_headers(records: Sequence[ImageRecord], problems: Problems) -> None:
    """Compare the sizes in the files' headers with the annotations; no pixel is decoded."""
    for record in records:
        try:
            with Image.open(record.path) as image:
                turned, (width, height), mode = _turns_sides(image), image.size, image.mode
        except UnidentifiedImageError:
            fault = f"{record.file_name} is not an image file that can be read"
            problems.add("image", record.image_id, fault, "unreadable")
        except _DAMAGE as error:
            problems.add("image", record.image_id, f"{record.file_name}: {_reason(error)}", "damaged")
        else:
            if turned:
                width, height = height, width
            if mode == "F":
                problems.add("image", record.image_id, f"{record.file_name}: {_FLOATING_POINT}", "mode")
            found = _size_fault(record, width, height, turned)
            if found:
                problems.add("image", record.image_id, found, f"size {turned}")


def read_pixels(path: str | Path) -> NDArray[np.uint8]:
    """Pixels of any image file, (H, W, 3) uint8, turned as its EXIF orientation says.

    Grey and palette images become RGB. Transparent pixels are laid on white. 16-bit grey is scaled
    from 0..65535 to 0..255, as a viewer does.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    return _decode(Path(path), "replace the file")[0]


def _decode(path: Path, remedy: str) -> tuple[NDArray[np.uint8], bool]:
    """Pixels, and whether EXIF swapped width and height."""
    try:
        with Image.open(path) as image:
            turned = _turns_sides(image)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image)), turned
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file; {remedy}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image file that can be read; {remedy}") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: cannot be decoded ({_reason(error)}); {remedy}") from None


def _turns_sides(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def _size_fault(record: ImageRecord, width: int, height: int, turned: bool) -> str | None:
    """How the size of the upright image differs from the annotations, and what to do."""
    if (width, height) == (record.width, record.height):
        return None
    given = f"the annotations say width {record.width}, height {record.height}"
    if turned and (height, width) == (record.width, record.height):
        return (
            f"{record.file_name} is turned by its EXIF orientation to width {width}, height {height}, but "
            f"{given}, as before turning; remove the orientation from the file if it was annotated so, or "
            "else annotate it upright"
        )
    return (
        f"{record.file_name} has width {width}, height {height}, but {given}; perhaps it was resized "
        "after it was annotated"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an upright image of any mode, (H, W, 3) uint8. Raises ValueError for floating point."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bit(np.asarray(image))
    if image.mode == "F":
        raise ValueError(_FLOATING_POINT)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, coloured)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bit(grey: NDArray[np.integer]) -> NDArray[np.uint8]:
    wide = grey.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError(f"its pixels range over {wide.min()}..{wide.max()}, more than 16 bits")
    byte = ((wide + 128) // 257).astype(np.uint8)
    return np.repeat(byte[:, :, None], 3, axis=2)


def rgb_pixels(image: str | Path | NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB of whatever `predict` takes."""
    if isinstance(image, str | Path):
        return read_pixels(image)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"pixels must be (h, w, 3) or (h, w) uint8, got {image.shape} {image.dtype}")
    return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
