"""RoIAlign in Triton, backward: an 8 x 8 pixel tile of a map a program, over all levels in one launch."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._spec import Launch
from ..level_assign.reference import first_threshold
from .geometry import axis, bins_near, level_of, load_boxes, scale_of, select, touched, weights
from .launch import HIP, TILE, box_arguments, configure, geometry_arguments, product_arguments
from .rois import Pooling, memory_format

ROIS_PER_WORD = 32


def launches(
    grad: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    channels_last: bool,
    how: Pooling,
    hip: bool = HIP,
) -> tuple[list[Tensor], list[Launch]]:
    rois, channels = grad.shape[:2]
    form = memory_format(channels_last)
    grads = [
        torch.empty((num_images, channels, *size), dtype=grad.dtype, device=grad.device, memory_format=form)
        for size in sizes
    ]
    config = configure(grad.dtype, channels, channels_last and grad.stride(1) == 1, hip)
    tiles = [num_images * triton.cdiv(h, TILE) * triton.cdiv(w, TILE) for h, w in sizes]
    per_image = rois if batch_index is not None else rois // max(num_images, 1)
    words = triton.cdiv(per_image, ROIS_PER_WORD)
    hits = torch.empty((sum(tiles), words), dtype=torch.int32, device=grad.device)
    common = {
        "hits_ptr": hits,
        # The coarsest level has the tiles with the most RoIs: they start first.
        "first_tiles": tuple(sum(tiles[level + 1 :]) for level in range(len(tiles))),
        "rois_per_image": per_image,
        "words": words,
        "ROIS": ROIS_PER_WORD,
        **geometry_arguments(how, sizes, config),
    }
    of_boxes = box_arguments(boxes, batch_index, valid)
    find = {
        **common,
        **of_boxes,
        "num_images": num_images,
        "AREA": first_threshold(how.k_min, how.canonical_size, how.canonical_level),
        "BLOCK": 64,
    }
    gather = {
        **common,
        **{name: of_boxes[name] for name in ("boxes_ptr", "stride_roi", "stride_coordinate", "HAS_BATCH")},
        "grad_ptr": grad,
        **{f"grad_{axis}": grad.stride(i) for i, axis in enumerate("rcij")},
        "grads": tuple(grads),
        "channels": channels,
        "LAYOUT": "channels_last" if channels_last else "contiguous",
        "BLOCK_WORDS": triton.next_power_of_2(max(words, 1)),
        **product_arguments(config, how),
    }
    grid = (sum(tiles), triton.cdiv(channels, config.block_c))
    return grads, [
        Launch(_hits_kernel, (words, num_images * len(sizes)), find),
        Launch(_backward_kernel, grid, gather, config.num_warps),
    ]


@triton.jit
def _hits_kernel(
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    hits_ptr,  # (tiles, words) int32, bit b of word w: the tile is touched by the image's RoI 32 w + b
    stride_roi, stride_coordinate, stride_batch,
    heights, widths,  # of each level
    first_tiles,  # of each level, the index of its first tile
    rois_per_image, num_images, words,
    OH: tl.constexpr, OW: tl.constexpr,
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, ROIS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0)
    image = tl.program_id(1) // len(SCALES)
    level = tl.program_id(1) % len(SCALES)
    height = select(heights, level, level * 0 + heights[0])
    width = select(widths, level, level * 0 + widths[0])
    first_tile = select(first_tiles, level, level * 0 + first_tiles[0])

    lane = tl.arange(0, ROIS)
    roi = word * ROIS + lane
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
    start_y, bin_y, samples_y = axis(y1, y2, scale, OH, SAMPLES, ALIGNED)
    start_x, bin_x, samples_x = axis(x1, x2, scale, OW, SAMPLES, ALIGNED)
    top, bottom = touched(start_y, bin_y, samples_y, height, 0, OH - 1)
    left, right = touched(start_x, bin_x, samples_x, width, 0, OW - 1)
    here = real & (levels == level) & (images == image) & (bottom >= top) & (right >= left)

    columns = (width + TILE - 1) // TILE
    tiles = (height + TILE - 1) // TILE * columns
    bit = tl.full((ROIS,), 1, tl.int64) << lane
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
def _backward_kernel(
    grad_ptr,  # (R, C, OH, OW)
    boxes_ptr,  # (R, 4) xyxy
    hits_ptr,  # (tiles, words) int32
    grads,  # of each level, (N, C, Hl, Wl), channels_last or contiguous
    grad_r, grad_c, grad_i, grad_j,
    stride_roi, stride_coordinate,
    heights, widths,  # of each level
    first_tiles,  # of each level, the index of its first tile
    rois_per_image, words, channels,
    OH: tl.constexpr, OW: tl.constexpr,
    SCALES: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BATCH: tl.constexpr, LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, ROIS: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    # The coarsest level has the tiles with the most RoIs, so its tiles come first.
    index = tl.program_id(0)
    level = index * 0
    for coarser in tl.static_range(1, len(SCALES)):
        level = tl.where(index < first_tiles[coarser - 1], coarser, level)
    height = select(heights, level, level * 0 + heights[0])
    width = select(widths, level, level * 0 + widths[0])
    local = index - select(first_tiles, level, level * 0 + first_tiles[0])
    columns = (width + TILE - 1) // TILE
    tiles = (height + TILE - 1) // TILE * columns
    image = local // tiles
    y0 = local % tiles // columns * TILE
    x0 = local % tiles % columns * TILE
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    side = tl.arange(0, TILE)
    flat = tl.arange(0, TILE * TILE)
    acc = tl.zeros((TILE * TILE, BLOCK_C), dtype=DTYPE)
    all_words = tl.arange(0, BLOCK_WORDS)
    row_ptr = hits_ptr + index.to(tl.int64) * words
    any_bit = tl.load(row_ptr + all_words, mask=all_words < words, other=0) != 0
    first_word = tl.min(tl.where(any_bit, all_words, BLOCK_WORDS), axis=0)
    end_word = tl.max(tl.where(any_bit, all_words + 1, 0), axis=0)
    first_roi = 0 if HAS_BATCH else image * rois_per_image
    for word in range(first_word, end_word):
        bits = tl.load(row_ptr + word).to(tl.uint32, bitcast=True).to(tl.int64)
        while bits != 0:
            # The lowest bit, as a float32, has its number in the exponent.
            lowest = (bits & (0 - bits)).to(tl.float32)
            lane = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            bits = bits & (bits - 1)
            roi = first_roi + word * ROIS + lane
            box_ptr = boxes_ptr + roi.to(tl.int64) * stride_roi
            x1 = tl.load(box_ptr).to(DTYPE)
            y1 = tl.load(box_ptr + stride_coordinate).to(DTYPE)
            x2 = tl.load(box_ptr + 2 * stride_coordinate).to(DTYPE)
            y2 = tl.load(box_ptr + 3 * stride_coordinate).to(DTYPE)
            scale = scale_of(level, x1, SCALES)
            start_y, bin_y, samples_y = axis(y1, y2, scale, OH, SAMPLES, ALIGNED)
            start_x, bin_x, samples_x = axis(x1, x2, scale, OW, SAMPLES, ALIGNED)
            first_i, last_i = bins_near(y0, start_y, bin_y, OH, TILE)
            first_j, last_j = bins_near(x0, start_x, bin_x, OW, TILE)
            parts_j = (last_j - first_j + TILE) // TILE
            parts = (last_i - first_i + TILE) // TILE * parts_j
            for part in range(parts):
                i0 = first_i + part // parts_j * TILE
                j0 = first_j + part % parts_j * TILE
                weight_y = weights(
                    (y0 + side)[:, None],
                    (i0 + side)[None, :],
                    start_y,
                    bin_y,
                    samples_y,
                    height,
                    SAMPLES,
                    SLOTS,
                )
                weight_x = weights(
                    (x0 + side)[:, None],
                    (j0 + side)[None, :],
                    start_x,
                    bin_x,
                    samples_x,
                    width,
                    SAMPLES,
                    SLOTS,
                )
                weight = tl.reshape(
                    weight_y[:, None, :, None] * weight_x[None, :, None, :] * WEIGHT_SCALE,
                    (TILE * TILE, TILE * TILE),
                )
                i = i0 + flat // TILE
                j = j0 + flat % TILE
                bin_ptr = grad_ptr + roi.to(tl.int64) * grad_r + i * grad_i + j * grad_j
                bin_grad = tl.load(
                    bin_ptr[:, None] + (channel * grad_c)[None, :],
                    mask=((i <= last_i) & (j <= last_j))[:, None] & (channel < channels)[None, :],
                    other=0.0,
                )
                acc = tl.dot(
                    weight.to(DOT_DTYPE),
                    bin_grad.to(DOT_DTYPE),
                    acc,
                    input_precision=PRECISION,
                    out_dtype=DTYPE,
                )

    y = y0 + flat // TILE
    x = x0 + flat % TILE
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
