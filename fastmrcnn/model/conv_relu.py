"""relu(conv(x) + bias + residual) as one operator: on CUDA one kernel of cuDNN, or of cuBLASLt where it is a
matrix product without a residual; with a backward of our own.

Without it the convolution writes its result, and another kernel reads and writes it again to add the bias
and apply the ReLU. Inductor fuses into neither library's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Convolve = Callable[[Tensor, Tensor, Tensor, Tensor | None, list[int], list[int]], Tensor]


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    """Under autocast x, weight and residual are cast to its type, as a convolution's would be.

    Args:
        x: (N, C, H, W).
        weight: (D, C, kh, kw), one group, no dilation.
        bias: (D,), of any floating type.
        residual: (N, D, h, w), added before the ReLU.
    Returns:
        (N, D, h, w), channels_last.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    return _conv_relu(x, weight, bias, residual, list(stride), list(padding))


# flexible_layout: Inductor would copy an input that it has not written yet, to be sure of its strides.
@torch.library.custom_op("fastmrcnn::conv_relu", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding)
    if residual is not None:
        y = y + residual
    return y.relu().contiguous(memory_format=torch.channels_last)


@_conv_relu.register_kernel("cuda")
def _cudnn(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    x, bias = x.contiguous(memory_format=torch.channels_last), bias.to(x.dtype)
    if residual is None and is_product(weight, stride, padding):
        return _product_relu(x, weight, bias)
    ones = [1] * len(stride)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, ones, 1)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, ones, 1)


def is_product(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution is one matrix product over the pixels of a channels_last map."""
    return (*weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)


def _product_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuBLASLt adds the bias and applies the ReLU before it writes; its result is never read."""
    rows = x.permute(0, 2, 3, 1)
    y = torch.ops.aten._addmm_activation(bias, rows.flatten(0, 2), weight.flatten(1).t())
    return y.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)


@_conv_relu.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    sides = [
        (side + 2 * pad - kernel) // step + 1
        for side, pad, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, output)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    # Where the ReLU cut, nothing flows back; one map serves all four gradients.
    grad = torch.where(y > 0, grad, 0)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        ctx.stride,
        ctx.padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [needs_x, needs_weight, False],
    )
    # The sum over a whole map is kept in float32, whatever the map is.
    total = grad.sum((0, 2, 3), dtype=_sum_dtype(grad)).to(ctx.bias_dtype) if needs_bias else None
    return grad_x, grad_weight, total, grad if needs_residual else None, None, None


@functools.cache
def epilogue_problem(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, convolve: Convolve = _conv_relu
) -> str | None:
    """One line on what is wrong with cuDNN's fused convolutions on a device, None if nothing is.

    cuDNN may compute alpha * conv + beta * (what stands in the memory of the result). With beta = 0 that is
    meant to be nothing, but 0 * NaN is NaN. So small convolutions run in memory that has held NaN and
    infinity, and must give what a convolution and a ReLU give. The host waits for them, once for a device.

    Args:
        convolve: what is tried, with the arguments of the operator.
    """
    for kernel, inputs, outputs, added in ((3, 64, 64, False), (1, 64, 256, True), (1, 256, 64, False)):
        generator = torch.Generator().manual_seed(kernel)
        shapes = ((2, inputs, 12, 20), (outputs, inputs, kernel, kernel), (outputs,), (2, outputs, 12, 20))
        x, weight, bias, z = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        x, weight, z = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, z))
        weight = weight / (inputs * kernel * kernel) ** 0.5
        padding = [kernel // 2] * 2
        wanted = F.conv2d(x, weight, None, 1, padding).float() + bias.float()[:, None, None]
        wanted = (wanted + z.float() if added else wanted).relu()
        for poison in (float("nan"), float("inf")):
            _poison(z, poison)
            found = convolve(x, weight, bias, z if added else None, [1, 1], padding).float()
            if not bool(torch.isclose(found, wanted, rtol=0.05, atol=0.05).all()):
                what = f"{kernel}x{kernel}{' with a residual' if added else ''}, memory that held {poison}"
                return f"cuDNN's fused convolution gives wrong values here ({what})"
    return None


def _poison(like: Tensor, value: float) -> None:
    """Leave this number in the memory that tensors of this size will be given next."""
    if like.device.type == "cuda":
        torch.cuda.empty_cache()  # so that no older block is taken
    held = [torch.full_like(like, value) for _ in range(8)]
    del held


def _sum_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


_conv_relu.register_autograd(_backward, setup_context=_setup_context)
