"""FPN level assignment."""

from __future__ import annotations

from typing import Any

import torch
from harness import Contest, Inputs, Traffic
from peers import reference_peer, torchvision_ops
from torch import Tensor
from workload import Workload, rois

from fastmrcnn.kernels import assign_levels
from fastmrcnn.kernels.level_assign import reference


def level_reference(boxes: Tensor) -> Tensor:
    return reference.assign_levels(boxes, 2, 5, 224.0, 4)


def contest(load: Workload, device: torch.device) -> Contest:
    boxes = rois(load, load.box_rois)

    def make_inputs(device: torch.device) -> Inputs:
        return Inputs({"boxes": boxes.to(device)})

    peers = reference_peer(level_reference, device)
    if torchvision_ops() is not None:
        from torchvision.ops.poolers import LevelMapper

        mapper = LevelMapper(2, 5)

        def torchvision(boxes: Tensor) -> Tensor:
            return mapper([*boxes]).view(boxes.shape[:2])

        peers = {"torchvision": torchvision, **peers}
    return Contest(
        f"level assignment, {load.box_rois} boxes an image",
        make_inputs,
        assign_levels,
        level_reference,
        peers,
        Traffic({"read boxes": boxes.nbytes, "write levels": boxes[..., 0].numel() * 4}),
    )


def test_level_assign(run: Any, load: Workload, device: torch.device) -> None:
    run(contest(load, device), "forward")
