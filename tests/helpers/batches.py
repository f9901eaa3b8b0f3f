"""Small padded batches and a small model, from seeds."""

from __future__ import annotations

import torch

from fastmrcnn.config.file import parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch, PackedMasks, Targets

SMALL = {
    "model": {
        "backbone": {"name": "resnet18", "norm": "gn", "frozen_stages": 0, "width": 16},
        "fpn": {"channels": 16},
        "rpn": {"pre_nms_top_n": 64, "post_nms_top_n": 64, "batch_per_image": 64},
        "roi": {"batch_per_image": 32, "sampling_ratio": 2},
        "box_head": {"hidden": 32, "detections": 20},
        "mask_head": {"channels": 16, "convs": 2},
    }
}


def small_config(**sections: dict) -> Config:
    tree = {**SMALL, **sections}
    return parse_config(tree, "the test")


def small_model(num_classes: int = 3, seed: int = 0, config: Config | None = None) -> MaskRCNN:
    torch.manual_seed(seed)
    return build_model((config or small_config()).model, num_classes)


def random_batch(
    seed: int = 0,
    counts: tuple[int, ...] = (3, 0),
    shape: tuple[int, int] = (128, 96),
    slots: int = 8,
    num_classes: int = 3,
) -> Batch:
    """Images of noise with bright ellipses; image i has counts[i] objects."""
    r = torch.Generator().manual_seed(seed)
    height, width = shape
    images = len(counts)
    pixels = torch.randint(0, 80, (images, 3, height, width), generator=r, dtype=torch.uint8)
    sizes = torch.tensor([[height - 8 * i, width - 8 * i] for i in range(images)])
    boxes = torch.zeros(images, slots, 4)
    classes = torch.zeros(images, slots, dtype=torch.int64)
    valid = torch.zeros(images, slots, dtype=torch.bool)
    window = torch.zeros(images, slots, 4, dtype=torch.int32)
    offset = torch.zeros(images, slots, dtype=torch.int64)
    buffer = torch.zeros(2**14, dtype=torch.uint8)
    used = 0
    for image, count in enumerate(counts):
        for slot in range(count):
            w, h = torch.randint(20, 40, (2,), generator=r).tolist()
            x = int(torch.randint(0, int(sizes[image, 1]) - w, (1,), generator=r))
            y = int(torch.randint(0, int(sizes[image, 0]) - h, (1,), generator=r))
            yy = (torch.arange(h) + 0.5)[:, None] / h * 2 - 1
            xx = (torch.arange(w) + 0.5)[None, :] / w * 2 - 1
            ellipse = (yy * yy + xx * xx) <= 1
            label = slot % num_classes
            pixels[image, label, y : y + h, x : x + w][ellipse] = 255
            boxes[image, slot] = torch.tensor([x, y, x + w, y + h])
            classes[image, slot] = label
            valid[image, slot] = True
            window[image, slot] = torch.tensor([x, y, w, h])
            offset[image, slot] = used
            buffer[used : used + h * w] = ellipse.flatten()
            used += h * w
    affine = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(images, 1, 1)
    masks = PackedMasks(buffer, offset, window, affine, sizes.int())
    return Batch(pixels, sizes, Targets(boxes, classes, valid, torch.zeros_like(valid), masks))
