"""What a kernel is compiled for without a GPU: the arguments of a launch at a real shape.

Each `kernel.py` has a function `compile_specs()` that returns these, forward and backward, fp32 and bf16,
both layouts, at the training shapes. The report compiles them and reads registers, spills and load
widths from the machine code; the tests do so for a few. A `kernel.py` that describes its launches as
`Launch` gets them from the code that launches, given tensors on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class CompileSpec:
    """One compilation of one kernel.

    Arguments are given as a launch gives them, by parameter name: numbers and constexprs as they are,
    and a tensor or just its dtype. A tuple stands for a tuple of those, None for None.
    """

    name: str  # operator and direction, as "roi_align backward 7x7"
    variant: str  # dtype and layout, as "bf16 channels_last"
    kernel: Any  # the @triton.jit function
    arguments: dict[str, Any]
    programs: int  # of the launch
    bytes: int  # least to read and write, each unique byte once
    flops: int  # least to compute
    num_warps: int = 4
    num_stages: int = 3
    widest_load: int | None = None  # bytes a thread at which the main load must be; None: nothing is asked

    def compile(self, backend: str = "cuda", arch: int | str = 90, warp_size: int = 32) -> Any:
        """Triton's compiled kernel for a target, with the specialisations of a launch of these arguments."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, Any] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attrs: dict[tuple[int, ...], Any] = {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constexprs[(position,)] = value
                continue
            signature[parameter.name] = _type(value)
            for path, leaf in _leaves(value, (position,)):
                if _type(leaf) == "constexpr":
                    constexprs[path] = leaf
                elif isinstance(leaf, (torch.dtype, Tensor)) or (isinstance(leaf, int) and leaf % 16 == 0):
                    attrs[path] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, with every parameter by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)

    def spec(
        self, name: str, variant: str, bytes: int, flops: int, widest_load: int | None = None
    ) -> CompileSpec:
        return CompileSpec(
            name,
            variant,
            self.kernel,
            self.arguments,
            math.prod(self.grid),
            bytes,
            flops,
            self.num_warps,
            widest_load=widest_load,
        )


def _type(value: Any) -> Any:
    """Triton's name of an argument's type, specialised as its launcher does: 1 and None are constants."""
    if isinstance(value, tuple):
        return tuple(_type(part) for part in value)
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, torch.dtype):
        return _POINTERS[value]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, (*path, index))
    else:
        yield path, value
