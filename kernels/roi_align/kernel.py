"""RoIAlign in Triton, forward and backward, over all levels in one launch.

An output bin is a weighted sum of pixels, and the weight of a pixel is that of its row times that of its
column. So both directions are products of small matrices on the tensor cores, whose weights are computed
on the fly: forward, one program has up to 8 x 8 bins of an RoI and runs over the 8 x 8 pixel tiles that
they touch, reading each pixel once; backward, one program has an 8 x 8 pixel tile of a map and runs over
the RoIs that touch it in the order of their index, writing each pixel once. No atomics, no float32 copy
of the maps, and the same bits in every run.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import interpreting
from .._spec import CompileSpec, Launch
from ..level_assign.reference import first_threshold
from .geometry import axis, bins_near, level_of, load_boxes, scale_of, select, touched, weights
from .reference import Pooling, is_channels_last, memory_format

HIP = torch.version.hip is not None
TILE = 8  # bins or pixels along a side; tl.dot multiplies TILE**2 of each
ROIS_PER_WORD = 32
ADAPTIVE_SLOTS = 8  # at least 5


class _Config(NamedTuple):
    dtype: Any  # of geometry and sums
    dot_dtype: Any
    precision: str
    weight_scale: float
    block_c: int
    num_warps: int


def _config(dtype: torch.dtype, channels: int, vectors: bool, hip: bool) -> _Config:
    """How to multiply, by the dtype of the features.

    `vectors` says that channels lie side by side, so that a thread loads many at once; otherwise it needs
    more registers for addresses, and gets fewer channels. float32 in three products needs more too, and
    AMD has less shared memory. Weights are at most 1; in float16 they are scaled up, so that those of large
    bins keep their bits.
    """
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    most = {torch.float64: 32, torch.float32: 32}.get(dtype, 256 if vectors and not hip else 128)
    most = most if vectors else most // 2
    block_c = max(16, min(most, triton.next_power_of_2(channels)))
    num_warps = 8 if vectors and not hip else 4
    if interpreting():  # bf16 arithmetic of the interpreter is wrong
        return _Config(wide, wide, "ieee", 1.0, block_c, num_warps)
    if dtype == torch.bfloat16:
        return _Config(wide, tl.bfloat16, "ieee", 1.0, block_c, num_warps)
    if dtype == torch.float16:
        return _Config(wide, tl.float16, "ieee", 4096.0, block_c, num_warps)
    three_products = dtype == torch.float32 and not hip
    return _Config(wide, wide, "tf32x3" if three_products else "ieee", 1.0, block_c, num_warps)


def multilevel_roi_align(
    features: list[Tensor], boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None, how: Pooling
) -> Tensor:
    """See `reference.multilevel_roi_align`. The result is channels_last if the first map is."""
    out, launch = _forward(features, boxes, batch_index, valid, how)
    if out.numel() > 0:
        launch.run()
    return out


def multilevel_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    channels_last: bool,
    how: Pooling,
) -> list[Tensor]:
    """See `reference.multilevel_roi_align_backward`. Two launches, and a bit of memory per RoI and tile."""
    grads, launches = _backward(grad, boxes, batch_index, valid, num_images, sizes, channels_last, how)
    if num_images * grad.shape[1] == 0:
        return grads
    if grad.shape[0] == 0:
        return [part.zero_() for part in grads]
    for launch in launches:
        launch.run()
    return grads


def _forward(
    features: list[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    how: Pooling,
    hip: bool = HIP,
) -> tuple[Tensor, Launch]:
    first = features[0]
    images, channels = first.shape[:2]
    rois = boxes.shape[0]
    oh, ow = how.output_size
    out = torch.empty(
        (rois, channels, oh, ow),
        dtype=first.dtype,
        device=first.device,
        memory_format=memory_format(is_channels_last(first)),
    )
    layout = _layout(features)
    config = _config(first.dtype, channels, layout == "channels_last", hip)
    part_h, part_w = _part(oh), _part(ow)
    parts = triton.cdiv(oh, part_h) * triton.cdiv(ow, part_w)
    arguments = {
        "maps": tuple(features),
        "out_ptr": out,
        **{f"map_{axis}": tuple(f.stride(i) for f in features) for i, axis in enumerate("ncyx")},
        **{f"out_{axis}": out.stride(i) for i, axis in enumerate("rcij")},
        **_box_arguments(boxes, batch_index, valid),
        **_geometry(how, [(f.shape[2], f.shape[3]) for f in features], config),
        "AREA": first_threshold(how.k_min, how.canonical_size, how.canonical_level),
        "rois_per_image": max(rois // max(images, 1), 1),
        "num_images": images,
        "channels": channels,
        "PART_H": part_h,
        "PART_W": part_w,
        "LAYOUT": layout,
        **_product(config, how),
    }
    grid = (rois * parts, triton.cdiv(channels, config.block_c))
    return out, Launch(_forward_kernel, grid, arguments, config.num_warps)


def _backward(
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
    config = _config(grad.dtype, channels, channels_last and grad.stride(1) == 1, hip)
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
        **_geometry(how, sizes, config),
    }
    box_arguments = _box_arguments(boxes, batch_index, valid)
    find = {
        **common,
        **box_arguments,
        "num_images": num_images,
        "AREA": first_threshold(how.k_min, how.canonical_size, how.canonical_level),
        "BLOCK": 64,
    }
    gather = {
        **common,
        **{
            name: box_arguments[name]
            for name in ("boxes_ptr", "stride_roi", "stride_coordinate", "HAS_BATCH")
        },
        "grad_ptr": grad,
        **{f"grad_{axis}": grad.stride(i) for i, axis in enumerate("rcij")},
        "grads": tuple(grads),
        "channels": channels,
        "LAYOUT": "channels_last" if channels_last else "contiguous",
        "BLOCK_WORDS": triton.next_power_of_2(max(words, 1)),
        **_product(config, how),
    }
    grid = (sum(tiles), triton.cdiv(channels, config.block_c))
    return grads, [
        Launch(_hits_kernel, (words, num_images * len(sizes)), find),
        Launch(_backward_kernel, grid, gather, config.num_warps),
    ]


def compile_specs(backend: str = "cuda") -> list[CompileSpec]:
    """P2-P5 of 8 images at 800x1344, C=256: 512 RoIs of 7x7 and 128 of 14x14 an image.

    The least bytes count every map once, which is what RoIs that cover the maps must read; the least
    operations are those of the two products of Wy, patch and Wx for RoIs of 16x16 pixels.
    """
    images, channels, sizes = 8, 256, [(200, 336), (100, 168), (50, 84), (25, 42)]
    specs = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for channels_last in (False, True):
            variant = f"{name} {'channels_last' if channels_last else 'nchw'}"
            widest = 16 if channels_last and dtype == torch.bfloat16 else None
            like: dict[str, Any] = {
                "dtype": dtype,
                "device": "meta",
                "memory_format": memory_format(channels_last),
            }
            maps = [torch.empty((images, channels, *size), **like) for size in sizes]
            for bins, per_image in ((7, 512), (14, 128)):
                rois = images * per_image
                how = Pooling((bins, bins), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, True, 224.0, 4, 2)
                boxes = torch.empty((rois, 4), device="meta")
                valid = torch.empty((rois,), dtype=torch.bool, device="meta")
                grad = torch.empty((rois, channels, bins, bins), **like)
                _, forward = _forward(maps, boxes, None, valid, how, backend == "hip")
                _, (find, gather) = _backward(
                    grad, boxes, None, valid, images, sizes, channels_last, how, backend == "hip"
                )
                moved = sum(t.nbytes for t in [*maps, grad, boxes])
                flops = 2 * rois * channels * (bins * 16 * 16 + bins * bins * 16)
                size = f"{bins}x{bins}"
                specs.append(forward.spec(f"roi_align forward {size}", variant, moved, flops, widest))
                specs.append(gather.spec(f"roi_align backward {size}", variant, moved, flops, widest))
            moved = boxes.nbytes + find.arguments["hits_ptr"].nbytes
            specs.append(find.spec("roi_align backward hits", variant, moved, 0))
    return specs


def _part(bins: int) -> int:
    """Bins of one program: equal parts of at most TILE."""
    return triton.cdiv(bins, triton.cdiv(bins, TILE))


def _box_arguments(boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None) -> dict[str, Any]:
    return {
        "boxes_ptr": boxes,
        "batch_ptr": batch_index,
        "valid_ptr": None if valid is None else valid.contiguous().view(torch.uint8),
        "stride_roi": boxes.stride(0),
        "stride_coordinate": boxes.stride(1),
        "stride_batch": 0 if batch_index is None else batch_index.stride(0),
        "HAS_BATCH": batch_index is not None,
        "HAS_VALID": valid is not None,
    }


def _geometry(how: Pooling, sizes: list[tuple[int, int]], config: _Config) -> dict[str, Any]:
    return {
        "heights": tuple(height for height, _ in sizes),
        "widths": tuple(width for _, width in sizes),
        "OH": how.output_size[0],
        "OW": how.output_size[1],
        "SCALES": tuple(how.spatial_scales),
        "SAMPLES": how.sampling_ratio,
        "ALIGNED": how.aligned,
        "DTYPE": config.dtype,
        "TILE": TILE,
    }


def _product(config: _Config, how: Pooling) -> dict[str, Any]:
    return {
        "DOT_DTYPE": config.dot_dtype,
        "WEIGHT_SCALE": config.weight_scale,
        "PRECISION": config.precision,
        "BLOCK_C": config.block_c,
        "SLOTS": triton.next_power_of_2(how.sampling_ratio) if how.sampling_ratio > 0 else ADAPTIVE_SLOTS,
    }


def _layout(features: list[Tensor]) -> str:
    if all(is_channels_last(f) for f in features):
        return "channels_last"
    if all(f.is_contiguous() for f in features):
        return "contiguous"
    return "strided"


@triton.jit
def _forward_kernel(
    maps,  # of each level, (N, C, Hl, Wl)
    boxes_ptr,  # (R, 4) xyxy
    batch_ptr,  # (R,) image of each box, any dtype
    valid_ptr,  # (R,) uint8
    out_ptr,  # (R, C, OH, OW)
    map_n, map_c, map_y, map_x,  # strides of each level
    stride_roi, stride_coordinate, stride_batch,
    out_r, out_c, out_i, out_j,
    heights, widths,  # of each level
    rois_per_image, num_images, channels,
    OH: tl.constexpr, OW: tl.constexpr,
    PART_H: tl.constexpr, PART_W: tl.constexpr,  # bins of a program, at most TILE along a side
    SCALES: tl.constexpr, AREA: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    parts_w: tl.constexpr = (OW + PART_W - 1) // PART_W
    parts: tl.constexpr = (OH + PART_H - 1) // PART_H * parts_w
    roi = tl.program_id(0) // parts
    first_i = tl.program_id(0) % parts // parts_w * PART_H
    first_j = tl.program_id(0) % parts % parts_w * PART_W
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    x1, y1, x2, y2, image, real = load_boxes(
        boxes_ptr, batch_ptr, valid_ptr, roi, roi >= 0,
        stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
        HAS_BATCH, HAS_VALID, DTYPE,
    )  # fmt: skip
    level = level_of(x1, y1, x2, y2, len(SCALES), AREA)
    scale = scale_of(level, x1, SCALES)
    height = select(heights, level, level * 0 + heights[0])
    width = select(widths, level, level * 0 + widths[0])
    start_y, bin_y, samples_y = axis(y1, y2, scale, OH, SAMPLES, ALIGNED)
    start_x, bin_x, samples_x = axis(x1, x2, scale, OW, SAMPLES, ALIGNED)
    top, bottom = touched(start_y, bin_y, samples_y, height, first_i, tl.minimum(first_i + PART_H, OH) - 1)
    left, right = touched(start_x, bin_x, samples_x, width, first_j, tl.minimum(first_j + PART_W, OW) - 1)
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
        zero = wide_image * 0
        map_ptr += wide_image * select(map_n, level, zero + map_n[0])
        map_channel = channel * select(map_c, level, zero + map_c[0])
        stride_y = select(map_y, level, zero + map_y[0])
        stride_x = select(map_x, level, zero + map_x[0])

    side = tl.arange(0, TILE)
    flat = tl.arange(0, TILE * TILE)
    acc = tl.zeros((TILE * TILE, BLOCK_C), dtype=DTYPE)
    for tile in range(tiles):
        y0 = top + tile // tiles_x * TILE
        x0 = left + tile % tiles_x * TILE
        weight_y = weights(
            (y0 + side)[None, :], (first_i + side)[:, None], start_y, bin_y, samples_y, height, SAMPLES, SLOTS
        )
        weight_x = weights(
            (x0 + side)[None, :], (first_j + side)[:, None], start_x, bin_x, samples_x, width, SAMPLES, SLOTS
        )
        weight = tl.reshape(
            weight_y[:, None, :, None] * weight_x[None, :, None, :] * WEIGHT_SCALE, (TILE * TILE, TILE * TILE)
        )
        y = y0 + flat // TILE
        x = x0 + flat % TILE
        pixel_ptr = map_ptr + y.to(tl.int64) * stride_y + x * stride_x
        pixel = tl.load(
            pixel_ptr[:, None] + map_channel[None, :],
            mask=((y <= bottom) & (x <= right))[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(
            weight.to(DOT_DTYPE), pixel.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=DTYPE
        )

    i = flat // TILE
    j = flat % TILE
    inside = (i < PART_H) & (first_i + i < OH) & (j < PART_W) & (first_j + j < OW)
    bin_ptr = out_ptr + roi.to(tl.int64) * out_r + (first_i + i) * out_i + (first_j + j) * out_j
    tl.store(
        bin_ptr[:, None] + (channel * out_c)[None, :],
        (acc * (1.0 / WEIGHT_SCALE)).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (channel < channels)[None, :],
    )


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
