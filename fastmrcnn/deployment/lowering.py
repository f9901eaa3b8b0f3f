"""Our operators in PyTorch's own, for graphs that are to run where only PyTorch is.

To an exported program an operator registered from Python is a name, which a process that has not imported
fastmrcnn.kernels does not know. So plain PyTorch is traced in place of each: the code that CPU tensors run,
which is made of tensors of fixed shape in all operators but one, and for that one `loop_nms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmrcnn.deployment.loop_nms import loop_nms
from fastmrcnn.kernels._ops import add_op_namespace_prefix
from fastmrcnn.kernels.box_decode import reference as box_decode
from fastmrcnn.kernels.common.library import in_full_precision
from fastmrcnn.kernels.common.pooling import Pooling, is_channels_last, memory_format
from fastmrcnn.kernels.level_assign import reference as level_assign
from fastmrcnn.kernels.mask_predictor import cpu as mask_predictor
from fastmrcnn.kernels.roi_align import cpu as roi_align
from fastmrcnn.kernels.roi_max import cpu as roi_max
from fastmrcnn.model import conv_relu

NAMESPACES = (add_op_namespace_prefix("").rstrip(":"), "fastmrcnn")  # of the kernels; of the model itself


class PlainPyTorch(TorchFunctionMode):
    """Within the block our operators are not called: their definitions in PyTorch run, and are traced.

    Raises:
        NotImplementedError: an operator is called that has no such form, one of training.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            if func not in PLAIN:
                raise NotImplementedError(f"{func} has no form in plain PyTorch")
            func = PLAIN[func]
        return func(*args, **(kwargs or {}))


def foreign_operators(graph_module: torch.fx.GraphModule) -> set[str]:
    """Names of the operators in a graph, and in the graphs within it, that PyTorch itself does not have."""
    return {
        str(node.target)
        for module in graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
    }


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, as within the operator."""
    return lambda tensor, *arguments: in_full_precision(function, tensor, *arguments)


def _roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    *arguments: Any,
) -> Tensor:
    out = roi_align.multilevel_roi_align(list(features), boxes, batch_index, valid, Pooling.of(arguments))
    return out.contiguous(memory_format=memory_format(is_channels_last(features[0])))


def _roi_max(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    kind: str,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    how = Pooling.of(arguments)
    out, winner = roi_max.multilevel_roi_max(list(features), boxes, batch_index, valid, kind, how)
    form = memory_format(is_channels_last(features[0]))
    return out.contiguous(memory_format=form), winner.contiguous(memory_format=form)


def _conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    y = torch.nn.functional.conv2d(x, weight, bias.to(x.dtype), stride, padding)
    y = y if residual is None else y + residual
    return y.relu().contiguous(memory_format=torch.channels_last)


PLAIN: dict[Any, Callable[..., Any]] = {
    **{
        getattr(getattr(torch.ops, NAMESPACES[0]), name).default: plain
        for name, plain in {
            "padded_nms": _plainly(loop_nms),
            "decode_boxes": _plainly(box_decode.decode_boxes),
            "assign_levels": _plainly(level_assign.assign_levels),
            "class_mask_logits": _plainly(mask_predictor.class_mask_logits),
            "roi_align": _roi_align,
            "roi_max": _roi_max,
        }.items()
    },
    conv_relu._conv_relu._opoverload: _conv_relu,
}
"""Of each operator that inference calls, the same in plain PyTorch."""
