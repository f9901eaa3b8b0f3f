"""A run that its launcher starts again goes on by itself.

torchrun tells its processes how often it has started them. The same command then means to go on with the run
that the first start made; a mark in that run's folder says whose it is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastmrcnn.files import write_text
from fastmrcnn.weights.checkpoint import LAST

MARK = "launch"


class Launch(NamedTuple):
    """What torchrun says of itself; the same in each of its starts."""

    identity: str
    restarts: int


def launch_of_environment(environment: Mapping[str, str] | None = None) -> Launch | None:
    """None if it was not torchrun that started this process."""
    given = os.environ if environment is None else environment
    name, restarts = given.get("TORCHELASTIC_RUN_ID"), given.get("TORCHELASTIC_RESTART_COUNT", "")
    if name is None or not restarts.isdecimal():
        return None
    if name == "none":  # one machine without --standalone: torchrun has no name for it
        name = f"process {os.getppid()} of {socket.gethostname()}"
    return Launch(name, int(restarts))


def mark(folder: Path, launch: Launch | None) -> None:
    """Note in a run's folder which launch it belongs to."""
    if launch is not None:
        write_text(folder / MARK, launch.identity + "\n")


def begun_before(launch: Launch | None, output: Path) -> Path | None:
    """The run under `output` that an earlier start of this launch was at, if it has saved a checkpoint."""
    if launch is None or launch.restarts == 0:
        return None
    marks = sorted(output.glob(f"*/{MARK}"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in marks:
        own = file.read_text(encoding="utf-8", errors="replace").strip() == launch.identity
        if own and (file.parent / "checkpoints" / LAST).is_file():
            return file.parent
    return None
