"""A checksum in every checkpoint, so that a bit that flipped on a disk is found before it is trained on.

torch.save writes a zip archive, and a zip archive may end in a comment. There the seal stands: it moves with
the file, whatever that is called, and torch.load reads past it. Whoever loads a checkpoint and saves it anew
drops the seal. Files without one are those, and the ones of earlier versions.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

_WORDS = b"fastmrcnn crc32 "
_DIGITS = 8
_COMMENT = len(_WORDS) + _DIGITS
_LENGTH = 2  # bytes in which an archive's last record tells how long the comment after it is
_LAST_RECORD = 22  # bytes of that record, which begins with:
_LAST_RECORD_BEGINS = b"PK\5\6"
_BLOCK = 1 << 22


class Sealing:
    """A file, for torch.save to write to and `seal` to end.

    Args:
        stream: gets all that is written but for the end of the archive, which `seal` makes anew.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._checksum = 0
        self._held = b""

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        kept = min(len(view), _LENGTH)
        ready = self._held if kept == _LENGTH else self._held[: max(0, len(self._held) + kept - _LENGTH)]
        self._put(ready)
        self._put(view[: len(view) - kept])
        self._held = self._held[len(ready) :] + bytes(view[len(view) - kept :])
        return len(view)

    def flush(self) -> None:
        self._stream.flush()

    def seal(self) -> None:
        """Write the end of the archive, with the checksum of all that stands before it as the comment."""
        assert self._held == bytes(_LENGTH), "an archive of torch.save has no comment"
        self._put(_COMMENT.to_bytes(_LENGTH, "little") + _WORDS)
        self._stream.write(b"%0*x" % (_DIGITS, self._checksum))

    def _put(self, data: bytes | memoryview) -> None:
        self._checksum = zlib.crc32(data, self._checksum)
        self._stream.write(data)


def written_checksum(path: Path) -> int | None:
    """What a file's seal says; None: it has none, or not a whole one. Raises OSError if it cannot be read."""
    match = re.fullmatch(re.escape(_WORDS) + rb"([0-9a-f]{%d})" % _DIGITS, _end_of(path, _COMMENT))
    return None if match is None else int(match[1], 16)


def fault_of(path: Path) -> str | None:
    """What is wrong with a file that `Sealing` or torch.save wrote, as the end of a sentence; None: nothing.

    Every changed bit of a sealed file is found. Of one without a seal, those in its tensors and in its
    structure are, by the checksums that torch.save gives to each part.

    Raises:
        OSError: it cannot be read.
    """
    written = written_checksum(path)
    if written is not None:
        found = _checksum(path, path.stat().st_size - _DIGITS)
        return None if found == written else f"is damaged: its checksum is {found:08x}, not {written:08x}"
    end = _end_of(path, _LAST_RECORD)
    if not (end.startswith(_LAST_RECORD_BEGINS) and end.endswith(bytes(_LENGTH))):
        return f"is incomplete or damaged: its {path.stat().st_size} bytes do not end as a checkpoint does"
    return _fault_of_archive(path)


def _end_of(path: Path, count: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - count))
        return stream.read(count)


def _checksum(path: Path, count: int) -> int:
    """Of the first `count` bytes."""
    checksum = 0
    with path.open("rb") as stream:
        while count and (block := stream.read(min(count, _BLOCK))):
            checksum = zlib.crc32(block, checksum)
            count -= len(block)
    return checksum


def _fault_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        return f"is damaged: {error}"
    return None if bad is None else f"is damaged: the checksum of its part {bad} is wrong"
