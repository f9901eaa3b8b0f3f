"""torchvision's numbers for the region operators: a subset of the project's golden vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "region_ops.npz"


def names(prefix: str, suffix: str = "/out") -> list[str]:
    """Cases below `prefix`, without the suffix."""
    with np.load(DATA) as data:
        return sorted(
            key[: -len(suffix)] for key in data.files if key.startswith(prefix) and key.endswith(suffix)
        )


def load(*keys: str) -> list[Tensor]:
    with np.load(DATA) as data:
        return [torch.from_numpy(np.asarray(data[key])) for key in keys]
