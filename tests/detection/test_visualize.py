"""Pictures: what is coloured where, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmrcnn.detection.draw import COLOURS, draw_comparison, draw_objects
from fastmrcnn.detection.objects import Objects
from fastmrcnn.errors import UserError
from fastmrcnn.training.curves import plot_losses

GREY = np.full((60, 80, 3), 128, np.uint8)


def square(x0: int, y0: int, x1: int, y1: int, height: int = 60, width: int = 80) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def near(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Whether a pixel leans from grey towards the colour."""
    away, towards = pixel.astype(float) - 128, np.array(colour, float) - 128
    return bool(away @ towards > 0.9 * np.linalg.norm(away) * np.linalg.norm(towards) > 0)


def objects(boxes: Any, masks: Any = None, classes: Any = None, **rest: Any) -> Objects:
    """Of an image of 60 x 80; without classes all of the first."""
    boxes = np.array(boxes, np.float32)
    if classes is None:
        classes = [0] * len(boxes)
    for name, value in rest.items():
        rest[name] = np.array(value, np.float32)
    return Objects(60, 80, boxes, np.array(classes), masks=masks, **rest)


def test_masks_boxes_and_labels() -> None:
    boxes = [[10, 20, 30, 50], [50, 20, 70, 50]]
    masks = np.stack((square(12, 24, 28, 46), square(52, 24, 68, 46)))
    image, names = GREY.copy(), ["", "dog", "", "cat"]
    drawn = draw_objects(image, objects(boxes, masks, [3, 1], scores=[0.9, 0.8]), names)
    assert (image == GREY).all()
    assert drawn.dtype == np.uint8
    assert drawn.shape == (360, 480, 3)  # six times as large
    assert near(drawn[35 * 6, 20 * 6], COLOURS[3])
    assert near(drawn[35 * 6, 60 * 6], COLOURS[1])
    assert (drawn[35 * 6, 40 * 6] == 128).all(), "between the objects"
    assert (drawn[35 * 6, 11 * 6] == 128).all(), "in the box, beside the mask"
    assert near(drawn[50 * 6 - 1, 20 * 6], COLOURS[3]), "lower edge of the box"
    # The outline is far stronger than the fill.
    assert np.ptp(drawn[35 * 6, 12 * 6].astype(int)) > 2 * np.ptp(drawn[35 * 6, 20 * 6].astype(int))
    # The label stands on a bar of the object's colour above its box, in black letters.
    bar = drawn[20 * 6 - 14 : 20 * 6 - 1, 61 : 61 + 30]
    assert (bar == COLOURS[3]).all(axis=2).mean() > 0.4
    assert (bar.max(axis=2) < 60).any()
    unscored = draw_objects(image, objects(boxes, masks, [3, 1]), names)
    assert (unscored != drawn).any()
    crowd = draw_objects(image, replace(objects(boxes, masks, [3, 1]), crowd=np.array([True, False])), names)
    longer = draw_objects(image, objects(boxes, masks, [3, 1]), ["", "dog", "", "cat (crowd)"])
    assert (crowd != unscored).any()
    assert (crowd == longer).all()


def test_each_object_its_colour() -> None:
    boxes = [[0, 0, 40, 60], [40, 0, 80, 60]]
    masks = np.stack((square(0, 0, 40, 60), square(40, 0, 80, 60)))
    each = draw_objects(GREY, objects(boxes, masks), ["a"])
    same = draw_objects(GREY, objects(boxes, masks), ["a", "b"])
    assert near(each[180, 120], COLOURS[0])
    assert near(each[180, 360], COLOURS[1])
    assert (same[180, 120] == same[180, 360]).all()
    assert len(set(COLOURS)) == len(COLOURS)


def test_small_objects_lie_on_large_ones() -> None:
    boxes = [[30, 25, 40, 35], [0, 0, 80, 60]]
    masks = np.stack((square(30, 25, 40, 35), square(0, 0, 80, 60)))
    alone = draw_objects(GREY, objects(boxes[1:], masks[1:], [1]), ["small", "large"])
    drawn = draw_objects(GREY, objects(boxes, masks, [0, 1]), ["small", "large"])
    red = COLOURS[0][0] - COLOURS[1][0]
    assert (int(drawn[180, 210, 0]) - int(alone[180, 210, 0])) * np.sign(red) > 20


@pytest.mark.parametrize(
    ("shape", "size"), [((480, 300), (480, 300)), ((100, 479), (200, 958)), ((7, 5), (483, 345))]
)
def test_only_small_images_are_enlarged(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 90, np.uint8)
    none = Objects(
        *shape, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), masks=np.zeros((0, *shape), bool)
    )
    drawn = draw_objects(image, none, [])
    assert drawn.shape == (*size, 3)
    assert (drawn == 90).all()


def test_objects_at_the_border_and_without_extent() -> None:
    boxes = [[-5, -5, 3, 3], [79, 59, 80, 60], [70, 10, 70, 10], [200, 200, 300, 300]]
    masks = np.stack((square(0, 0, 3, 3), square(79, 59, 80, 60), square(0, 0, 0, 0), square(0, 0, 0, 0)))
    name = "a rather long name of a class " * 4
    drawn = draw_objects(GREY, objects(boxes, masks, scores=[0.5] * 4), [name])
    assert drawn.shape == (360, 480, 3)
    assert near(draw_objects(GREY, objects(boxes[:2], masks[:2]), [""])[358, 478], COLOURS[1])


def test_boxes_alone() -> None:
    drawn = draw_objects(GREY, objects([[10, 20, 30, 50]]), ["cat"])
    assert (drawn[35 * 6, 20 * 6] == 128).all()
    assert near(drawn[35 * 6, 60], COLOURS[0])


def test_keypoints_are_dots_and_the_skeleton_lines() -> None:
    """At twelve times the size: two known ones and their line, none of the third one or to it."""
    points = np.array([[[5.0, 20, 2], [30, 20, 0.06], [20, 5, 0.04]]], np.float32)
    image = np.full((40, 40, 3), 128, np.uint8)
    bare = Objects(40, 40, np.array([[2, 2, 38, 38]], np.float32), np.zeros(1, np.int64))
    known = replace(bare, keypoints=points)
    plain = draw_objects(image, bare, ["a"])
    drawn = draw_objects(image, known, ["a"], skeleton=[(0, 1), (1, 2)])
    assert near(drawn[20 * 12, 5 * 12], COLOURS[0])
    assert near(drawn[20 * 12, 30 * 12], COLOURS[0])
    assert near(drawn[20 * 12, 17 * 12], COLOURS[0])
    changed = (drawn != plain).any(axis=2)
    assert not changed[: 18 * 12].any()
    assert not changed[:, 32 * 12 :].any()
    dots = draw_objects(image, known, ["a"])
    assert (dots[20 * 12, 17 * 12] == plain[20 * 12, 17 * 12]).all()


def test_mistakes() -> None:
    box = [[0, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"image must be \(60, 80, 3\) uint8, got \(60, 80\)"):
        draw_objects(GREY[:, :, 0], objects(box), ["a"])
    with pytest.raises(ValueError, match=r"image must be \(60, 80, 3\) uint8, got \(60, 80, 3\) float64"):
        draw_objects(GREY / 2, objects(box), ["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boxes must be \(n, 4\), got \(1, 5\)"):
        objects([[0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"masks must be \(1, 60, 80\), got \(1, 28, 28\)"):
        objects(box, np.zeros((1, 28, 28), bool))
    with pytest.raises(ValueError, match="1 boxes need as many classes, got 2"):
        objects(box, classes=[0, 1])
    with pytest.raises(ValueError, match="1 boxes need as many scores, got 0"):
        objects(box, scores=[])
    with pytest.raises(ValueError, match=r"keypoints must be \(1, J, 3\), got \(2, 5, 3\)"):
        objects(box, keypoints=np.zeros((2, 5, 3)))


def test_comparison() -> None:
    truth = objects([[10, 20, 30, 50]], square(10, 20, 30, 50)[None], [2])
    found = objects([[50, 20, 70, 50]], square(50, 20, 70, 50)[None], [2], scores=[0.7])
    names = ["", "", "cat"]
    sheet = draw_comparison(GREY, truth, found, names)
    left, right = draw_objects(GREY, truth, names), draw_objects(GREY, found, names)
    assert (sheet[-360:, :480] == left).all()
    assert (sheet[-360:, -480:] == right).all()
    caption = sheet[:-360]
    assert (caption[:, :480].max(axis=2) < 100).any()
    assert (caption[:, -480:].max(axis=2) < 100).any()


def write_metrics(path: Path, evaluations: bool) -> None:
    rows: list[dict[str, float | None]] = []
    for step in range(0, 100, 10):
        loss = {"loss_cls": 2 - step / 100, "loss_mask": 1.0 if step != 50 else None}
        rows.append({"iteration": step, "total_loss": 3 - step / 100, **loss, "lr": 0.01})
        if evaluations and step in (40, 90):
            rows.append({"iteration": step, "bbox/AP": step / 2, "segm/AP": None if step == 40 else 33.3})
            rows[-1]["keypoints/AP"] = 20.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_loss_curves(tmp_path: Path) -> None:
    heights = []
    for evaluations in (False, True):
        write_metrics(tmp_path / "metrics.json", evaluations)
        plot_losses(tmp_path / "metrics.json", tmp_path / "losses.png")
        picture = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB"))
        assert (np.ptp(picture.astype(int), axis=2) > 60).sum() > 500, "curves have colours"
        heights.append(picture.shape[0])
    assert heights[1] > heights[0], "AP has a panel of its own"


def test_no_curves_without_losses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    for text, message in (
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ('{"iteration": 0}\n', "no losses"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            plot_losses(path, tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()
