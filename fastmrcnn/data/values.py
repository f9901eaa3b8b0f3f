"""Numbers as annotation files write them: also as text, and with a point where there should be none."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**53  # up to here a float holds every whole number, and pycocotools keeps ids in floats


def number(value: Any) -> int | float | None:
    """A finite number, or the one that a text spells; None for anything else, true and false included."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if math.isfinite(value) and value == int(value) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not all_finite([value]):
        return None
    return value


def numbers(values: Any) -> list[int | float] | None:
    """A list of finite numbers, or of texts that spell them; None for anything else."""
    if not isinstance(values, list):
        return None
    found = [number(value) for value in values]
    return None if None in found else [value for value in found if value is not None]


def whole(value: Any) -> int | None:
    """A whole number that a float can hold, or the one that a text spells; None for anything else."""
    found = number(value)
    if found is None or found != int(found) or abs(found) > LARGEST:
        return None
    return int(found)


def all_finite(values: list[Any]) -> bool:
    """Whether these are numbers, and none of them infinite or NaN."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False
