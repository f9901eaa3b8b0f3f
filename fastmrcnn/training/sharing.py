"""What is this process's own in a run of several: its images and its device."""

from __future__ import annotations

import os

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.order import Share, cannot_divide
from fastmrcnn.errors import UserError
from fastmrcnn.group import Group


def share_of(config: Config, group: Group) -> Share:
    """Of each step's images.

    Raises:
        UserError: they cannot be shared out evenly; the line says to how many processes they can.
    """
    share = Share(group.rank, group.size, config.train.accumulate)
    if config.train.batch % share.parts:
        raise UserError(cannot_divide(config.train.batch, share))
    return share


def own_device(name: str, group: Group) -> str:
    """`runtime.device` for this process: of several on a machine each takes a GPU, by LOCAL_RANK.

    Where a launcher shows each process one GPU alone, that is the one.

    Raises:
        UserError: one GPU is named for all of them, or there are fewer than processes.
    """
    if group.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(
            f"runtime.device={name} is one device, and the run has {group.size} processes; use auto, cuda or "
            "cpu, and each takes its own"
        )
    count = torch.cuda.device_count()
    index = 0 if count == 1 else group.local_rank
    if index >= count or (count == 1 and group.local_rank > 0 and _sees_all()):
        raise UserError(
            f"process {group.rank} is number {group.local_rank} on its machine, which has {count} "
            f"GPU{'' if count == 1 else 's'}; start {count} there (--nproc-per-node={count})"
        )
    return f"cuda:{index}"


def _sees_all() -> bool:
    """Whether no launcher has narrowed down what this process sees of its machine."""
    return "CUDA_VISIBLE_DEVICES" not in os.environ
