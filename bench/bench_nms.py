"""Padded NMS over all levels of all images, against torchvision's, an image at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Contest, Inputs, assert_no_sync, host_syncs, prepare
from peers import torchvision_nms, torchvision_ops
from torch import Tensor
from workload import Workload, proposals

from fastmrcnn.kernels import padded_nms
from fastmrcnn.kernels.nms import cpu

IOU_THRESHOLD = 0.7


def exact(boxes: Tensor, scores: Tensor, groups: Tensor, max_out: int) -> tuple[Tensor, Tensor]:
    """Its greedy loop runs on the CPU."""
    return cpu.padded_nms(boxes.cpu(), scores.cpu(), groups.cpu(), None, IOU_THRESHOLD, max_out)


def ours(boxes: Tensor, scores: Tensor, groups: Tensor, max_out: int) -> tuple[Tensor, Tensor]:
    return padded_nms(boxes, scores, groups, None, IOU_THRESHOLD, max_out)


def contest(load: Workload) -> Contest:
    boxes, scores, levels = proposals(load)

    def make_inputs(device: torch.device) -> Inputs:
        return Inputs({"boxes": boxes.to(device), "scores": scores.to(device), "groups": levels.to(device)})

    peers: dict[str, Callable[..., Any]] = {}
    if (ops := torchvision_ops()) is not None:
        nms = partial(torchvision_nms, ops, iou_threshold=IOU_THRESHOLD, max_out=load.nms_kept)
        peers["torchvision"] = nms
    return Contest(
        f"padded NMS, {load.nms_levels} levels x {load.images} images x {load.nms_boxes} boxes",
        make_inputs,
        partial(ours, max_out=load.nms_kept),
        partial(exact, max_out=load.nms_kept),
        peers,
        # Lists in place of padded tensors; and it moves the boxes of each level, which rounds their IoU.
        peers_must_agree=False,
    )


def agreement(ours: tuple[Tensor, Tensor], theirs: list[Tensor]) -> float:
    """Share of the boxes kept by either that both keep."""
    both = either = 0
    for index, valid, other in zip(*ours, theirs, strict=True):
        a, b = set(index[valid].tolist()), set(other.tolist())
        both += len(a & b)
        either += len(a | b)
    return both / either


def test_nms(run: Any, load: Workload, device: torch.device) -> None:
    entry = contest(load)
    inputs = entry.make_inputs(device)
    extra: dict[str, Any] = {}
    kept = prepare(entry.ours, inputs, "forward")()
    for name, peer in entry.peers.items():
        extra[f"agreement with {name}"] = agreement(kept, peer(**inputs.arguments))
        assert extra[f"agreement with {name}"] > 0.99
    if device.type == "cuda":
        assert_no_sync(prepare(entry.ours, inputs, "forward"))
        extra["host_syncs"] = {"ours": 0}
        for name, peer in entry.peers.items():
            extra["host_syncs"][name] = host_syncs(prepare(peer, inputs, "forward"))
    run(entry, "forward", **extra)
