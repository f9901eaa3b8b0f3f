"""Batch normalisation over the images of all processes, on any device, as part of one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, same state, whose mean and variance are those of all processes together.

    torch's own SyncBatchNorm, whose names in checkpoints are the same, refuses a CPU. Each pass sums one
    small tensor over the processes. In evaluation, and until `synchronise_norms`, it is its base class.
    """

    processes: str | None = None  # name of the group of torch.distributed; None: this process alone

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape and type."""
        if self.processes is None or not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalised.apply(
            x, self.weight, self.bias, self.running_mean, self.eps, self.processes
        )
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return y


def synchronise_norms(model: nn.Module, processes: str | None) -> int:
    """Let the model's synchronised norms sum over a group of processes, by its name; None: over none.

    Returns:
        how many were told.
    """
    norms = [module for module in model.modules() if isinstance(module, SyncBatchNorm2d)]
    for norm in norms:
        norm.processes = processes
    return len(norms)


class _Normalised(torch.autograd.Function):
    """Sums are float32, or float64 for float64 inputs.

    The variance is the mean of squares less the square of the mean, of values less `shift`. With the running
    mean for that, which is the same in all processes and soon near the mean, little cancels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float, processes: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        moved = x.to(_sum_dtype(x)) - _channels(shift)
        one, pixels = moved.new_ones((1,)), moved.new_full((1,), x.numel() // x.shape[1])
        sums = torch.cat([moved.sum(_PIXELS), moved.square().sum(_PIXELS), shift, one, pixels])
        total = _over_processes(sums, processes)
        first, second, shifts = total[:-2].chunk(3)
        number, count = total[-2:].unbind()
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0)
        inverse = (variance + eps).rsqrt()
        y = (moved - _channels(mean)) * _channels(inverse * weight) + _channels(bias)
        # Not of `shift` itself: the running mean has been changed by the time of the backward pass, in which
        # a compiler may compute this anew.
        mean = mean + shifts / number
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.processes = processes
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        wide = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - _channels(mean)) * _channels(inverse)
        own = torch.cat([wide.sum(_PIXELS), (wide * normed).sum(_PIXELS)])
        # Every process's loss hangs on this one's pixels by the mean and the variance.
        of_mean, of_variance = (_over_processes(own, ctx.processes) / count).chunk(2)
        of_x = wide - _channels(of_mean) - normed * _channels(of_variance)
        of_x = of_x * _channels(inverse * weight)
        # The parameters' gradients are this process's part, as all gradients are.
        of_bias, of_weight = own.chunk(2)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None


_PIXELS = (0, 2, 3)


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _over_processes(values: Tensor, processes: str) -> Tensor:
    """Sum over the processes, by operators that a graph may hold."""
    summed = torch.ops._c10d_functional.all_reduce(values, "sum", processes)
    return torch.ops._c10d_functional.wait_tensor(summed)
