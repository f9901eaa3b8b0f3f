"""Archives of torch.save in which tensors stand beside objects that only running code could restore.

torch's own reader refuses such a file as a whole. This one reads the tensors and the containers, and puts
`Left` in place of every object. As in pickles.py, nothing that the file names is imported or called: each
name gets a stand-in, and tensors are made afterwards, from what was checked.
"""

from __future__ import annotations

import argparse
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmrcnn.errors import UserError
from fastmrcnn.weights.pickles import DictStandIn

_PLAIN = (bool, int, float, str, bytes, type(None))
_STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class Left:
    """In place of an object that was left in the file. Whatever the file wants done with it is not done."""

    name = "an object"

    def __new__(cls, *_: Any, **__: Any) -> Left:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Left:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Stored(NamedTuple):
    """A run of numbers in the archive."""

    dtype: torch.dtype
    key: str
    length: int


class _View(NamedTuple):
    """Stands in for a tensor."""

    stored: Any
    offset: Any
    size: Any
    stride: Any


class _Rebuild:
    """Stands in for torch's function that makes a tensor of a storage. No pickle can write into it."""

    __slots__ = ()

    def __call__(self, stored: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _View:
        return _View(stored, offset, size, stride)


class _Parameter:
    """Stands in for the one that makes a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): DictStandIn,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **_STORAGES,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get((module, name))
        return type("Left", (Left,), {"name": f"{module}.{name}"}) if known is None else known

    def persistent_load(self, pid: Any) -> _Stored:
        kind, dtype, key, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise pickle.UnpicklingError("a reference to something that is no storage")
        if type(length) is not int or length < 0:
            raise pickle.UnpicklingError("a storage without a size")
        return _Stored(dtype, key, length)


def read_archive(path: Path) -> Any:
    """Tensors on the CPU, containers and plain values, and `Left` in place of everything else.

    Raises:
        UserError: incomplete, damaged or forged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [pickled] = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
            folder = pickled.removesuffix("data.pkl")
            if (order := f"{folder}byteorder") in archive.namelist() and archive.read(order) != b"little":
                raise UserError(f"{path}: was written on a machine of another byte order; save it anew")
            with archive.open(pickled) as stream:
                tree = _Reader(stream).load()
            return _Plain(archive, folder).of(tree)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ):
        raise UserError(f"{path}: is incomplete or damaged; fetch or copy it again") from None
    except (MemoryError, RecursionError, OverflowError):
        raise UserError(f"{path}: asks for more memory than there is; it is damaged or forged") from None


class _Plain:
    """Makes tensors of stand-ins, and `Left` of all that is no data."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}
        self.done: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, (*_PLAIN, Left)):
            return value
        if isinstance(value, _View):
            return self.tensor(value)
        if id(value) not in self.done:
            self.done[id(value)] = left_out("a container within itself")  # unless it is known below
            self.done[id(value)] = self.container(value)
        return self.done[id(value)]

    def container(self, value: Any) -> Any:
        if isinstance(value, dict):
            if not all(isinstance(key, _PLAIN) for key in value):
                return left_out("an object as a key")
            return {key: self.of(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(inner) for inner in value)
        if isinstance(value, type) and issubclass(value, Left):
            return left_out(value.name)
        return left_out(type(value).__name__)

    def tensor(self, view: _View) -> Tensor:
        stored, offset, size, stride = view
        if not isinstance(stored, _Stored) or type(size) is not tuple or type(stride) is not tuple:
            raise ValueError("a tensor without a storage or a shape")
        if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
            raise ValueError("a tensor with a shape that is none")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= stored.length:
            raise ValueError("a tensor beyond its storage")
        if not math.prod(size):
            return torch.empty(size, dtype=stored.dtype)
        return self.storage(stored).as_strided(size, stride, offset)

    def storage(self, stored: _Stored) -> Tensor:
        name = f"{self.folder}data/{stored.key}"
        if name not in self.storages:
            if self.archive.getinfo(name).file_size != stored.length * stored.dtype.itemsize:
                raise ValueError("a storage of another size")
            self.storages[name] = torch.frombuffer(bytearray(self.archive.read(name)), dtype=stored.dtype)
        found = self.storages[name]
        if found.dtype != stored.dtype:
            raise ValueError("a storage of two types")
        return found


def left_out(name: str) -> Left:
    """A stand-in for an object of that name."""
    stand_in = Left()
    stand_in.name = name
    return stand_in


def objects_in(tree: Any, seen: set[int] | None = None) -> Iterator[Left]:
    """Every object that was left in the file, within containers."""
    seen = set() if seen is None else seen
    if isinstance(tree, Left):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)) and id(tree) not in seen:
        seen.add(id(tree))
        for inner in tree.values() if isinstance(tree, Mapping) else tree:
            yield from objects_in(inner, seen)


def is_plain_object(value: Left) -> bool:
    """Whether it is options of a command line, which nobody misses."""
    return value.name == f"{argparse.__name__}.{argparse.Namespace.__name__}"


def refuse_code(path: str | Path, found: Left) -> UserError:
    return UserError(
        f"{path}: holds pickled code ({found.name}) besides tensors and is not read; save its "
        "state_dict() alone"
    )
