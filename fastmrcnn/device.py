"""Where a program runs: the device, the precision there, and what makes it slow."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from fastmrcnn.errors import UserError


class Precision(NamedTuple):
    autocast: bool
    dtype: torch.dtype
    loss_scale: float | None  # fp16 only
    name: str = "fp32"


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is not one; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}': torch {torch.__version__} finds {torch.cuda.device_count()} CUDA "
            "devices; use auto or cpu"
        )
    return device


def set_up_cuda(device: torch.device) -> None:
    """Make a CUDA device the current one, on which streams and graphs are made without being told where.

    cuDNN may time its algorithms for each shape that it meets: here they are few, and come again.
    """
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True


def busy_machine(device: torch.device) -> str | None:
    """A line of advice if others keep the processor busy: torch's threads then wait for each other."""
    cores = os.cpu_count() or 1
    if device.type != "cpu" or not hasattr(os, "getloadavg") or torch.get_num_threads() == 1:
        return None
    load = os.getloadavg()[0]
    if load < 1.5 * cores:
        return None
    return f"This machine is busy (load {load:.0f}, {cores} cores); runtime.threads=1 is often faster then."


def choose_precision(name: str, device: torch.device) -> Precision:
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "fp32":
        return Precision(False, torch.bfloat16, None)
    if name == "bf16":
        return Precision(True, torch.bfloat16, None, name)
    return Precision(True, torch.float16, 2.0**16, name)
