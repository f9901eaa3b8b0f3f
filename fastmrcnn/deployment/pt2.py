"""A serving graph as a program of torch.export, or compiled by AOTInductor.

Both need PyTorch alone: our operators are lowered to its own when the graph is traced.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastmrcnn.data.transforms import Size
from fastmrcnn.deployment.graph import ServingGraph
from fastmrcnn.deployment.lowering import PlainPyTorch, foreign_operators
from fastmrcnn.errors import UserError
from fastmrcnn.weights.pt2_file import METADATA, OUTPUTS


def trace(graph: ServingGraph, batch: int, shape: Size) -> ExportedProgram:
    """The program of a serving graph for images of this padded shape, on the device of its model."""
    device = graph.model.pixel_mean.device
    pixels = torch.zeros((batch, *shape, 3), dtype=torch.uint8, device=device)
    sizes = torch.tensor([shape] * batch, dtype=torch.int32, device=device)
    return trace_module(graph, (pixels, sizes))


def trace_module(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The program of a module that calls our operators, in PyTorch's own alone."""
    with torch.no_grad(), PlainPyTorch():
        program = torch.export.export(module, inputs, strict=False)
    assert not foreign_operators(program.graph_module)
    return program


def as_program(graph: ServingGraph, batch: int, shape: Size, metadata: Mapping[str, str]) -> bytes:
    """The content of a .pt2 file that torch.export.load reads."""
    told = {**metadata, OUTPUTS: ",".join(graph.outputs)}
    stream = io.BytesIO()
    torch.export.save(trace(graph, batch, shape), stream, extra_files={METADATA: json.dumps(told)})
    return stream.getvalue()


def as_compiled(graph: ServingGraph, batch: int, shape: Size, metadata: Mapping[str, str]) -> bytes:
    """The content of a .pt2 file that torch._inductor.aoti_load_package reads, AOTIModelPackageLoader in C++.

    It holds machine code for the kind of device that the graph's model is on and, on a CPU, for the vector
    instructions that this one has. To compile it takes minutes.

    Raises:
        UserError: there is no C++ compiler.
    """
    from torch._inductor.exc import InvalidCxxCompiler

    told = {**metadata, OUTPUTS: ",".join(graph.outputs)}
    configs: dict[str, Any] = {"aot_inductor.metadata": told}
    program = trace(graph, batch, shape)
    with tempfile.TemporaryDirectory(prefix="fastmrcnn") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code, about itself
        file = Path(folder) / "model.pt2"
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(file), inductor_configs=configs
            )
        except InvalidCxxCompiler:
            raise UserError("--aot needs a C++ compiler and found none; install g++ or set CXX") from None
        return file.read_bytes()
