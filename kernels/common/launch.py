"""Launches of kernels, and what a launch is compiled for without a GPU.

An operator's `kernel.py` describes what it launches as `Launch`, and has a function `compile_specs()` that
returns what it launches at the training shapes: forward and backward, fp32 and bf16, both layouts. The
launches come from the code that launches, given tensors on the meta device, so that the report compiles
what runs. `compile_specs` may take a `Target`, for operators whose launches depend on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class Target(NamedTuple):
    """What a kernel is launched on, as far as the choice of a launch depends on it."""

    backend: str  # "cuda" or "hip"
    shared: int  # bytes of shared memory that one program can have
    tensor_memory: bool = False  # products accumulate in it (data centre Blackwell), not in registers


H100 = Target("cuda", 227 * 1024)


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that a device is; an H100 for what has no device, as the interpreter and meta tensors."""
    if device.type != "cuda":
        return H100
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index or 0)
    if torch.version.hip:
        return Target("hip", properties["max_shared_mem"])
    return Target("cuda", properties["max_shared_mem"], torch.cuda.get_device_capability(device)[0] == 10)


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
    options: dict[str, Any] = field(default_factory=dict)  # of the compiler, as `Launch.options`
    widest_load: int | None = None  # bytes a thread at which the main load must be; None: nothing is asked
    trips: float | None = None  # of the hot loop, of the average program; None: not known

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
            if parameter.do_not_specialize and isinstance(value, int):
                signature[parameter.name] = _integer(value)
                continue
            signature[parameter.name] = _type(value)
            for path, leaf in _leaves(value, (position,)):
                if _type(leaf) == "constexpr":
                    constexprs[path] = leaf
                elif isinstance(leaf, (torch.dtype, Tensor)) or (isinstance(leaf, int) and leaf % 16 == 0):
                    attrs[path] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        options = {"num_warps": self.num_warps, **self.options}
        return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, with every parameter by name.

    `options` are Triton's, beyond `num_warps`: num_stages, enable_fp_fusion, maxnreg (not on AMD). What is
    not there is Triton's choice.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """On the device of its tensors, which need not be the current one, where Triton would launch."""
        tensors = (leaf for value in self.arguments.values() for _, leaf in _leaves(value, ()))
        with torch.cuda.device_of(next(leaf for leaf in tensors if isinstance(leaf, Tensor))):
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, **self.options)

    def spec(
        self,
        name: str,
        variant: str,
        bytes: int,
        flops: int,
        widest_load: int | None = None,
        trips: float | None = None,
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
            self.options,
            widest_load,
            trips,
        )


def coded(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes that change from call to call, as a kernel takes them in a tuple: there `code >> 2` is the size.

    Triton compiles a kernel anew for each pattern of 1s and of multiples of 16 in a tuple, whatever its
    `do_not_specialize` says. A code is neither.
    """
    return tuple(4 * size + 2 for size in sizes)


def plain(tensor: Tensor) -> Tensor:
    """As a kernel reads it without strides: contiguous, and bytes in the place of bools."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def reach(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of tensor[i]; 32 bits count up to 2**31 of them."""
    return sum((n - 1) * step for n, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


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
        return _integer(value)
    return "fp32"


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, (*path, index))
    else:
        yield path, value
