"""The peers' models, rebuilt here from the weights that `fill` derives from their parameters' names."""

from __future__ import annotations

import numpy as np
import torch
from fill import fill, stream
from torch import Tensor

from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch, PackedMasks, Targets
from fastmrcnn.weights.detectors import prepared
from fastmrcnn.weights.peers.programs import export_state, import_state
from fastmrcnn.weights.states import copy_state


def peer_state(model: MaskRCNN, program: str) -> dict[str, Tensor]:
    """The state dict of the same model in the other program, each parameter filled by its name there."""
    category_ids = list(range(1, model.sampler.num_classes + 1))
    return {
        name: torch.from_numpy(fill(name, value.shape)) if value.is_floating_point() else value
        for name, value in export_state(model.state_dict(), program, "the test", category_ids).items()
    }


def fill_from(model: MaskRCNN, program: str) -> None:
    """Load the weights of the golden files, as the converter reads them."""
    own = model.state_dict()
    imported = import_state(peer_state(model, program), "the test")
    assert imported.program == program
    copy_state(model, prepared(imported, own), "the test")


def golden_images(scale: float) -> tuple[Tensor, Tensor]:
    """The two images of the golden files, padded: (2, 3, 256, 288) in 0..scale, and their sizes."""
    r = stream("image")
    images = [r.rand(3, 192, 288).astype(np.float32), r.rand(3, 240, 192).astype(np.float32)]
    pixels = torch.zeros(2, 3, 256, 288)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image) * scale
    return pixels, torch.tensor([[192, 288], [240, 192]])


def golden_batch(
    data: dict[str, np.ndarray], classes: str, masks: str, background: int, scale: float
) -> Batch:
    """The golden images with their targets; `background` is subtracted from the class labels."""
    pixels, sizes = golden_images(scale)
    boxes = torch.zeros(2, 2, 4)
    labels = torch.zeros(2, 2, dtype=torch.int64)
    valid = torch.zeros(2, 2, dtype=torch.bool)
    window = torch.zeros(2, 2, 4, dtype=torch.int32)
    offset = torch.zeros(2, 2, dtype=torch.int64)
    chunks: list[Tensor] = []
    used = 0
    for image in range(2):
        height, width = sizes[image].tolist()
        count = len(data[f"target{image}.boxes"])
        boxes[image, :count] = torch.from_numpy(data[f"target{image}.boxes"])
        labels[image, :count] = torch.from_numpy(data[f"target{image}.{classes}"]) - background
        valid[image, :count] = True
        bitmaps = np.unpackbits(data[f"target{image}.{masks}"], axis=-1)[..., :width]
        for slot in range(count):
            window[image, slot] = torch.tensor([0, 0, width, height])
            offset[image, slot] = used
            chunks.append(torch.from_numpy(bitmaps[slot].reshape(-1)))
            used += height * width
    affine = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3).contiguous()
    packed = PackedMasks(torch.cat(chunks), offset, window, affine, sizes.int())
    targets = Targets(boxes, labels, valid, torch.zeros_like(valid), packed)
    return Batch(pixels, sizes, targets)
