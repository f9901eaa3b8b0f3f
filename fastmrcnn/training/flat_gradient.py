"""All gradients as one tensor, to be summed over batches and over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: no gradient begins within another's cache line


class FlatGradient:
    """
    A gradient is written once by backward and copied in once. To let backward write here itself would be no
    less: it adds to a gradient that is there, so the tensor would have to be filled with zeros and read.

    Args:
        parameters: as they lie in memory, without gaps.
        adds: gradients of several batches are summed; else each `take` writes over the last.
        dtype: in which they are summed over processes. Over batches they are float32, as they are where the
            update reads them.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, adds: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        self.parameters = list(parameters)
        self.adds = adds
        self.taken = [False] * len(self.parameters)  # whether the parameter had a gradient
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.parameters]
        device = self.parameters[0].device
        own = torch.float32 if adds else dtype
        self.own = torch.zeros(sum(sizes), dtype=own, device=device)
        self.summed = self.own if own == dtype else torch.zeros_like(self.own, dtype=dtype)
        """What is to be summed over the processes, between `ready` and `give`."""
        self.views = [
            part.as_strided(p.size(), p.stride())
            for part, p in zip(self.own.split(sizes), self.parameters, strict=True)
        ]

    def clear(self) -> None:
        """Before the first of several batches."""
        self.own.zero_()

    @torch.no_grad()
    def take(self) -> None:
        """Take over the gradients that backward has left with the parameters."""
        self.taken = [p.grad is not None for p in self.parameters]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        (torch._foreach_add_ if self.adds else torch._foreach_copy_)(self._used(), grads)
        for parameter in self.parameters:
            parameter.grad = None

    def ready(self) -> Tensor:
        """The tensor to sum over the processes, in place."""
        if self.summed is not self.own:
            self.summed.copy_(self.own)
        return self.summed

    @torch.no_grad()
    def give(self) -> None:
        """Give the parameters what has become of their gradients, in float32."""
        if self.summed is not self.own:
            self.own.copy_(self.summed)
        used = [p for p, taken in zip(self.parameters, self.taken, strict=True) if taken]
        grads = self._used()
        if self.own.dtype != torch.float32:
            views, grads = grads, [torch.empty_like(p) for p in used]
            torch._foreach_copy_(grads, views)
        for parameter, grad in zip(used, grads, strict=True):
            parameter.grad = grad

    def _used(self) -> list[Tensor]:
        return [view for view, taken in zip(self.views, self.taken, strict=True) if taken]
