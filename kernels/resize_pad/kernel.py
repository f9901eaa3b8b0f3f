"""Resize and pad in Triton: a program for each tile of the output, which is written once.

Both passes of the resampling are in one program: it computes a row of the first one where the second needs
it, again for each of its taps, which are two wherever an image grows. Only where a colour matrix asks for the
mean level does a second kernel resize before, keeping sums alone.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, plain
from .cpu import LARGEST_PRODUCT, folded
from .taps import resample

TILE_H, TILE_W = 16, 64  # of a program, in pixels
SUMMERS = 128  # programs that share the sums of an image
WARPS = 4
LARGEST = tl.constexpr(LARGEST_PRODUCT)


def resize_pad(
    buffer: Tensor,
    offset: Tensor,
    source: Tensor,
    resized: Tensor,
    sizes: Tensor,
    turns: Tensor | None,
    flips: Tensor | None,
    origin: Tensor | None,
    colour: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """See `op.resize_pad`, whose arguments they are."""
    images = _images(buffer, offset, source, resized)
    matrix = None
    if colour is not None and len(offset):
        sums, launch = _sum_launch(images, colour)
        launch.run()
        matrix = folded(colour, sums.sum(1), resized)
    out, launch = _launch(images, sizes, turns, flips, origin, matrix, height, width)
    if out.numel():
        launch.run()
    return out.permute(0, 3, 1, 2)


def _images(buffer: Tensor, offset: Tensor, source: Tensor, resized: Tensor) -> dict[str, Tensor | int]:
    return {
        "buffer_ptr": plain(buffer),
        "offset_ptr": plain(offset),
        "source_ptr": plain(source),
        "resized_ptr": plain(resized),
        "bytes": buffer.numel(),
    }


def _launch(
    images: dict[str, Tensor | int],
    sizes: Tensor,
    turns: Tensor | None,
    flips: Tensor | None,
    origin: Tensor | None,
    matrix: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Launch]:
    out = torch.empty((len(sizes), height, width, 3), dtype=torch.uint8, device=sizes.device)
    words = width % 4 == 0
    arguments = {
        **images,
        "sizes_ptr": plain(sizes),
        "turns_ptr": None if turns is None else plain(turns),
        "flips_ptr": None if flips is None else plain(flips),
        "origin_ptr": None if origin is None else plain(origin),
        "matrix_ptr": None if matrix is None else plain(matrix),
        "out_ptr": out.flatten(2).view(torch.int32) if words else out,
        "height": height,
        "width": width,
        "WORDS": words,
        "TILE_H": TILE_H,
        "TILE_W": TILE_W,
    }
    grid = (triton.cdiv(width, TILE_W), triton.cdiv(height, TILE_H), len(sizes))
    # Without fusion a colour is rounded as cpu.py rounds it.
    return out, Launch(_resize_kernel, grid, arguments, WARPS, {"enable_fp_fusion": False})


def _sum_launch(images: dict[str, Tensor | int], colour: Tensor) -> tuple[Tensor, Launch]:
    sums = torch.empty((len(colour), SUMMERS), dtype=torch.int64, device=colour.device)
    arguments = {
        **images,
        "colour_ptr": plain(colour),
        "sums_ptr": sums,
        "TILE_H": TILE_H,
        "TILE_W": TILE_W,
    }
    return sums, Launch(_sum_kernel, (SUMMERS, len(colour)), arguments, WARPS, {"enable_fp_fusion": False})


def compile_specs() -> list[CompileSpec]:
    """8 images that fill 800x1344: of 480x640, which grow, and of 2400x4000, which shrink to a third.

    The least bytes are the images and the output. The least operations are a product and a sum for each tap
    and channel of both passes, each computed once.
    """
    specs = []
    for name, source, variants in (
        ("480x640", (480, 640), ("plain", "all", "no words")),
        ("2400x4000", (2400, 4000), ("plain",)),
    ):
        result = (800, 1067) if source[0] < 800 else (800, 1333)
        buffer = torch.empty(8 * 3 * source[0] * source[1], dtype=torch.uint8, device="meta")
        offset = buffer.new_empty(8, dtype=torch.int64)
        pair = offset.new_empty((8, 2), dtype=torch.int32)
        images = _images(buffer, offset, pair, pair)
        taps = [max(2, -(-2 * a // b)) for a, b in zip(source, result, strict=True)]
        flops = 8 * 2 * 3 * (taps[1] * source[0] * result[1] + taps[0] * result[0] * result[1])
        # Of a tile's hot loop; tiles of padding do not get there.
        trips = taps[0] * taps[1] * result[1] / 1344
        for variant in variants:
            colour = offset.new_empty((8, 3, 5), dtype=torch.float32)
            moves = (pair[:, 0], pair.to(torch.bool), pair, colour[:, :, :4])
            width = 1343 if variant == "no words" else 1344
            given = moves if variant == "all" else (None,) * 4
            out, launch = _launch(images, pair.long(), *given, 800, width)
            moved = buffer.nbytes + out.nbytes
            specs.append(launch.spec(f"resize_pad {name}", variant, moved, flops, trips=trips))
        tiles = -(-result[0] // TILE_H) * -(-result[1] // TILE_W)
        spec = _sum_launch(images, colour)[1]
        trips = taps[0] * taps[1] * tiles / SUMMERS
        specs.append(spec.spec(f"resize_pad {name} sums", "", buffer.nbytes, flops, trips=trips))
    return specs


@triton.jit(do_not_specialize=["bytes", "height", "width"])
def _resize_kernel(
    buffer_ptr,  # (bytes,) uint8
    offset_ptr,  # (N,) int64
    source_ptr,  # (N, 2) integer height, width
    resized_ptr,  # (N, 2) integer height, width
    sizes_ptr,  # (N, 2) integer height, width
    turns_ptr,  # (N,) integer or None
    flips_ptr,  # (N, 2) uint8 or None
    origin_ptr,  # (N, 2) integer y, x or None
    matrix_ptr,  # (N, 3, 4) fp32 or None
    out_ptr,  # (N, height, width, 3) uint8, or int32 words of it; written
    bytes,
    height,
    width,
    WORDS: tl.constexpr,  # whether rows are whole words
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    top, left = tl.program_id(1) * TILE_H, tl.program_id(0) * TILE_W
    base, source_h, source_w, result_h, result_w, real = _load_image(
        buffer_ptr, offset_ptr, source_ptr, resized_ptr, image, bytes
    )
    moved_h, moved_w, turns = result_h, result_w, 0
    if turns_ptr is not None:
        turns = tl.load(turns_ptr + image).to(tl.int32) & 3
        moved_h = tl.where(turns % 2 == 1, result_w, result_h)
        moved_w = tl.where(turns % 2 == 1, result_h, result_w)
    row = top + tl.arange(0, TILE_H)[:, None]
    column = left + tl.arange(0, TILE_W)[None, :]
    size_h = tl.minimum(tl.load(sizes_ptr + image * 2).to(tl.int32), height)
    size_w = tl.minimum(tl.load(sizes_ptr + image * 2 + 1).to(tl.int32), width)
    y, x = row, column
    if origin_ptr is not None:
        y += tl.load(origin_ptr + image * 2).to(tl.int32)
        x += tl.load(origin_ptr + image * 2 + 1).to(tl.int32)
    inside = real & (row < size_h) & (column < size_w) & (y >= 0) & (y < moved_h) & (x >= 0) & (x < moved_w)
    red = tl.zeros((TILE_H, TILE_W), tl.int32)
    green, blue = red, red
    if real & (top < size_h) & (left < size_w):
        # Those that are not inside compute something too, which is not written.
        y = tl.minimum(tl.maximum(y, 0), moved_h - 1)
        x = tl.minimum(tl.maximum(x, 0), moved_w - 1)
        if flips_ptr is not None:
            x = tl.where(tl.load(flips_ptr + image * 2) != 0, moved_w - 1 - x, x)
            y = tl.where(tl.load(flips_ptr + image * 2 + 1) != 0, moved_h - 1 - y, y)
        if turns_ptr is not None:
            # Three quarters are a quarter and a half: what is left is no turn or one.
            y = tl.where(turns >= 2, moved_h - 1 - y, y)
            x = tl.where(turns >= 2, moved_w - 1 - x, x)
            if turns % 2 == 1:
                red, green, blue = resample(base, x, result_w - 1 - y, source_h, source_w, result_h, result_w)
            else:
                red, green, blue = resample(base, y, x, source_h, source_w, result_h, result_w)
        else:
            red, green, blue = resample(base, y, x, source_h, source_w, result_h, result_w)
        if matrix_ptr is not None:
            at = matrix_ptr + image * 12
            r, g, b = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
            red, green, blue = _level(at, r, g, b), _level(at + 4, r, g, b), _level(at + 8, r, g, b)
        red, green, blue = tl.where(inside, red, 0), tl.where(inside, green, 0), tl.where(inside, blue, 0)
    line = image * height + top + tl.arange(0, TILE_H)[:, None]
    if WORDS:
        r0, r1, r2, r3 = _of_four(red)
        g0, g1, g2, g3 = _of_four(green)
        b0, b1, b2, b3 = _of_four(blue)
        four = left // 4 + tl.arange(0, TILE_W // 4)[None, :]
        written = (row < height) & (four < width // 4)
        at = out_ptr + line * (width // 4 * 3) + four * 3
        tl.store(at, r0 | (g0 << 8) | (b0 << 16) | (r1 << 24), mask=written)
        tl.store(at + 1, g1 | (b1 << 8) | (r2 << 16) | (g2 << 24), mask=written)
        tl.store(at + 2, b2 | (r3 << 8) | (g3 << 16) | (b3 << 24), mask=written)
    else:
        written = (row < height) & (column < width)
        at = out_ptr + (line * width + column) * 3
        tl.store(at, red.to(tl.uint8), mask=written)
        tl.store(at + 1, green.to(tl.uint8), mask=written)
        tl.store(at + 2, blue.to(tl.uint8), mask=written)


@triton.jit(do_not_specialize=["bytes"])
def _sum_kernel(
    buffer_ptr,  # (bytes,) uint8
    offset_ptr,  # (N,) int64
    source_ptr,  # (N, 2) integer height, width
    resized_ptr,  # (N, 2) integer height, width
    colour_ptr,  # (N, 3, 5) fp32
    sums_ptr,  # (N, programs of an image) int64, written: together the sum of the resized image's levels
    bytes,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    part, parts = tl.program_id(0), tl.num_programs(0)
    base, source_h, source_w, result_h, result_w, real = _load_image(
        buffer_ptr, offset_ptr, source_ptr, resized_ptr, image, bytes
    )
    at = colour_ptr + image * 15 + 3
    asked = (tl.load(at) != 0) | (tl.load(at + 5) != 0) | (tl.load(at + 10) != 0)
    across = tl.cdiv(result_w, TILE_W)
    tiles = tl.where(real & asked, tl.cdiv(result_h, TILE_H) * across, 0)
    total = tl.full((), 0, tl.int64)
    for tile in range(part, tiles, parts):
        y = tile // across * TILE_H + tl.arange(0, TILE_H)[:, None]
        x = tile % across * TILE_W + tl.arange(0, TILE_W)[None, :]
        inside = (y < result_h) & (x < result_w)
        red, green, blue = resample(
            base,
            tl.minimum(y, result_h - 1),
            tl.minimum(x, result_w - 1),
            source_h,
            source_w,
            result_h,
            result_w,
        )
        total += tl.sum(tl.sum(tl.where(inside, red + green + blue, 0), axis=1), axis=0)
    tl.store(sums_ptr + image * parts + part, total)


@triton.jit
def _load_image(buffer_ptr, offset_ptr, source_ptr, resized_ptr, image, bytes):
    """Where an image's pixels are, its sides before and after, and whether there is anything to read."""
    source_h = tl.load(source_ptr + image * 2).to(tl.int64)
    source_w = tl.load(source_ptr + image * 2 + 1).to(tl.int64)
    result_h = tl.load(resized_ptr + image * 2).to(tl.int64)
    result_w = tl.load(resized_ptr + image * 2 + 1).to(tl.int64)
    offset = tl.load(offset_ptr + image)
    real = (source_h > 0) & (source_w > 0) & (result_h > 0) & (result_w > 0)
    real = real & (source_h * result_h < LARGEST) & (source_w * result_w < LARGEST)
    real = real & (offset >= 0) & (offset + 3 * source_h * source_w <= bytes)
    h, w = source_h.to(tl.int32), source_w.to(tl.int32)
    return buffer_ptr + offset, h, w, result_h.to(tl.int32), result_w.to(tl.int32), real


@triton.jit
def _level(matrix_ptr, red, green, blue):
    """A new level from a row of the matrix, rounded half up."""
    level = (tl.load(matrix_ptr) * red + tl.load(matrix_ptr + 1) * green) + tl.load(matrix_ptr + 2) * blue
    level = level + tl.load(matrix_ptr + 3) + 0.5
    return tl.minimum(tl.maximum(level, 0.0), 255.0).to(tl.int32)


@triton.jit
def _of_four(levels):
    """The first, second, third and fourth of every four neighbours in a row."""
    even, odd = tl.split(tl.reshape(levels, (levels.shape[0], levels.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
