"""RoIAlign in Triton, backward: which RoIs touch which tile of the maps."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch
from ..common.library import sum_dtype
from ..common.pooling import Pooling
from .geometry import axis, bins_of, level_of, load_boxes, scale_of, select, touched
from .launch import TILE, Config, bin_arguments, box_arguments, level_arguments, parts_of

ITEMS_PER_WORD = 32


def find(
    grad: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    how: Pooling,
    config: Config,
) -> tuple[dict[str, Any], list[Launch]]:
    """What the kernel that runs over the items of a tile is told of them, and the launches that find it.

    An item is a part of an RoI's bins. Bits say which of them touch a tile, and lists of them follow from
    the bits, so that their order is always the same.
    """
    rois, device = grad.shape[0], grad.device
    tiles = [num_images * triton.cdiv(h, TILE) * triton.cdiv(w, TILE) for h, w in sizes]
    rois_per_image = rois if batch_index is not None else rois // max(num_images, 1)
    words = triton.cdiv(rois_per_image * parts_of(how), ITEMS_PER_WORD)
    of_boxes = box_arguments(boxes, batch_index, valid)
    common = {
        "places_ptr": torch.empty((rois, 6), dtype=sum_dtype(grad), device=device),
        # The coarsest level has the tiles with the most RoIs: they start first.
        "first_tiles": tuple(sum(tiles[level + 1 :]) for level in range(len(tiles))),
        "rois_per_image": rois_per_image,
        "HAS_BATCH": of_boxes.pop("HAS_BATCH"),
        "words": words,
        "ITEMS": ITEMS_PER_WORD,
        **bin_arguments(how, sizes),
    }
    hits = torch.zeros((sum(tiles), words), dtype=torch.int32, device=device)
    mark = {
        **common,
        **of_boxes,
        **level_arguments(how),
        "hits_ptr": hits,
        "num_images": num_images,
        "DTYPE": config.dtype,
        "PARTS": parts_of(how),
        "BLOCK": 32,
    }
    lists = {
        "list_ptr": torch.empty((sum(tiles), words * ITEMS_PER_WORD), dtype=torch.int32, device=device),
        "count_ptr": torch.empty((sum(tiles),), dtype=torch.int32, device=device),
    }
    write = {**lists, "hits_ptr": hits, "words": words, "ITEMS": ITEMS_PER_WORD, "BLOCK_WORDS": 8}
    return {**common, **lists}, [
        Launch(_hits_kernel, (rois * parts_of(how),), mark, num_warps=1),
        Launch(_list_kernel, (sum(tiles),), write, num_warps=1),
    ]


@triton.jit
def _hits_kernel(
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    hits_ptr,  # (tiles, words) int32, zeros; bit b of word w: its image's item 32 w + b touches the tile
    places_ptr,  # (R, 6) start, length of a bin and distance of samples, of y and of x; of RoIs that count
    stride_roi, stride_coordinate, stride_batch,
    heights, widths,  # of each level
    first_tiles,  # of each level, the index of its first tile
    rois_per_image, num_images, words,
    OH: tl.constexpr, OW: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,  # an item: a part of bins
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, ITEMS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    roi, first_i, last_i, first_j, last_j = bins_of(item, OH, OW, PART_H, PART_W)
    x1, y1, x2, y2, image, real = load_boxes(
        boxes_ptr, batch_ptr, valid_ptr, roi, roi >= 0,
        stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
        HAS_BATCH, HAS_VALID, DTYPE,
    )  # fmt: skip
    if not HAS_BATCH:
        item -= image * rois_per_image * PARTS
    level = level_of(x1, y1, x2, y2, len(SCALES), AREA)
    scale = scale_of(level, x1, SCALES)
    height = select(heights, level, level * 0 + heights[0])
    width = select(widths, level, level * 0 + widths[0])
    start_y, bin_y, step_y, samples_y = axis(y1, y2, scale, OH, SAMPLES, ALIGNED)
    start_x, bin_x, step_x, samples_x = axis(x1, x2, scale, OW, SAMPLES, ALIGNED)
    place_ptr = places_ptr + roi.to(tl.int64) * 6  # every item of an RoI writes the same
    tl.store(place_ptr, start_y, mask=real)
    tl.store(place_ptr + 1, bin_y, mask=real)
    tl.store(place_ptr + 2, step_y, mask=real)
    tl.store(place_ptr + 3, start_x, mask=real)
    tl.store(place_ptr + 4, bin_x, mask=real)
    tl.store(place_ptr + 5, step_x, mask=real)

    top, bottom = touched(start_y, bin_y, step_y, samples_y, height, first_i, last_i)
    left, right = touched(start_x, bin_x, step_x, samples_x, width, first_j, last_j)
    here = real & (bottom >= top) & (right >= left)
    first_row, first_column = top // TILE, left // TILE
    touched_columns = tl.where(here, right // TILE - first_column + 1, 1)
    count = tl.where(here, (bottom // TILE - first_row + 1) * touched_columns, 0)
    columns = (width + TILE - 1) // TILE
    tiles = (height + TILE - 1) // TILE * columns
    first_tile = select(first_tiles, level, level * 0 + first_tiles[0]) + image * tiles
    bit = tl.full((BLOCK,), 1, tl.int32) << (item % ITEMS)
    for begin in range(0, count, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        row = first_row + tile // touched_columns
        column = first_column + tile % touched_columns
        at = (first_tile + row * columns + column).to(tl.int64) * words + item // ITEMS
        # Bits come to the same in any order.
        tl.atomic_or(hits_ptr + at, bit, mask=tile < count, sem="relaxed")


@triton.jit
def _list_kernel(
    hits_ptr,  # (tiles, words) int32
    list_ptr,  # (tiles, words * ITEMS) int32, items that touch the tile, in their order
    count_ptr,  # (tiles,) int32, how many there are
    words, ITEMS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row_ptr = hits_ptr + tile * words
    list_ptr += tile * words * ITEMS
    lane = tl.arange(0, BLOCK_WORDS * ITEMS)
    count = 0
    for begin in range(0, words, BLOCK_WORDS):
        word = begin + tl.arange(0, BLOCK_WORDS)
        bits = tl.load(row_ptr + word, mask=word < words, other=0)
        if tl.max((bits != 0).to(tl.int32), axis=0) != 0:  # of most blocks no item touches the tile
            own = begin + lane // ITEMS
            bit = (tl.load(row_ptr + own, mask=own < words, other=0) >> (lane % ITEMS)) & 1
            tl.store(list_ptr + count + tl.cumsum(bit, axis=0) - 1, begin * ITEMS + lane, mask=bit != 0)
            count += tl.sum(bit, axis=0)
    tl.store(count_ptr + tile, count)
