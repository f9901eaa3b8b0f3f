"""How far an operator may be from the same sum in float64.

Errors are relative to the largest entry of what is compared. float64 and float32 grow with the number of
terms; half precision is one rounding of the result and, on tensor cores, one of the weights. The
interpreter truncates to bf16 where a GPU rounds, hence two units.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float64: 1.1e-16, torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
# Boxes of up to 1000 pixels in float32 are known to 3e-5 of a pixel, and so are the weights.
GEOMETRY = {torch.float64: 1e-12, torch.float32: 6e-5, torch.float16: 6e-5, torch.bfloat16: 6e-5}


def largest_error(dtype: torch.dtype, terms: int = 1) -> float:
    roundings = 2 if dtype in (torch.float16, torch.bfloat16) else 2 * terms**0.5
    return roundings * UNIT[dtype] + GEOMETRY[dtype]


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """`exact` is float64; `dtype` is that of the computation."""
    assert actual.shape == exact.shape
    exact = exact.detach().cpu()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().cpu().double(),
        exact,
        rtol=0,
        atol=largest_error(dtype, terms) * max(largest, 1.0),
    )
