"""Resize and pad: the public function and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import may_look, require, require_all, require_at_least
from ..common.library import register
from . import cpu


def resize_pad(
    buffer: Tensor,
    offset: Tensor,
    source: Tensor,
    resized: Tensor,
    sizes: Tensor,
    height: int,
    width: int,
    *,
    turns: Tensor | None = None,
    flips: Tensor | None = None,
    origin: Tensor | None = None,
    colour: Tensor | None = None,
) -> Tensor:
    """Images of any size resized, turned, flipped, cut, coloured and padded into one batch, in this order.

    Resizing is Pillow's `Image.resize(..., BILINEAR)`, which is antialiased: along rows, rounded to 8 bits,
    then along columns, with weights of 22 bits. The levels are those of Pillow up to 12 (13 rounds otherwise
    at some sizes, by one level); with a colour matrix they are within one level of what exact numbers would
    round to. The host does not wait for the device.

    Args:
        buffer: (B,) uint8, RGB images row by row, end to end.
        offset: (N,) int64, first byte of each image in the buffer.
        source: (N, 2) integer height and width of each image in the buffer.
        resized: (N, 2) integer height and width that it is resized to. A side times the one that it becomes
            must be below 2**29; an image has less than 2**31 bytes.
        sizes: (N, 2) integer height and width of the part that is wanted; what is larger than the output, or
            lies outside of the image, is cut off and stays zero.
        height, width: H and W of the output.
        turns: (N,) integer quarter turns counterclockwise; None: none.
        flips: (N, 2) bool, whether left and right, and top and bottom, are exchanged after turning.
        origin: (N, 2) integer y, x of the part's first pixel in the turned and flipped image; None: 0, 0.
        colour: (N, 3, 5) float32, finite: new red, green and blue from red, green, blue, the mean level of
            the part over its pixels and channels, and 1. Rounded half up and clipped to 0..255.

    Returns:
        (N, 3, H, W) uint8 in channels_last memory format, zero where padded. An image that has no pixel, or
        that does not lie within the buffer, gives zeros. There is no gradient.

    Raises:
        ValueError: a shape, dtype or device is not as above; on the CPU also where offset, source or resized
            are not.
    """
    require("buffer", buffer, ("B",), torch.uint8)
    like = ("buffer", buffer)
    require("offset", offset, ("N",), torch.int64, like)
    images = offset.shape[0]
    require("source", source, (images, 2), "integer", like)
    require("resized", resized, (images, 2), "integer", like)
    require("sizes", sizes, (images, 2), "integer", like)
    require("turns", turns, (images,), "integer", like)
    require("flips", flips, (images, 2), torch.bool, like)
    require("origin", origin, (images, 2), "integer", like)
    require("colour", colour, (images, 3, 5), torch.float32, like)
    require_at_least("height", height, 1)
    require_at_least("width", width, 1)
    if may_look(buffer):
        real = cpu.is_real(buffer, offset, source, resized)
        require_all(real, lambda: _fault(buffer, offset, source, resized, int(real.long().argmin())))
    colour = None if colour is None else colour.detach()
    return _resize_pad(buffer, offset, source, resized, sizes, turns, flips, origin, colour, height, width)


def _fault(buffer: Tensor, offset: Tensor, source: Tensor, resized: Tensor, n: int) -> str:
    return (
        f"image {n} must lie within the buffer of {buffer.numel()} bytes and have sides above 0, each times "
        f"what it becomes below 2**29; got offset {int(offset[n])}, source {source[n].tolist()}, "
        f"resized {resized[n].tolist()}"
    )


_resize_pad = register(cpu.resize_pad)


@_resize_pad.register_fake
def _(buffer: Tensor, offset: Tensor, *rest: Any) -> Tensor:
    height, width = rest[-2:]
    out = buffer.new_empty((offset.shape[0], height, width, 3))
    return out.permute(0, 3, 1, 2)
