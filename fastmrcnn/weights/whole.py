"""Checkpoints that are whole: damage is told before anything is made of a file, and what to take instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastmrcnn.errors import UserError
from fastmrcnn.weights.seal import fault_of, written_checksum
from fastmrcnn.weights.sources import read_weights

FORMAT = "fastmrcnn checkpoint"
_NAME = r"step_(\d+)\.pt"


def is_checkpoint(tree: Any) -> bool:
    """Whether what was read from a file is a checkpoint of ours, whole or not."""
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def read_whole(file: Path) -> Any:
    """What stands in a file of weights, as `read_weights`; of a checkpoint of ours only if it is whole.

    Raises:
        UserError: as `read_weights`; or a checkpoint is damaged, and which one before it is whole.
    """
    try:
        ours = re.fullmatch(_NAME, file.name) is not None or written_checksum(file) is not None
        fault = fault_of(file) if ours else None
    except OSError:
        return read_weights(file)  # which tells why it cannot be read
    if fault is not None:
        raise _damaged(file, fault)
    tree = read_weights(file)
    if not ours and is_checkpoint(tree) and (fault := fault_of(file)) is not None:
        raise _damaged(file, fault)
    return tree


def newest_whole(newest: Path) -> tuple[Path, list[str]]:
    """A checkpoint, or if it is damaged the newest whole one of the steps before, beside it.

    Returns:
        The file; and a line for each newer one that is damaged, which tells how.

    Raises:
        UserError: none is whole.
    """
    lines: list[str] = []
    for file in (newest, *_earlier(newest)):
        fault = _fault_of(file)
        if fault is None:
            return file, [*lines, f"Going on from the one before, {file.name}."] if lines else []
        lines.append(f"{file} {fault}.")
    raise UserError(f"{newest.parent}: no checkpoint there is whole: {' '.join(lines)}")


def steps_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by the number of steps done, whole or not."""
    found = ((re.fullmatch(_NAME, file.name), file) for file in folder.iterdir())
    return {int(match[1]): file for match, file in found if match}


def _earlier(file: Path) -> list[Path]:
    """The checkpoints of earlier steps beside it, the newest first."""
    steps = steps_in(file.parent)
    match = re.fullmatch(_NAME, file.name)
    before = int(match[1]) if match else 0
    return [steps[step] for step in sorted(steps, reverse=True) if step < before]


def _damaged(file: Path, fault: str) -> UserError:
    whole = next((other for other in _earlier(file) if _fault_of(other) is None), None)
    if whole is None:
        return UserError(f"{file}: {fault}; copy it again, there is no whole one before it in its folder")
    return UserError(f"{file}: {fault}; copy it again, or take the one before it, {whole}, which is whole")


def _fault_of(file: Path) -> str | None:
    try:
        return fault_of(file)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
