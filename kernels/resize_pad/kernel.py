"""Resize and pad in Triton: a program for each tile of the output, which is written once.

Both passes of the resampling are in one program: it computes a row of the first one where the second needs
it, again for each of its taps, which are two wherever an image grows. Where a colour matrix asks for the mean
level, the same kernel has run before and kept the sums of its tiles alone.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, plain
from ..common.library import interpreting
from .cpu import LARGEST_IMAGE, LARGEST_PRODUCT, folded
from .taps import resample

TILE_H, TILE_W = 8, 64  # of a program, in pixels
WARPS = 4
MOST_PRODUCT, MOST_BYTES = tl.constexpr(LARGEST_PRODUCT), tl.constexpr(LARGEST_IMAGE)


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
    images = (buffer, offset, source, resized, sizes, turns, flips, origin)
    matrix = None
    if colour is not None and colour.numel():
        sums, launch = _launch(*images, colour, height, width, sums=True)
        launch.run()
        matrix = folded(colour, sums.sum(1), 3 * _pixels(resized, sizes, turns, origin, height, width))
    out, launch = _launch(*images, matrix, height, width)
    if out.numel():
        launch.run()
    return out.permute(0, 3, 1, 2)


def _pixels(
    resized: Tensor, sizes: Tensor, turns: Tensor | None, origin: Tensor | None, height: int, width: int
) -> Tensor:
    """(N,) int64: how many pixels of each image are in its part."""
    moved = resized.long()
    if turns is not None:
        moved = moved.flip(1).where((turns % 2 == 1)[:, None], moved)
    begin = torch.zeros_like(moved) if origin is None else origin.long()
    most = torch.stack([sizes[:, 0].clamp(max=height), sizes[:, 1].clamp(max=width)], 1).long()
    return (torch.minimum(begin + most, moved) - begin.clamp(min=0)).clamp(min=0).prod(1)


def _launch(
    buffer: Tensor,
    offset: Tensor,
    source: Tensor,
    resized: Tensor,
    sizes: Tensor,
    turns: Tensor | None,
    flips: Tensor | None,
    origin: Tensor | None,
    matrix: Tensor | None,
    height: int,
    width: int,
    sums: bool = False,
) -> tuple[Tensor, Launch]:
    """The output (N, height, width, 3), or the sums (N, tiles) of the levels of images whose mean counts."""
    tile_h = 8 * TILE_H if interpreting() else TILE_H  # there an operation costs the same at any size
    grid = (triton.cdiv(width, TILE_W), triton.cdiv(height, tile_h), len(offset))
    if sums:
        out = torch.empty((len(offset), grid[0] * grid[1]), dtype=torch.int32, device=buffer.device)
    else:
        out = torch.empty((len(offset), height, width, 3), dtype=torch.uint8, device=buffer.device)
    words = width % 4 == 0
    arguments = {
        "buffer_ptr": plain(buffer),
        "offset_ptr": plain(offset),
        "source_ptr": plain(source),
        "resized_ptr": plain(resized),
        "sizes_ptr": plain(sizes),
        "turns_ptr": None if turns is None else plain(turns),
        "flips_ptr": None if flips is None else plain(flips),
        "origin_ptr": None if origin is None else plain(origin),
        "matrix_ptr": None if matrix is None else plain(matrix),
        "out_ptr": out.flatten(2).view(torch.int32) if words and not sums else out,
        "bytes": buffer.numel(),
        "height": height,
        "width": width,
        "SUMS": sums,
        "WORDS": words,
        "TILE_H": tile_h,
        "TILE_W": TILE_W,
    }
    # Without fusion a colour is rounded as cpu.py rounds it.
    return out, Launch(_resize_kernel, grid, arguments, WARPS, {"enable_fp_fusion": False})


def compile_specs() -> list[CompileSpec]:
    """8 images that fill 800x1344: of 480x640, which grow, and of 2400x4000, which shrink to a third.

    The least bytes are the images and the output. The least operations are a product and a sum for each tap
    and channel of both passes, each computed once.
    """
    specs = []
    for name, source, result, variants in (
        ("480x640", (480, 640), (800, 1067), ("plain", "moved", "coloured", "sums", "no words")),
        ("2400x4000", (2400, 4000), (800, 1333), ("plain",)),
    ):
        buffer = torch.empty(8 * 3 * source[0] * source[1], dtype=torch.uint8, device="meta")
        offset = buffer.new_empty(8, dtype=torch.int64)
        pair = offset.new_empty((8, 2), dtype=torch.int32)
        taps = [max(2, -(-2 * a // b)) for a, b in zip(source, result, strict=True)]
        flops = 8 * 2 * 3 * (taps[1] * source[0] * result[1] + taps[0] * result[0] * result[1])
        trips = taps[0] * taps[1] * result[1] / 1344  # of the average tile: those of padding make none
        for variant in variants:
            sums = variant == "sums"
            moves: tuple[Any, Any, Any, Any] = (None, None, None, None)
            if variant in ("moved", "coloured", "sums"):
                colour = offset.new_empty((8, 3, 5 if sums else 4), dtype=torch.float32)
                moves = (pair[:, 0], pair.to(torch.bool), pair, None if variant == "moved" else colour)
            width = 1343 if variant == "no words" else 1344
            out, launch = _launch(buffer, offset, pair, pair, pair.long(), *moves, 800, width, sums)
            moved = buffer.nbytes + out.nbytes
            specs.append(launch.spec(f"resize_pad {name}", variant, moved, flops, trips=trips))
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
    matrix_ptr,  # (N, 3, 4) fp32 or None; where sums are wanted the colour, (N, 3, 5)
    out_ptr,  # (N, height, width, 3) uint8, or int32 words of it, or (N, tiles) int32 sums; written
    bytes,
    height,
    width,
    SUMS: tl.constexpr,  # whether the sums of the tiles' levels are wanted alone
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
    if SUMS:
        at = matrix_ptr + image * 15 + 3
        real = real & ((tl.load(at) != 0) | (tl.load(at + 5) != 0) | (tl.load(at + 10) != 0))
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
        if matrix_ptr is not None and not SUMS:
            at = matrix_ptr + image * 12
            r, g, b = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
            red, green, blue = _level(at, r, g, b), _level(at + 4, r, g, b), _level(at + 8, r, g, b)
        red, green, blue = tl.where(inside, red, 0), tl.where(inside, green, 0), tl.where(inside, blue, 0)
    line = image * height + row
    if SUMS:
        tile = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(out_ptr + tile, tl.sum(tl.sum(red + green + blue, axis=1), axis=0))
    elif WORDS:
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


@triton.jit
def _load_image(buffer_ptr, offset_ptr, source_ptr, resized_ptr, image, bytes):
    """Where an image's pixels are, its sides before and after, and whether there is anything to read."""
    source_h = tl.load(source_ptr + image * 2).to(tl.int64)
    source_w = tl.load(source_ptr + image * 2 + 1).to(tl.int64)
    result_h = tl.load(resized_ptr + image * 2).to(tl.int64)
    result_w = tl.load(resized_ptr + image * 2 + 1).to(tl.int64)
    offset = tl.load(offset_ptr + image)
    real = (source_h > 0) & (source_w > 0) & (result_h > 0) & (result_w > 0)
    real = real & (source_h * result_h < MOST_PRODUCT) & (source_w * result_w < MOST_PRODUCT)
    real = real & (3 * source_h * source_w < MOST_BYTES)
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
