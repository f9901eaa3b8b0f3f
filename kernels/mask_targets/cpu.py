"""Mask targets as CPU tensors run them, in PyTorch; `naive.py` says what they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.bitmaps import Bitmaps, Sampling
from ..common.library import sum_dtype

CHUNK = 64  # RoIs whose bitmaps are looked up at once in the input's resolution


def is_real(boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, offset: Tensor) -> Tensor:
    """(F,) bool: there is something to read for this RoI."""
    images, objects = offset.shape
    real = (image >= 0) & (image < images) & (matched >= 0) & (matched < objects)
    real &= boxes.isfinite().all(1)
    return real if valid is None else real & (valid != 0)


def mask_targets(
    boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, bitmaps: Bitmaps, how: Sampling
) -> Tensor:
    """See `op.mask_targets`. Positions, weights and result are float64 for float64 boxes, else float32."""
    dtype, resolution = sum_dtype(boxes), how.resolution
    image, matched = image.long(), matched.long()  # narrower, they could not be compared with all sizes
    real = is_real(boxes, image, matched, valid, bitmaps.offset)
    soft = torch.zeros((len(boxes), resolution, resolution), dtype=dtype, device=boxes.device)
    if len(boxes) and bitmaps.offset.numel() and bitmaps.buffer.numel():
        boxes = boxes.to(dtype).where(real[:, None], 0)
        image, matched = image.where(real, 0), matched.where(real, 0)
        sample = _fixed if how.sampling_ratio > 0 else _adaptive
        soft = torch.where(real[:, None, None], sample(boxes, image, matched, bitmaps, how), soft)
    return soft >= 0.5 if how.bitmap else soft


def _fixed(boxes: Tensor, image: Tensor, matched: Tensor, bitmaps: Bitmaps, how: Sampling) -> Tensor:
    """Samples read in the annotation's resolution."""
    samples = how.sampling_ratio
    affine = _affine(bitmaps, image, boxes.dtype)
    start, pixel = _grid(boxes, how)
    steps = torch.arange(how.resolution * samples, dtype=boxes.dtype, device=boxes.device)
    position = start[..., None] + (steps + 0.5) / samples * pixel[..., None] + 0.5  # (F, 2, M*s), x and y
    u, v = _annotation_position(affine, position[:, 0, None, :], position[:, 1, :, None])
    u, v = u - 0.5, v - 0.5  # (F, M*s, M*s) column and row, as pixel indices
    height, width = bitmaps.size.index_select(0, image)[..., None, None].unbind(1)
    inside = (u >= -1) & (u <= width) & (v >= -1) & (v <= height)
    u0, u1, du = _neighbours(u, width)
    v0, v1, dv = _neighbours(v, height)
    crop = _crop(bitmaps, image, matched)
    top = _read(*crop, u0, v0) * (1 - du) + _read(*crop, u1, v0) * du
    bottom = _read(*crop, u0, v1) * (1 - du) + _read(*crop, u1, v1) * du
    value = torch.where(inside, top * (1 - dv) + bottom * dv, 0.0)
    split = (how.resolution, samples)
    return value.unflatten(2, split).unflatten(1, split).mean((2, 4))


def _adaptive(boxes: Tensor, image: Tensor, matched: Tensor, bitmaps: Bitmaps, how: Sampling) -> Tensor:
    """Samples read in the input's resolution, of which each pixel is the annotation pixel at its centre.

    Each operation and its order are those of torchvision's RoIAlign of float32 bitmaps, bit for bit.
    """
    chunks = zip(boxes.split(CHUNK), image.split(CHUNK), matched.split(CHUNK), strict=True)
    return torch.cat([_adaptive_chunk(b, i, m, bitmaps, how) for b, i, m in chunks])


def _adaptive_chunk(boxes: Tensor, image: Tensor, matched: Tensor, bitmaps: Bitmaps, how: Sampling) -> Tensor:
    height, width = how.image_shape
    dtype, device, side = boxes.dtype, boxes.device, how.resolution
    y = torch.arange(height, dtype=dtype, device=device)[:, None] + 0.5
    x = torch.arange(width, dtype=dtype, device=device)[None, :] + 0.5
    u, v = (t.floor().long() for t in _annotation_position(_affine(bitmaps, image, dtype), x, y))
    pixels = _read(*_crop(bitmaps, image, matched), u, v).flatten(1)  # (F, H * W) uint8

    def corners(at: Tensor) -> Tensor:
        return pixels.gather(1, at.flatten(1)).view(at.shape).to(dtype)

    start, pixel = _grid(boxes, how)
    sizes = bitmaps.image_sizes.index_select(0, image)
    rows = _axis(start[:, 1], pixel[:, 1], sizes[:, 0], height, side)
    columns = _axis(start[:, 0], pixel[:, 0], sizes[:, 1], width, side)
    total = torch.zeros((len(boxes), side, side), dtype=dtype, device=device)
    for row in zip(*rows[:-1], strict=True):
        top, bottom, ly, real_y = (t[:, :, None] for t in row)
        hy = 1 - ly
        for column in zip(*columns[:-1], strict=True):
            left, right, lx, real_x = (t[:, None, :] for t in column)
            hx = 1 - lx
            value = hy * hx * corners(top * width + left) + hy * lx * corners(top * width + right)
            value = value + ly * hx * corners(bottom * width + left)
            value = value + ly * lx * corners(bottom * width + right)
            total = total + torch.where(real_y & real_x, value, 0.0)
    return total / (rows.samples * columns.samples)[:, None, None]


def _affine(bitmaps: Bitmaps, image: Tensor, dtype: torch.dtype) -> Tensor:
    """(F, 2, 3, 1, 1)"""
    return bitmaps.to_annotation.to(dtype).index_select(0, image)[..., None, None]


def _annotation_position(affine: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Continuous annotation coordinates of input coordinates; affine is (F, 2, 3, 1, 1)."""
    u, v = (affine[:, i, 0] * x + affine[:, i, 1] * y + affine[:, i, 2] for i in (0, 1))
    return u, v


def _grid(boxes: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """First corner, in pixel-index coordinates, and side of a mask pixel: both (F, 2) as x, y."""
    extent = boxes[:, 2:] - boxes[:, :2]
    if how.aligned:
        return boxes[:, :2] - 0.5, extent / how.resolution
    return boxes[:, :2], extent.clamp(min=1.0) / how.resolution


def _neighbours(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels about an index position, clamped to 0..size-1, and the second one's weight."""
    last = (size - 1).clamp(min=0)
    position = torch.minimum(position.clamp(min=0), last)
    low = position.floor().long()
    return low, torch.minimum(low + 1, last.long()), position - low


def _crop(bitmaps: Bitmaps, image: Tensor, matched: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The buffer, and of each RoI's object the first byte (F,) and the window (F, 4)."""
    row = image * bitmaps.offset.shape[1] + matched
    offset = bitmaps.offset.long().flatten().index_select(0, row)
    return bitmaps.buffer, offset, bitmaps.window.long().flatten(0, 1).index_select(0, row)


def _read(buffer: Tensor, offset: Tensor, window: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Bytes at annotation pixels (F, h, w); zero outside the crop, where the bitmap is zero too."""
    left, top, width, height = window[..., None, None].unbind(1)
    column, row = column - left, row - top
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    address = offset[:, None, None] + row * width + column
    inside = inside & (address >= 0) & (address < len(buffer))
    return torch.where(inside, buffer[address.where(inside, 0)], 0)


class _Axis(NamedTuple):
    """The samples along an axis, each tensor with the samples of a mask pixel first: (most, F, M)."""

    low: Tensor  # index of the first pixel
    high: Tensor  # of the second
    weight: Tensor  # of the second
    real: Tensor  # whether this RoI has that many samples, and this one is not outside
    samples: Tensor  # (F,) of a mask pixel


def _axis(start: Tensor, pixel: Tensor, size: Tensor, length: int, resolution: int) -> _Axis:
    count = pixel.ceil().clamp(min=1)
    k = torch.arange(most_samples(length, resolution), device=start.device)[:, None, None]
    i = torch.arange(resolution, device=start.device)
    origin = start[:, None] + i * pixel[:, None]
    position = origin + (k + 0.5) * pixel[:, None] / count[:, None]
    size = size[:, None]
    real = (k < count[:, None]) & (position >= -1) & (position <= size)
    return _Axis(*_neighbours(position, size.clamp(max=length)), real, count)


def most_samples(length: int, resolution: int) -> int:
    """Adaptive samples a mask pixel can have along an axis, of a box within an image of this length."""
    return -(-length // resolution) + 1
