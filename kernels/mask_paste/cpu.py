"""Mask paste as CPU tensors run it, in PyTorch; `naive.py` says what it computes.

Bilinear sampling is separable: two taps for each row and two for each column say it all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of each whole-image intermediate


def sample_dtype(masks: Tensor, boxes: Tensor) -> torch.dtype:
    """Of positions, weights and values."""
    return torch.float64 if torch.float64 in (masks.dtype, boxes.dtype) else torch.float32


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    packed: bool,
) -> Tensor:
    """See `op.paste_masks`."""
    dtype = sample_dtype(masks, boxes)
    masks, boxes = masks.to(dtype), boxes.to(dtype)
    real = is_real(boxes, valid)
    shape = (len(masks), height, packed_width(width) if packed else width)
    out = torch.empty(shape, dtype=torch.uint8 if packed else torch.bool, device=masks.device)
    step = max(1, CHUNK_BYTES // (height * width * dtype.itemsize))
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        bits = sample(masks[part], boxes[part], real[part], height, width) >= threshold
        out[part] = pack(bits) if packed else bits
    return out


def is_real(boxes: Tensor, valid: Tensor | None) -> Tensor:
    """(D,) bool: a valid slot whose box has a finite extent above 0."""
    extent = boxes[:, 2:] - boxes[:, :2]
    real = (extent.isfinite() & (extent > 0)).all(1)
    return real if valid is None else real & valid


def sample(masks: Tensor, boxes: Tensor, real: Tensor, height: int, width: int) -> Tensor:
    """(D, height, width) probabilities at the pixels' centres, all in the dtype of the masks."""
    side = masks.shape[-1]
    boxes = boxes.where(real[:, None], boxes.new_tensor([0, 0, 1, 1]))
    masks = masks.where(real[:, None, None], 0)
    padded = F.pad(masks, (1, 1, 1, 1))
    y, down = taps(boxes[:, 1], boxes[:, 3], height, side)
    x, right = taps(boxes[:, 0], boxes[:, 2], width, side)
    y = y[:, :, None].expand(-1, -1, side + 2)
    upper, lower = padded.gather(1, y), padded.gather(1, y + 1)
    across = upper + down[:, :, None] * (lower - upper)
    x = x[:, None, :].expand(-1, height, -1)
    first, second = across.gather(2, x), across.gather(2, x + 1)
    return first + right[:, None, :] * (second - first)


def taps(low: Tensor, high: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """(D, size): the first of a pixel's two taps in a mask with a rim of zeros, and the second's weight."""
    centres = torch.arange(size, dtype=low.dtype, device=low.device) + 0.5
    position = (centres - low[:, None]) / (high - low)[:, None] * side + 0.5
    position = position.clamp(0, side + 1)  # beyond, there is nothing but the rim
    first = position.floor().clamp(max=side)
    return first.long(), position - first


def packed_width(width: int) -> int:
    return (width + 7) // 8


def pack(bits: Tensor) -> Tensor:
    """(..., W) bool -> (..., ceil(W / 8)) uint8, the first pixel in the highest bit, as numpy.packbits."""
    width = bits.shape[-1]
    bits = F.pad(bits.to(torch.uint8), (0, packed_width(width) * 8 - width)).unflatten(-1, (-1, 8))
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (bits * place).sum(-1, dtype=torch.uint8)
