"""The training step as Inductor schedules it for an H100, traced on a machine without a GPU.

Run as a program in a process of its own, by `schedule.py`: what it replaces in torch stays replaced. Tensors
are fakes of the device "cuda", which have shapes but no memory; nothing is computed, and no kernel is made.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.config.schema import Config
from fastmrcnn.data.synthetic import synthetic_batches
from fastmrcnn.device import choose_precision
from fastmrcnn.model.build import build_model
from fastmrcnn.model.convs import fuse_epilogues
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.speed.kernel_list import Kernel, kernels_of
from fastmrcnn.structures import tree_map
from fastmrcnn.training.step import forward_of

DEVICE = torch.device("cuda:0")
CLASSES, OBJECTS = 80, 15

# What Inductor asks of an H100 (SXM).
H100 = SimpleNamespace(
    name="NVIDIA H100",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


class _ScheduledError(Exception):
    """A graph has been scheduled: there is nothing more to do for it."""

    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__(f"{len(kernels)} kernels")
        self.kernels = kernels


class _OnCpu(TorchDispatchMode):
    """Makes on the CPU what would be made on a device that is not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def pretend_h100() -> None:
    """Let torch believe in an H100, for as long as this process lives."""
    from torch._dynamo import device_interface
    from torch._inductor import scheduler as scheduler_module
    from torch._inductor.fx_passes import joint_graph

    scheduler: Any = scheduler_module

    cuda: Any = torch.cuda
    cuda.is_available = lambda: False  # or fake tensors would take memory of the device first
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda *args: H100
    cuda.get_device_capability = lambda *args: (H100.major, H100.minor)
    cuda.amp.common.amp_definitely_not_available = lambda: False
    interface: Any = device_interface.CudaInterface
    for place in (interface, interface.Worker):
        place.get_device_properties = staticmethod(lambda *args: H100)
        place.current_device = staticmethod(lambda: 0)
    interface.is_available = staticmethod(lambda: True)
    interface.is_bf16_supported = staticmethod(lambda *args, **kwargs: True)
    interface.is_triton_capable = staticmethod(lambda *args: True)
    interface.get_compute_capability = staticmethod(lambda *args: 10 * H100.major + H100.minor)
    # Which library computes a convolution decides its result's layout; torch would ask the driver.
    backends: Any = torch._C._ConvBackend  # type: ignore[attr-defined]

    def select(*args: Any, transposed: bool, **kwargs: Any) -> Any:
        return backends.CudnnTranspose if transposed else backends.Cudnn

    torch._C._select_conv_backend = select

    # Inductor makes constants, to see what becomes of them.
    folder: Any = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with _OnCpu():
            return deduce(self, node)

    folder._deduce_value = deduce_on_cpu

    def stop(self: Any) -> None:
        raise _ScheduledError(kernels_of(self.nodes))

    scheduler.Scheduler.codegen = stop


def trace(config: Config, shape: tuple[int, int], images: int) -> dict[str, Any]:
    """Kernels of the forward and of the backward graph, and what the first keeps for the second.

    After `pretend_h100`. The update is not in the graphs.
    """
    from torch._inductor.compile_fx import compile_fx

    fakes = FakeTensorMode()
    batch = synthetic_batches(
        range(1), images, shape, OBJECTS, CLASSES, polygons=config.model.mask_head.target == "polygon"
    )[0]
    with torch.device("meta"):
        model = build_model(config.model, CLASSES)
    fuse_epilogues(model, config.train.fuse_epilogues)
    keys = model.draw_keys(batch, torch.Generator())
    put_on_fake_device(model, fakes)
    to_device = functools.partial(_fake, fakes)
    batch, keys = tree_map(to_device, batch), tree_map(to_device, keys)
    graphs: list[dict[str, Any]] = []
    forward = forward_of(model.train(), DEVICE, choose_precision("bf16", DEVICE))
    # Padding is chosen by timing both ways, which needs a GPU.
    options = {"shape_padding": False, "fx_graph_cache": False}
    with (
        torch._inductor.config.patch(options),
        torch._functorch.config.patch(enable_autograd_cache=False),
        fakes,
    ):
        backend = functools.partial(compile_fx, inner_compile=_scheduling(graphs, fakes))
        compiled: Callable[..., Any] = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
        losses, counts = compiled(batch, keys)
        losses.total().backward()
    results = sum(value is not None for value in (*losses, *counts))
    assert len(graphs) == 2, f"{len(graphs)} graphs instead of a forward and a backward one"
    return {
        "forward": graphs[0]["kernels"],
        "backward": graphs[1]["kernels"],
        "saved_bytes": sum(graphs[0]["results"][results:]),  # kept for backward
        "trained_numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def put_on_fake_device(model: MaskRCNN, fakes: FakeTensorMode) -> None:
    """As the trainer has a model on a GPU: weights of convolutions channels_last."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = nn.Parameter(_fake(fakes, _channels_last(weight)), requires_grad=weight.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(fakes, buffer)


def _channels_last(value: Tensor) -> Tensor:
    if value.dim() != 4:
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta", memory_format=torch.channels_last)


def _fake(fakes: FakeTensorMode, value: Tensor) -> Tensor:
    with fakes:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)


def _scheduling(graphs: list[dict[str, Any]], fakes: FakeTensorMode) -> Callable[..., Any]:
    """Inductor's compiler of one graph, which adds what it scheduled to `graphs`. What it returns runs the
    graph on fakes."""
    from torch._inductor.compile_fx import compile_fx_inner

    def inner(graph: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Callable[..., Any]:
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        given = ("placeholder", "get_attr")  # weights and inputs, which are there anyway
        made = [0 if node.op in given else node.meta["val"].nbytes for node in results if node is not None]
        try:
            compile_fx_inner(graph, inputs, **settings)
        except Exception as error:
            graphs.append({"kernels": _kernels_of(error), "results": made})

        def run(arguments: Any) -> Any:
            with fakes:
                return torch.fx.Interpreter(graph).run(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return inner


def _kernels_of(error: BaseException | None) -> list[Kernel]:
    first = error
    while error is not None:
        if isinstance(error, _ScheduledError):
            return error.kernels
        error = error.__cause__ or error.__context__
    assert first is not None
    raise first


def main() -> None:
    """Reads a JSON object (config, shape, images) from one file, writes what `trace` finds to another."""
    source, target = map(Path, sys.argv[1:])
    asked = json.loads(source.read_text(encoding="utf-8"))
    pretend_h100()
    found = trace(Config.model_validate(asked["config"]), tuple(asked["shape"]), asked["images"])
    for part in ("forward", "backward"):
        found[part] = [kernel._asdict() for kernel in found[part]]
    target.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
