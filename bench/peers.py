"""What the operators are compared with: torchvision's as its users call them, and what CPU tensors run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from fastmrcnn.kernels import assign_levels


def torchvision_ops() -> ModuleType | None:
    """torchvision.ops, or None where it is not installed or does not fit this torch."""
    try:
        from torchvision import ops
    except (ImportError, RuntimeError):
        return None
    return ops


def reference_peer(reference: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """Compiled by Inductor on CUDA; as it is elsewhere."""
    if device.type == "cuda":
        # The backward pass is repeated on one graph, which buffers given away would forbid.
        functorch_config.donated_buffer = False
        return {"compiled reference": torch.compile(reference, dynamic=False)}
    return {"eager reference": reference}


def torchvision_roi_align(
    ops: ModuleType,
    features: list[Tensor],
    boxes: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """A level at a time under autocast, as the poolers of torchvision and detectron2 do."""
    slots = tuple(boxes.shape[:2])
    image = torch.arange(slots[0], device=boxes.device).repeat_interleave(slots[1])
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes.flatten(0, 1)], 1)
    level = assign_levels(rois[:, 1:])
    channels, dtype = features[0].shape[1], features[0].dtype
    out = torch.zeros((rois.shape[0], channels, output_size, output_size), dtype=dtype, device=boxes.device)
    with torch.autocast(boxes.device.type, torch.bfloat16):
        for index, feature in enumerate(features):
            here = torch.where(level == index)[0]
            pooled = ops.roi_align(
                feature, rois[here], output_size, 1 / 4 / 2**index, sampling_ratio, aligned
            )
            out[here] = pooled.to(dtype)
    return out.unflatten(0, slots)


def torchvision_nms(
    ops: ModuleType, boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int
) -> list[Tensor]:
    """An image at a time, as torchvision's RPN does."""
    return [
        ops.batched_nms(b, s, g, iou_threshold)[:max_out]
        for b, s, g in zip(boxes, scores, groups, strict=True)
    ]


def torchvision_mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Pick the channels, then the mean in float32 under autocast, as torchvision and detectron2 do.

    They have no weights; those of the workload are all 1. Their targets are float32 from the start, so the
    cast here (0.8 MB against a gradient of 128 MB) counts against them without need.
    """
    with torch.autocast(logits.device.type, torch.bfloat16):
        picked = logits[torch.arange(logits.shape[0], device=logits.device), classes]
        return F.binary_cross_entropy_with_logits(picked.float(), targets.float())
