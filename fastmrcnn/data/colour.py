"""Random changes of colour, on uint8 RGB."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601, as Pillow's and torchvision's grey
_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


class Colour(NamedTuple):
    """Factors, and a share of a whole turn; applied in this order."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def colour_matrix(colour: Colour, mean: float) -> NDArray[np.float64]:
    """(3, 4), for columns (red, green, blue, 1) of values in 0..255: all four changes in one.

    Brightness scales, contrast scales about the mean of the brightened image, saturation scales the
    distance to grey (of equal luma), and hue turns the plane of I and Q about the axis of greys in YIQ. That
    is no turn of HSV's hue: it is linear, keeps the luma, and so can be one matrix with the others. What
    falls out of 0..255 is cut off once, at the end.

    Args:
        mean: of all values of the image, in 0..255.
    """
    scale = colour.brightness * colour.contrast
    shift = colour.brightness * mean * (1 - colour.contrast)
    angle = 2 * math.pi * colour.hue
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    hue = np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ if colour.hue else np.eye(3)
    grey = np.tile(LUMA, (3, 1))
    chroma = hue @ (grey + colour.saturation * (np.eye(3) - grey))
    return np.concatenate([scale * chroma, shift * chroma.sum(axis=1, keepdims=True)], axis=1)


def recolour(image: Image.Image, colour: Colour) -> Image.Image:
    """The image with other colours, rounded to the nearest; itself if nothing changes."""
    if colour == Colour():
        return image
    if colour.saturation == 1 and colour.hue == 0:  # each channel by itself: a table
        mean = colour.brightness * np.asarray(image).mean()
        levels = np.arange(256) * colour.brightness
        table = np.clip((levels - mean) * colour.contrast + mean + 0.5, 0, 255).astype(np.uint8)
        return image.point(table.tolist() * 3)
    matrix = colour_matrix(colour, sum(ImageStat.Stat(image).mean) / 3)
    return image.convert("RGB", tuple(matrix.ravel().tolist()))
