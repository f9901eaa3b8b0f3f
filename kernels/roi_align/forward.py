"""RoIAlign in Triton, forward: up to 8 x 8 bins of an RoI a program, over all levels in one launch."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, Target, target_of
from ..common.pooling import Pooling, empty_pooled
from .geometry import axis, bins_of, level_of, load_boxes, scale_of, select, size_of, touched, weights
from .launch import (
    bin_arguments,
    box_arguments,
    configure,
    layout_of,
    level_arguments,
    parts_of,
    product_arguments,
    slots_of,
    stride_arguments,
    two_programs,
)

STAGES = 3  # of the loop over tiles: the loads of one run ahead of the products of others


def launch(
    features: list[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    how: Pooling,
    target: Target | None = None,
) -> tuple[Tensor, Launch]:
    first = features[0]
    images, channels = first.shape[:2]
    rois = boxes.shape[0]
    out = empty_pooled(features, rois, how.output_size)
    layout = layout_of(features)
    vectors, target = layout == "channels_last", target or target_of(first.device)
    config = configure(first.dtype, channels, vectors, target)
    if vectors and first.element_size() == 2 and target.backend == "cuda":
        config = two_programs(config, target, STAGES)
    arguments = {
        "maps": tuple(features),
        "out_ptr": out,
        **stride_arguments(features, layout),
        **{f"out_{axis}": out.stride(i) for i, axis in enumerate("rcij")},
        **box_arguments(boxes, batch_index, valid),
        **bin_arguments(how, [(f.shape[2], f.shape[3]) for f in features]),
        **level_arguments(how),
        "rois_per_image": max(rois // max(images, 1), 1),
        "num_images": images,
        "channels": channels,
        "LAYOUT": layout,
        "SLOTS": slots_of(how),
        **product_arguments(config),
    }
    grid = (rois * parts_of(how), triton.cdiv(channels, config.block_c))
    return out, Launch(_roi_align_kernel, grid, arguments, config.num_warps, config.options)


@triton.jit(do_not_specialize=["rois_per_image", "num_images"])
def _roi_align_kernel(
    maps,  # of each level, (N, C, Hl, Wl)
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    out_ptr,  # (R, C, OH, OW)
    map_n, map_c, map_y, map_x,  # strides of each level, coded; None where LAYOUT tells them
    stride_roi, stride_coordinate, stride_batch,
    out_r, out_c, out_i, out_j,
    heights, widths,  # of each level, coded
    rois_per_image, num_images, channels,
    OH: tl.constexpr, OW: tl.constexpr,
    PART_H: tl.constexpr, PART_W: tl.constexpr,  # bins of a program, at most TILE along a side
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    roi, first_i, last_i, first_j, last_j = bins_of(tl.program_id(0), OH, OW, PART_H, PART_W)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    x1, y1, x2, y2, image, real = load_boxes(
        boxes_ptr, batch_ptr, valid_ptr, roi, roi >= 0,
        stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
        HAS_BATCH, HAS_VALID, DTYPE,
    )  # fmt: skip
    level = level_of(x1, y1, x2, y2, len(SCALES), AREA)
    scale = scale_of(level, x1, SCALES)
    height = size_of(heights, level)
    width = size_of(widths, level)
    start_y, bin_y, step_y, samples_y = axis(y1, y2, scale, OH, SAMPLES, ALIGNED)
    start_x, bin_x, step_x, samples_x = axis(x1, x2, scale, OW, SAMPLES, ALIGNED)
    top, bottom = touched(start_y, bin_y, step_y, samples_y, height, first_i, last_i)
    left, right = touched(start_x, bin_x, step_x, samples_x, width, first_j, last_j)
    tiles_y = (bottom - top + TILE) // TILE
    tiles_x = (right - left + TILE) // TILE
    tiles = tl.where(real, tiles_y * tiles_x, 0)

    # Where the layout is known, strides follow from sizes, which is what vector loads need to know.
    map_ptr = select(maps, level, maps[0])
    wide_image = image.to(tl.int64)
    if LAYOUT == "channels_last":
        map_ptr += wide_image * height * width * channels
        map_channel, stride_y, stride_x = channel, width * channels, channels
    elif LAYOUT == "contiguous":
        map_ptr += wide_image * height * width * channels
        map_channel, stride_y, stride_x = channel.to(tl.int64) * height * width, width, 1
    else:
        wide_level = level.to(tl.int64)
        map_ptr += wide_image * size_of(map_n, wide_level)
        map_channel = channel * size_of(map_c, wide_level)
        stride_y = size_of(map_y, wide_level)
        stride_x = size_of(map_x, wide_level)

    side = tl.arange(0, TILE)
    flat = tl.arange(0, TILE * TILE)
    y = flat // TILE
    x = flat % TILE
    # From the first pixel of a tile; 32 bits are enough where the layout is known, see `layout_of`.
    offset = (y * stride_y + x * stride_x)[:, None] + map_channel[None, :]
    acc = tl.zeros((TILE * TILE, BLOCK_C), dtype=DTYPE)
    y0 = top
    x0 = left
    for _ in range(tiles):
        weight_y = weights(
            (y0 + side)[None, :], (first_i + side)[:, None], start_y, bin_y, step_y, height, SAMPLES, SLOTS
        )
        weight_x = weights(
            (x0 + side)[None, :], (first_j + side)[:, None], start_x, bin_x, step_x, width, SAMPLES, SLOTS
        )
        weight = tl.reshape(
            weight_y[:, None, :, None] * weight_x[None, :, None, :] * WEIGHT_SCALE, (TILE * TILE, TILE * TILE)
        )
        tile_ptr = map_ptr + y0.to(tl.int64) * stride_y + x0.to(tl.int64) * stride_x
        pixel = tl.load(
            tile_ptr + offset,
            mask=((y <= bottom - y0) & (x <= right - x0))[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(
            weight.to(DOT_DTYPE), pixel.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=DTYPE
        )
        x0 += TILE
        y0 = tl.where(x0 > right, y0 + TILE, y0)
        x0 = tl.where(x0 > right, left, x0)

    i = flat // TILE
    j = flat % TILE
    inside = (i < PART_H) & (first_i + i < OH) & (j < PART_W) & (first_j + j < OW)
    bin_ptr = out_ptr + roi.to(tl.int64) * out_r
    bin_ptr += (first_i + i).to(tl.int64) * out_i + (first_j + j).to(tl.int64) * out_j
    tl.store(
        bin_ptr[:, None] + (channel.to(tl.int64) * out_c)[None, :],
        (acc * (1.0 / WEIGHT_SCALE)).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (channel < channels)[None, :],
    )
