"""The few padded shapes that batches come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from fastmrcnn.data.transforms import Size, resized_size
from fastmrcnn.errors import UserError

MULTIPLE = 32  # stride of the coarsest feature map that FPN's top-down path adds up
MIN_SAVING = 0.05  # share of the padded pixels that a second bucket has to save
FEW_IMAGES = 100  # sets of fewer images one way round keep to one bucket: a second costs a compilation


def choose_buckets(
    sizes: Iterable[Size], short_sides: Sequence[int], long_side_max: int, *, turns: bool = False
) -> list[Size]:
    """The padded shapes, in multiples of 32, for images of a data set.

    For each way round one that holds every image after resizing; and, in large sets, a smaller one where
    that saves enough pixels: most of COCO's images are 4:3, and in 800 x 1344 a fifth would be padding.

    Args:
        sizes: (height, width) of every image as it is.
        turns: whether quarter turns may happen.
    Returns:
        Landscape, squares included, before portrait; the larger before the smaller.
    """
    counts: Counter[Size] = Counter()
    for (h, w), number in Counter(sizes).items():
        for side in short_sides:
            height, width = resized_size(h, w, side, long_side_max)
            counts[height, width] += number
            if turns:
                counts[width, height] += number
    landscape = {size: number for size, number in counts.items() if size[0] <= size[1]}
    portrait = {size: number for size, number in counts.items() if size[0] > size[1]}
    buckets = [bucket for group in (landscape, portrait) if group for bucket in _one_or_two(group)]
    return list(dict.fromkeys(buckets))


def _one_or_two(counts: Mapping[Size, int]) -> list[Size]:
    """The hull of all sizes, and the smaller bucket that saves most, if it is worth it."""
    full = _hull(list(counts))
    total = sum(counts.values())
    if total < FEW_IMAGES:
        return [full]
    rows, columns = full[0] // MULTIPLE, full[1] // MULTIPLE
    fitting = np.zeros((rows + 1, columns + 1))  # images within (32 i, 32 j)
    for (height, width), number in counts.items():
        fitting[-(-height // MULTIPLE), -(-width // MULTIPLE)] += number
    fitting = fitting.cumsum(0).cumsum(1)
    area = np.outer(np.arange(rows + 1), np.arange(columns + 1))
    saved = fitting * (area[-1, -1] - area)
    best = np.unravel_index(int(saved.argmax()), saved.shape)
    if saved[best] < MIN_SAVING * total * area[-1, -1]:
        return [full]
    return [full, (int(best[0]) * MULTIPLE, int(best[1]) * MULTIPLE)]


def check_buckets(buckets: Sequence[Size]) -> list[Size]:
    """Buckets that a user gave. Raises UserError where they are not multiples of 32."""
    for height, width in buckets:
        if min(height, width) <= 0 or height % MULTIPLE or width % MULTIPLE:
            near = list(_hull([(max(1, height), max(1, width))]))
            raise UserError(
                f"data.buckets: [{height}, {width}] is not made of multiples of {MULTIPLE}; use {near}"
            )
    if not buckets:
        raise UserError("data.buckets: the list is empty; give a [height, width] or 'auto'")
    return list(buckets)


def smallest_bucket(size: Size, buckets: Sequence[Size]) -> Size | None:
    """The bucket of least area that holds an image of `size`; None if none does."""
    fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
    return min(fitting, key=lambda b: b[0] * b[1], default=None)


def bucket_or_new(size: Size, buckets: Sequence[Size]) -> Size:
    """The smallest bucket that holds an image of `size`, or a new one made for it."""
    return smallest_bucket(size, buckets) or _hull([size])


def resolve_buckets(
    buckets: Sequence[Size] | Literal["auto"],
    sizes: Iterable[Size],
    short_sides: Sequence[int],
    long_side_max: int,
    *,
    turns: bool = False,
) -> list[Size]:
    """The configuration's `data.buckets` as a list."""
    if buckets == "auto":
        return choose_buckets(sizes, short_sides, long_side_max, turns=turns)
    return check_buckets([(int(height), int(width)) for height, width in buckets])


def _hull(sizes: Sequence[Size]) -> Size:
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
