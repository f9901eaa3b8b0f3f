"""Multi-level RoIAlign at the shapes of the box head and of the mask head."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from harness import PASSES, Contest, Inputs, Traffic
from peers import reference_peer, torchvision_ops, torchvision_roi_align
from torch import Tensor
from workload import STRIDES, Workload, feature_maps, generator, rois

from fastmrcnn.kernels import RoiSet, multilevel_roi_align, multilevel_roi_align_sets
from fastmrcnn.kernels.common.pooling import Asked
from fastmrcnn.kernels.roi_align import cpu

SCALES = [1 / stride for stride in STRIDES]


def roi_align_reference(
    features: list[Tensor], boxes: Tensor, output_size: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    how = pooling(output_size, sampling_ratio, aligned)
    out = _Reference.apply(boxes.flatten(0, 1), how, *features)
    return out.unflatten(0, boxes.shape[:2])


class _Reference(torch.autograd.Function):
    """Plain PyTorch both ways. The gradient that PyTorch itself has for `embedding_bag` was NaN in a few of
    many runs on a CPU."""

    @staticmethod
    def forward(boxes: Tensor, how: cpu.Pooling, *features: Tensor) -> Tensor:
        return cpu.multilevel_roi_align(list(features), boxes, None, None, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        boxes, ctx.how, *features = inputs
        ctx.images, ctx.sizes = features[0].shape[0], [(f.shape[2], f.shape[3]) for f in features]
        ctx.save_for_backward(boxes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        [boxes] = ctx.saved_tensors
        asked = [Asked(boxes, None, None, ctx.how)]
        grads = cpu.multilevel_roi_align_backward([grad], asked, ctx.images, ctx.sizes)
        return None, None, *grads


def pooling(output_size: int, sampling_ratio: int, aligned: bool) -> cpu.Pooling:
    return cpu.Pooling((output_size, output_size), SCALES, sampling_ratio, aligned, 224.0, 4, 2)


def traffic(features: list[Tensor], boxes: Tensor, how: cpu.Pooling) -> Traffic:
    """Forward reads the pixels that some sample touches; backward writes whole maps."""
    images, channels = features[0].shape[:2]
    item = features[0].element_size()
    flat = boxes.flatten(0, 1).double().cpu()
    ones = torch.ones(flat.shape[0], 1, *how.output_size, dtype=torch.float64)
    sizes = [(f.shape[2], f.shape[3]) for f in features]
    touched = cpu.multilevel_roi_align_backward([ones], [Asked(flat, None, None, how)], images, sizes)
    pixels = sum(int((part != 0).sum()) for part in touched)
    out = flat.shape[0] * channels * how.output_size[0] * how.output_size[1] * item
    return Traffic(
        {"read boxes": boxes.nbytes, "read maps": pixels * channels * item, "write output": out},
        {
            "read boxes": boxes.nbytes,
            "read gradient": out,
            "write gradients": sum(f.numel() for f in features) * item,
        },
    )


@lru_cache(maxsize=1)  # of all passes: inputs are large, and the reference is compiled once
def contest(
    load: Workload, device: torch.device, bins: int, sampling_ratio: int, aligned: bool, variant: str = ""
) -> Contest:
    """`variant`: "nchw gradient" is what a head that flattens its features sends back, "packed" has each
    RoI name its image."""
    per_image = load.box_rois if bins == 7 else load.mask_rois
    maps, boxes = feature_maps(load), rois(load, per_image)
    shape = (load.images, per_image, load.channels, bins, bins)
    gradient = torch.randn(shape, generator=generator(9)).to(load.dtype)
    how: dict[str, Any] = {
        "output_size": bins,
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
    }

    def make_inputs(device: torch.device) -> Inputs:
        leaves = [m.to(device).requires_grad_() for m in maps]
        grad = gradient.to(device).flatten(0, 1)
        if variant != "nchw gradient":  # as the gradient of a channels_last output arrives
            grad = grad.contiguous(memory_format=torch.channels_last)
        return Inputs({"features": leaves, "boxes": boxes.to(device)}, leaves, grad.unflatten(0, shape[:2]))

    def exact(features: list[Tensor], boxes: Tensor) -> Tensor:
        return roi_align_reference([f.double() for f in features], boxes, **how)

    peers = reference_peer(partial(roi_align_reference, **how), device)
    if (ops := torchvision_ops()) is not None:
        peers = {"torchvision": partial(torchvision_roi_align, ops, **how), **peers}
    ours = partial(multilevel_roi_align, spatial_scales=SCALES, **how)
    image = torch.arange(load.images, device=device).repeat_interleave(per_image)

    def packed(features: list[Tensor], boxes: Tensor) -> Tensor:
        return ours(features, boxes.flatten(0, 1), batch_index=image).unflatten(0, boxes.shape[:2])

    samples = f"{sampling_ratio} samples" if sampling_ratio else "adaptive"
    title = f"RoIAlign {bins}x{bins}, {per_image} RoIs an image, {samples}"
    return Contest(
        f"{title}, {variant}" if variant else title,
        make_inputs,
        packed if variant == "packed" else ours,
        exact,
        peers,
        traffic(maps, boxes, pooling(bins, sampling_ratio, aligned)),
    )


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    ("sampling_ratio", "aligned"), [(0, True), (2, False)], ids=["detectron2", "torchvision"]
)
@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align(
    run: Any,
    load: Workload,
    device: torch.device,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
    which: str,
) -> None:
    run(contest(load, device, bins, sampling_ratio, aligned), which)


@pytest.mark.parametrize("which", ["backward", "both"])
@pytest.mark.parametrize("variant", ["nchw gradient", "packed"])
@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align_variants(
    run: Any, load: Workload, device: torch.device, bins: int, variant: str, which: str
) -> None:
    run(contest(load, device, bins, 0, True, variant), which)


@lru_cache(maxsize=1)
def contest_of_sets(load: Workload, device: torch.device) -> Contest:
    """The box head's and the mask head's RoIs, whose gradients of the maps are made as one, or apart.

    Outputs stand one after the other in memory, channels last, so that they are one tensor.
    """
    maps = feature_maps(load)
    sets = ((7, rois(load, load.box_rois)), (14, rois(load, load.mask_rois)))
    sizes = [load.images * boxes.shape[1] * load.channels * bins * bins for bins, boxes in sets]
    gradient = torch.randn(sum(sizes), generator=generator(9)).to(load.dtype)
    image = torch.arange(load.images, device=device).repeat_interleave(load.mask_rois)

    def make_inputs(device: torch.device) -> Inputs:
        leaves = [m.to(device).requires_grad_() for m in maps]
        (_, first), (_, second) = sets
        arguments = {"features": leaves, "boxes": first.to(device), "others": second.to(device).flatten(0, 1)}
        return Inputs(arguments, leaves, gradient.to(device))

    def joined(outs: list[Tensor]) -> Tensor:
        return torch.cat([out.movedim(-3, -1).flatten() for out in outs])

    def together(features: list[Tensor], boxes: Tensor, others: Tensor) -> Tensor:
        asked = [RoiSet(boxes, 7), RoiSet(others, 14, batch_index=image)]
        return joined(multilevel_roi_align_sets(features, asked, spatial_scales=SCALES, aligned=True))

    def apart(features: list[Tensor], boxes: Tensor, others: Tensor) -> Tensor:
        how: dict[str, Any] = {"spatial_scales": SCALES, "aligned": True}
        first = multilevel_roi_align(features, boxes, 7, **how)
        return joined([first, multilevel_roi_align(features, others, 14, batch_index=image, **how)])

    def exact(features: list[Tensor], boxes: Tensor, others: Tensor) -> Tensor:
        doubles = [f.double() for f in features]
        second = others.unflatten(0, (load.images, -1))
        return joined(
            [roi_align_reference(doubles, b, bins, 0, True) for bins, b in ((7, boxes), (14, second))]
        )

    title = f"RoIAlign 7x7 and 14x14, {load.box_rois} and {load.mask_rois} RoIs an image, adaptive"
    both = [traffic(maps, boxes, pooling(bins, 0, True)) for bins, boxes in sets]
    moved = Traffic(
        {f"{name} {i}": size for i, one in enumerate(both) for name, size in one.forward.items()},
        {
            **{f"{name} {i}": size for i, one in enumerate(both) for name, size in one.backward.items()},
            "write gradients 1": 0,  # as those of the first
        },
    )
    return Contest(title, make_inputs, together, exact, {"a call for each": apart}, moved)


@pytest.mark.parametrize("which", ["backward", "both"])
def test_roi_align_sets(run: Any, load: Workload, device: torch.device, which: str) -> None:
    run(contest_of_sets(load, device), which)
