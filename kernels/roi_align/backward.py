"""RoIAlign in Triton, backward: an 8 x 8 pixel tile of a map a program, over all levels in one launch."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, Target, reach, target_of
from ..common.pooling import Pooling, empty_maps
from .geometry import axis, bins_of, level_of, load_boxes, scale_of, select, tile_of, touched, weights
from .launch import (
    TILE,
    bin_arguments,
    box_arguments,
    configure,
    level_arguments,
    parts_of,
    product_arguments,
)

ITEMS_PER_WORD = 32


def launches(
    grad: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    channels_last: bool,
    how: Pooling,
    target: Target | None = None,
) -> tuple[list[Tensor], list[Launch]]:
    rois, channels = grad.shape[:2]
    grads = empty_maps(grad, num_images, sizes, channels_last)
    vectors = channels_last and grad.stride(1) == 1
    config = configure(grad.dtype, channels, vectors, target or target_of(grad.device))
    tiles = [num_images * triton.cdiv(h, TILE) * triton.cdiv(w, TILE) for h, w in sizes]
    rois_per_image = rois if batch_index is not None else rois // max(num_images, 1)
    words = triton.cdiv(rois_per_image * parts_of(how), ITEMS_PER_WORD)
    of_boxes = box_arguments(boxes, batch_index, valid)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    common = {
        "hits_ptr": torch.empty((sum(tiles), words), dtype=torch.int32, device=grad.device),
        "places_ptr": torch.empty((rois, 6), dtype=wide, device=grad.device),
        # The coarsest level has the tiles with the most RoIs: they start first.
        "first_tiles": tuple(sum(tiles[level + 1 :]) for level in range(len(tiles))),
        "rois_per_image": rois_per_image,
        "words": words,
        "HAS_BATCH": of_boxes.pop("HAS_BATCH"),
        "ITEMS": ITEMS_PER_WORD,
        **bin_arguments(how, sizes),
    }
    find = {
        **common,
        **of_boxes,
        **level_arguments(how),
        "num_images": num_images,
        "DTYPE": config.dtype,
        "BLOCK": 64,
    }
    gather = {
        **common,
        "grad_ptr": grad,
        **{f"grad_{axis}": grad.stride(i) for i, axis in enumerate("rcij")},
        "grads": tuple(grads),
        "channels": channels,
        "LAYOUT": "channels_last" if channels_last else "contiguous",
        "INDEX": tl.int32 if reach(grad) < 2**31 else tl.int64,
        "BLOCK_WORDS": triton.next_power_of_2(max(words, 1)),
        **product_arguments(config, how),
    }
    grid = (sum(tiles), triton.cdiv(channels, config.block_c))
    return grads, [
        Launch(_hits_kernel, (words, num_images * len(sizes)), find),
        Launch(_roi_align_backward_kernel, grid, gather, config.num_warps, config.options),
    ]


@triton.jit
def _hits_kernel(
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    hits_ptr,  # (tiles, words) int32, bit b of word w: the tile is touched by the image's item 32 w + b
    places_ptr,  # (R, 6) start, length of a bin and distance of samples, of y and of x; of RoIs that count
    stride_roi, stride_coordinate, stride_batch,
    heights, widths,  # of each level
    first_tiles,  # of each level, the index of its first tile
    rois_per_image, num_images, words,
    OH: tl.constexpr, OW: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,  # an item: a part of bins
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0)
    image = tl.program_id(1) // len(SCALES)
    level = tl.program_id(1) % len(SCALES)
    height = select(heights, level, level * 0 + heights[0])
    width = select(widths, level, level * 0 + widths[0])
    first_tile = select(first_tiles, level, level * 0 + first_tiles[0])

    lane = tl.arange(0, ITEMS)
    roi, first_i, last_i, first_j, last_j = bins_of(word * ITEMS + lane, OH, OW, PART_H, PART_W)
    exists = roi < rois_per_image
    if not HAS_BATCH:
        roi += image * rois_per_image
    x1, y1, x2, y2, images, real = load_boxes(
        boxes_ptr, batch_ptr, valid_ptr, roi, exists,
        stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
        HAS_BATCH, HAS_VALID, DTYPE,
    )  # fmt: skip
    levels = level_of(x1, y1, x2, y2, len(SCALES), AREA)
    scale = scale_of(levels, x1, SCALES)
    start_y, bin_y, step_y, samples_y = axis(y1, y2, scale, OH, SAMPLES, ALIGNED)
    start_x, bin_x, step_x, samples_x = axis(x1, x2, scale, OW, SAMPLES, ALIGNED)
    top, bottom = touched(start_y, bin_y, step_y, samples_y, height, first_i, last_i)
    left, right = touched(start_x, bin_x, step_x, samples_x, width, first_j, last_j)
    here = real & (levels == level) & (images == image)
    place_ptr = places_ptr + roi.to(tl.int64) * 6  # every item of an RoI writes the same
    tl.store(place_ptr, start_y, mask=here)
    tl.store(place_ptr + 1, bin_y, mask=here)
    tl.store(place_ptr + 2, step_y, mask=here)
    tl.store(place_ptr + 3, start_x, mask=here)
    tl.store(place_ptr + 4, bin_x, mask=here)
    tl.store(place_ptr + 5, step_x, mask=here)

    here = here & (bottom >= top) & (right >= left)
    columns = (width + TILE - 1) // TILE
    tiles = (height + TILE - 1) // TILE * columns
    bit = tl.full((ITEMS,), 1, tl.int64) << lane
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        y0 = (tile // columns * TILE)[:, None]
        x0 = (tile % columns * TILE)[:, None]
        hit = (y0 <= bottom[None, :]) & (y0 + TILE > top[None, :]) & here[None, :]
        hit = hit & (x0 <= right[None, :]) & (x0 + TILE > left[None, :])
        bits = tl.sum(tl.where(hit, bit[None, :], 0), axis=1)
        at = (first_tile + image * tiles + tile).to(tl.int64) * words + word
        tl.store(hits_ptr + at, bits.to(tl.int32), mask=tile < tiles)


@triton.jit
def _roi_align_backward_kernel(
    grad_ptr,  # (R, C, OH, OW)
    hits_ptr,  # (tiles, words) int32
    places_ptr,  # (R, 6)
    grads,  # of each level, (N, C, Hl, Wl), channels_last or contiguous
    grad_r, grad_c: tl.constexpr, grad_i: tl.constexpr, grad_j: tl.constexpr,
    heights, widths,  # of each level
    first_tiles,  # of each level, the index of its first tile
    rois_per_image, words, channels,
    OH: tl.constexpr, OW: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,
    SAMPLES: tl.constexpr, HAS_BATCH: tl.constexpr, LAYOUT: tl.constexpr, INDEX: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, ITEMS: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    level, height, width, image, y0, x0 = tile_of(index, heights, widths, first_tiles, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_roi = 0 if HAS_BATCH else image * rois_per_image

    side = tl.arange(0, TILE)
    i = tl.arange(0, TILE * TILE) // TILE
    j = tl.arange(0, TILE * TILE) % TILE
    offset = (i.to(INDEX) * grad_i + j.to(INDEX) * grad_j)[:, None] + (channel.to(INDEX) * grad_c)[None, :]
    all_words = tl.arange(0, BLOCK_WORDS)
    row_ptr = hits_ptr + index.to(tl.int64) * words
    any_bit = tl.load(row_ptr + all_words, mask=all_words < words, other=0) != 0
    word = tl.min(tl.where(any_bit, all_words, BLOCK_WORDS), axis=0)
    end_word = tl.max(tl.where(any_bit, all_words + 1, 0), axis=0)

    bits = _load_bits(row_ptr, word, end_word)
    roi, first_i, last_i, first_j, last_j = bins_of(word * ITEMS + _lowest(bits), OH, OW, PART_H, PART_W)
    roi += first_roi
    start_y, bin_y, step_y, start_x, bin_x, step_x = _load_place(places_ptr, roi, bits)
    bin_ptr = grad_ptr + (
        roi.to(tl.int64) * grad_r + first_i.to(tl.int64) * grad_i + first_j.to(tl.int64) * grad_j
    )
    inside = (i <= last_i - first_i) & (j <= last_j - first_j) & (bits != 0)
    bin_grad = tl.load(bin_ptr + offset, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)
    acc = tl.zeros((TILE * TILE, BLOCK_C), dtype=DTYPE)
    while bits != 0:
        # What the next item needs is on its way while this one is added.
        bits = bits & (bits - 1)
        while (bits == 0) & (word + 1 < end_word):
            word += 1
            bits = _load_bits(row_ptr, word, end_word)
        roi, next_i, last_i, next_j, last_j = bins_of(word * ITEMS + _lowest(bits), OH, OW, PART_H, PART_W)
        roi += first_roi
        next_start_y, next_bin_y, next_step_y, next_start_x, next_bin_x, next_step_x = _load_place(
            places_ptr, roi, bits
        )
        bin_ptr = grad_ptr + (
            roi.to(tl.int64) * grad_r + next_i.to(tl.int64) * grad_i + next_j.to(tl.int64) * grad_j
        )
        inside = (i <= last_i - next_i) & (j <= last_j - next_j) & (bits != 0)
        next_grad = tl.load(bin_ptr + offset, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)

        weight_y = weights(
            (y0 + side)[:, None], (first_i + side)[None, :], start_y, bin_y, step_y, height, SAMPLES, SLOTS
        )
        weight_x = weights(
            (x0 + side)[:, None], (first_j + side)[None, :], start_x, bin_x, step_x, width, SAMPLES, SLOTS
        )
        weight = tl.reshape(
            weight_y[:, None, :, None] * weight_x[None, :, None, :] * WEIGHT_SCALE, (TILE * TILE, TILE * TILE)
        )
        acc = tl.dot(
            weight.to(DOT_DTYPE), bin_grad.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=DTYPE
        )
        bin_grad, first_i, first_j = next_grad, next_i, next_j
        start_y, bin_y, step_y = next_start_y, next_bin_y, next_step_y
        start_x, bin_x, step_x = next_start_x, next_bin_x, next_step_x

    y = y0 + i
    x = x0 + j
    pixel = y.to(tl.int64) * width + x
    map_ptr = select(grads, level, grads[0]) + image.to(tl.int64) * height * width * channels
    if LAYOUT == "channels_last":
        pixel_ptr = (map_ptr + pixel * channels)[:, None] + channel[None, :]
    else:
        pixel_ptr = (map_ptr + pixel)[:, None] + (channel.to(tl.int64) * height * width)[None, :]
    tl.store(
        pixel_ptr,
        (acc * (1.0 / WEIGHT_SCALE)).to(grad_ptr.dtype.element_ty),
        mask=((y < height) & (x < width))[:, None] & (channel < channels)[None, :],
    )


@triton.jit
def _load_bits(row_ptr, word, end_word):
    return tl.load(row_ptr + word, mask=word < end_word, other=0).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _lowest(bits):
    """Number of the lowest bit, of 32; 0 of none. As a float32 the bit has its number in the exponent."""
    lowest = (bits & (0 - bits)).to(tl.float32)
    return tl.maximum((lowest.to(tl.int32, bitcast=True) >> 23) - 127, 0)


@triton.jit
def _load_place(places_ptr, roi, bits):
    place_ptr = places_ptr + roi.to(tl.int64) * 6
    return (
        tl.load(place_ptr, mask=bits != 0, other=0.0),
        tl.load(place_ptr + 1, mask=bits != 0, other=1.0),
        tl.load(place_ptr + 2, mask=bits != 0, other=1.0),
        tl.load(place_ptr + 3, mask=bits != 0, other=0.0),
        tl.load(place_ptr + 4, mask=bits != 0, other=1.0),
        tl.load(place_ptr + 5, mask=bits != 0, other=1.0),
    )
