"""Weights and inputs that anyone can rebuild, so that two programs hold the same model without a file.

Every array comes from NumPy's frozen legacy generator, seeded by the CRC-32 of the array's name. The numbers
recorded from other programs stand on these arrays: not a bit of them may change.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

GAIN = 1.5
PREDICTORS = ("cls_logits", "objectness_logits", "anchor_deltas", "bbox_pred", "cls_score")


def stream(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def fill(name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 array of a shape for the parameter or buffer that the other program calls `name`."""
    r = stream(name).standard_normal(tuple(shape)).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return np.exp(0.1 * r).astype(np.float32)
    if leaf == "running_mean":
        return 0.1 * r
    if len(shape) >= 2:  # of a convolution or a linear layer
        scale = np.sqrt(GAIN / np.prod(shape[1:]))
        if any(part in name for part in PREDICTORS):  # away from saturated scores and clipped deltas
            scale *= 0.15
        return r * np.float32(scale)
    if leaf == "weight":  # of a norm: small at the end of a residual branch, so that depth does not blow up
        last = ".bn3." in name or ".conv3.norm." in name
        return (0.25 if last else 1.0) * (1.0 + 0.1 * r)
    return 0.05 * r  # a bias
