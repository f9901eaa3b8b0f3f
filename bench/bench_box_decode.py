"""Proposals of all levels decoded, clipped and filtered."""

from __future__ import annotations

from typing import Any

import torch
from harness import Contest, Inputs, Traffic
from peers import reference_peer, torchvision_ops
from torch import Tensor
from workload import Workload, generator, proposals

from fastmrcnn.kernels import decode_boxes
from fastmrcnn.kernels.box_decode import reference

MIN_SIDE = 1.0
WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def ours(deltas: Tensor, references: Tensor, sizes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return decode_boxes(deltas, references, sizes, scores=scores, min_side=MIN_SIDE)


def decode_reference(
    deltas: Tensor, references: Tensor, sizes: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.decode_boxes(
        deltas, references, sizes, scores, WEIGHTS, reference.MAX_LOG_SCALE, MIN_SIDE, None
    )


def contest(load: Workload, device: torch.device) -> Contest:
    references, scores, _ = proposals(load)
    deltas = torch.randn(references.shape, generator=generator(6)) * 0.3
    sizes = torch.tensor([[load.height, load.width]]).repeat(load.images, 1)
    arguments = {"deltas": deltas.to(load.dtype), "references": references, "sizes": sizes, "scores": scores}

    def make_inputs(device: torch.device) -> Inputs:
        return Inputs({name: value.to(device) for name, value in arguments.items()})

    peers = reference_peer(decode_reference, device)
    if (ops := torchvision_ops()) is not None:
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder(WEIGHTS)

        def torchvision(
            deltas: Tensor, references: Tensor, sizes: Tensor, scores: Tensor
        ) -> tuple[Tensor, Tensor]:
            """All boxes at once, then an image at a time; what is dropped is zero here."""
            decoded = coder.decode_single(deltas.float().flatten(0, 1), references.flatten(0, 1))
            size = (load.height, load.width)
            images = decoded.unflatten(0, deltas.shape[:2])
            boxes = torch.stack([ops.clip_boxes_to_image(image, size) for image in images])
            valid = (boxes[..., 2:] - boxes[..., :2] > MIN_SIDE).all(-1)
            return torch.where(valid[..., None], boxes, 0.0), valid

        peers = {"torchvision": torchvision, **peers}
    moved = sum(t.nbytes for t in arguments.values())
    return Contest(
        f"box decode, {references.shape[1]} boxes an image",
        make_inputs,
        ours,
        decode_reference,
        peers,
        Traffic({"read": moved, "write boxes": references.nbytes, "write valid": scores.numel()}),
    )


def test_box_decode(run: Any, load: Workload, device: torch.device) -> None:
    run(contest(load, device), "forward")
