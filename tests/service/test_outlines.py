"""Polygons of masks: pycocotools makes the same bitmap of them again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from fastmrcnn.service.outlines import outlines


def painted(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def area(polygon: list[float]) -> float:
    """Signed: what is gone around the other way counts against it."""
    x, y = np.array(polygon).reshape(-1, 2).T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def check(mask: np.ndarray) -> list[list[float]]:
    found = outlines(mask)
    np.testing.assert_array_equal(painted(found, *mask.shape), mask)
    assert sum(area(polygon) for polygon in found) == mask.sum()
    return found


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=300, deadline=None)
def test_the_same_pixels_come_back(height: int, width: int, seed: int, share: float) -> None:
    check(np.random.default_rng(seed).random((height, width)) < share)


@pytest.mark.parametrize("seed", range(4))
def test_large_masks_with_many_holes(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mask = np.zeros((90, 70), dtype=bool)
    mask[5:85, 3:66] = True
    for x, y, side in zip(*draw.integers([[4], [6], [1]], [[60], [80], [9]], (3, 40)), strict=True):
        mask[y : y + side, x : x + side] = draw.random() < 0.2
    check(mask)


def test_one_polygon_for_a_ring_and_two_for_pixels_that_touch_by_a_corner() -> None:
    ring = np.ones((5, 6), dtype=bool)
    ring[2:4, 2:3] = False
    (polygon,) = check(ring)
    assert len(polygon) == 2 * (4 + 4 + 3)
    corner = np.eye(2, dtype=bool)
    assert check(corner) == [[0, 0, 1, 0, 1, 1, 0, 1], [1, 1, 2, 1, 2, 2, 1, 2]]
    assert outlines(np.zeros((3, 4), dtype=bool)) == []
