"""Mask targets: the share of each mask pixel that the ground truth covers, read from packed bitmaps."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_targets(
    boxes: Tensor,
    matched: Tensor,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    size: Tensor,
    *,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    resolution: int,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign average of the matched object's bitmap within each box.

    Args:
        boxes: (N, F, 4) float32 xyxy in input pixels, within the image.
        matched: (N, F) int64, slot of the object in the tables below.
        buffer: (B,) uint8, the objects' bitmaps (0 or 1), each cropped to its window, end to end.
        offset: (N, G) int64, first byte of each crop.
        window: (N, G, 4) int32 x, y, width, height of each crop in annotation pixels.
        to_annotation: (N, 2, 3) affine map from input pixels to annotation pixels.
        size: (N, 2) int32 height and width of the annotated image.
        image_sizes: (N, 2) height and width of the image within the padded input.
        image_shape: (H, W) of the padded input.
        resolution: M, side of the masks.
        sampling_ratio: samples per mask pixel and axis, each read bilinearly in the annotation's own
            resolution. 0 or less: adaptive, ceil(side / M) samples, read in the input's resolution;
            for an input that is not resized, the numbers of torchvision and detectron2.
        aligned: half-pixel correct sampling (detectron2); false: torchvision.
    Returns:
        (N, F, M, M) float32 in 0..1. An object without a window gives zeros.
    """
    table = (offset, window)
    offset, window = (
        t.gather(1, matched.reshape(*matched.shape, *(1,) * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))
        for t in table
    )
    if sampling_ratio <= 0:
        return _adaptive(
            boxes, buffer, offset, window.long(), to_annotation, image_sizes, image_shape, resolution, aligned
        )
    start, pixel = _grid(boxes, resolution, aligned)
    steps = (torch.arange(resolution * sampling_ratio, device=boxes.device) + 0.5) / sampling_ratio
    position = start[..., None] + steps * pixel[..., None] + 0.5  # (N, F, 2, M*s), continuous x and y
    x, y = position[:, :, 0, None, :], position[:, :, 1, :, None]
    a = to_annotation[:, None, :, :, None, None]
    u = a[:, :, 0, 0] * x + a[:, :, 0, 1] * y + a[:, :, 0, 2] - 0.5  # (N, F, M*s, M*s) columns
    v = a[:, :, 1, 0] * x + a[:, :, 1, 1] * y + a[:, :, 1, 2] - 0.5
    height, width = size[:, 0, None, None, None], size[:, 1, None, None, None]
    inside = (u >= -1) & (u <= width) & (v >= -1) & (v <= height)
    u0, u1, du = _neighbours(u, width)
    v0, v1, dv = _neighbours(v, height)

    def read(column: Tensor, row: Tensor) -> Tensor:
        return _read(buffer, offset[..., None, None], window.long()[..., None, None, :], column, row).float()

    top = read(u0, v0) * (1 - du) + read(u1, v0) * du
    bottom = read(u0, v1) * (1 - du) + read(u1, v1) * du
    value = torch.where(inside, top * (1 - dv) + bottom * dv, 0.0)
    split = (resolution, sampling_ratio)
    return value.unflatten(3, split).unflatten(2, split).mean((3, 5))


def _grid(boxes: Tensor, resolution: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """First corner, in pixel-index coordinates, and side of a mask pixel: both (N, F, 2) as x, y."""
    extent = boxes[..., 2:] - boxes[..., :2]
    if aligned:
        return boxes[..., :2] - 0.5, extent / resolution
    return boxes[..., :2], extent.clamp(min=1.0) / resolution


def _neighbours(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels about an index position, clamped to 0..size-1, and the second one's weight."""
    position = position.clamp(min=0)
    last = size - 1
    low = torch.minimum(position.floor().long(), last.long())
    high = torch.minimum(low + 1, last.long())
    return low, high, torch.where(low < last, position - low, 0.0)


def _read(buffer: Tensor, offset: Tensor, window: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Bytes at annotation pixels; zero outside the crop, where the bitmap is zero too."""
    left, top, width, height = window.unbind(-1)
    column, row = column - left, row - top
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    address = torch.where(inside, offset + row * width + column, 0)
    return torch.where(inside, buffer[address], 0)


def _adaptive(
    boxes: Tensor,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    resolution: int,
    aligned: bool,
) -> Tensor:
    """The average of bilinear samples is separable: weights over rows x bitmap x weights over columns."""
    start, pixel = _grid(boxes, resolution, aligned)
    height, width = image_shape
    rows = _axis_weights(start[..., 1], pixel[..., 1], image_sizes[:, 0, None], height, resolution)
    columns = _axis_weights(start[..., 0], pixel[..., 0], image_sizes[:, 1, None], width, resolution)
    y = torch.arange(height, device=boxes.device)[:, None] + 0.5
    x = torch.arange(width, device=boxes.device)[None, :] + 0.5
    a = to_annotation[..., None, None]
    u = (a[:, 0, 0] * x + a[:, 0, 1] * y + a[:, 0, 2]).floor().long()[:, None]  # (N, 1, H, W) columns
    v = (a[:, 1, 0] * x + a[:, 1, 1] * y + a[:, 1, 2]).floor().long()[:, None]
    slots = []
    for slot in range(boxes.shape[1]):  # one at a time: a whole bitmap in the input's resolution each
        one = slice(slot, slot + 1)
        bitmap = _read(buffer, offset[:, one, None, None], window[:, one, None, None], u, v).float()
        slots.append(rows[:, one] @ bitmap @ columns[:, one].mT)
    return torch.cat(slots, 1)


def _axis_weights(start: Tensor, pixel: Tensor, size: Tensor, length: int, resolution: int) -> Tensor:
    """(N, F, M, length): how much each input row (or column) counts in each mask row (or column)."""
    count = pixel.ceil().clamp(min=1)
    most = -(-length // resolution) + 1
    k = torch.arange(most, device=start.device)
    i = torch.arange(resolution, device=start.device)[:, None]
    step = (pixel / count)[..., None, None]
    position = start[..., None, None] + i * pixel[..., None, None] + (k + 0.5) * step  # (N, F, M, most)
    size = size[..., None, None]
    real = (k < count[..., None, None]) & (position >= -1) & (position <= size)
    low, high, weight = _neighbours(position, size)
    share = torch.where(real, 1 / count[..., None, None], 0.0)
    weights = torch.zeros(*position.shape[:3], length, device=start.device)
    weights.scatter_add_(3, low.clamp(max=length - 1), share * (1 - weight))
    return weights.scatter_add_(3, high.clamp(max=length - 1), share * weight)
