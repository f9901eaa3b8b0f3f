"""Gradients in one tensor, and what each of them becomes there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastmrcnn.training.flat_gradient import ALIGNMENT, FlatGradient


def parameters() -> list[nn.Parameter]:
    """Of odd sizes, one of them channels_last, one that gets no gradient."""
    torch.manual_seed(0)
    conv = torch.randn(5, 3, 3, 2).contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in (conv, torch.randn(7), torch.randn(2, 3), torch.randn(()))]


def gradients(own: list[nn.Parameter], seed: int) -> list[Tensor | None]:
    r = torch.Generator().manual_seed(seed)
    found: list[Tensor | None] = [torch.randn(p.shape, generator=r) for p in own]
    found[2] = None
    for parameter, gradient in zip(own, found, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batches", [1, 3])
def test_what_comes_back_is_the_sum(batches: int, dtype: torch.dtype) -> None:
    own = parameters()
    flat = FlatGradient(own, adds=batches > 1, dtype=dtype)
    for step in range(2):  # nothing stays of the first
        sums: list[Tensor | None] = []
        flat.clear()
        for number in range(batches):
            new = gradients(own, 10 * step + number)
            sums = new if not sums else [None if b is None else a + b for a, b in zip(sums, new, strict=True)]
            flat.take()
            assert not any(p.grad is not None for p in own)
        tensor = flat.ready()
        assert tensor.dtype == dtype
        tensor.mul_(2)  # another process with the same
        flat.give()
        for parameter, total in zip(own, sums, strict=True):
            if total is None:
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.stride() == parameter.stride()
            assert parameter.grad.equal(2 * total.to(dtype).float())


def test_each_begins_where_a_vector_may() -> None:
    flat = FlatGradient(parameters())
    assert [view.storage_offset() % ALIGNMENT for view in flat.views] == [0, 0, 0, 0]
    assert len(flat.own) == 4 * ALIGNMENT + ALIGNMENT  # 90, 7, 6 and 1
