"""How a step is run: eager, compiled, replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.model.conv_relu import epilogue_problem


class Execution(NamedTuple):
    """How a step is run."""

    compiled: bool = False
    max_autotune: bool = False
    cuda_graphs: bool = False
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
        UserError: CUDA graphs or cuDNN's epilogues are asked for on a CPU.
    """
    train, cuda = config.train, device.type == "cuda"
    if train.cuda_graphs == "on" and not cuda:
        raise UserError(f"train.cuda_graphs=on needs a CUDA device, this is {device}; use auto or off")
    if train.fuse_epilogues and not cuda:
        raise UserError(f"train.fuse_epilogues=true needs a CUDA device, this is {device}; leave it out")
    compiled = cuda if train.compile == "auto" else train.compile != "off"
    graphs = cuda if train.cuda_graphs == "auto" else train.cuda_graphs == "on"
    how = [
        f"compiled as one graph (train.compile={train.compile})" if compiled else "eager, not compiled",
        f"replayed as CUDA graphs (train.cuda_graphs={train.cuda_graphs})" if graphs else "no CUDA graphs",
    ]
    if train.compile == "auto" and not cuda:
        how[0] += ": compiling on a CPU takes minutes (train.compile=on to do it all the same)"
    problem = problem_of(device) if train.fuse_epilogues else None
    if problem is not None:
        how.append(f"train.fuse_epilogues=true stays off: {problem}")
    elif train.fuse_epilogues:
        how.append("bias, residual and ReLU within cuDNN's convolutions (train.fuse_epilogues=true)")
    fused = train.fuse_epilogues and problem is None
    autotune = train.compile == "max-autotune"
    return Execution(compiled, autotune, graphs, fused, ", ".join(how))
