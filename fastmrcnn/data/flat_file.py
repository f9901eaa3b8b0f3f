"""Flat arrays in one file that is mapped into memory, and checked when it is opened.

A head (magic, version, length and checksum of what follows), a description in JSON, and the arrays one behind
the other. The arrays of images and objects have checksums that are compared when the file is opened. What
is most of the bytes, coordinates above all, has one for each image, which is compared when that image is
read: so opening reads a sixth of the file, and a wrong bit is found wherever it is.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.flat import DTYPES, IN_BULK, Arrays, Shapes
from fastmrcnn.errors import UserError

MAGIC = b"fastmrcnn flat\r\n"  # \r\n: a copy that changes line ends is found out
VERSION = 1
_HEAD = struct.Struct("<16sIIQ")  # magic, version, crc32 of the description, its length
_ALIGNED = 64
_CHECKS = "checks"  # (n,) crc32 of each image's words and keypoints
_DTYPES = {**DTYPES, _CHECKS: np.dtype("<u4")}
_BLOCK = 2**24


class DamagedError(Exception):
    """A file is not whole, or of another version. The text says what is wrong with it."""


class MappedArrays:
    """The arrays of a file. Loader processes share its pages; pickled, this is the path alone.

    Args:
        path: of a file that `write_arrays` wrote.
    Raises:
        DamagedError: it is not such a file, not whole, or has bits that were not written.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        with open(self.path, "rb") as stream:
            self.about, self._places = _read_description(stream)
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            # One of its own for what is read rather than mapped: pages that are mapped count as memory of
            # each process that has looked at them, and over an epoch that would be the whole file.
            self._file = os.dup(stream.fileno())
        self._close = os.close
        self._mapped = {name: self._view(name) for name in self._places}

    def _view(self, name: str) -> NDArray[Any]:
        offset, shape, _ = self._places[name]
        count = math.prod(shape)
        if not count:  # numpy refuses to look at nothing
            return np.zeros(shape, _DTYPES[name])
        return np.frombuffer(self._map, _DTYPES[name], count, offset).reshape(shape)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._close(self._file)

    def __reduce__(self) -> tuple[Callable[[str, str], MappedArrays], tuple[str, str]]:
        return reopened, (self.path, json.dumps(self.about))

    def whole(self, name: str) -> NDArray[Any]:
        return self._mapped[name]

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        offset, shape, _ = self._places[name]
        dtype, row = _DTYPES[name], shape[1:]
        size = dtype.itemsize * math.prod(row)
        read = bytearray()
        while missing := (stop - start) * size - len(read):
            piece = os.pread(self._file, missing, offset + start * size + len(read))
            if not piece:
                raise self._damaged("it has become shorter")
            read += piece
        return np.frombuffer(read, dtype).reshape(stop - start, *row)

    def check(self, image: int, shapes: Shapes) -> None:
        if _check_of(shapes.words, shapes.keypoints) != int(self._mapped[_CHECKS][image]):
            raise self._damaged(f"its checksum of image {self._mapped['image_id'][image]} is another")

    def verify(self) -> None:
        """Compare the checksums of all that is not read image by image; DamagedError if one is another."""
        for name, (_, _, check) in self._places.items():
            if check is not None and zlib.crc32(_bytes_of(self._mapped[name])) != check:
                raise DamagedError(f"its checksum of '{name}' is another")

    def _damaged(self, what: str) -> UserError:
        """Nothing that was read of it so far was wrong; so it is taken away, and the next start writes a new
        one."""
        try:
            os.unlink(self.path)
            gone = "it has been removed; start again, and it is written anew"
        except OSError:
            gone = "remove it and start again, and it is written anew"
        return UserError(f"{self.path}: kept annotations are damaged ({what}); {gone}")


def open_arrays(path: str | Path) -> MappedArrays:
    """Open and verify. Raises as `MappedArrays`."""
    arrays = MappedArrays(path)
    arrays.verify()
    return arrays


def reopened(path: str, about: str) -> MappedArrays:
    """The same file in another process, which has verified it.

    Raises:
        UserError: it is no longer there, or another.
    """
    try:
        arrays = MappedArrays(path)
        if arrays.about == json.loads(about):
            return arrays
        what = "is another"
    except (OSError, DamagedError) as error:
        what = f"cannot be opened ({error})"
    raise UserError(f"{path}: the file of kept annotations {what} while they are in use; start again")


def write_arrays(stream: BinaryIO, arrays: Arrays, about: dict[str, Any]) -> None:
    """Write the arrays of `DTYPES`, and beside them what JSON can hold.

    Raises:
        OSError: as writing does.
    """
    contents = {name: np.ascontiguousarray(arrays.whole(name), _DTYPES[name]) for name in DTYPES}
    contents[_CHECKS] = np.fromiter(_checks(arrays), np.uint32)
    described = {
        name: {"shape": array.shape, "crc32": None if name in IN_BULK else zlib.crc32(_bytes_of(array))}
        for name, array in contents.items()
    }
    text = json.dumps({"arrays": described, "about": about}).encode()
    stream.write(_HEAD.pack(MAGIC, VERSION, zlib.crc32(text), len(text)))
    stream.write(text)
    end = _HEAD.size + len(text)
    for array in contents.values():
        stream.write(bytes(-end % _ALIGNED))
        stream.write(_bytes_of(array))
        end += -end % _ALIGNED + array.nbytes


def _read_description(
    stream: BinaryIO,
) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, ...], int | None]]]:
    """What is beside the arrays; and offset, shape and checksum of each of them."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise DamagedError("it is too short")
    magic, version, check, length = _HEAD.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise DamagedError("it is no such file, or of another version")
    size = os.fstat(stream.fileno()).st_size
    text = stream.read(length) if length <= size else b""
    if len(text) != length or zlib.crc32(text) != check:
        raise DamagedError("its description is not what was written")
    tree = json.loads(text)
    places: dict[str, tuple[int, tuple[int, ...], int | None]] = {}
    end = _HEAD.size + length
    for name, one in tree["arrays"].items():
        start, shape = end + -end % _ALIGNED, tuple(one["shape"])
        places[name] = start, shape, one["crc32"]
        end = start + _DTYPES[name].itemsize * math.prod(shape)
    if size != end:
        raise DamagedError(f"it has {size} bytes, not {end}")
    return tree["about"], places


def _checks(arrays: Arrays) -> Iterator[int]:
    """The checksum of what is in bulk of each image."""
    table, first_word = arrays.whole("object"), arrays.whole("first_word")
    words, points = arrays.whole("words"), arrays.whole("keypoints")
    first_object = arrays.whole("first_object")
    parts = np.append(0, np.cumsum(table["parts"]))[first_object]
    first = first_word[parts].tolist()
    rows = np.append(0, np.cumsum(table["keypoints"] >= 0))[first_object].tolist()
    for image in range(len(first) - 1):
        yield _check_of(words[first[image] : first[image + 1]], points[rows[image] : rows[image + 1]])


def _check_of(words: NDArray[np.int64], keypoints: NDArray[np.float32]) -> int:
    return zlib.crc32(_bytes_of(keypoints), zlib.crc32(_bytes_of(words)))


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
