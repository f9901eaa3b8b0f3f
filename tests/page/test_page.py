"""What the page does, without a browser: found, drawn, counted, measured, saved."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from planted import CATEGORIES
from planted_page import planted_detector
from pycocotools import mask as coco_mask

import fastmrcnn.predict as predict
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.detection.detector import Detector
from fastmrcnn.detection.draw import draw_objects
from fastmrcnn.detection.objects import Objects
from fastmrcnn.detection.prediction import as_prediction
from fastmrcnn.errors import UserError
from fastmrcnn.page import layout
from fastmrcnn.page.downloads import JSON, LABELS, PICTURE, TABLE, label_image
from fastmrcnn.page.examples import MOST, find_examples
from fastmrcnn.page.found import Found, look, subset
from fastmrcnn.page.layout import Handlers
from fastmrcnn.page.picture import BOXES, MASKS, NAMES, NUMBERS, POINTS, draw_found
from fastmrcnn.page.tables import ROWS_SHOWN, as_csv, class_table, object_table

ALL = [0, 1, 2]
SHOWN = [MASKS, BOXES, NAMES]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoDataset, Detector]:
    return planted_detector(tmp_path_factory.mktemp("planted") / "data")


@pytest.fixture
def dataset(planted: tuple[CocoDataset, Detector]) -> CocoDataset:
    return planted[0]


@pytest.fixture
def detector(planted: tuple[CocoDataset, Detector]) -> Detector:
    return planted[1]


@pytest.fixture
def page(detector: Detector, tmp_path: Path) -> Handlers:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Handlers(detector, [], scratch)


def view(score: float = 0.5, classes: list[int] = ALL, parts: list[str] = SHOWN, size: str = "") -> list[Any]:
    return [score, classes, parts, size]


def counted(table: str) -> dict[str, int]:
    """Class names and counts of the table of classes."""
    rows = re.findall(r"<tr[^>]*>((?:<td>.*?</td>)+)</tr>", table)
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in rows]
    return {row[0]: int(row[1]) for row in cells}


def test_one_run_serves_every_threshold(dataset: CocoDataset, page: Handlers) -> None:
    before = len(page.detector.model.seen)
    found, picture, message, classes, objects = page.run(dataset.records[0].path, *view())
    assert found is not None
    assert "3 objects in 11.png, 92 x 60 pixels." in message
    assert counted(classes) == {"disc": 2, "box": 1, "All": 3}
    assert objects.count("<tr>") == 4
    assert picture is not None
    with Image.open(picture) as image:
        assert image.size == (552, 360)
    for score, count in ((0.6, 2), (0.76, 1), (1.0, 0)):
        _, message, classes, _ = page.show(found, *view(score))
        assert f"{count} object" in message
        assert sum(counted(classes).values()) in (count, 2 * count)
    assert "The best score is 0.95" in message
    assert len(page.detector.model.seen) == before + 1


def test_classes_that_are_shown(dataset: CocoDataset, page: Handlers) -> None:
    found, *_ = page.run(dataset.records[0].path, *view())
    box = page.detector.class_names.index("box")
    _, message, classes, objects = page.show(found, *view(classes=[box]))
    assert counted(classes) == {"box": 1}
    assert "<td>3</td>" in objects, "it keeps its number"
    _, message, classes, _ = page.show(found, *view(classes=[]))
    assert "of classes that are not chosen" in message
    assert not classes
    page.few_classes = False  # chosen from a list, where nothing chosen means all
    assert counted(page.show(found, *view(classes=[]))[2])["All"] == 3


def test_parts_of_the_drawing(dataset: CocoDataset, detector: Detector) -> None:
    found = look(detector, dataset.records[0].path, "11.png")
    places, card = found.chosen(0.5), detector.card
    whole = draw_found(found, places, card, SHOWN, None)
    np.testing.assert_array_equal(whole, detector(dataset.records[0].path).draw())
    bare = draw_found(found, places, card, [], None)
    np.testing.assert_array_equal(
        bare, np.asarray(Image.fromarray(found.pixels).resize((552, 360), Image.Resampling.BICUBIC))
    )
    seen = {
        part: (draw_found(found, places, card, [part], None) != bare).any(2) for part in (*SHOWN, NUMBERS)
    }
    assert all(changed.any() for changed in seen.values())
    covered = detector(dataset.records[0].path).masks.any(0).repeat(6, 0).repeat(6, 1)
    assert (seen[MASKS] & covered).sum() / (seen[MASKS] | covered).sum() > 0.9
    assert seen[NUMBERS].sum() < seen[NAMES].sum()


def test_large_images_are_shown_reduced_and_measured_in_full(
    dataset: CocoDataset, detector: Detector, page: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    with Image.open(dataset.records[0].path) as image:
        image.resize((920, 600)).save(path)
    small = look(detector, dataset.records[0].path, "11.png")
    monkeypatch.setattr(layout, "LONG_SIDE", 500)
    found, picture, message, *_ = page.run(path, *view())
    assert found is not None
    assert found.areas / small.areas == pytest.approx([100] * 3, rel=0.06)
    assert "The picture is reduced to 54%; numbers and files are of the full image." in message
    with Image.open(picture) as image:
        assert image.size == (500, 326)
    reduced = draw_found(found, found.chosen(0), detector.card, [MASKS], 500)
    full = draw_found(found, found.chosen(0), detector.card, [MASKS], None)
    full = np.asarray(Image.fromarray(full).resize((500, 326), Image.Resampling.LANCZOS))
    near = np.abs(full.astype(int) - reduced).max(2) < 40
    assert near.mean() > 0.97  # but for the width of the outlines
    with Image.open(page.save(PICTURE, found, *view())[0]) as image:
        assert image.size == (920, 600)


def test_json_is_what_predict_writes(
    dataset: CocoDataset, page: Handlers, tmp_path: Path, monkeypatch
) -> None:
    path = dataset.records[0].path
    monkeypatch.setattr(predict, "load", lambda *_: page.detector)
    predict.main([str(path), "--checkpoint", "x", "--output", str(tmp_path / "out"), "--score", "0.6"])
    theirs = json.loads((tmp_path / "out" / predict.RESULTS).read_text())
    found, *_ = page.run(path, *view())
    file, message = page.save(JSON, found, *view(0.6))
    ours = json.loads(Path(file).read_text())
    assert "11_coco.json is ready: 2 objects." in message
    assert len(ours) == 2
    for own, their in zip(ours, theirs, strict=True):
        assert Path(their.pop("file_name")).name == own.pop("file_name")
        del their["overlay"]
        assert own == their
    assert {one["category_id"] for one in ours} == {CATEGORIES[0]["id"]}


def test_label_image(dataset: CocoDataset, page: Handlers) -> None:
    found, *_ = page.run(dataset.records[0].path, *view())
    file, _ = page.save(LABELS, found, *view())
    with Image.open(file) as image:
        assert (image.format, image.mode) == ("PNG", "I;16")
        labels = np.asarray(image)
    assert labels.shape == (60, 92)
    masks = page.detector(dataset.records[0].path).masks
    for number, mask in enumerate(masks, start=1):
        above = masks[: number - 1].any(0)
        np.testing.assert_array_equal(labels == number, mask & ~above)
    # Numbers are those of the table, also where classes are left out.
    box = page.detector.class_names.index("box")
    only = page.save(LABELS, found, *view(classes=[box]))[0]
    with Image.open(only) as image:
        assert set(np.unique(np.asarray(image))) == {0, 3}


def hand_made(scores: list[float], boxes: list[list[int]]) -> Found:
    """Rectangles in an image of 20 x 30 pixels."""
    entries = []
    for x0, y0, x1, y1 in boxes:
        bitmap = np.zeros((20, 30), np.uint8, order="F")
        bitmap[y0:y1, x0:x1] = 1
        entries.append({"segmentation": coco_mask.encode(bitmap)})
    count = len(scores)
    objects = Objects(
        20,
        30,
        np.array(boxes, np.float32).reshape(count, 4),
        np.zeros(count, np.int64),
        np.array(scores, np.float32),
    )
    areas = np.array([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes], np.int64)
    return Found("a.png", np.zeros((20, 30, 3), np.uint8), objects, entries, areas, [])


def test_objects_that_others_cover_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hand_made([0.9, 0.8, 0.7], [[0, 0, 10, 10], [2, 2, 8, 8], [5, 5, 20, 15]])
    with pytest.raises(UserError, match="no masks"):
        label_image(found, found.chosen(0))
    monkeypatch.setattr(Found, "has_masks", True)
    labels, hidden = label_image(found, found.chosen(0))
    assert hidden == [2]
    assert labels.dtype == np.uint16
    assert [(labels == number).sum() for number in (0, 1, 2, 3)] == [600 - 225, 100, 0, 125]


def test_more_labels_than_16_bits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Found, "has_masks", True)
    found = hand_made([0.5] * 2, [[0, 0, 10, 10], [20, 10, 30, 20]])
    last = 70_000
    many = replace(found, entries=found.entries * (last // 2), areas=np.tile(found.areas, last // 2))
    labels, hidden = label_image(many, np.array([0, last - 1]))
    assert labels.dtype == np.int32
    assert not hidden
    assert (labels[0, 0], labels[19, 29]) == (1, last)


def test_table_as_csv(dataset: CocoDataset, page: Handlers) -> None:
    found, *_ = page.run(dataset.records[0].path, *view())
    file, _ = page.save(TABLE, found, *view(size="0.5 um"))
    with open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    prediction = page.detector(dataset.records[0].path)
    assert [row["number"] for row in rows] == ["1", "2", "3"]
    assert [row["class"] for row in rows] == prediction.names
    assert [float(row["score"]) for row in rows] == pytest.approx(prediction.scores.tolist(), abs=1e-6)
    pixels = [int(mask.sum()) for mask in prediction.masks]
    assert [int(row["area_px"]) for row in rows] == pixels
    assert [float(row["area_um2"]) for row in rows] == pytest.approx([area / 4 for area in pixels])
    for row, (x0, y0, x1, y1) in zip(rows, prediction.boxes.tolist(), strict=True):
        box = [float(row[key]) for key in ("left_px", "top_px", "width_px", "height_px")]
        assert box == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.006)
    with open(page.save(TABLE, found, *view())[0], encoding="utf-8") as stream:
        assert "um2" not in stream.read()


def test_areas_in_units(dataset: CocoDataset, page: Handlers) -> None:
    found, _, message, classes, objects = page.run(dataset.records[0].path, *view(size="2 mm"))
    assert found is not None
    assert "Total area (mm²)" in classes
    assert f"<td>{4 * found.areas.sum():,}</td>" in classes
    assert f"<td>{4 * found.areas[0]:,}</td>" in objects
    assert "problem" not in message
    _, message, classes, _ = page.show(found, *view(size="2"))
    assert "Pixel size &#x27;2&#x27;: give a number above 0 and a unit" in message
    assert "Total area (pixels)" in classes


def test_models_of_keypoints_alone(dataset: CocoDataset, detector: Detector, monkeypatch) -> None:
    schema = KeypointSchema(["tip", "end"], [(0, 1)], [0, 1])
    card = replace(detector.card, keypoints=schema)
    points = np.array([[[10, 12, 0.9], [30, 40, 0.01]]], np.float32)
    objects = Objects(
        60,
        92,
        np.array([[5.2, 6, 45.2, 46]], np.float32),
        np.array([1]),
        np.array([0.8], np.float32),
        keypoints=points,
    )
    monkeypatch.setattr(Detector, "detect", lambda *_: objects)
    found = look(detector, dataset.records[0].path, "11.png")
    places = found.chosen(0.5)
    assert not found.has_masks
    assert found.areas.tolist() == [1600]
    assert "Box area (pixels)" in object_table(found, places, card, None)
    assert "Total box area" in class_table(found, places, card, None)
    (row,) = csv.DictReader(as_csv(found, places, card, None).splitlines())
    assert row["box_area_px"] == "1600"
    assert [float(row[f"tip_{part}"]) for part in ("x_px", "y_px", "score")] == pytest.approx([10, 12, 0.9])
    assert len(found.entries[0]["keypoints"]) == 6
    drawn = draw_found(found, places, card, [POINTS], None) != draw_found(found, places, card, [], None)
    rows, columns = np.nonzero(drawn.any(2))  # the image is enlarged by 6
    assert (abs(columns - 60).max(), abs(rows - 72).max()) < (8, 8), "the other one is too unsure"
    assert len(rows) > 20


def test_names_are_not_taken_for_html(dataset: CocoDataset, detector: Detector) -> None:
    card = replace(detector.card, class_names=["<b>disc", "a & b", "absent"])
    found = look(detector, dataset.records[0].path, "11.png")
    for table in (class_table, object_table):
        text = table(found, found.chosen(0), card, None)
        assert "&lt;b&gt;disc" in text
        assert "<b>" not in text
    assert "<img" not in layout.note("<img src=x>")


def test_long_tables_are_cut_and_say_so(detector: Detector) -> None:
    count = ROWS_SHOWN + 20
    found = hand_made([0.9] * count, [[0, 0, 1, 1]] * count)
    table = object_table(found, found.chosen(0), detector.card, None)
    assert table.count("<tr>") == ROWS_SHOWN + 1
    assert "20 more objects are in the CSV table" in table
    assert len(as_csv(found, found.chosen(0), detector.card, None).splitlines()) == count + 1


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("notes.txt", b"no image", "notes.txt is not an image that can be read here"),
        ("empty.png", b"", "empty.png is not an image that can be read here"),
    ],
)
def test_files_that_are_no_images(
    page: Handlers, tmp_path: Path, name: str, content: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    found, picture, message, *tables = page.run(tmp_path / name, *view())
    assert (found, picture, tables) == (None, None, ["", ""])
    assert line in message
    assert str(tmp_path) not in message


def test_damaged_and_large_files(page: Handlers, dataset: CocoDataset, tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "half.png"
    Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:9000])
    message = page.run(path, *view())[2]
    assert "half.png" in message
    assert "cannot be read" in message or "cannot be decoded" in message
    assert str(tmp_path) not in message
    reading = page.detector.reading._replace(max_pixels=1000)
    monkeypatch.setattr(Detector, "reading", reading)
    message = page.run(dataset.records[0].path, *view())[2]
    assert "11.png has more than 1,000 pixels; cut it into tiles" in message


def test_what_there_is_to_say_of_a_file(page: Handlers, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    deep = Image.fromarray(np.full((60, 92), 110 * 257, np.uint16))
    deep.save(path, save_all=True, append_images=[deep])
    found, _, message, *_ = page.run(path, *view())
    assert found is not None
    assert len(found.objects) == 3
    assert "It has several pages, of which the first is taken." in message
    Image.fromarray(np.full((60, 92), 5000, np.uint16)).save(path)
    nothing = Objects(60, 92, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "detect", lambda *_: nothing)
        _, _, message, classes, objects = page.run(path, *view())
    assert "a small, dark part" in message
    assert "The model sees nothing in it." in message
    assert not classes + objects


def test_a_model_that_fails_is_told(page: Handlers, dataset: CocoDataset, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(Detector, "detect", fail)
    message = page.run(dataset.records[0].path, *view())[2]
    assert "The model failed on 11.png: out of memory</div>" in message


def test_nothing_chosen_yet(page: Handlers) -> None:
    assert page.show(None, *view())[0] is None
    assert page.save(JSON, None, *view()) == (None, layout.note("Choose an image first."))


def test_an_emptied_field_of_numbers(page: Handlers, dataset: CocoDataset) -> None:
    found, *_ = page.run(dataset.records[0].path, None, ALL, SHOWN, None)
    assert found is not None
    assert "3 objects" in page.show(found, None, ALL, SHOWN, "")[1]


def test_what_was_handed_over_is_deleted(page: Handlers, dataset: CocoDataset) -> None:
    found, *_ = page.run(dataset.records[0].path, *view())
    (old,) = page.scratch.glob("made_*")
    page.show(found, *view())
    assert old.exists()
    os.utime(old, (time.time() - 3600,) * 2)
    page.show(found, *view())
    assert not old.exists()
    assert len(list(page.scratch.glob("made_*"))) == 2


def test_examples(detector: Detector, dataset: CocoDataset, tmp_path: Path) -> None:
    folder = dataset.records[0].path.parent
    stray = folder / "stray.png"  # not of the validation set
    Image.new("RGB", (8, 8)).save(stray)
    try:
        found = find_examples(None, detector, tmp_path)
        assert {one.path for one in found} == {record.path for record in dataset.records}
        assert all(Image.open(one.small).size[0] <= 160 for one in found)
        own = find_examples(str(folder), detector, tmp_path)
        assert stray in {one.path for one in own}
    finally:
        stray.unlink()
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    (unreadable / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image in it that can be read"):
        find_examples(str(unreadable), detector, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_examples(str(tmp_path / "gone"), detector, tmp_path)


def test_examples_that_are_gone(detector: Detector, tmp_path: Path) -> None:
    def with_data(**changes: Any) -> Detector:
        config = detector.card.config
        data = config.data.model_copy(update=changes)
        card = replace(detector.card, config=config.model_copy(update={"data": data}))
        return Detector(detector.model, card)

    gone = detector.card.config.data.val.model_copy(update={"images": str(tmp_path / "gone")})
    assert find_examples(None, with_data(val=gone), tmp_path) == []
    shapes = find_examples(None, with_data(val=gone, shapes=True), tmp_path)
    assert len(shapes) == MOST
    assert len({one.path.read_bytes() for one in shapes}) == MOST


def test_drawing_refuses_other_counts(dataset: CocoDataset, detector: Detector) -> None:
    found = look(detector, dataset.records[0].path, "11.png")
    with pytest.raises(ValueError, match="3 objects need as many labels, got 1"):
        draw_objects(found.pixels, found.objects, detector.class_names, labels=["a"])


def test_masks_are_drawn_from_probabilities_as_from_bitmaps(dataset: CocoDataset, detector: Detector) -> None:
    found = look(detector, dataset.records[0].path, "11.png")
    names = detector.class_names
    whole = as_prediction(found.objects, found.pixels, detector.card).draw()
    np.testing.assert_array_equal(whole, draw_objects(found.pixels, found.objects, names))
    some = subset(found.objects, np.array([0, 2]))
    assert some.probabilities.shape[0] == 2
    assert some.classes.tolist() == found.objects.classes[[0, 2]].tolist()


def test_covered_objects_are_named_when_the_label_image_is_saved(
    page: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Found, "has_masks", True)
    found = hand_made([0.9, 0.8, 0.7], [[0, 0, 10, 10], [2, 2, 8, 8], [5, 5, 20, 15]])
    file, message = page.save(LABELS, found, *view())
    assert Path(file).name == "a_labels.png"
    assert "3 objects. Others cover these objects, which are not in it: 2." in message
    monkeypatch.setattr(Found, "has_masks", False)
    file, message = page.save(LABELS, found, *view())
    assert file is None
    assert "This model makes no masks" in message
