"""The kernels of a graph that Inductor has scheduled: bytes, products, and the lines that they come from.

To be asked while the graph is at hand, that is within `Scheduler.codegen`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch.fx import Node
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from fastmrcnn.speed.graph_count import kind_of

PACKAGE = Path(__file__).parents[1]
# Types and shapes; a convolution among generated operations stands for its bias, which is added there.
_MOVING = {"convert_element_type", "view", "reshape", "permute", "unsqueeze", "expand", "full", "convolution"}
_FRAME = re.compile(r'File "(.+?)", line (\d+)')

# The part of a kernel is that of the outermost of these files on the way from the model to its operation.
_PARTS = {
    "model/backbone.py": "backbone",
    "model/fpn.py": "FPN",
    "model/rpn.py": "RPN",
    "model/rois.py": "sampling",
    "model/roi_pooler.py": "RoI heads",
    "model/box_head.py": "RoI heads",
    "model/mask_head.py": "RoI heads",
    "model/keypoint_head.py": "RoI heads",
}
OTHER = "other"


class Kernel(NamedTuple):
    kind: str  # generated | library | ours
    name: str  # of the call; of what Inductor writes, its operations
    part: str  # of the model
    sources: list[str]  # of its last operations, as "model/convs.py:42 in backbone.layer1.0.conv1"
    read: int  # bytes
    written: int  # bytes
    flops: int  # of convolutions and matrix products

    @property
    def bytes(self) -> int:
        return self.read + self.written


def kernels_of(nodes: list[Any]) -> list[Kernel]:
    """Of the final nodes of a scheduler.

    A kernel reads each of its inputs once and writes each of its results once, as a whole: what it reads in
    places only, as RoIAlign does, counts whole. But of a buffer that is added to in places, those places
    count. A convolution's backward counts as one kernel, with both of its gradients.
    """
    from torch._inductor import ir, scheduler

    kernels = []
    order: dict[Any, int] = {}
    for node in nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
            continue  # nothing is run: the second is one of several results
        kind = kind_of(node)
        origins = _origins(node)
        if origins and not order:
            order = {operation: place for place, operation in enumerate(origins[0].graph.nodes)}
        origins.sort(key=lambda origin: -order.get(origin, -1))  # its last operation is what it is for
        read = sum(_accesses(node, include_reads=True, include_writes=False).values())
        written = sum(_accesses(node, include_reads=False, include_writes=True).values())
        if isinstance(node.node, ir.IndexPutFallback):
            _, values, *index = (_buffer_bytes(buffer) for buffer in node.node.inputs)
            read, written = 2 * values + sum(index), values
        name = _operations(origins) if kind == "generated" else _call(node)
        flops = 0 if kind == "generated" else _flops(origins)
        kernels.append(Kernel(kind, name, _part(origins), _sources(origins), read, written, flops))
    return kernels


def _origins(node: Any) -> list[Any]:
    """The operations of the traced graph that a kernel is made of, and those before it that make nothing
    of their own."""
    return list(dict.fromkeys(o for part in node.get_nodes() for o in getattr(part.node, "origins", ())))


def _accesses(node: Any, **which: bool) -> dict[str, int]:
    """Bytes of each buffer that a kernel reads or writes.

    Of one that it adds to in places the scheduler knows how many those are, but forgets it where several
    such loops are one kernel.
    """
    accesses: dict[str, int] = node.get_read_write_buffer_accesses(**which)
    parts = node.get_nodes()
    for part in parts if len(parts) > 1 else []:
        adds = [dep for dep in part.read_writes.writes if getattr(dep, "mode", None) == "atomic_add"]
        own = part.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
        changed = {name for buffer in part.get_outputs() for name in buffer.get_mutations()}
        for dep in adds:
            for name in ({dep.name} | changed) & accesses.keys():
                accesses[name] = min(accesses[name], own[dep.name])
    return accesses


def _buffer_bytes(buffer: Any) -> int:
    return math.prod(int(side) for side in buffer.get_size()) * buffer.get_dtype().itemsize


def _call(node: Any) -> str:
    operator = getattr(node.node, "op_overload", None)
    name = str(operator) if operator is not None else str(getattr(node.node, "python_kernel_name", None))
    return name.removeprefix("extern_kernels.").removesuffix(".default").removesuffix(".out")


def _operations(origins: list[Any]) -> str:
    """The last that compute."""
    names = dict.fromkeys(
        str(origin.target).removeprefix("aten.").removeprefix("prims.").split(".")[0] for origin in origins
    )
    computing = [name for name in names if name not in _MOVING]
    return ", ".join(computing[:4]) or "copy"


def _flops(origins: list[Any]) -> int:
    """Of the last convolution or product: others have made what it reads."""
    for origin in origins:
        packet = getattr(origin.target, "_overloadpacket", None)
        if packet in flop_registry:
            args, kwargs, out = tree_map(
                lambda leaf: leaf.meta["val"] if isinstance(leaf, Node) else leaf,
                (origin.args, origin.kwargs, origin),
            )
            return int(flop_registry[packet](*args, **kwargs, out_val=out))
        if str(origin.target) == "fastmrcnn.conv_relu.default":
            return 2 * origin.meta["val"].numel() * origin.args[1].meta["val"][0].numel()
    return 0


def _frames(origin: Any) -> list[tuple[str, str]]:
    """Our files and lines that lead to an operation, outermost first."""
    frames = _FRAME.findall(origin.meta.get("stack_trace") or "")
    return [
        (Path(file).relative_to(PACKAGE).as_posix(), line)
        for file, line in frames
        if Path(file).is_relative_to(PACKAGE)
    ]


def _part(origins: list[Any]) -> str:
    files = (file for origin in origins for file, _ in _frames(origin))
    return next((_PARTS[file] for file in files if file in _PARTS), OTHER)


def _sources(origins: list[Any]) -> list[str]:
    """Of its last operations, as far as they are known."""
    found = dict.fromkeys(
        ":".join(frames[-1]) + _module(origin) for origin in origins if (frames := _frames(origin))
    )
    return list(found)[:2]


def _module(origin: Any) -> str:
    """The layer that an operation belongs to, where the tracer has noted it."""
    stack = origin.meta.get("nn_module_stack") or origin.meta.get("fwd_nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    _, _, inner = path.partition(".")
    return f" in {inner}" if inner else ""
