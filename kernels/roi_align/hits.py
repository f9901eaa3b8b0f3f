"""RoIAlign in Triton, backward: which RoIs touch which tile of the maps."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch
from ..common.library import sum_dtype
from ..common.pooling import Asked
from .geometry import axis, bins_of, level_of, load_boxes, scale_of, size_of, touched
from .launch import TILE, Config, bin_arguments, box_arguments, first_tiles, level_arguments, parts_of

ITEMS_PER_WORD = 32


class Items(NamedTuple):
    """What the kernel that runs over the items of a tile is told of them: parts of the bins of RoIs."""

    places: Tensor  # (R, 6) where each RoI lies
    lists: Tensor  # (places,) int32, items of the tiles one after the other
    ranges: Tensor  # (tiles, 2) int64, where the items of a tile begin, and how many there are
    rois_per_image: int
    launches: list[Launch]  # that find all this


def find(grad: Tensor, asked: Asked, num_images: int, sizes: list[tuple[int, int]], config: Config) -> Items:
    """Bits say which items touch a tile; lists follow from the bits, so that their order is always the same.

    An item is on one map, and touches at most all of its tiles: that bounds the lists. Where in the memory
    for them that of a tile lies follows from which program comes first, and changes nothing.
    """
    rois, device, how = grad.shape[0], grad.device, asked.how
    firsts, tiles = first_tiles(num_images, sizes)
    rois_per_image = rois if asked.batch_index is not None else rois // max(num_images, 1)
    items = rois * parts_of(how)
    words = triton.cdiv(rois_per_image * parts_of(how), ITEMS_PER_WORD)
    places = torch.empty((rois, 6), dtype=sum_dtype(grad), device=device)
    largest_map = max(triton.cdiv(h, TILE) * triton.cdiv(w, TILE) for h, w in sizes)
    lists = torch.empty((items * largest_map,), dtype=torch.int32, device=device)
    ranges = torch.empty((tiles, 2), dtype=torch.int64, device=device)
    # What is zero at the beginning, in one piece: how much of `lists` is taken, and the bits.
    zeros = torch.zeros((4 + tiles * words,), dtype=torch.int32, device=device)
    taken, hits = zeros[:2].view(torch.int64), zeros[4:]
    mark = {
        **box_arguments(asked.boxes, asked.batch_index, asked.valid),
        **bin_arguments(how, sizes),
        **level_arguments(how),
        "hits_ptr": hits,
        "places_ptr": places,
        "first_tiles": firsts,
        "rois_per_image": rois_per_image,
        "num_images": num_images,
        "words": words,
        "DTYPE": config.dtype,
        "ITEMS": ITEMS_PER_WORD,
        "PARTS": parts_of(how),
        "BLOCK": 32,
    }
    write = {
        "hits_ptr": hits,
        "taken_ptr": taken,
        "list_ptr": lists,
        "range_ptr": ranges,
        "words": words,
        "ITEMS": ITEMS_PER_WORD,
        "COUNT_WORDS": 32,
        "BLOCK_WORDS": 8,
    }
    launches = [
        Launch(_hits_kernel, (items,), mark, num_warps=1),
        Launch(_list_kernel, (tiles,), write, num_warps=1),
    ]
    return Items(places, lists, ranges, rois_per_image, launches)


@triton.jit(do_not_specialize=["rois_per_image", "num_images", "words"])
def _hits_kernel(
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    hits_ptr,  # (tiles, words) int32, zeros; bit b of word w: its image's item 32 w + b touches the tile
    places_ptr,  # (R, 6) start, length of a bin and distance of samples, of y and of x; of RoIs that count
    stride_roi, stride_coordinate, stride_batch,
    heights, widths,  # of each level, coded
    first_tiles,  # of each level, the index of its first tile, coded
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
    height = size_of(heights, level)
    width = size_of(widths, level)
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
    first_tile = size_of(first_tiles, level) + image * tiles
    bit = tl.full((BLOCK,), 1, tl.int32) << (item % ITEMS)
    for begin in range(0, count, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        row = first_row + tile // touched_columns
        column = first_column + tile % touched_columns
        at = (first_tile + row * columns + column).to(tl.int64) * words + item // ITEMS
        # Bits come to the same in any order.
        tl.atomic_or(hits_ptr + at, bit, mask=tile < count, sem="relaxed")


@triton.jit(do_not_specialize=["words"])
def _list_kernel(
    hits_ptr,  # (tiles, words) int32
    taken_ptr,  # (1,) int64, zero; raised, how much of the lists' memory is taken
    list_ptr,  # int32, written, items that touch a tile, in their order
    range_ptr,  # (tiles, 2) int64, written, where the items of a tile begin and how many there are
    words, ITEMS: tl.constexpr, COUNT_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row_ptr = hits_ptr + tile * words
    count = 0
    for begin in range(0, words, COUNT_WORDS):
        word = begin + tl.arange(0, COUNT_WORDS)
        count += tl.sum(_bits_set(tl.load(row_ptr + word, mask=word < words, other=0)), axis=0)
    tl.store(range_ptr + tile * 2 + 1, tl.cast(count, tl.int64))
    if count != 0:
        first = tl.atomic_add(taken_ptr, tl.cast(count, tl.int64), sem="relaxed")
        tl.store(range_ptr + tile * 2, first)
        list_ptr += first
        lane = tl.arange(0, BLOCK_WORDS * ITEMS)
        for begin in range(0, words, BLOCK_WORDS):
            word = begin + tl.arange(0, BLOCK_WORDS)
            bits = tl.load(row_ptr + word, mask=word < words, other=0)
            if tl.max((bits != 0).to(tl.int32), axis=0) != 0:  # of most blocks no item touches the tile
                own = begin + lane // ITEMS
                bit = (tl.load(row_ptr + own, mask=own < words, other=0) >> (lane % ITEMS)) & 1
                tl.store(list_ptr + tl.cumsum(bit, axis=0) - 1, begin * ITEMS + lane, mask=bit != 0)
                list_ptr += tl.sum(bit, axis=0)


@triton.jit
def _bits_set(words):
    """How many, of 32 each: in pairs, fours, eights and so on, side by side."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = (bits & 0x55555555) + ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits & 0x0F0F0F0F) + ((bits >> 4) & 0x0F0F0F0F)
    bits += bits >> 8
    return ((bits + (bits >> 16)) & 0x3F).to(tl.int32)
