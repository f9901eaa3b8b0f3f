"""A guard against operators that make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::where",  # of a condition alone; the one of three arguments is aten::where.self
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
}
FORBIDDEN_METHODS = {"tolist", "numpy", "__array__", "cpu"}  # on the CPU these call no operator


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait or a shape depend on data, inside custom operators too.

    Only NMS on the CPU may: its greedy order is sequential. Outside of custom operators it fails on
    tensors made of numbers too (torch.tensor): on a GPU that is a copy which waits, and which no CUDA graph
    can record.

    Args:
        host_tensors: let those pass, of code that pins them before it copies them.
    """

    def __init__(self, *, host_tensors: bool = False) -> None:
        super().__init__()
        self.host_tensors = host_tensors
        self.exempt = 0
        self.inside = 0
        self.methods = _Methods(self)

    def __enter__(self) -> NoSync:
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        made = name == "aten::lift_fresh" and not self.inside and not self.host_tensors
        assert not made, "torch.tensor() copies numbers to the device"
        if not self.exempt:
            assert name not in FORBIDDEN, f"{name} makes the host wait or a shape depend on data"
            if name == "aten::repeat_interleave.Tensor":
                assert "output_size" in (kwargs or {}), f"{name} without an output_size reads the counts"
            if name.startswith("aten::index") and isinstance(args[1], (list, tuple)):
                kinds = [i.dtype for i in args[1] if isinstance(i, torch.Tensor)]
                assert torch.bool not in kinds, f"{name} with a boolean mask"
        operator = _maybe_get_opdef(name)
        if operator is None:
            return func(*args, **(kwargs or {}))
        # The mode is off while it handles an operator, so look inside by running the body under it.
        is_nms = "padded_nms" in name
        self.exempt += is_nms
        self.inside += 1
        try:
            with self, torch.no_grad():
                return operator._init_fn(*args, **(kwargs or {}))
        finally:
            self.exempt -= is_nms
            self.inside -= 1


class _Methods(TorchFunctionMode):
    """Fails on methods of tensors that read their values without any operator."""

    def __init__(self, guard: NoSync) -> None:
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert self.guard.exempt or name not in FORBIDDEN_METHODS, f"{name}() makes the host wait"
        return func(*args, **(kwargs or {}))
