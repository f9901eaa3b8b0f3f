"""Mask targets: the share of each mask pixel that the ground truth covers, read from packed bitmaps."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_targets(
    boxes: Tensor,
    image: Tensor,
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
        boxes: (F, 4) float32 xyxy in input pixels, within the image.
        image: (F,) int64 in 0..N-1.
        matched: (F,) int64 in 0..G-1, slot of the object in the tables below.
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
        (F, M, M) float32 in 0..1. An object without a window gives zeros.
    """
    row = image * offset.shape[1] + matched
    offset = offset.flatten().index_select(0, row)  # (F,)
    window = window.flatten(0, 1).index_select(0, row).long()  # (F, 4)
    affine = to_annotation.index_select(0, image)[..., None, None]  # (F, 2, 3, 1, 1)
    start, pixel = _grid(boxes, resolution, aligned)
    if sampling_ratio <= 0:
        image_sizes = image_sizes.index_select(0, image)
        return _adaptive(start, pixel, buffer, offset, window, affine, image_sizes, image_shape, resolution)
    steps = (torch.arange(resolution * sampling_ratio, device=boxes.device) + 0.5) / sampling_ratio
    position = start[..., None] + steps * pixel[..., None] + 0.5  # (F, 2, M*s), continuous x and y
    u, v = _annotation_position(affine, position[:, 0, None, :], position[:, 1, :, None])
    u, v = u - 0.5, v - 0.5  # (F, M*s, M*s) column and row, as pixel indices
    height, width = size.index_select(0, image).unsqueeze(-1).unsqueeze(-1).unbind(1)
    inside = (u >= -1) & (u <= width) & (v >= -1) & (v <= height)
    u0, u1, du = _neighbours(u, width)
    v0, v1, dv = _neighbours(v, height)

    def read(column: Tensor, row: Tensor) -> Tensor:
        return _read(buffer, offset, window, column, row).float()

    top = read(u0, v0) * (1 - du) + read(u1, v0) * du
    bottom = read(u0, v1) * (1 - du) + read(u1, v1) * du
    value = torch.where(inside, top * (1 - dv) + bottom * dv, 0.0)
    split = (resolution, sampling_ratio)
    return value.unflatten(2, split).unflatten(1, split).mean((2, 4))


def _annotation_position(affine: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Continuous annotation coordinates of input coordinates; affine is (F, 2, 3, 1, 1)."""
    u, v = (affine[:, i, 0] * x + affine[:, i, 1] * y + affine[:, i, 2] for i in (0, 1))
    return u, v


def _grid(boxes: Tensor, resolution: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """First corner, in pixel-index coordinates, and side of a mask pixel: both (F, 2) as x, y."""
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
    """Bytes at annotation pixels (F, h, w); zero outside the crop, where the bitmap is zero too."""
    left, top, width, height = window[..., None, None].unbind(1)
    column, row = column - left, row - top
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    address = torch.where(inside, offset[:, None, None] + row * width + column, 0)
    return torch.where(inside, buffer[address], 0)


def _adaptive(
    start: Tensor,
    pixel: Tensor,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    affine: Tensor,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    resolution: int,
) -> Tensor:
    """The average of bilinear samples is separable: weights over rows x bitmap x weights over columns."""
    height, width = image_shape
    rows = _axis_weights(start[:, 1], pixel[:, 1], image_sizes[:, 0], height, resolution)
    columns = _axis_weights(start[:, 0], pixel[:, 0], image_sizes[:, 1], width, resolution)
    y = torch.arange(height, device=start.device)[:, None] + 0.5
    x = torch.arange(width, device=start.device)[None, :] + 0.5
    masks = [start.new_zeros(0, resolution, resolution)]
    for slot in range(len(start)):  # one at a time: a whole bitmap in the input's resolution each
        one = slice(slot, slot + 1)
        u, v = (t.floor().long() for t in _annotation_position(affine[one], x, y))
        bitmap = _read(buffer, offset[one], window[one], u, v).float()
        masks.append(rows[one] @ bitmap @ columns[one].mT)
    return torch.cat(masks)


def _axis_weights(start: Tensor, pixel: Tensor, size: Tensor, length: int, resolution: int) -> Tensor:
    """(F, M, length): how much each input row (or column) counts in each mask row (or column)."""
    count = pixel.ceil().clamp(min=1)
    most = -(-length // resolution) + 1
    k = torch.arange(most, device=start.device)
    i = torch.arange(resolution, device=start.device)[:, None]
    step = (pixel / count)[..., None, None]
    position = start[..., None, None] + i * pixel[..., None, None] + (k + 0.5) * step  # (F, M, most)
    size = size[..., None, None]
    real = (k < count[..., None, None]) & (position >= -1) & (position <= size)
    low, high, weight = _neighbours(position, size)
    share = torch.where(real, 1 / count[..., None, None], 0.0)
    weights = torch.zeros(*position.shape[:2], length, device=start.device)
    weights.scatter_add_(2, low.clamp(max=length - 1), share * (1 - weight))
    return weights.scatter_add_(2, high.clamp(max=length - 1), share * weight)
