"""A matrix product of bf16 or fp16 with a result in float32, as it is summed, instead of rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, the weight cast to x's type, the result float32; under autocast too.

    The gradient of x is of its type, that of the weight is not rounded to it.

    Args:
        x: (..., C) bf16 or fp16.
        weight: (D, C), of any floating type.
    Returns:
        (..., D) float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _WideProduct.apply(rows, weight).unflatten(0, x.shape[:-1])


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight.to(x.dtype).t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight.to(x.dtype), _product(grad.t(), x).to(weight.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # or it would be rounded after all
        return a.float() @ b.float()
