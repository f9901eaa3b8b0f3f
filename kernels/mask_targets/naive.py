"""Mask targets, RoI by RoI from the object's whole bitmap: the definition, in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..roi_align.naive import bilinear, sample_lines


def mask_targets(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    size: Tensor,
    *,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    resolution: int,
    sampling_ratio: int = 2,
    aligned: bool = True,
    bitmap: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """(F, M, M): RoIAlign of the matched object's bitmap, at least one sample a bin.

    Arguments are those of `op.mask_targets`; the padding of the input, `image_shape`, has no part in it. A
    slot that is not valid, a box that is not finite, and an image or object that is not there give zeros.
    """
    out = torch.zeros((len(boxes), resolution, resolution), dtype=torch.float64)
    for f, box in enumerate(boxes.double()):
        n, g = int(image[f]), int(matched[f])
        exists = n in range(offset.shape[0]) and g in range(offset.shape[1])
        if not exists or not box.isfinite().all() or (valid is not None and not valid[f]):
            continue
        left, top, width, height = window[n, g].tolist()
        crop = buffer[int(offset[n, g]) :][: width * height].view(height, width)
        place = (n, g) if to_annotation.dim() == 4 else n  # maps of objects, or of images
        mask = torch.zeros(size[place].tolist(), dtype=torch.float64)
        mask[top : top + height, left : left + width] = crop
        affine = to_annotation[place].double()
        if sampling_ratio <= 0:  # read in the input's resolution
            mask, affine = _resized(mask, affine, image_sizes[n].tolist()), torch.eye(2, 3).double()
        x1, y1, x2, y2 = box.tolist()
        lines = partial(
            sample_lines, bins=resolution, sampling_ratio=sampling_ratio, aligned=aligned, least=1
        )
        for i, y in enumerate(lines(y1, y2)):
            for j, x in enumerate(lines(x1, x2)):
                u, v = _moved(affine, y[:, None] + 0.5, x + 0.5)
                out[f, i, j] = bilinear(mask[None], v - 0.5, u - 0.5).mean()
    return out >= 0.5 if bitmap else out


def _resized(mask: Tensor, affine: Tensor, image_size: list[int]) -> Tensor:
    """The mask in an input of that height and width: a pixel is the annotation's pixel at its centre."""
    y, x = (torch.arange(length, dtype=torch.float64) + 0.5 for length in image_size)
    column, row = (t.floor().long() for t in _moved(affine, y[:, None], x))
    height, width = mask.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return mask[row.where(inside, 0), column.where(inside, 0)].where(inside, 0)


def _moved(affine: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in the annotation of positions in the input; pixel 0 reaches from 0 to 1 in both."""
    u, v = (row[0] * x + row[1] * y + row[2] for row in affine)
    return u, v
