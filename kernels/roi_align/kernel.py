"""RoIAlign in Triton, forward and backward, over all levels in one launch.

An output bin is a weighted sum of pixels, and the weight of a pixel is that of its row times that of its
column. So both directions are products of small matrices on the tensor cores, whose weights are computed
on the fly: forward, one program has up to 8 x 8 bins of an RoI and runs over the 8 x 8 pixel tiles that
they touch, reading each pixel once; backward, one program has an 8 x 8 pixel tile of a map and runs over
the RoIs that touch it in the order of their index, writing each pixel once. No atomics on sums, no
float32 copy of the maps, and the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launch import H100, CompileSpec, Target
from ..common.pooling import Pooling, memory_format
from . import backward, forward


def multilevel_roi_align(
    features: list[Tensor], boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None, how: Pooling
) -> Tensor:
    """See `cpu.multilevel_roi_align`. The result is channels_last if the first map is."""
    out, launch = forward.launch(features, boxes, batch_index, valid, how)
    if out.numel() > 0:
        launch.run()
    return out


def multilevel_roi_align_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Arguments as of `backward.launches`. Three launches, and four bytes for a tile and RoI of its image."""
    grads, launches = backward.launches(grad, *arguments)
    if grads[0].numel() == 0:
        return grads
    if grad.shape[0] == 0:
        return [part.zero_() for part in grads]
    for launch in launches:
        launch.run()
    return grads


def compile_specs(target: Target = H100) -> list[CompileSpec]:
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
                _, pool = forward.launch(maps, boxes, None, valid, how, target)
                _, (find, write, gather) = backward.launches(
                    grad, boxes, None, valid, images, sizes, channels_last, how, target
                )
                moved = sum(t.nbytes for t in [*maps, grad, boxes])
                flops = 2 * rois * channels * (bins * 16 * 16 + bins * bins * 16)
                size = f"{bins}x{bins}"
                specs.append(pool.spec(f"roi_align forward {size}", variant, moved, flops, widest))
                specs.append(gather.spec(f"roi_align backward {size}", variant, moved, flops, widest))
                if channels_last:  # a head that flattens its features hands back such a gradient
                    _, (*_, gather) = backward.launches(
                        grad.contiguous(), boxes, None, valid, images, sizes, True, how, target
                    )
                    flat = f"{variant}, nchw gradient"
                    specs.append(gather.spec(f"roi_align backward {size}", flat, moved, flops))
            moved = boxes.nbytes + find.arguments["hits_ptr"].nbytes
            specs.append(find.spec("roi_align backward hits", variant, moved, 0))
            moved = find.arguments["hits_ptr"].nbytes
            specs.append(write.spec("roi_align backward lists", variant, moved, 0))
            index = torch.empty((rois,), dtype=torch.int64, device="meta")
            _, (find, write, _) = backward.launches(
                grad, boxes, index, valid, images, sizes, channels_last, how, target
            )
            hits = find.arguments["hits_ptr"].nbytes
            packed = f"{variant}, packed"
            specs.append(find.spec("roi_align backward hits", packed, boxes.nbytes + hits, 0))
            specs.append(write.spec("roi_align backward lists", packed, hits, 0))
    return specs
