"""Masks and boxes for the tests of mask paste and mask RLE."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

# Inside, across each border, over the whole image, thin, smaller than a pixel; see `SIZE`.
BOXES = [
    [3.2, 4.1, 21.7, 30.3],
    [-6.5, 10.0, 9.3, 60.0],
    [20.0, -8.0, 60.0, 12.5],
    [-9.0, -9.0, 70.0, 50.0],
    [0.0, 0.0, 43.0, 37.0],
    [30.4, 2.0, 31.6, 33.0],
    [10.3, 7.7, 10.6, 7.9],
    [12.5, 36.2, 12.6, 36.9],
]
SIZE = (37, 43)
# Without area, inverted, not finite, or of an extent that float32 does not have.
NOTHING = [
    [4.0, 4.0, 4.0, 8.0],
    [9.0, 9.0, 4.0, 30.0],
    [math.nan, 1.0, 30.0, 30.0],
    [1.0, 1.0, math.inf, 30.0],
    [-math.inf, 1.0, math.inf, 30.0],
    [-3e38, 0.0, 3e38, 30.0],
]

coordinates = st.one_of(
    st.floats(-30, 70, width=32),
    st.floats(-0.75, 0.75, width=32),
    st.sampled_from([0.0, 20.0, 1e6, -1e6, 1e30, -3e38, math.nan, math.inf]),
)
corners = st.lists(coordinates, min_size=8, max_size=8)


def random_masks(count: int, side: int, seed: int = 0) -> Tensor:
    """Coarse ones enlarged, so that there are areas and not only noise; each reaches 1."""
    coarse = torch.rand((count, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    masks = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0].clamp(0, 1)
    return masks / masks.amax((1, 2), keepdim=True)


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Some of them partly outside the image."""
    r = torch.Generator().manual_seed(seed)
    places = (torch.rand((count, 2, 2), generator=r) * 1.6 - 0.3) * torch.tensor([width, height])
    return torch.cat((places.amin(1), places.amax(1)), dim=1)
