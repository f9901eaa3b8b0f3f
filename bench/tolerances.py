"""How far an operator may be from the same sum in float64.

Errors are relative to the largest entry of what is compared, however small that is; where larger terms
cancel, to the largest term, which the caller names. float64 and float32 grow with the number of terms;
half precision is one rounding of the result and, on tensor cores, one of the weights. The interpreter
truncates to bf16 where a GPU rounds, hence two units.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float64: 1.1e-16, torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
EXTENT = 1000.0
"""Largest coordinate of boxes in training. It is known to so many float32 units, and so are the weights."""


def largest_error(dtype: torch.dtype, terms: int = 1, extent: float = EXTENT) -> float:
    """Of results in `dtype`, of sums of so many terms, with boxes of coordinates up to `extent`."""
    roundings = 2 if dtype in (torch.float16, torch.bfloat16) else 2 * terms**0.5
    geometry = UNIT[torch.float64] * 10 if dtype == torch.float64 else UNIT[torch.float32]
    return roundings * UNIT[dtype] + geometry * extent


def assert_near(
    actual: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    terms: int = 1,
    extent: float = EXTENT,
    largest_term: float = 0.0,
) -> None:
    """`exact` is float64; `dtype` is that of the computation. Of zeros, every entry must be zero."""
    assert actual.shape == exact.shape
    exact = exact.detach().cpu()
    largest = max(float(exact.abs().max()) if exact.numel() else 0.0, largest_term)
    torch.testing.assert_close(
        actual.detach().cpu().double(), exact, rtol=0, atol=largest_error(dtype, terms, extent) * largest
    )
