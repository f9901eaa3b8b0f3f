"""Resize and pad, pixel by pixel: the definition, as Pillow's Resample.c has it, in float64 and integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 22  # behind the point of a weight; Pillow's PRECISION_BITS for 8-bit images


def resize_pad(
    buffer: Tensor,
    offset: Tensor,
    source: Tensor,
    resized: Tensor,
    sizes: Tensor,
    height: int,
    width: int,
    *,
    turns: Tensor,
    flips: Tensor,
    origin: Tensor,
    colour: Tensor | None = None,
) -> Tensor:
    """(N, 3, height, width) uint8; see `op.resize_pad`."""
    out = torch.zeros((len(offset), 3, height, width), dtype=torch.uint8)
    for n, start in enumerate(offset.tolist()):
        h, w = source[n].tolist()
        pixels = buffer[start : start + 3 * h * w].view(h, w, 3)
        image = torch.rot90(resize(pixels, *resized[n].tolist()), int(turns[n]))
        image = image.flip([axis for axis, way in ((1, 0), (0, 1)) if flips[n, way]])
        top, left = origin[n].tolist()
        part = {
            (y, x): image[top + y, left + x].double()
            for y in range(min(int(sizes[n, 0]), height))
            for x in range(min(int(sizes[n, 1]), width))
            if 0 <= top + y < image.shape[0] and 0 <= left + x < image.shape[1]
        }
        mean = math.fsum(float(level) for levels in part.values() for level in levels) / max(3 * len(part), 1)
        for (y, x), level in part.items():
            if colour is not None:
                known = torch.cat([level, level.new_tensor([mean, 1])])
                level = (colour[n].double() @ known + 0.5).floor().clamp(0, 255)
            out[n, :, y, x] = level.to(torch.uint8)
    return out


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 3) to (height, width, 3) uint8: along rows first, rounded, then along columns, rounded."""
    across = torch.stack([_resampled(row.tolist(), width) for row in pixels])
    down = [_resampled(column.tolist(), height) for column in across.transpose(0, 1)]
    return torch.stack(down, dim=1)


def _resampled(line: Sequence[Sequence[int]], length: int) -> Tensor:
    """(length, 3) of a line of colours."""
    out = []
    for place in range(length):
        first, weights = window(place, len(line), length)
        levels = [
            (sum(k * line[first + i][c] for i, k in enumerate(weights)) + (1 << (BITS - 1))) >> BITS
            for c in range(3)
        ]
        out.append([min(max(level, 0), 255) for level in levels])
    return torch.tensor(out, dtype=torch.uint8)


def window(place: int, source: int, length: int) -> tuple[int, list[int]]:
    """The first source pixel that counts for a pixel of the result, and the weights from there on.

    A triangle as wide as two pixels of the result or of the source, whichever are wider.
    """
    scale = source / length
    support = max(scale, 1.0)
    centre = (place + 0.5) * scale
    first = max(int(centre - support + 0.5), 0)
    last = min(int(centre + support + 0.5), source)
    weights = [max(0.0, 1 - abs((x - centre + 0.5) / support)) for x in range(first, last)]
    whole = math.fsum(weights)
    return first, [int(0.5 + weight / whole * (1 << BITS)) for weight in weights]
