"""A guard against operators that make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::item",
}


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait or a shape depend on data, inside custom operators too.

    Only the CPU reference of NMS may: its greedy order is sequential.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exempt = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not self.exempt:
            assert name not in FORBIDDEN, f"{name} makes the host wait or a shape depend on data"
            if name == "aten::repeat_interleave.Tensor":
                assert "output_size" in (kwargs or {}), f"{name} without an output_size reads the counts"
            if name.startswith("aten::index") and isinstance(args[1], (list, tuple)):
                kinds = [i.dtype for i in args[1] if isinstance(i, torch.Tensor)]
                assert torch.bool not in kinds, f"{name} with a boolean mask"
        is_nms = "padded_nms" in name
        self.exempt += is_nms
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.exempt -= is_nms
