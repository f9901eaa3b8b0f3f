"""A serving graph as an ONNX model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmrcnn.config.model import ModelConfig
from fastmrcnn.data.transforms import Size
from fastmrcnn.deployment.graph import INPUTS, ServingGraph
from fastmrcnn.deployment.onnx_operators import check_operators, translations
from fastmrcnn.errors import UserError
from fastmrcnn.kernels.box_decode.reference import decode_boxes
from fastmrcnn.weights.exported import CARD, ExportedCard, as_text

OPSET = 18  # RoIAlign's half pixels came with 16; the exporter's own operators are of 18
INSTALL = "pip install onnx onnxscript onnxruntime"


def require_onnx() -> None:
    """UserError unless the packages that write and run ONNX are here."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name)


def require(name: str) -> Any:
    """The module of that name; UserError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed, which exported files need: {INSTALL}") from None


def example_inputs(batch: int, shape: Size) -> tuple[Tensor, Tensor]:
    """Inputs of a graph's shape: black images."""
    pixels = torch.zeros((batch, *shape, 3), dtype=torch.uint8)
    return pixels, torch.tensor([shape] * batch, dtype=torch.int32)


def as_onnx(graph: ServingGraph, config: ModelConfig, num_classes: int, batch: int, shape: Size) -> Any:
    """The graph as an `onnx.ModelProto`, for images of this padded shape.

    Args:
        config: of the graph's model.
    Raises:
        UserError: a package is missing; the model has an operator that ONNX lacks.
    """
    check_operators(config.roi)
    groups = max(num_classes, len(config.anchors.sizes))
    return to_onnx(graph, example_inputs(batch, shape), INPUTS, graph.outputs, groups)


def to_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    groups: int,
) -> Any:
    """A module that calls our operators, as an `onnx.ModelProto` of standard ones.

    Args:
        groups: as in `translations`.
    """
    require_onnx()
    ops = torch.ops.fastmrcnn_kernels
    with torch.no_grad(), quiet():
        exported = torch.export.export(module, inputs, strict=False)
        exported = exported.run_decompositions({ops.decode_boxes.default: decode_boxes})
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            custom_translation_table=translations(groups),
        )
    assert program is not None
    return program.model_proto


def with_card(model: Any, exported: ExportedCard) -> bytes:
    """The content of a file: an `onnx.ModelProto` that says what it is.

    Raises:
        UserError: it would be larger than a file of ONNX can be.
    """
    entry = model.metadata_props.add()
    entry.key, entry.value = CARD, as_text(exported)
    model.producer_name = "fastmrcnn"
    if model.ByteSize() >= 2**31:
        raise UserError("the model is larger than 2 GiB, the most that a file of ONNX holds; try --half")
    content: bytes = model.SerializeToString()
    return content


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings, of which none is for its user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
