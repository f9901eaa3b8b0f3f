"""Reading a pickle of numpy arrays without running anything that it asks for.

A pickle is a program that may call whatever Python can import. This reader answers every request with
a stand-in of its own: plain data classes for arrays and their types, which are checked and turned into
arrays afterwards. numpy's own functions never see the file, because a forged dtype is enough to make
them read memory that is not theirs.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrcnn.errors import UserError

_KINDS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


class RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that is no array and no container; the text names it."""


def read_pickle(path: Path) -> Any:
    """Containers, numbers, text and, in place of numpy arrays, CPU tensors.

    Raises:
        UserError: incomplete, or with anything else in it, which is named and not run.
    """
    try:
        with path.open("rb") as stream:
            return _tensors(_Reader(stream).load())
    except RefusedError as error:
        raise UserError(
            f"{path}: holds {error}, which is no array and no container; nothing of it was run. Save a dict "
            "of names and numpy arrays"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path}: is incomplete or damaged, or neither tensors written by torch.save nor a pickle of "
            "numpy arrays; fetch or copy it again"
        ) from None
    except (MemoryError, RecursionError, OverflowError):
        raise UserError(f"{path}: asks for more memory than there is; it is damaged or forged") from None


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, text: Any, align: Any = False, copy: Any = True) -> None:
        self.text = text.decode("latin1") if isinstance(text, bytes) else text
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, field names, fields, size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise RefusedError(f"a numpy dtype that is not a number's ({self.text!r})")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise RefusedError(f"a numpy dtype of unknown byte order ({order!r})")
        self.order = order

    def real(self) -> np.dtype[Any]:
        text = self.text if isinstance(self.text, str) else ""
        kind = text[1:] if text[:1] in ("<", ">", "|", "=") else text
        if kind not in _KINDS:
            raise RefusedError(f"a numpy array of dtype {self.text!r}")
        order = text[0] if kind != text else self.order
        return np.dtype(order + kind)


class _Array:
    """Stands in for numpy.ndarray."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, is it in Fortran's order, bytes); the version is left out in old files
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise RefusedError("a numpy array with a state of its own")
        shape, dtype, fortran, raw = state[-4:]
        if isinstance(raw, list):
            raise RefusedError("a numpy array of objects")
        self.value = _build(raw, dtype, shape, "F" if fortran else "C")


class DictStandIn(dict[Any, Any]):
    """Stands in for OrderedDict; attributes that an object has (torch's _metadata) are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def _build(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if isinstance(raw, str):  # of Python 2
        raw = raw.encode("latin1")
    sides = shape if isinstance(shape, tuple) else (shape,)
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)) or order not in ("C", "F"):
        raise RefusedError("a numpy array with a state of its own")
    if not all(type(side) is int and side >= 0 for side in sides):
        raise RefusedError("a numpy array with a shape that is none")
    real = dtype.real()
    if math.prod(sides) * real.itemsize != len(raw):
        raise RefusedError(f"a numpy array of shape {sides} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype=real).reshape(sides, order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise RefusedError("a numpy array of a class of its own")
    return _Array()


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    return _build(raw, dtype, (), "C").item()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.value = _build(raw, dtype, shape, order)
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How old protocols write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): DictStandIn,
    ("argparse", "Namespace"): DictStandIn,  # options of a command line: plain data, but no weights
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Reader(pickle.Unpickler):
    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")  # text of Python 2

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError(f"a reference to something outside the file ({pid!r:.60})")


def _tensors(tree: Any, depth: int = 0, done: dict[int, Any] | None = None) -> Any:
    """The tree with tensors for stand-ins. Nothing but data may be left in it.

    Args:
        done: what has become of a container, by its id: a few that hold each other many times over would
            otherwise take for ever.
    """
    if isinstance(tree, _Array):
        if tree.value is None:
            raise RefusedError("a numpy array without contents")
        # A copy, aligned, writable and in the machine's byte order.
        return torch.from_numpy(np.array(tree.value, dtype=tree.value.dtype.newbyteorder("="), order="C"))
    if tree is None or type(tree) in (bool, int, float, str, bytes):
        return tree
    if depth > 20:
        raise RefusedError("containers within containers without end")
    done = {} if done is None else done
    if id(tree) not in done:
        if isinstance(tree, Mapping):
            found: Any = {
                _tensors(key, depth + 1, done): _tensors(value, depth + 1, done)
                for key, value in tree.items()
            }
        elif type(tree) in (list, tuple):
            found = type(tree)(_tensors(value, depth + 1, done) for value in tree)
        else:
            raise RefusedError(f"a {type(tree).__name__.lstrip('_')}")
        done[id(tree)] = found
    return done[id(tree)]
