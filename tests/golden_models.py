"""The peers' models, rebuilt here from the weights that `fill` derives from their parameters' names."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch, PackedMasks, Targets

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"the golden file {name} is not beside this checkout")
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def load_fill() -> Callable[[str, Sequence[int]], np.ndarray]:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


_TORCHVISION = [
    (r"backbone\.", "backbone.body."),
    (r"fpn\.lateral\.", "backbone.fpn.inner_blocks."),
    (r"fpn\.output\.", "backbone.fpn.layer_blocks."),
    (r"rpn\.head\.convs\.(\d)\.", r"rpn.head.conv.\1.0."),
    (r"rpn\.head\.objectness\.", "rpn.head.cls_logits."),
    (r"rpn\.head\.deltas\.", "rpn.head.bbox_pred."),
    (r"box_head\.fc1\.", "roi_heads.box_head.fc6."),
    (r"box_head\.fc2\.", "roi_heads.box_head.fc7."),
    (r"box_head\.classes\.", "roi_heads.box_predictor.cls_score."),
    (r"box_head\.deltas\.", "roi_heads.box_predictor.bbox_pred."),
    (r"mask_head\.convs\.(\d)\.", r"roi_heads.mask_head.\1.0."),
    (r"mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"mask_head\.predictor\.", "roi_heads.mask_predictor.mask_fcn_logits."),
]


def torchvision_name(ours: str) -> str:
    for pattern, theirs in _TORCHVISION:
        if re.match(pattern, ours):
            return re.sub("^" + pattern, theirs, ours, count=1)
    raise KeyError(ours)


def detectron2_name(ours: str) -> str:
    name = re.sub(r"^backbone\.(conv1|bn1)\.", r"backbone.bottom_up.stem.\1.", ours)
    name = re.sub(r"^backbone\.layer(\d)\.", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
    name = re.sub(
        r"^fpn\.(lateral|output)\.(\d)\.0\.", lambda m: f"backbone.fpn_{m[1]}{int(m[2]) + 2}.", name
    )
    name = re.sub(r"^rpn\.head\.convs\.0\.", "proposal_generator.rpn_head.conv.", name)
    name = re.sub(r"^rpn\.head\.objectness\.", "proposal_generator.rpn_head.objectness_logits.", name)
    name = re.sub(r"^rpn\.head\.deltas\.", "proposal_generator.rpn_head.anchor_deltas.", name)
    name = re.sub(r"^box_head\.(fc\d)\.", r"roi_heads.box_head.\1.", name)
    name = re.sub(r"^box_head\.classes\.", "roi_heads.box_predictor.cls_score.", name)
    name = re.sub(r"^box_head\.deltas\.", "roi_heads.box_predictor.bbox_pred.", name)
    name = re.sub(
        r"^mask_head\.convs\.(\d)\.", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.", name
    )
    return re.sub(r"^mask_head\.", "roi_heads.mask_head.", name)


def fill_from_torchvision(model: MaskRCNN) -> None:
    """torchvision counts the background as class 0: its rows are rolled to the end, or dropped."""
    fill = load_fill()
    state = model.state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        theirs, shape = torchvision_name(name), list(value.shape)
        if name.startswith("box_head.classes"):
            filled = np.roll(fill(theirs, shape), -1, axis=0)
        elif name.startswith("box_head.deltas"):
            filled = fill(theirs, [shape[0] + 4, *shape[1:]])[4:]
        elif name.startswith("mask_head.predictor"):
            filled = fill(theirs, [shape[0] + 1, *shape[1:]])[1:]
        else:
            filled = fill(theirs, shape)
        value.copy_(torch.from_numpy(np.ascontiguousarray(filled)))


def fill_from_detectron2(model: MaskRCNN) -> None:
    fill = load_fill()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(fill(detectron2_name(name), list(value.shape))))


def golden_images(scale: float) -> tuple[Tensor, Tensor]:
    """The two images of the golden files, padded: (2, 3, 256, 288) in 0..scale, and their sizes."""
    r = np.random.RandomState(__import__("zlib").crc32(b"image") & 0xFFFFFFFF)
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
