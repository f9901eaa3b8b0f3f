"""Annotations that are checked all at once: only if one by one nothing would be found in them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from mistakes import HEIGHT, WIDTH, mistakes, quiet, valid

from fastmrcnn.data.annotation import annotation_fault, tidy
from fastmrcnn.data.masks import pack_polygons
from fastmrcnn.data.plain import pack_plain
from fastmrcnn.data.records import ImageRecord, Problems

RECORDS = {i: ImageRecord(i, Path(f"{i}.png"), f"{i}.png", WIDTH, HEIGHT, [], Path("a.json")) for i in (1, 2)}
INDEX_OF = {1: 0, 2: 1}


def one_by_one(entries: Any) -> list[Any] | None:
    """What `pack_plain` returns, found as slowly as can be."""
    if any(not isinstance(entry, dict) for entry in entries):
        return None
    for entry in entries:
        before, problems = copy.deepcopy(entry), Problems()
        tidy(entry, 1, problems)
        if problems.found or repr(before) != repr(entry) or annotation_fault(entry, RECORDS, INDEX_OF, True):
            return None
    return [pack_polygons(entry.get("segmentation") or None) for entry in entries]


def check_against_one_by_one(entries: Any) -> None:
    packed, slow = pack_plain(entries, RECORDS, INDEX_OF), one_by_one(copy.deepcopy(entries))
    if packed is not None:
        assert slow is not None
        for fast, right in zip(packed, slow, strict=True):
            np.testing.assert_equal(fast, right)


def test_a_valid_file_is_plain() -> None:
    entries = valid()["annotations"]
    packed = pack_plain(entries, RECORDS, INDEX_OF)
    assert packed is not None
    np.testing.assert_equal(packed, one_by_one(entries))


@quiet(max_examples=500)
@given(mistakes())
def test_no_mistake_is_plain(tree: dict[str, Any]) -> None:
    entries = tree.get("annotations")
    if isinstance(entries, list):
        for entry in entries:
            check_against_one_by_one([entry])
        check_against_one_by_one(entries)


@pytest.mark.parametrize("value", [True, None, "3", float("nan"), 10**400, 1_000_001, [1]])
@pytest.mark.parametrize("place", ["bbox", "segmentation"])
def test_a_number_that_is_none_is_not_plain(place: str, value: Any) -> None:
    entries = valid()["annotations"]
    numbers = entries[0]["bbox"] if place == "bbox" else entries[0]["segmentation"][0]
    numbers[2] = value
    check_against_one_by_one(entries)
    if value is not True:  # in a polygon it is taken for 1, as pycocotools does
        assert pack_plain(entries, RECORDS, INDEX_OF) is None


def test_polygons_may_be_few_or_many() -> None:
    entries = valid()["annotations"]
    first, *_ = entries[0]["segmentation"]
    entries[0]["segmentation"] = [first, first[::-1], first[:6]]
    entries[2]["segmentation"] = []
    entries[3]["segmentation"] = None
    packed = pack_plain(entries, RECORDS, INDEX_OF)
    assert packed is not None
    np.testing.assert_equal(packed, one_by_one(entries))
    assert [len(packed[0]), packed[2], packed[3]] == [3, None, None]
