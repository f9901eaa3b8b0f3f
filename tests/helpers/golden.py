"""What other programs computed, as tests/fixtures has it; its README says which programs, and how."""

from __future__ import annotations

import numpy as np
import torch
from places import FIXTURES
from torch import Tensor

OPERATORS = "region_ops.npz"


def arrays(file: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a file whose names begin with `prefix`, under the rest of their names."""
    with np.load(FIXTURES / file) as archive:
        return {key[len(prefix) :]: archive[key] for key in archive.files if key.startswith(prefix)}


def names(prefix: str, suffix: str = "/out") -> list[str]:
    """Cases of the operators below `prefix`, without the suffix."""
    with np.load(FIXTURES / OPERATORS) as data:
        return sorted(
            key[: -len(suffix)] for key in data.files if key.startswith(prefix) and key.endswith(suffix)
        )


def load(*keys: str) -> list[Tensor]:
    """Arrays of the operators."""
    with np.load(FIXTURES / OPERATORS) as data:
        return [torch.from_numpy(np.asarray(data[key])) for key in keys]
