"""Anchors matched to the objects of a batch, against the matrix of all overlaps and torchvision's matcher.

Once with the objects of the workload in slots for four times as many, and once with many objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Contest, Inputs, Traffic, assert_no_sync, host_syncs, prepare
from peers import reference_peer, torchvision_ops
from torch import Tensor
from workload import STRIDES, Workload, rois

from fastmrcnn.kernels import match_boxes
from fastmrcnn.kernels.matcher import cpu, naive

FOREGROUND_IOU, BACKGROUND_IOU = 0.7, 0.3
MANY = 2  # objects for each RoI of the workload


def anchors(load: Workload) -> Tensor:
    """(1, R, 4) of the five levels of an FPN, three a cell, as large as squares of eight strides a side."""
    levels = []
    for stride in (*STRIDES, 2 * STRIDES[-1]):
        widths = [8 * stride / height_over_width**0.5 for height_over_width in (0.5, 1.0, 2.0)]
        half = torch.tensor([widths, widths[::-1]]).T / 2  # of width and height
        x, y = (torch.arange(0.0, side, stride) for side in (load.width, load.height))
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
        levels.append(torch.cat([centre - half, centre + half], -1).reshape(-1, 4))
    return torch.cat(levels)[None]


def ours(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> list[Tensor]:
    return list(match_boxes(boxes, gt_boxes, gt_valid, low_quality=True)[:4])


def exact(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> list[Tensor]:
    return list(cpu.match_boxes(boxes, gt_boxes, gt_valid, None, True, 0.0)[:4])


def by_matrix(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> tuple[Tensor | None, ...]:
    """All overlaps at once; Inductor may keep them out of memory."""
    return naive.match_boxes(boxes, gt_boxes, gt_valid)[:4]


def torchvision_matcher(objects: int) -> Callable[..., list[Tensor]] | None:
    """An image at a time, as torchvision's RPN does: the object of each anchor, -1 background, -2 between."""
    ops = torchvision_ops()
    if ops is None:
        return None
    from torchvision.models.detection._utils import Matcher

    matcher = Matcher(FOREGROUND_IOU, BACKGROUND_IOU, allow_low_quality_matches=True)

    def match(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> list[Tensor]:
        return [matcher(ops.box_iou(image[:objects], boxes[0])) for image in gt_boxes]

    return match


def contest(load: Workload, device: torch.device, many: bool) -> Contest:
    boxes = anchors(load)
    objects = MANY * load.box_rois if many else load.objects
    slots = objects if many else 4 * objects
    gt_boxes = rois(load, slots)
    gt_valid = (torch.arange(slots) < objects).expand(load.images, slots).contiguous()

    def make_inputs(device: torch.device) -> Inputs:
        arguments = {"boxes": boxes, "gt_boxes": gt_boxes, "gt_valid": gt_valid}
        return Inputs({name: value.to(device) for name, value in arguments.items()})

    peers: dict[str, Callable[..., Any]] = reference_peer(by_matrix, device)
    if (torchvision := torchvision_matcher(objects)) is not None:
        peers = {"torchvision": torchvision, **peers}
    return Contest(
        f"matcher, {objects} objects an image",
        make_inputs,
        ours,
        exact,
        peers,
        traffic(boxes, gt_boxes, gt_valid),
        # torchvision returns labels alone; and what Inductor fuses it may round otherwise.
        peers_must_agree=False,
    )


def traffic(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> Traffic:
    slots = gt_valid.shape[0] * boxes.shape[1]
    return Traffic(
        {
            "read boxes": boxes.nbytes,
            "read objects": gt_boxes.nbytes + gt_valid.nbytes,
            "write overlap": slots * 4,
            "write object": slots * 8,
            "write best": slots * 1,
            "write overlap of objects": gt_valid.numel() * 4,
        }
    )


def labels(best: Tensor, matched: Tensor, highest: Tensor, is_best: Tensor) -> Tensor:
    """As torchvision's matcher says it."""
    between = torch.where(best < BACKGROUND_IOU, -1, -2)
    return torch.where((best >= FOREGROUND_IOU) | is_best, matched, between)


@pytest.mark.parametrize("many", [False, True], ids=["usual", "many"])
def test_matcher(run: Any, load: Workload, device: torch.device, many: bool) -> None:
    entry = contest(load, device, many)
    inputs = entry.make_inputs(device)
    extra: dict[str, Any] = {}
    found = labels(*prepare(entry.ours, inputs, "forward")())
    for name, peer in entry.peers.items():
        try:
            theirs = prepare(peer, inputs, "forward")()
        except torch.OutOfMemoryError:  # which the harness records
            continue
        other = torch.stack(theirs) if name == "torchvision" else labels(*theirs)
        extra[f"agreement with {name}"] = float((found == other).float().mean())
        assert extra[f"agreement with {name}"] > 0.999
    if device.type == "cuda":
        assert_no_sync(prepare(entry.ours, inputs, "forward"))
        extra["host_syncs"] = {"ours": 0}
        for name, peer in entry.peers.items():
            if f"agreement with {name}" in extra:
                extra["host_syncs"][name] = host_syncs(prepare(peer, inputs, "forward"))
    run(entry, "forward", **extra)
