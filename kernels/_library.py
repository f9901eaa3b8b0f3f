"""What every operator's registration shares.

The operators' namespace comes from the package's own name, so that a copy of this folder under
another name registers beside the original instead of colliding with it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = __package__.replace(".", "_")  # fastmrcnn.kernels -> fastmrcnn_kernels


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
