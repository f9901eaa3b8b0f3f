"""The largest value of each bin in Triton: bins of one row a program, over all levels in one launch."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, Target, target_of
from ..common.pooling import Pooling, empty_pooled
from ..roi_align.geometry import level_of, load_boxes, scale_of, select, size_of
from ..roi_align.launch import box_arguments, layout_of, level_arguments, size_arguments, stride_arguments
from .geometry import on_map, onto_map, place, sample_at, window
from .points import MOST_SAMPLES

BLOCK_J = 8  # bins of a program


def launch(
    features: list[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    kind: str,
    how: Pooling,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Launch]:
    first = features[0]
    images, channels = first.shape[:2]
    rois = boxes.shape[0]
    oh, ow = how.output_size
    out = empty_pooled(features, rois, how.output_size)
    winner = empty_pooled(features, rois, how.output_size, torch.int32)
    layout = layout_of(features)
    # Eight channels a thread, where they are one load; fewer where they take more registers.
    most_channels = 128 if layout == "channels_last" and first.element_size() == 2 else 64
    block_c = max(16, min(most_channels, triton.next_power_of_2(channels)))
    parts = triton.cdiv(ow, BLOCK_J)
    arguments = {
        "maps": tuple(features),
        "out_ptr": out,
        "winner_ptr": winner,
        **stride_arguments(features, layout),
        **{f"out_{axis}": out.stride(i) for i, axis in enumerate("rcij")},
        **box_arguments(boxes, batch_index, valid),
        **geometry(kind, how, [(f.shape[2], f.shape[3]) for f in features], first.dtype),
        "rois_per_image": max(rois // max(images, 1), 1),
        "num_images": images,
        "channels": channels,
        "LAYOUT": layout,
        "BLOCK_J": BLOCK_J,
        "BLOCK_C": block_c,
    }
    grid = (rois * oh * parts, triton.cdiv(channels, block_c))
    hip = (target or target_of(first.device)).backend == "hip"
    num_warps = 2 if hip else 4  # of 64 threads: as many channels for each
    return out, winner, Launch(_roi_max_kernel, grid, arguments, num_warps)


def geometry(kind: str, how: Pooling, sizes: list[tuple[int, int]], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of both kernels."""
    return {
        **size_arguments(sizes),
        "OH": how.output_size[0],
        "OW": how.output_size[1],
        "SAMPLES": how.sampling_ratio,
        **level_arguments(how),
        "KIND": kind,
        "MOST": MOST_SAMPLES,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


@triton.jit(do_not_specialize=["rois_per_image", "num_images"])
def _roi_max_kernel(
    maps,  # of each level, (N, C, Hl, Wl)
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    out_ptr,  # (R, C, OH, OW)
    winner_ptr,  # (R, C, OH, OW) int32, strides of out
    map_n, map_c, map_y, map_x,  # strides of each level, coded; None where LAYOUT tells them
    stride_roi, stride_coordinate, stride_batch,
    out_r, out_c, out_i, out_j,
    heights, widths,  # of each level, coded
    rois_per_image, num_images, channels,
    OH: tl.constexpr, OW: tl.constexpr,
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, MOST: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (OW + BLOCK_J - 1) // BLOCK_J
    roi = tl.program_id(0) // (OH * parts)
    i = tl.program_id(0) // parts % OH
    j = tl.program_id(0) % parts * BLOCK_J + tl.arange(0, BLOCK_J)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (j < OW)[:, None] & (channel < channels)[None, :]

    x1, y1, x2, y2, image, real = load_boxes(
        boxes_ptr, batch_ptr, valid_ptr, roi, roi >= 0,
        stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
        HAS_BATCH, HAS_VALID, DTYPE,
    )  # fmt: skip
    level = level_of(x1, y1, x2, y2, len(SCALES), AREA)
    scale = scale_of(level, x1, SCALES)
    height = size_of(heights, level)
    width = size_of(widths, level)
    start_y, bin_y, step_y, samples_y = place(y1, y2, scale, OH, SAMPLES, ALIGNED, KIND, MOST)
    start_x, bin_x, step_x, samples_x = place(x1, x2, scale, OW, SAMPLES, ALIGNED, KIND, MOST)
    top, bottom = window(i, start_y, bin_y, step_y, samples_y, height, KIND)
    left, right = window(j, start_x, bin_x, step_x, samples_x, width, KIND)
    bottom = tl.where(real, bottom, top)
    right = tl.where(j < OW, right, left)
    most_columns = tl.max(right - left, axis=0)

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

    largest = tl.full((BLOCK_J, BLOCK_C), float("-inf"), DTYPE)
    winner = tl.full((BLOCK_J, BLOCK_C), -1, tl.int32)
    for row in range(bottom - top):
        y = top + row
        if KIND == "pool":
            row_ptr = map_ptr + y.to(tl.int64) * stride_y
        else:
            at_y = sample_at(y, i, start_y, bin_y, step_y)
            end = tl.where(on_map(at_y, height), right, left)  # no column of a row off the map is on it
            at_y = onto_map(at_y, height)
            low_y = tl.floor(at_y)
            down = at_y - low_y
            row_ptr = map_ptr + low_y.to(tl.int64) * stride_y
            below = tl.where(low_y + 1 < height, stride_y, 0)
        for column in range(most_columns):
            x = left + column
            exists = x < right
            if KIND == "pool":
                read = exists
                mask = read[:, None] & inside
                value = _load(row_ptr, x, stride_x, map_channel, mask, DTYPE)
            else:
                at_x = sample_at(x, j, start_x, bin_x, step_x)
                read = (x < end) & on_map(at_x, width)
                mask = read[:, None] & inside
                at_x = onto_map(at_x, width)
                low_x = tl.floor(at_x)
                over = (at_x - low_x)[:, None]
                low_x = low_x.to(tl.int32)
                next_x = tl.minimum(low_x + 1, width - 1)
                # Equal corners give their value exactly, so that ties stay ties; off the map all are zero.
                one = _load(row_ptr, low_x, stride_x, map_channel, mask, DTYPE)
                other = _load(row_ptr, next_x, stride_x, map_channel, mask, DTYPE)
                upper = one + (other - one) * over
                one = _load(row_ptr + below, low_x, stride_x, map_channel, mask, DTYPE)
                other = _load(row_ptr + below, next_x, stride_x, map_channel, mask, DTYPE)
                lower = one + (other - one) * over
                value = upper + (lower - upper) * down
            nan = (value != value) & (largest == largest)
            better = exists[:, None] & ((value > largest) | nan)
            largest = tl.where(better, value, largest)
            code = tl.where(read, (y << 16) | x, -1)
            winner = tl.where(better, code[:, None], winner)

    some = (right > left) & (bottom > top)
    largest = tl.where(some[:, None], largest, 0.0)
    at = roi.to(tl.int64) * out_r + i * out_i + (j * out_j)[:, None] + (channel * out_c)[None, :]
    tl.store(out_ptr + at, largest.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(winner_ptr + at, winner, mask=inside)


@triton.jit
def _load(row_ptr, x, stride_x, map_channel, mask, DTYPE: tl.constexpr):
    at = row_ptr + x * stride_x
    return tl.load(at[:, None] + map_channel[None, :], mask=mask, other=0.0).to(DTYPE)
