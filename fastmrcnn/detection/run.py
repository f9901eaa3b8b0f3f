"""A model's detections of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from fastmrcnn.device import choose_precision
from fastmrcnn.structures import Batch, Detections, to_device


def run_model(
    model: nn.Module,
    batch: Batch,
    precision: str,
    device: torch.device | None = None,
    part: Callable[[Batch], Detections] | None = None,
) -> Detections:
    """Detections of a batch, under the autocast that `runtime.precision` means on the device.

    Args:
        device: of the model; None: that of its first parameter.
        part: what of the model detects; None: all of it.
    """
    if device is None:
        device = next(itertools.chain(model.parameters(), model.buffers())).device
    chosen = choose_precision(precision, device)
    with torch.no_grad(), torch.autocast(device.type, dtype=chosen.dtype, enabled=chosen.autocast):
        return (part or model)(to_device(batch, device))
