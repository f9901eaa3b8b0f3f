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

from ..common.launch import H100, CompileSpec, Launch, Target
from ..common.pooling import Asked, Pooling, empty_maps, memory_format
from . import backward, forward


def multilevel_roi_align(
    features: list[Tensor], boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None, how: Pooling
) -> Tensor:
    """See `cpu.multilevel_roi_align`. The result is channels_last if the first map is."""
    out, launch = forward.launch(features, boxes, batch_index, valid, how)
    if out.numel() > 0:
        launch.run()
    return out


def multilevel_roi_align_backward(
    out_grads: list[Tensor],
    asked: list[Asked],
    num_images: int,
    sizes: list[tuple[int, int]],
    channels_last: bool,
) -> list[Tensor]:
    """See `cpu.multilevel_roi_align_backward`. Two launches for each set of RoIs, and one for all.

    It takes, beside the gradients, four bytes for an RoI and tile of the largest map, and a bit for an RoI
    and tile of its image, or of all images where RoIs name theirs.
    """
    if not any(grad.shape[0] for grad in out_grads):
        return [part.zero_() for part in empty_maps(out_grads[0], num_images, sizes, channels_last)]
    grads, launches = backward.launches(out_grads, asked, num_images, sizes, channels_last)
    if grads[0].numel() > 0:
        for launch in launches:
            launch.run()
    return grads


def compile_specs(target: Target = H100) -> list[CompileSpec]:
    """P2-P5 of 8 images at 800x1344, C=256: 512 RoIs of 7x7 and 128 of 14x14 an image.

    Backward of both, too, where the 14x14 are 48 an image and packed, as they are in a step. The least bytes
    count every map once, which is what RoIs that cover the maps must read; the least operations are those of
    the two products of Wy, patch and Wx for RoIs of 16x16 pixels. Trips are the tiles of a part of an RoI,
    and the parts on a tile, in the mean of the RoIs of `bench/workload.py`.
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
            maps_bytes = sum(t.nbytes for t in maps)

            def pooled(bins: int, per_image: int, packed: bool, like: Any = like) -> tuple[Tensor, Asked]:
                rois = images * per_image
                how = Pooling((bins, bins), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, True, 224.0, 4, 2)
                boxes = torch.empty((rois, 4), device="meta")
                image = torch.empty((rois,), dtype=torch.int64, device="meta") if packed else None
                valid = torch.empty((rois,), dtype=torch.bool, device="meta")
                return torch.empty((rois, channels, bins, bins), **like), Asked(boxes, image, valid, how)

            def gradient(
                *sets: tuple[Tensor, Asked], last: bool = channels_last
            ) -> tuple[list[Launch], int, int]:
                """Its launches, the least bytes and the least operations of the last."""
                grads, asked = [grad for grad, _ in sets], [one for _, one in sets]
                _, launches = backward.launches(grads, asked, images, sizes, last, target)
                return launches, sum(g.nbytes for g in grads), sum(map(_least_flops, grads))

            for bins, per_image, tiles, items in ((7, 512, 9.24, 4.64), (14, 128, 3.58, 2.05)):
                grad, asked = pooled(bins, per_image, False)
                size = f"{bins}x{bins}"
                _, pool = forward.launch(maps, *asked, target)
                (find, write, gather), read, flops = gradient((grad, asked))
                moved = maps_bytes + read + asked.boxes.nbytes
                specs.append(pool.spec(f"roi_align forward {size}", variant, moved, flops, widest, tiles))
                specs.append(gather.spec(f"roi_align backward {size}", variant, moved, flops, widest, items))
                if channels_last:  # a head that flattens its features hands back such a gradient
                    (*_, gather), *_ = gradient((grad.contiguous(), asked))
                    flat = f"{variant}, nchw gradient"
                    specs.append(gather.spec(f"roi_align backward {size}", flat, moved, flops, trips=items))
            both = pooled(7, 512, False), pooled(14, 48, True)
            (*_, packed_find, packed_write, gather), read, flops = gradient(*both)
            moved = maps_bytes + read + sum(one.boxes.nbytes for _, one in both)
            specs.append(gather.spec("roi_align backward 7x7 and 14x14", variant, moved, flops, widest, 5.42))
            for packed, one, other in (("", find, write), (", packed", packed_find, packed_write)):
                hits = one.arguments["hits_ptr"].nbytes
                boxes = one.arguments["boxes_ptr"].nbytes
                specs.append(one.spec("roi_align backward hits", f"{variant}{packed}", boxes + hits, 0))
                specs.append(other.spec("roi_align backward lists", f"{variant}{packed}", hits, 0))
    return specs


def _least_flops(grad: Tensor) -> int:
    rois, channels, bins, _ = grad.shape
    return 2 * rois * channels * (bins * 16 * 16 + bins * bins * 16)
