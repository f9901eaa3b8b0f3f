"""RoIAlign in Triton, backward: an 8 x 8 pixel tile of a map a program, over all levels in one launch."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, Target, coded, reach, target_of
from ..common.pooling import Asked, empty_maps
from .geometry import bins_of, select, tile_of, weights
from .hits import find
from .launch import (
    TILE,
    Config,
    bin_arguments,
    configure,
    first_tiles,
    product_arguments,
    size_arguments,
    slots_of,
    two_programs,
)

STAGES = 5  # of the loop over items: their bins are loaded two ahead, what is known of them one more


def launches(
    out_grads: list[Tensor],
    asked: list[Asked],
    num_images: int,
    sizes: list[tuple[int, int]],
    channels_last: bool,
    target: Target | None = None,
) -> tuple[list[Tensor], list[Launch]]:
    """Of what was pooled of the same maps in one or several sets of RoIs; each gradient is written once.

    Args:
        out_grads: of each set, (R, C, oh, ow).
    """
    first, channels = out_grads[0], out_grads[0].shape[1]
    grads = empty_maps(first, num_images, sizes, channels_last)
    # A set without RoIs has nothing to add, and no memory to point at.
    sets = [(grad, one) for grad, one in zip(out_grads, asked, strict=True) if grad.shape[0]]
    vectors = channels_last and all(grad.stride(1) == 1 for grad, _ in sets)
    config = _configure(first, vectors, target or target_of(first.device))
    items = [find(grad, one, num_images, sizes, config) for grad, one in sets]
    parts = [bin_arguments(one.how, sizes) for _, one in sets]
    firsts, tiles = first_tiles(num_images, sizes)
    gather = {
        "out_grads": tuple(grad for grad, _ in sets),
        "grads": tuple(grads),
        "lists": tuple(part.lists for part in items),
        "ranges": tuple(part.ranges for part in items),
        "places": tuple(part.places for part in items),
        "rois_per_image": coded(part.rois_per_image for part in items),
        "strides": tuple(tuple(grad.stride(i) for i in (0, 2, 3)) for grad, _ in sets),
        "CHANNEL": tuple(grad.stride(1) for grad, _ in sets),
        "INDEX": tuple(tl.uint32 if reach(grad) < 2**31 else tl.int64 for grad, _ in sets),
        "HAS_BATCH": tuple(one.batch_index is not None for _, one in sets),
        **{key: tuple(part[key] for part in parts) for key in ("OH", "OW", "PART_H", "PART_W", "SAMPLES")},
        "SLOTS": tuple(slots_of(one.how) for _, one in sets),
        **size_arguments(sizes),
        "first_tiles": firsts,
        "channels": channels,
        "LAYOUT": "channels_last" if channels_last else "contiguous",
        "TILE": TILE,
        **product_arguments(config),
    }
    grid = (tiles, triton.cdiv(channels, config.block_c))
    return grads, [
        *(launch for part in items for launch in part.launches),
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
    out_grads,  # of each set of RoIs, (R, C, OH, OW)
    lists,  # of each set, int32
    ranges,  # of each set, (tiles, 2) int64
    places,  # of each set, (R, 6)
    grads,  # of each level, (N, C, Hl, Wl), channels_last or contiguous
    strides,  # of each set, of its RoIs, rows and columns of bins
    rois_per_image,  # of each set, coded
    heights, widths,  # of each level, coded
    first_tiles,  # of each level, the index of its first tile, coded
    channels,
    CHANNEL: tl.constexpr,  # of each set, the stride of its channels, and so on
    OH: tl.constexpr, OW: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,
    SAMPLES: tl.constexpr, SLOTS: tl.constexpr, HAS_BATCH: tl.constexpr, INDEX: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    level, height, width, image, y0, x0 = tile_of(index, heights, widths, first_tiles, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, TILE * TILE) // TILE
    j = tl.arange(0, TILE * TILE) % TILE
    acc = tl.zeros((TILE * TILE, BLOCK_C), dtype=DTYPE)
    for s in tl.static_range(len(out_grads)):
        first_roi = 0 if HAS_BATCH[s] else image * (rois_per_image[s] >> 2)
        acc = _add_items(
            acc, out_grads[s], lists[s], ranges[s] + index.to(tl.int64) * 2, places[s], first_roi,
            strides[s][0], CHANNEL[s], strides[s][1], strides[s][2], i, j, channel, channels,
            y0, x0, height, width, OH[s], OW[s], PART_H[s], PART_W[s], SAMPLES[s], SLOTS[s], INDEX[s],
            DTYPE, DOT_DTYPE, WEIGHT_SCALE, PRECISION, TILE,
        )  # fmt: skip

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
        (acc * (1.0 / WEIGHT_SCALE)).to(grads[0].dtype.element_ty),
        mask=((y < height) & (x < width))[:, None] & (channel < channels)[None, :],
    )


@triton.jit
def _add_items(
    acc, grad_ptr, list_ptr, range_ptr, places_ptr, first_roi,
    grad_r, grad_c: tl.constexpr, grad_i, grad_j, i, j, channel, channels,
    y0, x0, height, width,
    OH: tl.constexpr, OW: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,
    SAMPLES: tl.constexpr, SLOTS: tl.constexpr, INDEX: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add what the items of one set give to a tile."""
    side = tl.arange(0, TILE)
    count = tl.load(range_ptr + 1).to(tl.int32)
    offset = (i.to(INDEX) * grad_i + j.to(INDEX) * grad_j)[:, None] + (channel.to(INDEX) * grad_c)[None, :]
    list_ptr += tl.load(range_ptr, mask=count > 0, other=0)
    for k in range(count):
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
    return acc
