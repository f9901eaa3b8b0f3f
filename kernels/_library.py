"""What every operator's registration shares.

The operators' namespace comes from the package's own name, so that a copy of this folder under
another name registers beside the original instead of colliding with it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

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
