"""Decode images of any kind to what a person would see: 8 bits a channel, RGB, upright."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastmrcnn.data.coco import ImageRecord
from fastmrcnn.errors import UserError

_ORIENTATION = 0x0112  # EXIF tag


def read_image(record: ImageRecord) -> NDArray[np.uint8]:
    """Pixels of a data set's image, (H, W, 3) uint8.

    Raises:
        UserError: the file cannot be decoded, or its size is not the one in the annotations.
    """
    where = f"image {record.image_id} of {record.annotations}"
    pixels, turned = _decode(record.path, f"replace the file or remove {where}")
    height, width = pixels.shape[:2]
    if (height, width) == (record.height, record.width):
        return pixels
    if turned and (width, height) == (record.height, record.width):
        raise UserError(
            f"{record.path}: its EXIF orientation turns it to width {width}, height {height}, but {where} "
            f"gives the size before turning, width {record.width}, height {record.height}; remove the "
            "orientation from the file if it was annotated unturned, or else correct width and height"
        )
    raise UserError(
        f"{record.path}: the file has width {width}, height {height}, but {where} says width "
        f"{record.width}, height {record.height}; correct the annotations or replace the file"
    )


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
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image)), turned
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file; {remedy}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image file that can be read; {remedy}") from None
    except (
        # what Pillow's decoders raise on damaged files
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason}); {remedy}") from None


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bit(np.asarray(image))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose white is unknown")
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
