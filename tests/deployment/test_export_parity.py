"""The comparison of a file with its model: it passes what is equal, and each kind of fault is told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from test_graph import images, trained

from fastmrcnn.deployment.parity import FULL, Parity, compare, compare_image, eager, median_times
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.exported import Arrays

MODEL = trained().model


def parity_after(change: Callable[[Arrays], None]) -> Parity:
    """Of a file that gives what the model gives, changed."""
    pixels, sizes = (value.numpy() for value in images())
    assert isinstance(MODEL, MaskRCNN)
    model = MODEL

    def run(pixels: np.ndarray, sizes: np.ndarray) -> Arrays:
        found = {name: value.copy() for name, value in eager(model, pixels, sizes).items()}
        change(found)
        return found

    return compare(model, run, [(pixels, sizes)], FULL, 0.5)


def test_the_same_is_the_same() -> None:
    parity = parity_after(lambda found: None)
    assert parity.faults() == []
    assert parity.matched > 10
    assert parity.images == 2
    assert parity.mask_pixels > 0
    assert (parity.boxes, parity.scores, parity.mask_bits, parity.swapped) == (0, 0, 0, 0)
    assert f"{parity.matched} detections in 2 images" in parity.lines()[0]


def shift_boxes(found: Arrays) -> None:
    found["boxes"] += 0.02


def raise_scores(found: Arrays) -> None:
    found["scores"] += 0.01


def other_classes(found: Arrays) -> None:
    found["classes"] = (found["classes"] + 1) % 3


def fewer(found: Arrays) -> None:
    found["valid"][:, 0] = False


def other_masks(found: Arrays) -> None:
    found["masks"] = 1 - found["masks"]


def not_a_number(found: Arrays) -> None:
    found["boxes"][:] = np.nan


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (shift_boxes, "boxes differ"),
        (raise_scores, "missing"),
        (other_classes, "missing"),
        (fewer, "1 detections are missing|2 detections are missing"),
        (other_masks, "mask pixels differ"),
        (not_a_number, "missing"),
    ],
)
def test_a_fault_is_told(change: Callable[[Arrays], None], word: str) -> None:
    faults = parity_after(change).faults()
    assert faults
    assert any(part in fault for fault in faults for part in word.split("|"))


def test_equal_scores_may_stand_in_either_order() -> None:
    ours = {
        "boxes": np.array([[0, 0, 9, 9], [20, 20, 29, 29], [0, 0, 0, 0]], np.float32),
        "scores": np.array([0.9, 0.9, 0], np.float32),
        "classes": np.zeros(3, np.int64),
        "valid": np.array([True, True, False]),
    }
    theirs = {name: value[[1, 0, 2]] for name, value in ours.items()}
    parity = Parity(FULL)
    compare_image(parity, ours, theirs, (32, 32), 0.05, 0.5)
    assert parity.faults() == []
    assert (parity.matched, parity.swapped, parity.boxes) == (2, 2, 0)


def test_what_is_at_the_edge_of_the_least_score_is_no_fault() -> None:
    """All places are taken: which of two nearly equal ones comes last is chance."""

    def other_last(found: Arrays) -> None:
        found["boxes"][:, -1] = [0, 0, 1, 1]

    parity = parity_after(other_last)
    assert parity.at_the_edge == 4  # in both images one of the model's, and one of the file's
    assert parity.faults() == []


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    times = median_times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}
