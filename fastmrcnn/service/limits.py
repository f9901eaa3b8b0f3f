"""What the service takes, and how it says no."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Limits(NamedTuple):
    """What one service takes on."""

    batch: int = 8
    """Most images that go through the model together."""
    max_delay: float = 0.005
    """Seconds that an image waits for others of its padded shape while the model is idle."""
    max_bytes: int = 20_000_000
    """Of a request's body."""
    max_pixels: int = 50_000_000
    """Of an image."""
    timeout: float = 60.0
    """Seconds from a request's headers to its answer."""
    queue: int = 64
    """Most requests that are in hand at once."""


class RefusedError(Exception):
    """An answer that is not the one that was asked for: a status, and a line that says why.

    Args:
        headers: of the answer, such as Retry-After.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


CLIENT_GONE = 499
"""Nobody reads this status: it is what the metrics count of requests whose client hung up."""
