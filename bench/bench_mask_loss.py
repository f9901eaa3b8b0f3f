"""The mask loss, from logits and targets to the dense gradient."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from harness import PASSES, Contest, Inputs, Traffic
from peers import reference_peer, torchvision_mask_loss
from torch import Tensor
from workload import Workload, masks

from fastmrcnn.kernels import mask_loss
from fastmrcnn.kernels.mask_loss import reference


def mask_loss_reference(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return reference.mask_loss(logits, classes, targets, weight)[0]


def exact(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return mask_loss_reference(logits.double(), classes, targets, weight)


def traffic(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> Traffic:
    """Forward reads one channel of each slot. Backward reads it too, and writes the gradient of all."""
    read = {
        "read logits": logits[:, 0].numel() * logits.element_size(),
        "read classes": classes.nbytes,
        "read targets": targets.nbytes,
        "read weight": weight.nbytes,
    }
    return Traffic({**read, "write loss": 4}, {**read, "read gradient": 4, "write gradient": logits.nbytes})


@lru_cache(maxsize=1)
def contest(load: Workload, device: torch.device) -> Contest:
    tensors = masks(load)

    def make_inputs(device: torch.device) -> Inputs:
        logits, classes, targets, weight = (t.to(device) for t in tensors)
        logits.requires_grad_()
        arguments = {"logits": logits, "classes": classes, "targets": targets, "weight": weight}
        return Inputs(arguments, [logits], torch.ones((), device=device))

    slots, classes, side = load.masks, load.classes, load.mask_side
    return Contest(
        f"mask loss {slots} x {classes} x {side} x {side}",
        make_inputs,
        mask_loss,
        exact,
        {"torchvision": torchvision_mask_loss, **reference_peer(mask_loss_reference, device)},
        traffic(*tensors),
        terms=slots * side * side,
    )


@pytest.mark.parametrize("which", PASSES)
def test_mask_loss(run: Any, load: Workload, device: torch.device, which: str) -> None:
    run(contest(load, device), which)
