"""What several processes must sum so that together they make the step that one would make with all images.

A loss is a mean: over sampled RoIs, packed slots, visible keypoints. Each process knows its own sum and its
own divisor. The loss of the whole batch is the sum of the sums over the sum of the divisors, which is not the
mean of the means: a process without any object would pull that down. So the divisors are summed before
backward, and each process differentiates its losses times its share of the divisor; summed over the
processes, those are the losses of the whole batch, and their gradients are its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmrcnn.structures import Counts, Losses, present

T = TypeVar("T")
Parts = Generator[Tensor, None, T]
"""A computation that is cut where processes must sum: it yields a tensor, and goes on when what stands in
that tensor is the sum over all processes."""


class Contribution(NamedTuple):
    """This process's part in the losses of a batch."""

    values: Tensor  # (k,) float32, its losses, to be differentiated
    divisors: Tensor  # (k,) float64, what they were divided by
    sums: Tensor  # (2 k + c,) float64, to be summed: losses times divisors; what is counted in those; counts


def contribution_of(losses: Losses, counts: Counts) -> Contribution:
    """
    Args:
        losses: k of them.
        counts: c of them, and the divisors of all losses.
    Raises:
        ValueError: the model does not say what a loss is a mean over.
    """
    named, counted = present(losses), present(counts.divisors or Losses())
    if missing := named.keys() - counted.keys():
        raise ValueError(
            f"{', '.join(sorted(missing))}: where several processes train one model, it must say in "
            "Counts.divisors what each loss is a mean over"
        )
    values = torch.stack([value.float() for value in named.values()])
    found = torch.stack([counted[name].double() for name in named])
    divisors = _divisor(found)
    others = [count.double().reshape(1) for count in present(counts).values()]
    return Contribution(values, divisors, torch.cat([values.detach() * divisors, found, *others]))


def whole_of(own: Contribution, losses: Losses, counts: Counts) -> tuple[Tensor, Losses, Counts]:
    """Once `own.sums` has been summed over the processes.

    Returns:
        what this process differentiates: its part of the loss of the whole batch; losses and counts of the
        whole batch.
    """
    names, others = list(present(losses)), present(counts)
    sums, found, totals = own.sums.split([len(names), len(names), len(others)])
    divisors = _divisor(found)
    part = (own.values * (own.divisors / divisors).to(own.values.dtype)).sum()
    means = (sums / divisors).to(own.values.dtype)
    whole = [total.to(count.dtype) for total, count in zip(totals.unbind(), others.values(), strict=True)]
    return (
        part,
        losses._replace(**dict(zip(names, means.unbind(), strict=True))),
        counts._replace(**dict(zip(others, whole, strict=True))),
    )


def _divisor(found: Tensor) -> Tensor:
    """A mean over nothing is 0 over 1. Of summed counts: a process that has none adds none."""
    return torch.where(found > 0, found, 1.0)


def run_through(parts: Parts[T], reduce: Callable[[Tensor], object]) -> T:
    """Make a computation from beginning to end, summing where it is cut."""
    while True:
        try:
            tensor = next(parts)
        except StopIteration as end:
            return end.value
        reduce(tensor)


def sum_over_processes(tensor: Tensor) -> None:
    """In place, over the default group of torch.distributed. On CUDA the host does not wait."""
    torch.distributed.all_reduce(tensor)
