"""Random changes of an image, planned before it is decoded.

A plan follows from the image's size and the sample's random numbers alone, so that the loader knows
into which bucket an image falls without opening it.

Coordinates are continuous with pixel edges at integers: pixel i covers [i, i + 1). Two affine maps, (2, 3)
matrices for columns (x, y, 1), lead from one set of pixels to the other: *image_to_input* from the image as
it is annotated to what the model sees of it, *input_to_image* back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.affine import moves, place_keypoints
from fastmrcnn.data.colour import Colour, recolour

Size = tuple[int, int]  # height, width
Window = tuple[int, int, int, int]  # left, top, width, height

FIRST_DRAWS = 8  # of a stream of their own, so that runs from before there were others stay as they were
DRAWS = 24  # random numbers of a sample and layer; a new kind of change takes one of the spare ones
_TURNS = {
    1: Image.Transpose.ROTATE_90,  # counterclockwise
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}
_SHORT_SIDE, _FLIP_H, _FLIP_V, _TURN, _TURN_WAY, _BRIGHTNESS, _CONTRAST = range(7)
_SCALE, _CROP_X, _CROP_Y, _SATURATION, _HUE, _ROTATE = range(FIRST_DRAWS, 14)
COMPOSE_DRAWS = slice(14, 22)  # what `compose.py` draws with
PIPELINE_DRAW = 22  # what `saved_pipeline.py` is seeded with


@dataclass(frozen=True)
class Augment:
    """What may change, in the words of the configuration's `data.augment`."""

    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    rotate90: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    rotate: float = 0.0
    crop: Size | None = None
    scale: tuple[float, float] | None = None
    copy_paste: float = 0.0
    mosaic: float = 0.0
    min_visible: float = 0.0
    albumentations: str | None = None
    """File of a pipeline that comes before all this; see `saved_pipeline.py`."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """RGB of what no image covers within the result: the corners of a rotated one, gaps of a mosaic."""

    @property
    def colours(self) -> bool:
        """Whether colours may change."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def layers(self) -> int:
        """Most images that a sample may be put together from."""
        return 1 + 3 * (self.mosaic > 0) + (self.copy_paste > 0)

    @property
    def reads_originals(self) -> bool:
        """Whether images are needed as they are decoded, not at one of a few sizes."""
        return self.crop is not None or self.composes or self.albumentations is not None

    @property
    def composes(self) -> bool:
        """Whether samples of several images may come."""
        return self.copy_paste > 0 or self.mosaic > 0


@dataclass(frozen=True)
class Plan:
    """One way to change one image: resize, turn, flip, rotate, crop; and its colours."""

    resized: Size
    turns: int = 0
    """Quarter turns counterclockwise, 0..3."""
    flip_horizontal: bool = False
    flip_vertical: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    """Share of a whole turn."""
    rotation: float = 0.0
    """Degrees counterclockwise, about the centre."""
    crop: Window | None = None
    """What is left, in pixels of the image after all that; None: everything."""
    fill: tuple[int, int, int] = (0, 0, 0)

    @property
    def whole(self) -> Size:
        """Height and width before the crop."""
        height, width = self.resized
        return (width, height) if self.turns % 2 else (height, width)

    @property
    def size(self) -> Size:
        """Height and width of the result."""
        return self.whole if self.crop is None else (self.crop[3], self.crop[2])

    @property
    def cuts(self) -> bool:
        """Whether objects may be cut off, so that their boxes have to be found anew."""
        return self.crop is not None or self.rotation != 0

    @property
    def colour(self) -> Colour:
        return Colour(self.brightness, self.contrast, self.saturation, self.hue)

    @property
    def region(self) -> Window | None:
        """The part of the resized image that the result shows, which is all that has to be resized; None:
        all of it."""
        if self.crop is None:
            return None
        height, width = self.size
        back = np.linalg.inv(_moves(self))
        corners = back[:2] @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]], float)
        margin = 1 if self.rotation else 0  # of the bilinear reading
        low = np.floor(corners.min(axis=1) + 1e-6).astype(int) - margin
        high = np.ceil(corners.max(axis=1) - 1e-6).astype(int) + margin
        edge = self.resized[::-1]
        left, top = (int(min(max(a, 0), e - 1)) for a, e in zip(low, edge, strict=True))
        right, bottom = (int(min(max(b, 1), e)) for b, e in zip(high, edge, strict=True))
        return left, top, max(1, right - left), max(1, bottom - top)

    @property
    def mirrored(self) -> bool:
        """Whether left and right are exchanged; two flips make a half turn."""
        return self.flip_horizontal != self.flip_vertical


def draws(seed: int, first: int, count: int = 1, layer: int = 0) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of the samples first .. first + count - 1.

    Philox is a counter-based generator: a sample's numbers depend on the seed and its index alone,
    and those of a whole epoch come out in one call.

    Args:
        layer: 0 for the sample's own image, 1, 2, ... for others that are put into it.
    Returns:
        (count, DRAWS).
    """
    streams = ((16 * layer, FIRST_DRAWS), (16 * layer + 3, DRAWS - FIRST_DRAWS))
    words_per_count = 4  # Philox4x64
    words = []
    for stream, each in streams:
        generator = np.random.Philox(key=[seed, stream], counter=first * each // words_per_count)
        words.append(generator.random_raw(count * each).reshape(count, each))
    return (np.concatenate(words, axis=1) >> np.uint64(11)) * 2.0**-53


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
    resized = resized_size(height, width, short_sides[side], long_side_max)
    if augment.scale is not None and augment.crop is not None:
        low, high = augment.scale
        share = low + (high - low) * float(numbers[_SCALE])
        rows, columns = augment.crop
        target = (columns, rows) if turns % 2 else (rows, columns)
        resized = jittered_size(height, width, target, share)
    plan = Plan(
        resized=resized,
        turns=turns,
        flip_horizontal=bool(numbers[_FLIP_H] < augment.flip_horizontal),
        flip_vertical=bool(numbers[_FLIP_V] < augment.flip_vertical),
        brightness=float(1 + augment.brightness * (2 * numbers[_BRIGHTNESS] - 1)),
        contrast=float(1 + augment.contrast * (2 * numbers[_CONTRAST] - 1)),
        saturation=float(1 + augment.saturation * (2 * numbers[_SATURATION] - 1)),
        hue=float(augment.hue * (2 * numbers[_HUE] - 1)),
        rotation=float(augment.rotate * (2 * numbers[_ROTATE] - 1)),
        fill=augment.fill,
    )
    if augment.crop is None:
        return plan
    sides = [(whole, min(whole, most)) for whole, most in zip(plan.whole, augment.crop, strict=True)]
    (top, crop_height), (left, crop_width) = [
        (int(number * (whole - kept + 1)), kept)
        for (whole, kept), number in zip(sides, numbers[[_CROP_Y, _CROP_X]], strict=True)
    ]
    return replace(plan, crop=(left, top, crop_width, crop_height))


def jittered_size(height: int, width: int, target: Size, share: float) -> Size:
    """Size of an image that is fitted into `target` and then scaled by `share`: torchvision's ScaleJitter,
    detectron2's ResizeScale."""
    scale = share * min(target[0] / height, target[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def choose_side(numbers: NDArray[np.float64], sides: int) -> NDArray[np.int64]:
    """Which of the short sides is drawn; numbers (..., DRAWS)."""
    return (numbers[..., _SHORT_SIDE] * sides).astype(np.int64)


def choose_turns(numbers: NDArray[np.float64], probability: float) -> NDArray[np.int64]:
    """0, or 1 or 3 quarter turns counterclockwise with equal chance; numbers (..., DRAWS)."""
    way = np.where(numbers[..., _TURN_WAY] < 0.5, 1, 3)
    return np.where(numbers[..., _TURN] < probability, way, 0)


def resize(pixels: NDArray[np.uint8], size: Size, region: Window | None = None) -> NDArray[np.uint8]:
    """Bilinear with antialiasing, as Pillow and detectron2 do it; (H, W, 3) to (*size, 3).

    Args:
        region: of the resized image what is wanted; the rest is not computed.
    """
    height, width = pixels.shape[:2]
    if region is None or region == (0, 0, size[1], size[0]):
        if (height, width) == size:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    left, top, columns, rows = region
    if (height, width) == size:
        return pixels[top : top + rows, left : left + columns]
    across, down = width / size[1], height / size[0]
    right, bottom = min(width, (left + columns) * across), min(height, (top + rows) * down)
    box = (left * across, top * down, right, bottom)
    return np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR, box))


def apply_plan(resized: NDArray[np.uint8], plan: Plan) -> NDArray[np.uint8]:
    """Recolour, turn, flip, rotate. The input is left as it is; the result may be the input itself.

    Args:
        resized: (*plan.resized, 3), from `resize`; of a plan with a region that region alone.
    """
    moves = [_TURNS[plan.turns]] if plan.turns else []
    if plan.flip_horizontal:
        moves.append(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.flip_vertical:
        moves.append(Image.Transpose.FLIP_TOP_BOTTOM)
    if not moves and not plan.rotation and plan.colour == Colour():
        return resized
    image = recolour(Image.fromarray(resized), plan.colour)
    if plan.rotation:  # the one affine map of all moves: pixels are interpolated once
        left, top = (plan.region or (0, 0, 0, 0))[:2]
        back = np.linalg.inv(_moves(plan))[:2] - np.array([[0, 0, left], [0, 0, top]])
        size = (plan.size[1], plan.size[0])
        coefficients = tuple(back.ravel().tolist())
        method, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return np.asarray(image.transform(size, method, coefficients, bilinear, fillcolor=plan.fill))
    for move in moves:  # Pillow moves whole pixels: several times faster than NumPy's views
        image = image.transpose(move)
    return np.asarray(image)


def image_to_input(plan: Plan, height: int, width: int) -> NDArray[np.float64]:
    """(2, 3), from pixels of an image of height x width to those of the plan's result."""
    return _matrix(plan, height, width)[:2] + 0.0  # adding 0 turns -0 into 0


def input_to_image(plan: Plan, height: int, width: int) -> NDArray[np.float64]:
    """(2, 3), from pixels of the plan's result to those of the image of height x width."""
    return np.linalg.inv(_matrix(plan, height, width)).astype(np.float64)[:2] + 0.0


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
    area = (0, 0, plan.size[1], plan.size[0])
    return place_keypoints(
        keypoints, image_to_input(plan, height, width), area, mirror if plan.mirrored else None
    )


def _matrix(plan: Plan, height: int, width: int) -> NDArray[np.float64]:
    h, w = plan.resized
    return _moves(plan) @ np.diag([w / width, h / height, 1.0])


def _moves(plan: Plan) -> NDArray[np.float64]:
    """(3, 3), from pixels of the resized image to those of the result."""
    flips, corner = (plan.flip_horizontal, plan.flip_vertical), (plan.crop or (0, 0))[:2]
    return moves(*plan.resized, plan.turns, *flips, plan.rotation, corner)
