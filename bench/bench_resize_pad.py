"""Decoded images resized and padded to the pixels of a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import Contest, Inputs, Traffic, assert_no_sync, prepare
from torch import Tensor
from workload import Workload, generator

from fastmrcnn.kernels import resize_pad
from fastmrcnn.kernels.resize_pad import cpu


def contest(load: Workload, device: torch.device) -> Contest:
    """Images of 3/5 of the height, 4:3, grow to it, as 480x640 to 800x1067."""
    source = (load.height * 3 // 5, load.height * 4 // 5)
    resized = (load.height, min(round(source[1] * load.height / source[0]), load.width))
    count, size = load.images, 3 * source[0] * source[1]
    arguments = {
        "buffer": torch.randint(256, (count * size,), generator=generator(8)).to(torch.uint8),
        "offset": torch.arange(count) * size,
        "source": torch.tensor([source] * count, dtype=torch.int32),
        "resized": torch.tensor([resized] * count, dtype=torch.int32),
    }

    def ours(buffer: Tensor, offset: Tensor, source: Tensor, resized: Tensor) -> Tensor:
        return resize_pad(buffer, offset, source, resized, resized, load.height, load.width)

    def exact(**given: Tensor) -> Tensor:
        values = [given[name].cpu() for name in arguments]
        return cpu.resize_pad(*values, values[-1], None, None, None, None, load.height, load.width)

    def interpolate(buffer: Tensor, offset: Tensor, source: Tensor, resized: Tensor) -> Tensor:
        """PyTorch's own, in float32, rounded once: other levels by up to one."""
        images = buffer.view(count, *source_shape, 3).permute(0, 3, 1, 2).float()
        grown = F.interpolate(images, resized_shape, mode="bilinear", antialias=True).round().to(torch.uint8)
        out = grown.new_zeros((count, 3, load.height, load.width))
        out[:, :, : resized_shape[0], : resized_shape[1]] = grown
        return out

    source_shape, resized_shape = source, resized
    moved = sum(value.nbytes for value in arguments.values())
    return Contest(
        f"resize and pad, {count} of {source[0]}x{source[1]} to {resized[0]}x{resized[1]}",
        lambda device: Inputs({name: value.to(device) for name, value in arguments.items()}),
        ours,
        exact,
        {"interpolate": interpolate},
        Traffic({"read": moved, "write": 3 * count * load.height * load.width}),
        peers_must_agree=False,
    )


def test_resize_pad(run: Any, load: Workload, device: torch.device) -> None:
    entry = contest(load, device)
    if device.type == "cuda":
        call = prepare(entry.ours, entry.make_inputs(device), "forward")
        call()
        assert_no_sync(call)
    run(entry, "forward")
