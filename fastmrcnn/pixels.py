"""A batch's pixels, where the loader leaves it to the device to make them of decoded images."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn.kernels import resize_pad
from fastmrcnn.structures import Batch


def with_pixels(batch: Batch) -> Batch:
    """The batch with the pixels that its raw images become, made on their device; without those as it is.

    The host does not wait.
    """
    if batch.raw is None:
        return batch
    height, width = batch.pixels.shape[-2:]
    buffer, offset, source, resized, turns, flips, origin, colour = batch.raw
    pixels = resize_pad(
        buffer,
        offset,
        source,
        resized,
        batch.sizes,
        height,
        width,
        turns=turns,
        flips=flips,
        origin=origin,
        colour=colour,
    )
    return batch._replace(pixels=pixels, raw=None)


def pixels_to_be(batch: Batch) -> Tensor:
    """The shape, dtype and memory format of the pixels of `with_pixels`, without any memory."""
    if batch.raw is None:
        return batch.pixels.to("meta")
    shape = (len(batch.raw.offset), *batch.pixels.shape[1:])
    return torch.empty(shape, dtype=torch.uint8, device="meta", memory_format=torch.channels_last)
