"""How a step is run: eager, compiled, replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.model.conv_relu import epilogue_problem


class Execution(NamedTuple):
    """How a step is run."""

    compiled: bool = False
    max_autotune: bool = False
    cuda_graphs: bool = False
    parts: bool = False  # of CUDA graphs: cut where processes sum, which is done between them
    reduce_bf16: bool = False  # gradients travel between processes in bf16
    fuse_epilogues: bool = False
    description: str = ""


def choose_execution(
    config: Config,
    device: torch.device,
    problem_of: Callable[[torch.device], str | None] = epilogue_problem,
) -> Execution:
    """Compile and replay on CUDA; on a CPU neither, since compiling takes longer than a short run.

    Epilogues in cuDNN stay off, and the description says why, where they do not pass a check.

    Args:
        problem_of: that check.

    Raises:
        UserError: CUDA graphs or cuDNN's epilogues are asked for on a CPU; graphs cannot be had as asked for
            with what processes sum.
    """
    train, cuda = config.train, device.type == "cuda"
    if train.cuda_graphs in ("on", "parts") and not cuda:
        raise UserError(
            f"train.cuda_graphs={train.cuda_graphs} needs a CUDA device, this is {device}; use auto or off"
        )
    if train.fuse_epilogues and not cuda:
        raise UserError(f"train.fuse_epilogues=true needs a CUDA device, this is {device}; leave it out")
    compiled = cuda if train.compile == "auto" else train.compile != "off"
    graphs = choose_graphs(config) if cuda else "off"
    how = [
        f"compiled as one graph (train.compile={train.compile})" if compiled else "eager, not compiled",
        f"replayed as CUDA graphs{' in parts' if graphs == 'parts' else ''} (train.cuda_graphs="
        f"{train.cuda_graphs})"
        if graphs != "off"
        else "no CUDA graphs",
    ]
    if graphs == "off" and cuda and train.cuda_graphs == "auto":
        how[1] += ", which cannot hold what sync_bn sums here"
    if train.compile == "auto" and not cuda:
        how[0] += ": compiling on a CPU takes minutes (train.compile=on to do it all the same)"
    problem = problem_of(device) if train.fuse_epilogues else None
    if problem is not None:
        how.append(f"train.fuse_epilogues=true stays off: {problem}")
    elif train.fuse_epilogues:
        how.append("bias, residual and ReLU within cuDNN's convolutions (train.fuse_epilogues=true)")
    fused = train.fuse_epilogues and problem is None
    autotune = train.compile == "max-autotune"
    return Execution(
        compiled=compiled,
        max_autotune=autotune,
        cuda_graphs=graphs != "off",
        parts=graphs == "parts",
        reduce_bf16=train.reduce_in == "bf16",
        fuse_epilogues=fused,
        description=", ".join(how),
    )


def choose_graphs(config: Config) -> Literal["whole", "parts", "off"]:
    """How a step on CUDA is recorded: whole where the sums over processes can be, else in parts.

    Raises:
        UserError: it cannot be as train.cuda_graphs wants it.
    """
    asked = config.train.cuda_graphs
    if asked == "off":
        return "off"
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    backend = str(torch.distributed.get_backend_config()) if several else "none"
    recordable = not several or "nccl" in backend
    if asked == "on" and not recordable:
        raise UserError(
            f"train.cuda_graphs=on: no graph can hold what processes sum by {backend}; use auto or parts"
        )
    if asked != "parts" and recordable:
        return "whole"
    model = config.model
    if several and "sync_bn" in (model.backbone.norm, model.fpn.norm):
        if asked == "auto":
            return "off"
        raise UserError(
            "train.cuda_graphs=parts: sync_bn sums amid the forward and backward pass, where a step is not "
            "cut; use auto, or another norm"
        )
    return "parts"
