"""What every operator's registration shares.

The operators' namespace comes from the package's own name, so that a copy of this folder under
another name registers beside the original instead of colliding with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMESPACE = __package__.replace(".", "_")  # fastmrcnn.kernels -> fastmrcnn_kernels
Function = TypeVar("Function", bound=Callable[..., Any])

_switchable: set[str] = set()
_by_reference: frozenset[str] = frozenset()


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(tensor: Tensor) -> bool:
    """CUDA tensors run Triton; CPU tensors run the reference, unless the interpreter is on."""
    if tensor.device.type == "cuda":
        require_triton()
        return True
    return interpreting() and tensor.device.type == "cpu"


@functools.cache
def require_triton() -> None:
    """Raise one clear error where Triton cannot work, instead of one from deep inside it."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{__package__}: kernels on CUDA tensors need triton: pip install 'triton>=3.6,<3.8'"
        )
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        raise RuntimeError(
            f"{__package__}: triton builds its launchers with a C compiler and found none; "
            "install gcc or clang, or set CC"
        )


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


def in_full_precision(reference: Callable[..., Any], tensor: Tensor, *arguments: Any) -> Any:
    """Call without autocast, which would round a reference's matrix products; kernels do not feel it."""
    with torch.autocast(tensor.device.type, enabled=False):
        return reference(tensor, *arguments)


def may_look(tensor: Tensor) -> bool:
    """Whether a check may look at values: in eager mode on the CPU, where it costs no wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_all(fine: Tensor, message: Callable[[], str]) -> None:
    """Raise ValueError unless all are true, for tensors that `may_look` allows."""
    try:
        torch._assert_async(fine.all())  # on the CPU it raises at once, and traces without a host read
    except RuntimeError:
        raise ValueError(message()) from None


def check_range(name: str, index: Tensor, size: int, counts: Tensor | None = None) -> None:
    """Raise ValueError for an index that is not in 0..size-1, where looking costs no wait.

    Args:
        index: (slots,).
        counts: (slots,), 0 or false where the index is not used; None: all are.
    """
    if not may_look(index):
        return
    fine = (index >= 0) & (index < size)
    if counts is not None:
        fine = fine | (counts == 0)
    require_all(fine, lambda: f"{name} must be in 0..{size - 1}, got {index[~fine][:5].tolist()}")
