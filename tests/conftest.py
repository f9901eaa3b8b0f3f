"""Shared by all tests."""

from __future__ import annotations

import pytest

from fastmrcnn import device


@pytest.fixture(autouse=True)
def _fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No result may hang on which of two precisions is faster at the moment. The tests of that choice have a
    processor, and a clock, of their own."""
    monkeypatch.setattr(device, "has_bf16", lambda: False)
