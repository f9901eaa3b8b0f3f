"""Shared by the operators' tests, which run twice: plain, and with TRITON_INTERPRET=1 (test_interpreter)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills what torch.empty returns; our operators need no slow path for it."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")
