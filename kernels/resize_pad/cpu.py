"""Resize and pad as CPU tensors run it, in PyTorch; `naive.py` says what it computes.

A weight is a ratio of integers: of a source pixel x, for the place p of the result, it is
2S - |(2x + 1) result - (2p + 1) source| over the sum of these, where S is the larger of both lengths. So the
fixed-point weights, and with them the levels, are the same bits wherever they are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 22  # behind the point of a weight; Pillow's PRECISION_BITS for 8-bit images
LARGEST_PRODUCT = 2**29
"""A source side times what it is resized to stays below this, so that 32 bits hold what is computed."""
LARGEST_IMAGE = 2**31  # bytes


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
    """See `op.resize_pad`."""
    count = len(offset)
    out = torch.zeros((count, height, width, 3), dtype=torch.uint8, device=buffer.device)
    real = is_real(buffer, offset, source, resized).tolist()
    quarter = [0] * count if turns is None else (turns % 4).tolist()
    mirrored = [[False, False]] * count if flips is None else flips.tolist()
    begin = [[0, 0]] * count if origin is None else origin.tolist()
    for n in range(count):
        if not real[n]:
            continue
        h, w = source[n].tolist()
        start = int(offset[n])
        pixels = buffer[start : start + 3 * h * w].view(h, w, 3)
        size = resized[n].tolist()
        moved = size[::-1] if quarter[n] % 2 else size
        rows, columns = (
            _places(begin[n][axis], min(int(sizes[n, axis]), limit), moved[axis], mirrored[n][1 - axis])
            for axis, limit in enumerate((height, width))
        )
        top, left = (max(-first, 0) for first in begin[n])  # before it, the part lies outside of the image
        y, x = _turned_back(rows, columns, quarter[n], size)
        part = resize(pixels, size, y, x)
        if quarter[n] % 2:
            part = part.transpose(0, 1)
        if colour is not None:
            levels = offset.new_tensor(part.numel())
            part = _coloured(part, folded(colour[n], part.sum(dtype=torch.int64), levels))
        out[n, top : top + part.shape[0], left : left + part.shape[1]] = part
    return out.permute(0, 3, 1, 2)


def is_real(buffer: Tensor, offset: Tensor, source: Tensor, resized: Tensor) -> Tensor:
    """(N,) bool: the image has pixels, all of them within the buffer, and sides that can be resized so."""
    source, resized = source.long(), resized.long()
    sides = ((source > 0) & (resized > 0) & (source * resized < LARGEST_PRODUCT)).all(1)
    size = 3 * source.prod(1)
    return sides & (size < LARGEST_IMAGE) & (offset >= 0) & (offset + size <= buffer.numel())


def folded(colour: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """(..., 3, 4) float32 of (red, green, blue, 1), for a part whose levels (...) and their sum are known."""
    mean = total.double() / count.clamp(min=1)
    last = colour[..., 3].double() * mean[..., None] + colour[..., 4].double()
    return torch.cat([colour[..., :3], last.float()[..., None]], dim=-1)


def resize(pixels: Tensor, size: list[int], y: Tensor, x: Tensor) -> Tensor:
    """(rows, columns, 3) uint8: these rows and columns of what (h, w, 3) uint8 becomes at this size."""
    if not len(y) or not len(x):
        return pixels.new_zeros((len(y), len(x), 3))
    first, weights = windows(y, pixels.shape[0], size[0])
    low = int(first.min())
    used = pixels[low : int(first.max()) + weights.shape[0]]
    lines = _resampled(used.transpose(0, 1).flatten(1), *windows(x, pixels.shape[1], size[1]))
    lines = lines.unflatten(1, (-1, 3)).transpose(0, 1).flatten(1)
    return _resampled(lines, first - low, weights).unflatten(1, (-1, 3))


def windows(place: Tensor, source: int, result: int) -> tuple[Tensor, Tensor]:
    """The first source pixel (places,) of each place, and the weights (taps, places) from there on, int32."""
    larger = max(source, result)
    centre = (2 * place + 1) * source
    first = (centre - 2 * larger + result).clamp(min=0) // (2 * result)
    taps = min(-(-2 * larger // result), source)
    x = first + torch.arange(taps, device=place.device)[:, None]
    share = (2 * larger - ((2 * x + 1) * result - centre).abs()).clamp(min=0) * (x < source)
    weights = (share * ((1 << BITS) / share.sum(0, keepdim=True).double()) + 0.5).to(torch.int32)
    return first, weights


def _resampled(lines: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """(places, n) uint8: the weighted sums of lines (m, n), rounded."""
    total = torch.full((len(first), lines.shape[1]), 1 << (BITS - 1), dtype=torch.int32, device=lines.device)
    for tap, weight in enumerate(weights):
        line = lines.index_select(0, (first + tap).clamp(max=len(lines) - 1))
        total.addcmul_(line.to(torch.int32), weight[:, None])
    return total.bitwise_right_shift_(BITS).to(torch.uint8)


def _places(begin: int, length: int, side: int, mirrored: bool) -> Tensor:
    """Of the moved image, whose side is so long, what begin .. begin + length - 1 are before the flip."""
    place = torch.arange(max(begin, 0), max(min(begin + length, side), max(begin, 0)))
    return side - 1 - place if mirrored else place


def _turned_back(rows: Tensor, columns: Tensor, turns: int, size: list[int]) -> tuple[Tensor, Tensor]:
    """Which rows and columns of the resized image these are, of the image after quarter turns."""
    if turns == 1:
        return columns, size[1] - 1 - rows
    if turns == 2:
        return size[0] - 1 - rows, size[1] - 1 - columns
    if turns == 3:
        return size[0] - 1 - columns, rows
    return rows, columns


def _coloured(image: Tensor, matrix: Tensor) -> Tensor:
    """(h, w, 3) uint8 under a (3, 4) matrix, each product and sum rounded to float32 in this order."""
    red, green, blue = image.float().unbind(2)
    levels = [(m[0] * red + m[1] * green) + m[2] * blue + m[3] for m in matrix]
    return (torch.stack(levels, dim=2) + 0.5).clamp(0, 255).to(torch.uint8)
