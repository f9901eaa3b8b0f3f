"""Small squares cut out of maps, and a gradient that touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """Cells of the maps of a pyramid, T in all."""

    image: Tensor  # (T,) int64
    level: Tensor  # (T,) int64, counted from the first map
    y: Tensor  # (T,) int64
    x: Tensor  # (T,) int64


def cells_of(index: Tensor, features: Sequence[Tensor], per_cell: int) -> tuple[Cells, Tensor]:
    """Where anchors stand, from their number among all: level by level, row by row, cell by cell.

    Args:
        index: (N, S) int64, anchors of each image.
        per_cell: A, anchors of a cell.
    Returns:
        cells (N * S), and each anchor's number within its cell (N * S,).
    """
    flat = index.flatten()
    cell, within = flat // per_cell, flat % per_cell
    level, x, y = torch.zeros_like(cell), torch.zeros_like(cell), torch.zeros_like(cell)
    first = 0
    for number, feature in enumerate(features):
        height, width = feature.shape[2:]
        local = cell - first
        there = (local >= 0) & (local < height * width)
        level = torch.where(there, number, level)
        y = torch.where(there, local // width, y)
        x = torch.where(there, local % width, x)
        first += height * width
    image = torch.arange(len(index), device=index.device)[:, None].expand_as(index).flatten()
    return Cells(image, level, y, x), within


def take_patches(features: Sequence[Tensor], cells: Cells, reach: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The surroundings of cells, zero outside of their map.

    The maps that come back are to be read by what follows, in place of those that went in: the patches'
    gradient is added to theirs in its places. Gathered from the maps by themselves, it would be a map of
    zeros for each level, and another pass to add it.

    Args:
        features: of each level (N, C, H, W).
        reach: cells on each side, 1 gives 3x3.
    Returns:
        the maps; patches (T, C, k, k), channels_last, k = 2 * reach + 1; whether their cells lie inside of
        the map, (T, 1, k, k) bool.
    """
    side = 2 * reach + 1
    offset = torch.arange(-reach, reach + 1, device=cells.y.device)
    y = (cells.y[:, None, None] + offset[:, None]).expand(-1, side, side).flatten()
    x = (cells.x[:, None, None] + offset).expand(-1, side, side).flatten()
    image, level = (t[:, None].expand(-1, side * side).flatten() for t in (cells.image, cells.level))
    number = torch.arange(len(y), device=y.device)
    inside_any = torch.zeros_like(y, dtype=torch.bool)
    places: list[Tensor] = []
    for index, feature in enumerate(features):
        height, width = feature.shape[2:]
        inside = (level == index) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        # The others read, and add zero, somewhere: spread out, since additions to one cell wait in line.
        places += [
            torch.where(inside, y, number // width % height),
            torch.where(inside, x, number % width),
            inside,
        ]
        inside_any = inside_any | inside
    *maps, rows = _TakePatches.apply(image, len(features), *places, *features)
    patches = rows.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)
    return maps, patches, inside_any.unflatten(0, (-1, 1, side, side))


class _TakePatches(torch.autograd.Function):
    @staticmethod
    def forward(image: Tensor, levels: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        places, features = tensors[: 3 * levels], tensors[3 * levels :]
        rows = features[0].new_zeros((len(image), features[0].shape[1]))
        for index, feature in enumerate(features):
            y, x, inside = places[3 * index : 3 * index + 3]
            rows = torch.where(inside[:, None], feature[image, :, y, x], rows)
        return *(feature.view_as(feature) for feature in features), rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        image, ctx.levels, *tensors = inputs
        ctx.save_for_backward(image, *tensors[: 3 * ctx.levels])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, *places = ctx.saved_tensors
        *maps, rows = grads
        added = []
        for index, grad in enumerate(maps):
            y, x, inside = places[3 * index : 3 * index + 3]
            values = torch.where(inside[:, None], rows, 0.0).to(grad.dtype)
            added.append(torch.ops.aten.index_put(grad, [image, None, y, x], values, True))
        return (*(None for _ in range(2 + len(places))), *added)
