"""Inputs of the keypoint parity test, and the program that made tests/fixtures/torchvision_keypoint_rcnn.npz.

    python tests/peer_keypoints.py tests/fixtures/torchvision_keypoint_rcnn.npz

It was run with torchvision 0.27.1 and torch 2.12.1 on a CPU: `keypointrcnn_resnet50_fpn` with frozen batch
norm (eps 1e-5), every weight filled by its name, the two images and targets below, sizes at which nothing is
resized, and samplers so large that nothing is random. Kept are the losses, the norm of every parameter's
gradient, and the detections of eval mode. Training mode is in float64: in float32 it depends on the machine
which of two proposals of nearly one score or overlap is kept, and the losses differ by 4e-4.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from fill import fill, stream

SIZES = ((128, 160), (160, 128))
OBJECTS = (2, 1)
OPTIONS: dict[str, Any] = {
    "num_classes": 2,
    "num_keypoints": 17,
    "min_size": 128,
    "max_size": 192,
    "rpn_batch_size_per_image": 10**6,
    "rpn_positive_fraction": 0.5,
    "box_batch_size_per_image": 10**6,
    "box_positive_fraction": 0.5,
    "box_detections_per_img": 12,
}


def images() -> list[np.ndarray]:
    """(3, H, W) float32 in 0..1."""
    r = stream("image")
    return [r.rand(3, *size).astype(np.float32) for size in SIZES]


def objects(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) and keypoints (n, 17, 3) of an image. Some keypoints are unlabelled, some lie outside of
    their box, one lies on its right edge; the last object of the first image has none."""
    r, (height, width) = stream(f"objects{index}"), SIZES[index]
    corner = r.rand(OBJECTS[index], 2) * (width / 2, height / 2)
    side = 40 + r.rand(OBJECTS[index], 2) * (width / 2 - 40, height / 2 - 40)
    boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
    places = corner[:, None] + side[:, None] * (r.rand(OBJECTS[index], 17, 2) * 1.2 - 0.1)
    places[0, 0, 0] = boxes[0, 2]
    keypoints = np.concatenate([places, r.randint(0, 3, (OBJECTS[index], 17, 1))], -1).astype(np.float32)
    keypoints[0, 0, 2] = 2
    if index == 0:
        keypoints[-1, :, 2] = 0
    return boxes, keypoints


def main(output: str) -> None:
    import torch
    from torchvision.models.detection import keypointrcnn_resnet50_fpn
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **OPTIONS)
    freeze_norms(model, FrozenBatchNorm2d)
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(fill(name, value.shape)))
    pixels = [torch.from_numpy(image) for image in images()]
    found: dict[str, np.ndarray] = {}
    targets = []
    for index in range(2):
        boxes, keypoints = (torch.from_numpy(array) for array in objects(index))
        targets.append({"boxes": boxes.double(), "labels": torch.ones(len(boxes), dtype=torch.int64)})
        targets[-1]["keypoints"] = keypoints
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    losses = model.double().train()([image.double() for image in pixels], targets)
    for name, loss in losses.items():
        found[f"loss.{name}"] = loss.detach().numpy()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        found[f"gradnorm.{name}"] = parameter.grad.norm().numpy()
    with torch.no_grad():
        for index, detections in enumerate(model.float().eval()(pixels)):
            for name, value in detections.items():
                found[f"det{index}.{name}"] = value.numpy()
    np.savez_compressed(output, **found)


def freeze_norms(module: Any, norm: Any) -> None:
    """Replace BatchNorm2d, which torchvision uses without pretrained weights."""
    import torch

    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            setattr(module, name, norm(child.num_features, eps=1e-5))
        else:
            freeze_norms(child, norm)


if __name__ == "__main__":
    main(sys.argv[1])
