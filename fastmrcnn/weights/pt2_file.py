"""Files of torch.export and of AOTInductor: what they say of themselves, and how to run them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export.passes import move_to_device_pass

from fastmrcnn.errors import UserError

METADATA = "fastmrcnn.json"
"""What an exported program carries its metadata in; a compiled one has a place of its own for them."""
OUTPUTS = "outputs"
"""Key in the metadata of the names of the outputs, a comma between two."""

DEVICE = "AOTI_DEVICE_KEY"
"""Key in the metadata of what a package is compiled for, which AOTInductor writes."""

Source = Path | bytes
"""A file, or the content of what is to become one."""


def is_compiled(source: Source) -> bool:
    """Whether it is a package of AOTInductor, machine code, instead of a program.

    Raises:
        UserError: missing, damaged, or neither.
    """
    names = _entries(source, r"/data/aotinductor/|/models/model\.json$")
    if not names:
        raise UserError(f"{_name(source)}: is no file of torch.export or AOTInductor")
    return any("/aotinductor/" in name for name in names)


def read_metadata(source: Source) -> dict[str, str]:
    """What `deployment.pt2` wrote beside the graph; nothing of it if another program did. Nothing is run.

    Raises:
        UserError: as `is_compiled`.
    """
    compiled = is_compiled(source)
    where = r"/data/aotinductor/model/.*metadata\.json$" if compiled else rf"/extra/{re.escape(METADATA)}$"
    metadata: dict[str, str] = {}
    for content in _entries(source, where).values():
        metadata |= json.loads(content)
    return metadata


def pt2_runner(
    source: Source, device: torch.device
) -> Callable[[NDArray[np.uint8], NDArray[np.int32]], dict[str, NDArray[Any]]]:
    """A function of pixels (N, H, W, 3) and sizes (N, 2), of the file's shape, that gives outputs by name.

    It runs what the file says: open files only of those whom you trust.

    Raises:
        UserError: as `is_compiled`; written by a newer torch; compiled for another kind of device; it does
            not tell what its outputs are.
    """
    metadata = read_metadata(source)
    if OUTPUTS not in metadata:
        raise UserError(f"{_name(source)}: does not tell its outputs; python -m fastmrcnn.export writes such")
    call = _compiled(source, device) if is_compiled(source) else _program(source, device)
    names = metadata[OUTPUTS].split(",")

    def run(pixels: NDArray[np.uint8], sizes: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        inputs = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (pixels, sizes)]
        with torch.no_grad():
            found = call(*inputs)
        return {name: value.cpu().numpy() for name, value in zip(names, found, strict=True)}

    return run


def _program(source: Source, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    with _quiet():
        try:
            program = torch.export.load(_opened(source))
        except Exception as error:  # of any kind, from the depths of the reader
            raise _cannot_open(source, error) from None
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    # The inputs have the shape that the metadata tell, so that nothing is gained from looking at each call.
    module: Callable[..., tuple[Tensor, ...]] = program.module(check_guards=False)
    return module


def _compiled(source: Source, device: torch.device) -> Callable[..., list[Tensor]]:
    compiled_for = read_metadata(source).get(DEVICE)
    if compiled_for != device.type:
        raise UserError(
            f"{_name(source)}: is compiled for {compiled_for} and cannot run on {device.type}; export it "
            f"with --aot {device.type}, or give the device {compiled_for}"
        )
    index = -1 if device.index is None else device.index
    with _quiet():
        try:
            return torch._inductor.aoti_load_package(_opened(source), device_index=index)
        except (RuntimeError, OSError) as error:
            raise _cannot_open(source, error) from None


def _entries(source: Source, pattern: str) -> dict[str, bytes]:
    """Contents by name of the entries whose names have the pattern, those of big files left out."""
    try:
        with zipfile.ZipFile(_opened(source)) as archive:
            names = [name for name in archive.namelist() if re.search(pattern, name)]
            return {name: archive.read(name) if name.endswith(".json") else b"" for name in names}
    except FileNotFoundError:
        raise UserError(f"{_name(source)}: no such file") from None
    except (OSError, zipfile.BadZipFile):
        raise UserError(f"{_name(source)}: is damaged, or no file of torch.export or AOTInductor") from None


def _opened(source: Source) -> Any:
    """What the readers of torch, and zipfile, take."""
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, Path) else "the file"


def _cannot_open(source: Source, error: BaseException) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{_name(source)}: torch {torch.__version__} cannot open it ({reason}); export it with this version"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of the readers, which say at length what the error says in one."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
