"""Mask targets from polygons, edge by edge as pycocotools does it: the definition.

`rasterise` is rleFrPoly of pycocotools' maskApi.c, step by step. Python computes as C does on x86, in float64
without fused multiply-add, so that the masks are equal bit for bit.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

SCALE = 5  # fine rows and columns of a mask pixel
Point = tuple[int, int]  # column and row on the fine grid


def polygon_mask_targets(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    vertices: Tensor,
    part_start: Tensor,
    first_part: Tensor,
    parts: Tensor,
    to_input: Tensor,
    step: Tensor,
    *,
    resolution: int,
) -> Tensor:
    """(T, M, M) bool: detectron2's PolygonMasks.crop_and_resize; see `op.polygon_mask_targets`.

    Vertices move by the box's corner and grow by M over its sides, of at least 0.1; an object is the union
    of its polygons. A box that is not finite and an image or object that is not there give zeros.
    """
    masks = torch.zeros((len(boxes), resolution, resolution), dtype=torch.bool)
    for mask, box, i, j in zip(masks, boxes.float(), image.tolist(), matched.tolist(), strict=True):
        if not box.isfinite().all() or i not in range(len(parts)) or j not in range(parts.shape[1]):
            continue
        side = (box[2:] - box[:2]).clamp(min=0.1)
        ratio = torch.full_like(side, resolution) / side  # in float32, the type of detectron2's boxes
        first = int(first_part[i, j])
        affine = to_input[i, j] if to_input.dim() == 4 else to_input[i]  # of the object, or of the image
        for begin, end in pairwise(part_start[first : first + int(parts[i, j]) + 1].tolist()):
            x, y = vertices[begin:end].T
            moved = torch.stack([row[0] * x + row[1] * y + row[2] for row in affine], dim=1)
            mask |= rasterise(((moved - box[:2].double()) * ratio.double()).tolist(), resolution)
    return masks


def rasterise(polygon: list[list[float]], resolution: int) -> Tensor:
    """(M, M) bool of vertices x, y in mask pixels, by the even-odd rule."""
    fine = [(int(SCALE * x + 0.5), int(SCALE * y + 0.5)) for x, y in polygon]
    chain = [point for edge in zip(fine, fine[1:] + fine[:1], strict=True) for point in walk(*edge)]
    mask = torch.zeros((resolution, resolution), dtype=torch.bool)
    for (u, v), (next_u, next_v) in pairwise(chain):
        column, fine_column = divmod(min(u, next_u), SCALE)
        # Where the chain steps over the middle of a column, the column is toggled from there on.
        if u != next_u and fine_column == SCALE // 2 and 0 <= column < resolution:
            row = math.ceil(min(max((min(v, next_v) + 0.5) / SCALE - 0.5, 0), resolution))
            mask[row:, column] ^= True
    return mask


def walk(start: Point, end: Point) -> list[Point]:
    """The points of an edge: one in each column, or in each row if it is higher than wide."""
    across, down = abs(end[0] - start[0]), abs(end[1] - start[1])
    flat = across >= down
    turned = start[0] > end[0] if flat else start[1] > end[1]
    (x, y), (other_x, other_y) = (end, start) if turned else (start, end)
    if flat:
        slope = (other_y - y) / max(across, 1)
        points = [(x + t, int(y + slope * t + 0.5)) for t in range(across + 1)]
    else:
        slope = (other_x - x) / down
        points = [(int(x + slope * t + 0.5), y + t) for t in range(down + 1)]
    return points[::-1] if turned else points
