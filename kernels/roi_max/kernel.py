"""RoIPool, and RoIWarp and RoIAlign with the largest sample of a bin, in Triton, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launch import H100, CompileSpec, Target
from ..common.pooling import Pooling, memory_format
from . import backward, forward


def multilevel_roi_max(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `cpu.multilevel_roi_max`, whose arguments they are; channels_last if the first map is."""
    out, winner, launch = forward.launch(*arguments)
    if out.numel() > 0:
        launch.run()
    return out, winner


def multilevel_roi_max_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Arguments as of `backward.launch`. One launch, and no memory but the gradients."""
    grads, launch = backward.launch(grad, *arguments)
    if grads[0].numel() == 0:
        return grads
    if grad.numel() == 0:
        return [part.zero_() for part in grads]
    launch.run()
    return grads


def compile_specs(target: Target = H100) -> list[CompileSpec]:
    """P2-P5 of 8 images at 800x1344, C=256, 512 RoIs of 7x7 an image.

    The least bytes count every map once, which is what RoIs that cover the maps must read; the least
    operations are a comparison for each of 16x16 points of an RoI, and three interpolations where the
    points are samples. The kernels of RoIWarp are those of RoIAlign but for a few instructions: one variant.
    """
    images, channels, rois, bins = 8, 256, 8 * 512, 7
    sizes = [(200, 336), (100, 168), (50, 84), (25, 42)]
    how = Pooling((bins, bins), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, True, 224.0, 4, 2)
    boxes = torch.empty((rois, 4), device="meta")
    valid = torch.empty((rois,), dtype=torch.bool, device="meta")
    specs = []
    for kind, name in (("pool", "roi_pool"), ("warp", "roi_warp_max"), ("align", "roi_align_max")):
        for dtype, dtype_name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            for channels_last in (False, True):
                variant = f"{dtype_name} {'channels_last' if channels_last else 'nchw'}"
                if kind == "warp" and variant != "bf16 channels_last":
                    continue
                widest = 16 if channels_last and dtype == torch.bfloat16 else None
                form = memory_format(channels_last)
                like: dict[str, Any] = {"dtype": dtype, "device": "meta", "memory_format": form}
                maps = [torch.empty((images, channels, *size), **like) for size in sizes]
                out, winner, pool = forward.launch(maps, boxes, None, valid, kind, how, target)
                _, gather = backward.launch(
                    out, winner, boxes, None, valid, images, sizes, channels_last, kind, how
                )
                moved = sum(t.nbytes for t in (*maps, out, winner, boxes))
                flops = rois * channels * 16 * 16 * (1 if kind == "pool" else 10)
                specs.append(pool.spec(f"{name} forward 7x7", variant, moved, flops, widest))
                flops = rois * channels * bins * bins * (1 if kind == "pool" else 8)
                specs.append(gather.spec(f"{name} backward 7x7", variant, moved, flops))
    return specs
