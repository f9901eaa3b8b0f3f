"""What the Python interface takes, and one line for what it does not take."""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded

ImageLike: TypeAlias = str | Path | NDArray[np.uint8] | Image.Image | Tensor
_IMAGES = "a file, a Pillow image, uint8 pixels (h, w, 3) in RGB or (h, w) in grey, or a list of such"


def checked_path(path: Any, name: str) -> Path:
    """A path, `~` in it expanded. Raises ValueError for anything else; `name` is the argument's."""
    if not isinstance(path, str | os.PathLike) or not (text := os.fspath(path)) or not isinstance(text, str):
        raise ValueError(f"{name} must be text or a Path, got {_shown(path)}")
    return expanded(text)


def checked_score(score: Any) -> float:
    """A number in 0..1, as a float. Raises ValueError."""
    number = isinstance(score, numbers.Real) and not isinstance(score, bool)
    if not number or not 0 <= score <= 1:
        percent = number and 1 < score <= 100 and math.isfinite(score)
        hint = f"; {score:g} % are {score / 100:g}" if percent else ""
        raise ValueError(f"score must be a number in 0..1, got {_shown(score)}{hint}")
    return float(score)


def checked_batch(batch: Any) -> int:
    """A whole number above 0. Raises ValueError."""
    if not isinstance(batch, numbers.Integral) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch must be a whole number above 0, got {_shown(batch)}")
    return int(batch)


def checked_image(image: Any, name: str = "image") -> Path | NDArray[np.uint8] | Image.Image:
    """A file, uint8 pixels (h, w, 3) or (h, w), or a Pillow image.

    Raises:
        ValueError: something else, or no pixel; `name` is the argument's.
        UserError: a folder.
    """
    if isinstance(image, str | os.PathLike):
        path = checked_path(image, name)
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the files in it as a list")
        return path
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{name} has no pixel: width {image.width}, height {image.height}")
        return image
    if isinstance(image, Tensor):
        if image.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got a tensor on {image.device}; use image.cpu()")
        if image.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {image.layout}")
        _check_pixels(tuple(image.shape), str(image.dtype).removeprefix("torch."), name)
        return image.detach().numpy()
    if isinstance(image, np.ndarray):
        _check_pixels(image.shape, str(image.dtype), name)
        return np.asarray(image)
    hint = "; decode it with PIL.Image.open(io.BytesIO(...))" if isinstance(image, bytes | bytearray) else ""
    raise ValueError(f"{name} must be {_IMAGES}, got {_shown(image)}{hint}")


def _check_pixels(shape: tuple[int, ...], dtype: str, name: str) -> None:
    colours = len(shape) == 3 and shape[2] == 3
    if dtype == "uint8" and (len(shape) == 2 or colours) and 0 not in shape:
        return
    hint = ""
    if 0 in shape:
        hint = "; there is no pixel in it"
    elif len(shape) == 4:
        hint = "; give several images as a list"
    elif len(shape) == 3 and shape[2] == 4:
        hint = "; leave transparency out, [:, :, :3], or give a Pillow image, which is laid on white"
    elif len(shape) == 3 and shape[2] == 1:
        hint = "; leave the last axis out, [:, :, 0]"
    elif len(shape) == 3 and not colours and shape[0] in (1, 3, 4):
        hint = "; colours come last: transpose it to (h, w, 3)"
    elif dtype.startswith(("float", "bfloat")):
        hint = "; scale white to 255 and convert to uint8"
    raise ValueError(f"{name}: pixels must be (h, w, 3) or (h, w) uint8, got {shape} {dtype}{hint}")


def _shown(value: Any) -> str:
    """Itself if that is short, else what it is."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
