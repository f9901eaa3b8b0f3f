"""Random changes of an image, planned before it is decoded.

A plan follows from the image's size and the sample's random numbers alone, so that the loader knows
into which bucket an image falls without opening it.

Coordinates are continuous with pixel edges at integers: pixel i covers [i, i + 1). Two affine maps, (2, 3)
matrices for columns (x, y, 1), lead from one set of pixels to the other: *image_to_input* from the image as
it is annotated to what the model sees of it, *input_to_image* back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]  # height, width

DRAWS = 8  # random numbers of a sample; a new kind of change takes one of the spare ones
_TURNS = {
    1: Image.Transpose.ROTATE_90,  # counterclockwise
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}
_SHORT_SIDE, _FLIP_H, _FLIP_V, _TURN, _TURN_WAY, _BRIGHTNESS, _CONTRAST = range(7)


@dataclass(frozen=True)
class Augment:
    """What may change, in the words of the configuration's `data.augment`."""

    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    rotate90: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0


@dataclass(frozen=True)
class Plan:
    """One way to change one image: resize, then turn, then flip, then brightness and contrast."""

    resized: Size
    turns: int = 0
    """Quarter turns counterclockwise, 0..3."""
    flip_horizontal: bool = False
    flip_vertical: bool = False
    brightness: float = 1.0
    contrast: float = 1.0

    @property
    def size(self) -> Size:
        """Height and width of the result."""
        height, width = self.resized
        return (width, height) if self.turns % 2 else (height, width)

    @property
    def mirrored(self) -> bool:
        """Whether left and right are exchanged; two flips make a half turn."""
        return self.flip_horizontal != self.flip_vertical


def draws(seed: int, first: int, count: int = 1) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of the samples first .. first + count - 1.

    Philox is a counter-based generator: a sample's numbers depend on the seed and its index alone,
    and those of a whole epoch come out in one call.

    Returns:
        (count, DRAWS).
    """
    words_per_count = 4  # Philox4x64
    generator = np.random.Philox(key=[seed, 0], counter=first * DRAWS // words_per_count)
    words = generator.random_raw(count * DRAWS).reshape(count, DRAWS)
    return (words >> np.uint64(11)) * 2.0**-53


def resized_size(height: int, width: int, short_side: int, long_side_max: int) -> Size:
    """Size at which the short side is `short_side`, or the long side `long_side_max` if that is less.

    Rounds to the nearest pixel, as detectron2's ResizeShortestEdge does.
    """
    scale = min(short_side / min(height, width), long_side_max / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def plan_image(
    height: int,
    width: int,
    numbers: NDArray[np.float64],
    short_sides: Sequence[int],
    long_side_max: int,
    augment: Augment,
) -> Plan:
    """How to change an image of the given size.

    Args:
        numbers: (DRAWS,), from `draws`.
    """
    side, turns = int(choose_side(numbers, len(short_sides))), int(choose_turns(numbers, augment.rotate90))
    return Plan(
        resized=resized_size(height, width, short_sides[side], long_side_max),
        turns=turns,
        flip_horizontal=bool(numbers[_FLIP_H] < augment.flip_horizontal),
        flip_vertical=bool(numbers[_FLIP_V] < augment.flip_vertical),
        brightness=float(1 + augment.brightness * (2 * numbers[_BRIGHTNESS] - 1)),
        contrast=float(1 + augment.contrast * (2 * numbers[_CONTRAST] - 1)),
    )


def choose_side(numbers: NDArray[np.float64], sides: int) -> NDArray[np.int64]:
    """Which of the short sides is drawn; numbers (..., DRAWS)."""
    return (numbers[..., _SHORT_SIDE] * sides).astype(np.int64)


def choose_turns(numbers: NDArray[np.float64], probability: float) -> NDArray[np.int64]:
    """0, or 1 or 3 quarter turns counterclockwise with equal chance; numbers (..., DRAWS)."""
    way = np.where(numbers[..., _TURN_WAY] < 0.5, 1, 3)
    return np.where(numbers[..., _TURN] < probability, way, 0)


def resize(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Bilinear with antialiasing, as Pillow and detectron2 do it; (H, W, 3) to (*size, 3)."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def apply_plan(resized: NDArray[np.uint8], plan: Plan) -> NDArray[np.uint8]:
    """Turn, flip, brighten. The input is left as it is; the result may be the input itself.

    Args:
        resized: (*plan.resized, 3), from `resize`.
    """
    moves = [_TURNS[plan.turns]] if plan.turns else []
    if plan.flip_horizontal:
        moves.append(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.flip_vertical:
        moves.append(Image.Transpose.FLIP_TOP_BOTTOM)
    relit = plan.brightness != 1 or plan.contrast != 1
    if not moves and not relit:
        return resized
    image = Image.fromarray(resized)  # Pillow moves whole pixels: several times faster than NumPy's views
    for move in moves:
        image = image.transpose(move)
    if relit:
        mean = plan.brightness * resized.mean()
        levels = np.arange(256) * plan.brightness
        table = np.clip((levels - mean) * plan.contrast + mean + 0.5, 0, 255).astype(np.uint8)
        image = image.point(table.tolist() * 3)
    return np.asarray(image)


def image_to_input(plan: Plan, height: int, width: int) -> NDArray[np.float64]:
    """(2, 3), from pixels of an image of height x width to those of the plan's result."""
    return _matrix(plan, height, width)[:2] + 0.0  # adding 0 turns -0 into 0


def input_to_image(plan: Plan, height: int, width: int) -> NDArray[np.float64]:
    """(2, 3), from pixels of the plan's result to those of the image of height x width."""
    return np.linalg.inv(_matrix(plan, height, width)).astype(np.float64)[:2] + 0.0


def transform_boxes(boxes: NDArray[np.floating], affine: NDArray[np.floating]) -> NDArray[np.float64]:
    """Boxes (n, 4) xyxy under an affine of flips, quarter turns and scales."""
    corners = boxes.reshape(-1, 2, 2).astype(np.float64) @ affine[:, :2].T + affine[:, 2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def transform_keypoints(
    keypoints: NDArray[np.floating], plan: Plan, height: int, width: int, mirror: Sequence[int]
) -> NDArray[np.float32]:
    """Keypoints of an image of height x width after a plan.

    Args:
        keypoints: (n, J, 3) x, y, visibility.
        mirror: which keypoint each one becomes in a mirror image.
    Returns:
        (n, J, 3); all 0 where not labelled or no longer within the image.
    """
    affine = image_to_input(plan, height, width)
    places = keypoints[..., :2].astype(np.float64) @ affine[:, :2].T + affine[:, 2]
    within = (places >= 0) & (places <= plan.size[::-1])
    keep = within.all(axis=-1, keepdims=True) & (keypoints[..., 2:] > 0)
    moved = np.where(keep, np.concatenate([places, keypoints[..., 2:]], axis=-1), 0).astype(np.float32)
    return moved[:, list(mirror)] if plan.mirrored else moved


def _matrix(plan: Plan, height: int, width: int) -> NDArray[np.float64]:
    h, w = plan.resized
    matrix = np.diag([w / width, h / height, 1.0])
    for _ in range(plan.turns % 4):  # (x, y) -> (y, w - x)
        matrix = np.array([[0.0, 1, 0], [-1, 0, w], [0, 0, 1]]) @ matrix
        h, w = w, h
    if plan.flip_horizontal:
        matrix = np.array([[-1.0, 0, w], [0, 1, 0], [0, 0, 1]]) @ matrix
    if plan.flip_vertical:
        matrix = np.array([[1.0, 0, 0], [0, -1, h], [0, 0, 1]]) @ matrix
    return matrix
