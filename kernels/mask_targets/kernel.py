"""Mask targets cut from packed bitmaps, in Triton: a thread for each mask pixel.

Neighbouring threads have neighbouring mask pixels of a row, so that their reads lie along a row of the
crop, and a crop's bytes come from memory once and then from the cache.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.bitmaps import Bitmaps, Sampling
from ..common.launch import CompileSpec, Launch, coded, plain
from ..common.library import sum_dtype
from .sampling import target_pixels

PIXELS = 128  # of a program
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def mask_targets(
    boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, bitmaps: Bitmaps, how: Sampling
) -> Tensor:
    """See `cpu.mask_targets`."""
    out, launch = _launch(boxes, image, matched, valid, bitmaps, how)
    if out.numel() > 0:
        launch.run()
    return out


def bitmap_arguments(
    boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, bitmaps: Bitmaps, how: Sampling
) -> dict[str, Any]:
    """What a kernel hands to `target_pixels`."""
    images, objects = bitmaps.offset.shape
    valid = None if valid is None else plain(valid)
    rois = (boxes.contiguous(), image.contiguous(), matched.contiguous(), valid)
    return {
        "rois": rois,
        "bitmaps": tuple(plain(table) for table in bitmaps),
        "limits": coded((bitmaps.buffer.numel(), images, objects, *how.image_shape)),
        "SAMPLES": how.sampling_ratio,
        "ALIGNED": how.aligned,
        "POSITION": TRITON_DTYPE[sum_dtype(boxes)],
    }


def _launch(
    boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, bitmaps: Bitmaps, how: Sampling
) -> tuple[Tensor, Launch]:
    slots, side = boxes.shape[0], how.resolution
    dtype = torch.bool if how.bitmap else sum_dtype(boxes)
    out = torch.empty((slots, side, side), dtype=dtype, device=boxes.device)
    arguments = {
        **bitmap_arguments(boxes, image, matched, valid, bitmaps, how),
        "out_ptr": plain(out),
        "SIDE": side,
        "BITMAP": how.bitmap,
        "PIXELS": PIXELS,
    }
    return out, Launch(_targets_kernel, (slots, triton.cdiv(side * side, PIXELS)), arguments)


def example(slots: int, how: Sampling) -> tuple[Tensor, Tensor, Tensor, Tensor, Bitmaps, Sampling]:
    """Arguments of a launch at a real shape, on the meta device: 8 images with 64 objects each."""
    images, objects = 8, 64

    def table(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bitmaps = Bitmaps(
        table(torch.uint8, 1 << 22),
        table(torch.int64, images, objects),
        table(torch.int32, images, objects, 4),
        table(torch.float32, images, 2, 3),
        table(torch.int32, images, 2),
        table(torch.int64, images, 2),
    )
    rois = (table(torch.float32, slots, 4), table(torch.int64, slots), table(torch.int64, slots))
    return *rois, table(torch.bool, slots), bitmaps, how


def compile_specs() -> list[CompileSpec]:
    """Slots of 8 images at 800x1344, 28x28, two samples an axis; adaptive in the same shape.

    The least bytes are one of the ground truth a sample, and the target; adaptive takes one sample at
    least. The least operations are those of the two products with the affine map of a sample.
    """
    specs = []
    for slots in (8 * 128, 8 * 48):
        for name, samples, bitmap in (("bitmap", 2, True), ("soft", 2, False), ("adaptive", 0, True)):
            how = Sampling((800, 1344), 28, samples, True, bitmap)
            out, launch = _launch(*example(slots, how))
            reads = slots * 28 * 28 * max(samples, 1) ** 2
            specs.append(
                launch.spec(f"mask_targets {slots}", name, reads + out.nbytes + 32 * slots, 8 * reads)
            )
    return specs


@triton.jit
def _targets_kernel(
    rois,  # boxes, image, matched, valid; see `target_pixels`
    bitmaps,  # the tables; see `target_pixels`
    limits,
    out_ptr,  # (F, SIDE, SIDE) uint8 if BITMAP, else floating point; written
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    POSITION: tl.constexpr,  # the dtype of positions
    BITMAP: tl.constexpr,
    PIXELS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = pixel < SIDE * SIDE
    target = target_pixels(rois, bitmaps, limits, slot, pixel, mask, SIDE, SAMPLES, ALIGNED, POSITION)
    if BITMAP:
        target = (target >= 0.5).to(tl.uint8)
    tl.store(out_ptr + slot * SIDE * SIDE + pixel, target.to(out_ptr.dtype.element_ty), mask=mask)
