"""Gradient of the largest values in Triton: a tile of a map a program, which gathers from the RoIs there.

RoIs are taken in the order of their index and bins in row-major order, and each pixel is written once: no
atomics, and the same bits in every run.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, reach
from ..common.pooling import Pooling, empty_maps
from ..roi_align.geometry import level_of, load_boxes, scale_of, select, tile_of
from ..roi_align.launch import TILE, box_arguments, first_tiles
from .forward import geometry
from .geometry import bins_of_tile, lines_of, onto_map, place, sample_at

ROIS = 32  # whose boxes are compared with the tile at once
MOST_CHANNELS = 64  # of a program


def launch(
    grad: Tensor,
    winner: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    channels_last: bool,
    kind: str,
    how: Pooling,
) -> tuple[list[Tensor], Launch]:
    rois, channels = grad.shape[:2]
    # Within an RoI the kernel counts in 32 bits.
    grad, winner = (t if reach(t) < 2**31 else t.contiguous() for t in (grad, winner))
    grads = empty_maps(grad, num_images, sizes, channels_last)
    # The weights of a tile are many registers: with these shares of them no target spills.
    weighted = kind != "pool"
    most = MOST_CHANNELS // 2 if weighted and not channels_last else MOST_CHANNELS
    block_c = max(16, min(most, triton.next_power_of_2(channels)))
    firsts, tiles = first_tiles(num_images, sizes)
    arguments = {
        "grad_ptr": grad,
        "winner_ptr": winner,
        "grads": tuple(grads),
        **{f"grad_{axis}": grad.stride(i) for i, axis in enumerate("rcij")},
        **{f"winner_{axis}": winner.stride(i) for i, axis in enumerate("rcij")},
        **box_arguments(boxes, batch_index, valid),
        **geometry(kind, how, sizes, grad.dtype),
        "first_tiles": firsts,
        "rois_per_image": rois if batch_index is not None else rois // max(num_images, 1),
        "num_images": num_images,
        "channels": channels,
        "LAYOUT": "channels_last" if channels_last else "contiguous",
        "TILE": TILE,
        "ROIS": ROIS,
        "BLOCK_C": block_c,
    }
    grid = (tiles, triton.cdiv(channels, block_c))
    return grads, Launch(
        _roi_max_backward_kernel, grid, arguments, num_warps=8 if weighted and channels_last else 4
    )


@triton.jit(do_not_specialize=["rois_per_image", "num_images"])
def _roi_max_backward_kernel(
    grad_ptr,  # (R, C, OH, OW)
    winner_ptr,  # (R, C, OH, OW) int32
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    grads,  # of each level, (N, C, Hl, Wl), channels_last or contiguous
    grad_r, grad_c, grad_i, grad_j,
    winner_r, winner_c, winner_i, winner_j,
    stride_roi, stride_coordinate, stride_batch,
    heights, widths,  # of each level, coded
    first_tiles,  # of each level, the index of its first tile, coded
    rois_per_image, num_images, channels,
    OH: tl.constexpr, OW: tl.constexpr,
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, MOST: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, ROIS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    level, height, width, image, y0, x0 = tile_of(index, heights, widths, first_tiles, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    side = tl.arange(0, TILE)
    lane = tl.arange(0, ROIS)
    bit = tl.full((ROIS,), 1, tl.int64) << lane
    acc = tl.zeros((TILE, TILE, BLOCK_C), dtype=DTYPE)
    first_roi = 0 if HAS_BATCH else image * rois_per_image
    for begin in range(0, rois_per_image, ROIS):
        x1, y1, x2, y2, images, real = load_boxes(
            boxes_ptr, batch_ptr, valid_ptr, first_roi + begin + lane, begin + lane < rois_per_image,
            stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
            HAS_BATCH, HAS_VALID, DTYPE,
        )  # fmt: skip
        levels = level_of(x1, y1, x2, y2, len(SCALES), AREA)
        scales = scale_of(levels, x1, SCALES)
        start_y, bin_y, _steps, samples_y = place(y1, y2, scales, OH, SAMPLES, ALIGNED, KIND, MOST)
        start_x, bin_x, _steps, samples_x = place(x1, x2, scales, OW, SAMPLES, ALIGNED, KIND, MOST)
        top, bottom = lines_of(start_y, bin_y, samples_y, height, OH)
        left, right = lines_of(start_x, bin_x, samples_x, width, OW)
        hit = real & (levels == level) & (images == image)
        hit = hit & (bottom >= top) & (y0 <= bottom) & (y0 + TILE > top)
        hit = hit & (right >= left) & (x0 <= right) & (x0 + TILE > left)
        bits = tl.sum(tl.where(hit, bit, 0), axis=0)
        while bits != 0:
            # The lowest bit, as a float32, has its number in the exponent.
            lowest = (bits & (0 - bits)).to(tl.float32)
            roi = first_roi + begin + (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            bits = bits & (bits - 1)
            box_ptr = boxes_ptr + roi.to(tl.int64) * stride_roi
            low_x = tl.load(box_ptr).to(DTYPE)
            low_y = tl.load(box_ptr + stride_coordinate).to(DTYPE)
            high_x = tl.load(box_ptr + 2 * stride_coordinate).to(DTYPE)
            high_y = tl.load(box_ptr + 3 * stride_coordinate).to(DTYPE)
            scale = scale_of(level, low_x, SCALES)
            from_y, length_y, step_y, _samples = place(low_y, high_y, scale, OH, SAMPLES, ALIGNED, KIND, MOST)
            from_x, length_x, step_x, _samples = place(low_x, high_x, scale, OW, SAMPLES, ALIGNED, KIND, MOST)
            first_i, last_i = bins_of_tile(y0, from_y, length_y, OH, TILE, KIND)
            first_j, last_j = bins_of_tile(x0, from_x, length_x, OW, TILE, KIND)
            roi_grad = grad_ptr + roi.to(tl.int64) * grad_r
            roi_winner = winner_ptr + roi.to(tl.int64) * winner_r
            bins_j = last_j - first_j + 1
            for place_of_bin in range((last_i - first_i + 1) * bins_j):
                i = first_i + place_of_bin // bins_j
                j = first_j + place_of_bin % bins_j
                at = i * grad_i + j * grad_j + channel * grad_c
                share = tl.load(roi_grad + at, mask=channel < channels, other=0.0).to(DTYPE)
                at = i * winner_i + j * winner_j + channel * winner_c
                won = tl.load(roi_winner + at, mask=channel < channels, other=-1)
                share = tl.where(won >= 0, share, 0.0)
                if KIND == "pool":
                    on_row = (y0 + side)[:, None] == (won >> 16)[None, :]
                    on_column = (x0 + side)[:, None] == (won & 0xFFFF)[None, :]
                    here = on_row[:, None, :] & on_column[None, :, :]
                    acc += tl.where(here, share[None, None, :], 0.0)
                else:
                    at_y = onto_map(sample_at(won >> 16, i, from_y, length_y, step_y), height)
                    at_x = onto_map(sample_at(won & 0xFFFF, j, from_x, length_x, step_x), width)
                    of_row = tl.maximum(1 - tl.abs((y0 + side)[:, None] - at_y[None, :]), 0.0)
                    of_column = tl.maximum(1 - tl.abs((x0 + side)[:, None] - at_x[None, :]), 0.0)
                    of_column = of_column * share[None, :]
                    acc += of_row[:, None, :] * of_column[None, :, :]

    y = (y0 + side)[:, None, None]
    x = (x0 + side)[None, :, None]
    channel = channel[None, None, :]
    map_ptr = select(grads, level, grads[0]) + image.to(tl.int64) * height * width * channels
    pixel = y.to(tl.int64) * width + x
    if LAYOUT == "channels_last":
        pixel_ptr = map_ptr + pixel * channels + channel
    else:
        pixel_ptr = map_ptr + pixel + channel.to(tl.int64) * height * width
    tl.store(
        pixel_ptr,
        acc.to(grad_ptr.dtype.element_ty),
        mask=(y < height) & (x < width) & (channel < channels),
    )
