"""Images that are resized, turned, flipped, cut and coloured on the device: what it is told of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn.data.buckets import power_of_two
from fastmrcnn.data.colour import colour_matrix
from fastmrcnn.data.transforms import Plan, Size
from fastmrcnn.structures import RawImages

MIN_BYTES = 2**16
MOST_PRODUCT = 2**29  # of a side and what it becomes: the limit of `kernels.resize_pad`
MOST_PIXELS = 2  # of an image as decoded, for each of the padded result; larger ones are resized here


class Room:
    """Flat memory that images are put into, end to end.

    Args:
        memory: None: there is none, and the images stay where they are.
    """

    def __init__(self, memory: NDArray[np.uint8] | None) -> None:
        self.memory = np.empty(0, np.uint8) if memory is None else memory
        self.used = 0

    @property
    def rest(self) -> NDArray[np.uint8]:
        return self.memory[self.used :]

    def place(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image, here if it fits; not copied if it is here already."""
        own = self.rest[: pixels.size]
        if own.size < pixels.size:
            return pixels
        self.used += pixels.size
        own = own.reshape(pixels.shape)
        if not (pixels.flags.c_contiguous and pixels.ctypes.data == own.ctypes.data):
            own[:] = pixels
        return own

    def gathered(self, images: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], list[int]]:
        """(B,) with the images, B a power of two, and where in it each begins; this memory if all of them
        were placed here."""
        begin = self.memory.ctypes.data
        starts = [image.ctypes.data - begin for image in images]
        ends = [start + image.size for start, image in zip(starts, images, strict=True)]
        if min(starts) >= 0 and max(ends) <= self.used:
            size = power_of_two(max(self.used, MIN_BYTES))
            if size <= self.memory.size:
                return self.memory[:size], starts
        sizes = [image.size for image in images]
        buffer = np.zeros(power_of_two(max(sum(sizes), MIN_BYTES)), np.uint8)
        np.concatenate([image.ravel() for image in images], out=buffer[: sum(sizes)])
        return buffer, [sum(sizes[:i]) for i in range(len(sizes))]


def device_resizes(size: Size, plan: Plan, bucket: Size) -> bool:
    """Whether an image is handed over as it was decoded. Not if it has to be rotated, which the device does
    not do, or if it is so large that moving it would take longer than to resize it first, or too long."""
    products = (side * result for side, result in zip(size, plan.resized, strict=True))
    small = size[0] * size[1] <= MOST_PIXELS * bucket[0] * bucket[1] and max(products) < MOST_PRODUCT
    return small and not plan.rotation


def raw_images(
    images: Sequence[NDArray[np.uint8]], plans: Sequence[Plan], room: Room, coloured: bool
) -> RawImages:
    """What `kernels.resize_pad` takes, but for the sizes of the results.

    Args:
        images: (h, w, 3) each.
        plans: what to do to each.
        coloured: whether any image of the set may change its colours.
    """
    buffer, starts = room.gathered(images)
    crops = [plan.crop or (0, 0, 0, 0) for plan in plans]
    return RawImages(
        buffer=torch.from_numpy(buffer),
        offset=torch.tensor(starts, dtype=torch.int64),
        source=_pairs([image.shape[:2] for image in images]),
        resized=_pairs([plan.resized for plan in plans]),
        turns=torch.tensor([plan.turns for plan in plans], dtype=torch.int32),
        flips=torch.tensor([(plan.flip_horizontal, plan.flip_vertical) for plan in plans]),
        origin=_pairs([(top, left) for left, top, _, _ in crops]),
        colour=torch.stack([colour_terms(plan) for plan in plans]) if coloured else None,
    )


def colour_terms(plan: Plan) -> Tensor:
    """(3, 5) float32: the colour matrix with a column for the mean, which only the device will know."""
    matrix = colour_matrix(plan.colour, mean=1.0)  # its last column is the mean times something
    return torch.from_numpy(np.concatenate([matrix, np.zeros((3, 1))], axis=1).astype(np.float32))


def _pairs(values: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).view(-1, 2)
