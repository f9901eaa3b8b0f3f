"""Loss pieces shared by the proposal network and the box head."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """Elementwise; quadratic below `beta`, then linear (arXiv 1504.08083, eq. 3). beta 0 is L1."""
    size = difference.abs()
    if beta == 0:
        return size
    return torch.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def masked_sum(values: Tensor, where: Tensor) -> Tensor:
    """Sum of `values` (..., D) over the slots where `where` (...) holds."""
    return torch.where(where[..., None], values, 0.0).sum()
