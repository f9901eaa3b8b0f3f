"""The mask predictor of the ground-truth class with its loss, from features to gradients.

What peers do: a 1x1 convolution to the masks of all classes, then the loss on one of them, under autocast.
Their logits and slopes are rounded to bfloat16, so they need not agree to our tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import PASSES, Contest, Inputs, Traffic
from peers import reference_peer, torchvision_mask_loss
from torch import Tensor
from workload import JITTER, Workload, generator

from fastmrcnn.kernels import class_mask_loss, class_mask_loss_from_bitmaps, mask_loss, mask_targets
from fastmrcnn.kernels.mask_predictor import cpu
from fastmrcnn.kernels.mask_targets import cpu as targets_cpu

SHRUNK = 1.25  # pixels of the input for one of the annotation, along a side
BITMAPS = ("boxes", "image", "matched", *targets_cpu.Bitmaps._fields)


class Predictor(NamedTuple):
    features: Tensor  # (F, C, M, M) channels_last
    weight: Tensor  # (K, C) fp32
    bias: Tensor  # (K,) fp32
    classes: Tensor
    slot_weight: Tensor  # all 1


def predictor(load: Workload) -> Predictor:
    random = generator(4)
    features = torch.randn(load.masks, load.channels, load.mask_side, load.mask_side, generator=random)
    features = features.relu().to(load.dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(load.classes, load.channels, generator=random) / load.channels**0.5
    bias = torch.randn(load.classes, generator=random)
    classes = torch.randint(load.classes, (load.masks,), generator=random)
    return Predictor(features, weight, bias, classes, torch.ones(load.masks))


def ground_truth(load: Workload) -> dict[str, Tensor]:
    """Ellipses, whose sides are log-uniform from 16 to half the height, and RoIs jittered about them."""
    random = generator(5)
    extent = torch.tensor([load.width, load.height]) / SHRUNK
    shape = (load.images, load.objects)
    side = (16 * (load.height / 2 / 16) ** torch.rand(*shape, 2, generator=random) / SHRUNK).int()
    corner = ((extent - side) * torch.rand(*shape, 2, generator=random)).int()
    crops = []
    for width, height in side.flatten(0, 1).tolist():
        x, y = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (width, height))
        crops.append((y[:, None] ** 2 + x**2 <= 1).byte().flatten())
    image = torch.arange(load.masks) % load.images
    matched = torch.randint(load.objects, (load.masks,), generator=random)
    low, size = corner[image, matched] * SHRUNK, side[image, matched] * SHRUNK
    jitter = JITTER * torch.randn(2, load.masks, 2, generator=random)
    low, size = low + jitter[0] * size, size * jitter[1].exp()
    ends = torch.tensor([len(crop) for crop in crops]).cumsum(0)
    affine = torch.tensor([[1 / SHRUNK, 0, 0], [0, 1 / SHRUNK, 0]])
    largest = torch.tensor([load.width, load.height])
    return {
        "boxes": torch.cat([low, low + size], 1).clamp(min=0).minimum(largest.repeat(2)),
        "image": image,
        "matched": matched,
        "buffer": torch.cat(crops),
        "offset": torch.cat([ends.new_zeros(1), ends[:-1]]).view(shape),
        "window": torch.cat([corner, side], 2),
        "to_annotation": affine.repeat(load.images, 1, 1),
        "size": extent.flip(0).int().repeat(load.images, 1),
        "image_sizes": largest.flip(0).repeat(load.images, 1),
    }


def reference_loss(
    features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, targets: Tensor, slot_weight: Tensor
) -> Tensor:
    return cpu.class_mask_loss(features, weight, bias, classes, targets, slot_weight)[0]


def all_classes(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The predictor of all classes under autocast, and a loss on its logits."""

    def run(
        features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, targets: Tensor, slot_weight: Tensor
    ) -> Tensor:
        with torch.autocast(features.device.type, torch.bfloat16):
            logits = F.conv2d(features, weight[:, :, None, None], bias)
        return loss(logits, classes, targets, slot_weight)

    return run


def with_targets(load: Workload, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cut the targets from the bitmaps first, then a loss on them."""

    def run(
        features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, slot_weight: Tensor, **truth: Tensor
    ) -> Tensor:
        shape = (load.height, load.width)
        targets = mask_targets(**truth, image_shape=shape, resolution=load.mask_side, bitmap=True)
        return loss(features, weight, bias, classes, targets, slot_weight)

    return run


def traffic(given: Predictor, truth: list[Tensor]) -> Traffic:
    """Features once, in forward; in backward nothing but the gradients. `truth` is what targets come from."""
    read = {name: tensor.nbytes for name, tensor in given._asdict().items()}
    read = {f"read {name}": size for name, size in read.items()}
    read["read ground truth"] = sum(t.nbytes for t in truth)
    leaves = {"features": given.features, "weight": given.weight, "bias": given.bias}
    written = {f"write gradient of {name}": leaf.nbytes for name, leaf in leaves.items()}
    again = {name: read[name] for name in ("read weight", "read classes", "read slot_weight")}
    return Traffic({**read, "write loss": 4}, {**again, "read gradient": 4, **written})


@lru_cache(maxsize=1)
def contest(load: Workload, device: torch.device, fused: bool) -> Contest:
    given, truth = predictor(load), ground_truth(load)
    shape = (load.height, load.width)
    if not fused:
        rois = {name: truth[name] for name in BITMAPS}
        targets = mask_targets(**rois, image_shape=shape, resolution=load.mask_side, bitmap=True)
        truth = {"targets": targets}

    def make_inputs(device: torch.device) -> Inputs:
        arguments: dict[str, Any] = {k: v.to(device) for k, v in {**given._asdict(), **truth}.items()}
        leaves = [arguments[name].requires_grad_() for name in ("features", "weight", "bias")]
        return Inputs(arguments, leaves, torch.ones((), device=device))

    def exact(**arguments: Tensor) -> Tensor:
        arguments["features"] = arguments["features"].double()
        loss = with_targets(load, reference_loss) if fused else reference_loss
        return loss(**arguments)

    def from_bitmaps(**arguments: Any) -> Tensor:
        return class_mask_loss_from_bitmaps(**arguments, image_shape=shape)

    size = f"{load.masks} x {load.channels} x {load.mask_side} x {load.mask_side}, {load.classes} classes"
    steps = {"torchvision": torchvision_mask_loss, "predictor, then mask_loss": mask_loss}
    peers = {name: all_classes(loss) for name, loss in steps.items()}
    if fused:
        peers = {name: with_targets(load, peer) for name, peer in peers.items()}
        peers["mask_targets, then class_mask_loss"] = with_targets(load, class_mask_loss)
    else:
        peers |= reference_peer(reference_loss, device)
    return Contest(
        f"mask predictor and loss{' from bitmaps' if fused else ''}, {size}",
        make_inputs,
        from_bitmaps if fused else class_mask_loss,
        exact,
        peers,
        traffic(given, list(truth.values())),
        terms=load.masks * load.mask_side**2,
        peers_must_agree=False,
    )


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("fused", [False, True], ids=["targets", "bitmaps"])
def test_mask_predictor(run: Any, load: Workload, device: torch.device, which: str, fused: bool) -> None:
    run(contest(load, device, fused), which)
