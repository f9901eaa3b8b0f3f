"""The few padded shapes that batches come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from fastmrcnn.data.transforms import Size, resized_size
from fastmrcnn.errors import UserError

MULTIPLE = 32  # stride of the coarsest feature map that FPN's top-down path adds up


def choose_buckets(
    sizes: Iterable[Size], short_sides: Sequence[int], long_side_max: int, *, turns: bool = False
) -> list[Size]:
    """The smallest multiples of 32 that hold every landscape and every portrait image after resizing.

    Args:
        sizes: (height, width) of the images as they are.
        turns: whether quarter turns may happen.
    Returns:
        One (height, width) if all images come out alike or all one way round, else two: landscape,
        squares included, and portrait.
    """
    sizes = set(sizes)
    resized = {resized_size(h, w, side, long_side_max) for h, w in sizes for side in short_sides}
    if turns:
        resized |= {(w, h) for h, w in resized}
    landscape = [size for size in resized if size[0] <= size[1]]
    portrait = [size for size in resized if size[0] > size[1]]
    return list(dict.fromkeys(_hull(group) for group in (landscape, portrait) if group))


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
