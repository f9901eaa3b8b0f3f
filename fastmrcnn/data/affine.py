"""Affine maps of images, boxes and keypoints: (2, 3) or (3, 3) for columns (x, y, 1).

Coordinates are continuous with pixel edges at integers: pixel i covers [i, i + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def moves(
    h: int,
    w: int,
    turns: int,
    flip_horizontal: bool,
    flip_vertical: bool,
    rotation: float,
    corner: tuple[int, int],
) -> NDArray[np.float64]:
    """(3, 3), from pixels of an image of height h and width w to those of what becomes of it.

    Args:
        turns: quarter turns counterclockwise, which come first.
        rotation: degrees counterclockwise about the centre, after the flips.
        corner: left and top of a crop, which comes last.
    """
    matrix = np.eye(3)
    for _ in range(turns % 4):  # (x, y) -> (y, w - x)
        matrix = np.array([[0.0, 1, 0], [-1, 0, w], [0, 0, 1]]) @ matrix
        h, w = w, h
    if flip_horizontal:
        matrix = np.array([[-1.0, 0, w], [0, 1, 0], [0, 0, 1]]) @ matrix
    if flip_vertical:
        matrix = np.array([[1.0, 0, 0], [0, -1, h], [0, 0, 1]]) @ matrix
    if rotation:  # y points down: counterclockwise to the eye
        cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        x, y = w / 2, h / 2
        turn = np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y], [0, 0, 1]])
        matrix = turn @ matrix
    if corner != (0, 0):
        matrix = np.array([[1.0, 0, -corner[0]], [0, 1, -corner[1]], [0, 0, 1]]) @ matrix
    return matrix


def transform_boxes(boxes: NDArray[np.floating], affine: NDArray[np.floating]) -> NDArray[np.float64]:
    """Boxes (n, 4) xyxy under an affine of flips, quarter turns and scales; under another, what encloses
    their four corners."""
    diagonals = boxes if is_axis_aligned(affine) else boxes[:, [0, 1, 2, 3, 0, 3, 2, 1]]
    corners = (
        diagonals.reshape(len(boxes), diagonals.shape[1] // 2, 2).astype(np.float64) @ affine[:, :2].T
        + affine[:, 2]
    )
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def is_axis_aligned(affine: NDArray[np.floating]) -> bool:
    """Whether rows become rows or columns."""
    return not (affine[0, 0] and affine[0, 1]) and not (affine[1, 0] and affine[1, 1])


def place_keypoints(
    keypoints: NDArray[np.floating],
    affine: NDArray[np.float64],
    area: tuple[float, float, float, float],
    mirror: Sequence[int] | None,
) -> NDArray[np.float32]:
    """Keypoints (n, J, 3) under an affine map; all 0 where not labelled or not within `area`, xyxy."""
    places = keypoints[..., :2].astype(np.float64) @ affine[:, :2].T + affine[:, 2]
    within = (places >= area[:2]) & (places <= area[2:])
    keep = within.all(axis=-1, keepdims=True) & (keypoints[..., 2:] > 0)
    moved = np.where(keep, np.concatenate([places, keypoints[..., 2:]], axis=-1), 0).astype(np.float32)
    return moved if mirror is None else moved[:, list(mirror)]
