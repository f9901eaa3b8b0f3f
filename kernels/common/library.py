"""What every operator's registration shares."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix

PACKAGE = __package__.rpartition(".")[0]  # of the operators: fastmrcnn.kernels, or what a copy is called
Function = TypeVar("Function", bound=Callable[..., Any])

_switchable: set[str] = set()
_by_reference: frozenset[str] = frozenset()


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(tensor: Tensor) -> bool:
    """CUDA tensors run Triton; CPU tensors run plain PyTorch, unless the interpreter is on."""
    if tensor.device.type == "cuda":
        require_triton()
        return True
    if interpreting() and tensor.device.type == "cpu":
        require_interpreter()
        return True
    return False


@functools.cache
def require_triton() -> None:
    """Raise one clear error where Triton cannot work, instead of one from deep inside it."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{PACKAGE}: kernels on CUDA tensors need triton: pip install 'triton>=3.6,<3.8'")
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        raise RuntimeError(
            f"{PACKAGE}: triton builds its launchers with a C compiler and found none; "
            "install gcc or clang, or set CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for it
    include = sysconfig.get_paths(scheme)["include"]
    searched = os.pathsep.join([include, os.environ.get("CPATH", ""), os.environ.get("C_INCLUDE_PATH", "")])
    if not any(os.path.exists(os.path.join(folder, "Python.h")) for folder in searched.split(os.pathsep)):
        raise RuntimeError(
            f"{PACKAGE}: triton builds its launchers with Python's headers, and there is no Python.h in "
            f"{include}; install them (python3-dev or python3-devel)"
        )


@functools.cache
def require_interpreter() -> None:
    """Raise one clear error where Triton's interpreter cannot work, instead of one from deep inside it."""
    triton, numpy = (importlib.import_module(name).__version__ for name in ("triton", "numpy"))
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        raise RuntimeError(
            f"{PACKAGE}: the interpreter of triton {triton} does not work with numpy {numpy}: "
            "pip install 'numpy<2.4', or a newer triton"
        )


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers."""
    return tuple(int(number) for number in version.split(".")[:2])


def sum_dtype(values: Tensor) -> torch.dtype:
    """Of positions and sums."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def register(plain: Callable[..., Any]) -> torch.library.CustomOpDef:
    """The operator of a function in plain PyTorch: its name, its arguments, a tensor first, and its results.

    The function of that name in the `kernel.py` of its folder runs in its place where Triton runs.
    """
    name, package = plain.__name__, plain.__module__.rpartition(".")[0]

    def run(*arguments: Any) -> Any:
        if runs_triton(arguments[0]):
            return getattr(importlib.import_module(".kernel", package), name)(*arguments)
        return in_full_precision(plain, *arguments)

    schema = torch.library.infer_schema(plain, mutates_args=())
    return torch.library.custom_op(add_op_namespace_prefix(name), run, mutates_args=(), schema=schema)


@contextlib.contextmanager
def by_reference(*names: str) -> Iterator[None]:
    """Let public functions run plain PyTorch within the block, also where Triton would run.

    Their operators are not called: what runs are PyTorch's own, which Inductor sees through. A function that
    is compiled is traced once within such a block and once without; `torch.compile` keeps both. Blocks nest,
    and hold for the whole process.

    Args:
        names: of the functions, as "match_boxes".

    Raises:
        ValueError: there is no such function, or it needs its operator (the message lists those that do not).
    """
    global _by_reference
    unknown = [name for name in names if name not in _switchable]
    if unknown:
        known = ", ".join(sorted(_switchable))
        raise ValueError(f"by_reference knows {known}; got {', '.join(map(repr, unknown))}")
    before = _by_reference
    _by_reference = before | set(names)
    try:
        yield
    finally:
        _by_reference = before


def switchable(function: Function) -> Function:
    """A public function that calls `chosen`, and so follows `by_reference`."""
    _switchable.add(function.__name__)
    return function


def chosen(name: str, operator: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """What the public function of that name is to call; both take the same arguments, a tensor first."""
    return functools.partial(in_full_precision, plain) if name in _by_reference else operator


def in_full_precision(plain: Callable[..., Any], tensor: Tensor, *arguments: Any) -> Any:
    """Call without autocast, which would round matrix products; kernels do not feel it."""
    with torch.autocast(tensor.device.type, enabled=False):
        return plain(tensor, *arguments)
