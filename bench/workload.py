"""The workload of all benchmarks: fixed, so that numbers compare over time.

P2-P5 of 8 images at 800x1344 with 256 channels, bf16, channels_last. Of an image's RoIs one quarter are
jittered around 15 objects and come first, as the foreground does in training; the sides of the others are
log-uniform from 16 to 800 pixels. A change of anything here makes old results incomparable: delete them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20170320  # the month and day of arXiv 1703.06870
STRIDES = (4, 8, 16, 32)
SMALLEST, LARGEST = 16.0, 800.0  # sides of RoIs, in pixels
JITTER = 0.1  # of an object's sides: standard deviation of its centre, and of the logarithm of its sides


@dataclass(frozen=True)
class Workload:
    """Sizes of the inputs. Images are height x width pixels."""

    name: str
    images: int
    height: int
    width: int
    channels: int
    objects: int  # of an image, to jitter RoIs around
    box_rois: int  # of an image, pooled to 7x7
    mask_rois: int  # of an image, pooled to 14x14
    nms_levels: int
    nms_boxes: int  # of an image and level
    nms_kept: int  # of an image
    masks: int
    classes: int
    mask_side: int
    dtype: torch.dtype = torch.bfloat16


TRAINING = Workload("training", 8, 800, 1344, 256, 15, 512, 128, 5, 2000, 1000, 1024, 80, 28)
SMALL = Workload("small", 2, 256, 448, 16, 5, 16, 8, 5, 40, 30, 8, 5, 12)


def generator(offset: int = 0) -> torch.Generator:
    """On the CPU, so that every machine draws the same."""
    return torch.Generator().manual_seed(SEED + offset)


def feature_maps(load: Workload) -> list[Tensor]:
    """Of each level, (N, C, Hl, Wl) channels_last."""
    random = generator()
    sizes = [(math.ceil(load.height / s), math.ceil(load.width / s)) for s in STRIDES]
    return [
        torch.randn(load.images, load.channels, h, w, generator=random)
        .to(load.dtype)
        .contiguous(memory_format=torch.channels_last)
        for h, w in sizes
    ]


def rois(load: Workload, per_image: int) -> Tensor:
    """(N, per_image, 4) fp32 xyxy within the image."""
    random = generator(1)
    near = per_image // 4
    shape = (load.images, load.objects)
    centre, side = _log_uniform(load, shape, random)
    index = torch.randint(load.objects, (load.images, near, 1), generator=random).expand(-1, -1, 2)
    centre, side = centre.gather(1, index), side.gather(1, index)
    centre = centre + JITTER * side * torch.randn(centre.shape, generator=random)
    side = side * (JITTER * torch.randn(side.shape, generator=random)).exp()
    far_centre, far_side = _log_uniform(load, (load.images, per_image - near), random)
    return _xyxy(load, torch.cat([centre, far_centre], 1), torch.cat([side, far_side], 1))


def proposals(load: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of NMS: (N, P, 4) boxes, (N, P) scores without ties, (N, P) int64 levels.

    Boxes are jittered around objects, so that most overlap others, as those of an RPN do.
    """
    random = generator(2)
    per_image = load.nms_levels * load.nms_boxes
    centre, side = _log_uniform(load, (load.images, 8 * load.objects), random)
    index = torch.randint(8 * load.objects, (load.images, per_image, 1), generator=random).expand(-1, -1, 2)
    centre, side = centre.gather(1, index), side.gather(1, index)
    centre = centre + 2 * JITTER * side * torch.randn(centre.shape, generator=random)
    side = side * (2 * JITTER * torch.randn(side.shape, generator=random)).exp()
    order = [torch.randperm(per_image, generator=random) for _ in range(load.images)]
    levels = torch.arange(load.nms_levels).repeat_interleave(load.nms_boxes)
    return _xyxy(load, centre, side), torch.stack(order) / per_image, levels.repeat(load.images, 1)


def masks(load: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the mask loss: (F, K, M, M) logits, (F,) classes, (F, M, M) bool targets, (F,) weights, all 1."""
    random = generator(3)
    slots, side = load.masks, load.mask_side
    logits = torch.randn(slots, load.classes, side, side, generator=random).to(load.dtype)
    classes = torch.randint(load.classes, (slots,), generator=random)
    targets = torch.rand(slots, side, side, generator=random) < 0.5
    return logits.contiguous(memory_format=torch.channels_last), classes, targets, torch.ones(slots)


def _log_uniform(load: Workload, shape: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres and sides of boxes within the image, each (*shape, 2) in the order x, y."""
    extent = torch.tensor([load.width, load.height], dtype=torch.float32)
    largest = extent.clamp(max=LARGEST)
    side = SMALLEST * (largest / SMALLEST) ** torch.rand(*shape, 2, generator=random)
    return side / 2 + (extent - side) * torch.rand(*shape, 2, generator=random), side


def _xyxy(load: Workload, centre: Tensor, side: Tensor) -> Tensor:
    extent = torch.tensor([load.width, load.height], dtype=torch.float32)
    low = torch.minimum((centre - side / 2).clamp(min=0), extent)
    high = torch.minimum((centre + side / 2).clamp(min=0), extent)
    return torch.cat([low, high], -1)
