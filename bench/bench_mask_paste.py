"""Masks pasted to bitmaps of the image, and encoded, as after detection in one image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Contest, Inputs, Traffic, assert_no_sync, prepare
from peers import reference_peer, torchvision_ops
from pycocotools import mask as coco_mask
from torch import Tensor
from workload import Workload, generator, rois

from fastmrcnn.kernels import mask_rle, paste_masks
from fastmrcnn.kernels.mask_paste import cpu as paste_cpu
from fastmrcnn.kernels.mask_rle import reference as rle_reference

DETECTIONS = 100
MAX_RUNS = 4096
THRESHOLD = 0.5


def detections(load: Workload) -> tuple[Tensor, Tensor]:
    """(D, M, M) probabilities, as smooth as those of objects, and (D, 4) boxes of one image."""
    count = min(DETECTIONS, load.box_rois)
    coarse = torch.rand(count, 1, 6, 6, generator=generator(4))
    side = (load.mask_side, load.mask_side)
    masks = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")[:, 0].clamp(0, 1)
    return masks, rois(load, count)[0]


def inputs_of(load: Workload) -> Callable[[torch.device], Inputs]:
    masks, boxes = detections(load)
    return lambda device: Inputs({"masks": masks.to(device), "boxes": boxes.to(device)})


def torchvision_paste(load: Workload) -> Callable[..., Tensor] | None:
    """It rounds the box to whole pixels and resizes the mask to it, which gives a few other pixels."""
    if torchvision_ops() is None:
        return None
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    def paste(masks: Tensor, boxes: Tensor) -> Tensor:
        return paste_masks_in_image(masks[:, None], boxes, (load.height, load.width))[:, 0] > THRESHOLD

    return paste


def encoded(paste: Callable[..., Tensor], masks: Tensor, boxes: Tensor) -> list[dict[str, Any]]:
    """By way of bitmaps on the host, as evaluation does it everywhere."""
    columns = np.asfortranarray(paste(masks, boxes).permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return coco_mask.encode(columns)


def paste_contest(load: Workload, device: torch.device, packed: bool) -> Contest:
    size = (load.height, load.width)
    masks, boxes = detections(load)

    def reference(masks: Tensor, boxes: Tensor) -> Tensor:
        return paste_cpu.paste_masks(masks, boxes, None, *size, THRESHOLD, packed)

    peers = reference_peer(reference, device)
    if not packed and (torchvision := torchvision_paste(load)) is not None:
        peers = {"torchvision": torchvision, **peers}
    columns = paste_cpu.packed_width(load.width) if packed else load.width
    return Contest(
        f"mask paste to {'bits' if packed else 'bools'}, {len(masks)} detections",
        inputs_of(load),
        lambda masks, boxes: paste_masks(masks, boxes, *size, THRESHOLD, packed=packed),
        reference,
        peers,
        traffic(masks, boxes, len(masks) * load.height * columns),
        peers_must_agree=False,
    )


def rle_contest(load: Workload) -> Contest:
    size = (load.height, load.width)
    masks, boxes = detections(load)

    def exact(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return rle_reference.mask_rle(masks.cpu(), boxes.cpu(), None, None, *size, THRESHOLD, MAX_RUNS)

    ours = partial(paste_masks, height=load.height, width=load.width, threshold=THRESHOLD)
    peers: dict[str, Callable[..., Any]] = {"bitmaps and pycocotools": partial(encoded, ours)}
    if (torchvision := torchvision_paste(load)) is not None:
        peers["torchvision"] = partial(encoded, torchvision)
    return Contest(
        f"mask RLE, {len(masks)} detections",
        inputs_of(load),
        lambda masks, boxes: mask_rle(masks, boxes, *size, THRESHOLD, max_runs=MAX_RUNS),
        exact,
        peers,
        traffic(masks, boxes, 4 * len(masks) * (MAX_RUNS + 1)),
        peers_must_agree=False,  # they give COCO's compressed strings
    )


def traffic(masks: Tensor, boxes: Tensor, written: int) -> Traffic:
    return Traffic({"read masks": masks.nbytes, "read boxes": boxes.nbytes, "write": written})


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Intersection over union of the bitmaps, all objects together."""
    return float((ours & theirs).sum() / (ours | theirs).sum())


def test_paste_to_bools(run: Any, load: Workload, device: torch.device) -> None:
    entry = paste_contest(load, device, packed=False)
    extra: dict[str, Any] = {}
    if "torchvision" in entry.peers:
        inputs = entry.make_inputs(device).arguments
        extra["agreement with torchvision"] = agreement(
            entry.ours(**inputs), entry.peers["torchvision"](**inputs)
        )
        assert extra["agreement with torchvision"] > 0.95
    check_no_sync(entry, device)
    run(entry, "forward", **extra)


def test_paste_to_bits(run: Any, load: Workload, device: torch.device) -> None:
    entry = paste_contest(load, device, packed=True)
    check_no_sync(entry, device)
    run(entry, "forward")


def test_rle(run: Any, load: Workload, device: torch.device) -> None:
    entry = rle_contest(load)
    check_no_sync(entry, device)
    run(entry, "forward")


def check_no_sync(entry: Contest, device: torch.device) -> None:
    if device.type == "cuda":
        call = prepare(entry.ours, entry.make_inputs(device), "forward")
        call()
        assert_no_sync(call)
