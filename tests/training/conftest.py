"""Shared by the tests of runs of two processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Started when a test first asks for it."""
    pair = Pair()
    try:
        yield pair
    finally:
        pair.close()
