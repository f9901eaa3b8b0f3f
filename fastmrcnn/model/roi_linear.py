"""A fully connected layer over whole RoI features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.kernels.common.pooling import is_channels_last


class RoiLinear(nn.Linear):
    """`nn.Linear`, same parameters, whose weight has a column for each (channel, row, column) of a RoI.

    Features that are channels_last are read as they lie, and so is their gradient written: RoIAlign's
    backward then reads it in whole vectors. In their place the columns of the weight are put in order,
    which compiled is one pass with their cast under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, h, w) -> (..., outputs)."""
        if not is_channels_last(x.flatten(0, -4)):
            return super().forward(x.flatten(-3))
        weight = self.weight.unflatten(1, x.shape[-3:]).permute(0, 2, 3, 1).flatten(1)
        return F.linear(x.movedim(-3, -1).flatten(-3), weight, self.bias)
