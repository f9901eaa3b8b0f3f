"""Where a run writes: folders that nothing shares, files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastmrcnn.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~name` as home folders, as in a shell; one that is nobody's stays as it is."""
    return Path(os.path.expanduser(path))


def to_write(path: str | Path) -> Path:
    """The path likewise, of something that is to be made.

    Raises:
        UserError: it begins with the home folder of nobody, and would become a folder of that name.
    """
    found = expanded(path)
    if str(path).startswith("~") and found.parts[0].startswith("~"):
        raise UserError(
            f"{path}: there is no user {found.parts[0][1:]} here; for a folder of that name write ./{path}"
        )
    return found


def new_run_folder(root: str | Path, name: str = "run") -> Path:
    """Make and return `root/name_001`, or the next number that nobody has taken.

    Making the folder is the claim on its number, so runs that start together get different ones.

    Raises:
        UserError: `root` cannot be made or written to.
    """
    root = to_write(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = (re.fullmatch(re.escape(name) + r"_(\d+)", entry.name) for entry in root.iterdir())
        number = max((int(match[1]) for match in taken if match), default=0)
        while True:
            number += 1
            folder = root / f"{name}_{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except FileExistsError:
        raise UserError(f"{root}: is a file; output=FOLDER must name a folder") from None
    except OSError as error:
        raise UserError(
            f"{root}: cannot hold a run ({_reason(error)}); choose another output=FOLDER"
        ) from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends, and never if it fails.

    What a reader finds under `path`, after a crash too, is the old file or the new one, whole.

    Raises:
        UserError: the file cannot be written (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already if the block succeeded
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file as `replacing` does."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, indent: int | None = None) -> None:
    """Write a JSON file as `replacing` does.

    Raises:
        ValueError: a NaN or an infinity, which JSON cannot hold. Nothing is written then.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut. Not every system can open a folder; there it is skipped."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --output") from None
