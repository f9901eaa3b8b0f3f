"""Polygons rasterised on the grid of each RoI as CPU tensors run it, in PyTorch; `naive.py` says how.

The rule is pycocotools' (maskApi, rleFrPoly), which works on a grid five times as fine as the mask's:

- vertices are scaled by five and rounded to that fine grid;
- an edge becomes a chain of fine points, one for each column it spans if it is wider than high, else one
  for each row, the other coordinate rounded;
- where the chain steps over the middle of a mask column, from fine column 5c + 2 to 5c + 3, that column
  is toggled from the first mask pixel whose middle is not above the lower of the two points' rows;
- a pixel is inside a polygon if it was toggled an odd number of times, and inside the object if it is
  inside one of its polygons.

Only the points beside those middles matter, so they are computed directly, never the whole chain. Every
step is rounded as pycocotools rounds it on x86 (float64, no fused multiply-add), so the masks are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 5  # fine rows and columns of a mask pixel
MIN_SIDE = 0.1  # of a box, as in detectron2
EDGES = 32  # at once
BITS = 63  # rows in a word of int64, less the one that a shift may not pass


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
    resolution: int,
) -> Tensor:
    """See `op.polygon_mask_targets`."""
    image, matched, step = image.long(), matched.long(), step.long()
    known = boxes.isfinite().all(1) & in_range(image, matched, first_part)
    image, matched = image.where(known, 0), matched.where(known, 0)
    row = image * first_part.shape[1] + matched
    first = first_part.flatten().index_select(0, row).long()
    count = parts.flatten().index_select(0, row).where(known, 0)
    begin, end = part_start.index_select(0, first), part_start.index_select(0, first + count)
    index = begin[:, None] + step  # (T, E), the object's vertices one after the other
    real = index < end[:, None]
    index = index.where(real, 0)
    part = torch.searchsorted(part_start, index.to(part_start.dtype), right=True) - 1
    part = part.clamp(max=len(part_start) - 2)
    closes = index + 1 == part_start[part + 1]  # the last vertex of a part goes back to its first
    following = part_start[part].where(closes, index + 1)

    affine = to_input.index_select(0, image)
    a = fine_vertices(vertices[index], affine, boxes, resolution)
    b = fine_vertices(vertices[following], affine, boxes, resolution)
    # A column of the mask is a word of bits, one for each row, or several words.
    top = torch.arange(0, resolution, BITS, device=boxes.device)
    inside = index.new_zeros((len(boxes), resolution, len(top)))  # (T, M, words)
    odd = torch.zeros_like(inside)  # of the part that the edges are in
    for low in range(0, len(step), EDGES):
        some = slice(low, low + EDGES)
        crosses, row = crossings(a[:, some], b[:, some], resolution)
        word = -1 << (row[..., None] - top).clamp(0, BITS)  # the rows from there on
        word = word.where((crosses & real[:, some, None])[..., None], 0)
        for edge, done in enumerate(closes[:, some, None, None].unbind(1)):
            odd = odd ^ word[:, edge]
            inside = (inside | odd).where(done, inside)
            odd = odd.where(~done, 0)
    bit = torch.arange(BITS, device=boxes.device)
    rows = (inside[..., None] >> bit & 1).flatten(2)[..., :resolution]  # (T, M, M), columns first
    return rows.mT.bool().contiguous()


def in_range(image: Tensor, matched: Tensor, first_part: Tensor) -> Tensor:
    """(T,) bool, whether the tables (N, G) have that slot."""
    images, slots = first_part.shape
    return (image >= 0) & (image < images) & (matched >= 0) & (matched < slots)


def fine_vertices(points: Tensor, affine: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """Annotation pixels (T, E, 2) -> whole numbers on the fine grid of each box, (T, E, 2) float64."""
    x, y = points[..., 0, None], points[..., 1, None]
    affine = affine[:, None]
    position = affine[..., 0] * x + affine[..., 1] * y + affine[..., 2]  # input pixels
    side = boxes[:, 2:] - boxes[:, :2]
    # detectron2 divides in float32, the type of its boxes; all else is float64.
    # (torch divides a number by a tensor as number * (1 / tensor), which rounds twice)
    ratio = torch.full_like(side, resolution) / side.clamp(min=MIN_SIDE)
    position = (position - boxes[:, None, :2].double()) * ratio[:, None].double()
    return (SCALE * position + 0.5).trunc()


def crossings(a: Tensor, b: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Where the edges from a to b (T, E, 2) step over the middles of the mask's columns.

    Returns:
        (T, E, M) bool, whether an edge does so in a column, and (T, E, M) int64, the first row, of
        0..M, that it toggles there.
    """
    border = SCALE * torch.arange(resolution, device=a.device, dtype=a.dtype) + (SCALE + 1) // 2
    before, after = border - 1, border  # the fine columns on both sides of each middle
    flat = ((a - b)[..., 0].abs() >= (a - b)[..., 1].abs())[..., None]
    # Edges run by rising x if flat, else by rising y.
    swap = torch.where(flat, a[..., :1] > b[..., :1], a[..., 1:] > b[..., 1:])
    start, end = a.where(~swap, b), b.where(~swap, a)
    (x, y), (dx, dy) = start[..., None].unbind(-2), (end - start)[..., None].unbind(-2)
    crosses = (x < border) != (x + dx < border)
    long, short = torch.where(flat, dx, dy), torch.where(flat, dy, dx)
    slope = short / long.where(long > 0, 1)  # 0 where there is no edge

    fine = torch.minimum(y + slope * (before - x) + 0.5, y + slope * (after - x) + 0.5).floor()

    # The row of the middle is known to far less than a row; which side of it counts is then looked up.
    near = ((border - 0.5 - x) * (long / short.where(short != 0, 1)) + 0.5).floor()
    reached = x + slope * near + 0.5 >= border
    steep = y + near - (reached == (slope > 0)).to(near.dtype)

    fine = torch.where(flat, fine, steep).where(crosses, 0.0).clamp(0, SCALE * resolution)
    return crosses, ((fine + SCALE // 2) / SCALE).long()
