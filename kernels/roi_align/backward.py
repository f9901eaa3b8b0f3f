"""RoIAlign in Triton, backward: an 8 x 8 pixel tile of a map a program, over all levels in one launch."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, Target, reach, target_of
from ..common.pooling import Pooling, empty_maps
from .geometry import bins_of, select, tile_of, weights
from .hits import find
from .launch import Config, configure, product_arguments, two_programs

STAGES = 5  # of the loop over items: their bins are loaded two ahead, what is known of them one more


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
    channels = grad.shape[1]
    grads = empty_maps(grad, num_images, sizes, channels_last)
    vectors = channels_last and grad.stride(1) == 1
    config = _configure(grad, vectors, target or target_of(grad.device))
    of_items, finding = find(grad, boxes, batch_index, valid, num_images, sizes, how, config)
    gather = {
        **of_items,
        "grad_ptr": grad,
        **{f"grad_{axis}": grad.stride(i) for i, axis in enumerate("rcij")},
        "grads": tuple(grads),
        "channels": channels,
        "LAYOUT": "channels_last" if channels_last else "contiguous",
        "INDEX": tl.int32 if reach(grad) < 2**31 else tl.int64,
        **product_arguments(config, how),
    }
    grid = (of_items["count_ptr"].shape[0], triton.cdiv(channels, config.block_c))
    return grads, [
        *finding,
        Launch(_roi_align_backward_kernel, grid, gather, config.num_warps, config.options),
    ]


def _configure(grad: Tensor, vectors: bool, target: Target) -> Config:
    """On NVIDIA bins are loaded ahead, within the registers of two programs of 8 warps, or three of 4."""
    config, size = configure(grad.dtype, grad.shape[1], vectors, target), grad.element_size()
    if target.backend != "cuda" or size == 8:
        return config
    if vectors and size == 2:
        return two_programs(config, target, STAGES)
    if vectors:
        return config._replace(options={"num_stages": STAGES})
    # Loads of 2 bytes can be ahead in registers only.
    return config._replace(options={"num_stages": STAGES if size == 4 else 2, "maxnreg": 168})


@triton.jit
def _roi_align_backward_kernel(
    grad_ptr,  # (R, C, OH, OW)
    list_ptr,  # (tiles, words * ITEMS) int32
    count_ptr,  # (tiles,) int32
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
):  # fmt: skip
    index = tl.program_id(0)
    level, height, width, image, y0, x0 = tile_of(index, heights, widths, first_tiles, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_roi = 0 if HAS_BATCH else image * rois_per_image

    side = tl.arange(0, TILE)
    i = tl.arange(0, TILE * TILE) // TILE
    j = tl.arange(0, TILE * TILE) % TILE
    offset = (i.to(INDEX) * grad_i + j.to(INDEX) * grad_j)[:, None] + (channel.to(INDEX) * grad_c)[None, :]
    list_ptr += index.to(tl.int64) * words * ITEMS
    acc = tl.zeros((TILE * TILE, BLOCK_C), dtype=DTYPE)
    for k in range(tl.load(count_ptr + index)):
        item = tl.load(list_ptr + k)
        roi, first_i, last_i, first_j, last_j = bins_of(item, OH, OW, PART_H, PART_W)
        roi += first_roi
        place_ptr = places_ptr + roi.to(tl.int64) * 6
        start_y = tl.load(place_ptr)
        bin_y = tl.load(place_ptr + 1)
        step_y = tl.load(place_ptr + 2)
        start_x = tl.load(place_ptr + 3)
        bin_x = tl.load(place_ptr + 4)
        step_x = tl.load(place_ptr + 5)
        bin_ptr = grad_ptr + (
            roi.to(tl.int64) * grad_r + first_i.to(tl.int64) * grad_i + first_j.to(tl.int64) * grad_j
        )
        inside = (i <= last_i - first_i) & (j <= last_j - first_j)
        bin_grad = tl.load(bin_ptr + offset, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)
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
