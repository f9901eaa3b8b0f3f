"""What is judged by: perfect results score 100, whatever an annotation file gets wrong beside the objects."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import planted
import pytest
from batches import small_config
from PIL import Image
from planted import PlantedModel
from pycocotools import mask as coco_mask

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.coco import evaluate_coco
from fastmrcnn.evaluation.run import run_evaluation

SIDE = 200
MANY = [((i % 20) * 10, (i // 20) * 12, 8, 8) for i in range(300)]
KEYPOINTS = {"keypoints": ["a", "b"], "skeleton": []}


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def tree(boxes: list[tuple[int, int, int, int]], classes: int = 1) -> dict[str, Any]:
    """One image of 200 x 200; the classes of the objects go round."""
    return {
        "images": [{"id": 1, "file_name": "1.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": k + 1, "name": f"class {k + 1}", **KEYPOINTS} for k in range(classes)],
        "annotations": [
            {
                "id": index + 1,
                "image_id": 1,
                "category_id": 1 + index % classes,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": polygon(*box),
                "keypoints": [box[0] + 1, box[1] + 1, 2, box[0] + 3, box[1] + 5, 1],
                "num_keypoints": 2,
            }
            for index, box in enumerate(boxes)
        ],
    }


def perfect(content: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for entry in content["annotations"]:
        [rle] = coco_mask.frPyObjects(entry["segmentation"], SIDE, SIDE)
        names = ("image_id", "category_id", "bbox", "keypoints")
        same = {name: entry[name] for name in names}
        found.append({**same, "segmentation": rle, "score": 0.9})
    return found


def write(folder: Path, content: Any) -> Path:
    (folder / "set.json").write_text(json.dumps(content))
    return folder / "set.json"


def changed(place: str, value: Any) -> Any:
    return pytest.param(lambda entry: entry.update({place: value}), id=f"{place} {value!r}")


@pytest.mark.parametrize(
    "change",
    [
        *(changed("area", value) for value in (-900, 0, 1, math.nan, True, None, 1e9, [1])),
        *(changed("num_keypoints", value) for value in (0, "2", None, -1, 9)),
        *(changed("iscrowd", value) for value in ("0", False, 0.0, None)),
        *(changed("image_id", value) for value in ("1", 1.0)),
        *(changed("ignore", value) for value in (1, "x")),
        pytest.param(lambda entry: entry.update(area=str(entry["area"])), id="area as text"),
        pytest.param(lambda entry: entry.update(area=entry["area"] / 5), id="a fifth of the area"),
        pytest.param(lambda entry: entry.update(id=entry["id"] - 1), id="ids from 0"),
        pytest.param(lambda entry: entry.update(id=0.5), id="ids all 0.5"),
        pytest.param(lambda entry: entry.pop("id"), id="no ids"),
        pytest.param(lambda e: e.update(category_id=str(e["category_id"])), id="category as text"),
        pytest.param(lambda e: e.update(bbox=[str(side) for side in e["bbox"]]), id="bbox as text"),
    ],
)
def test_perfect_results_score_100(tmp_path: Path, change: Any) -> None:
    boxes = [(5, 5, 30, 30), (60, 8, 40, 35), (20, 80, 60, 60), (120, 100, 70, 80)]
    content = tree(boxes, classes=2)
    found = perfect(content)
    right = evaluate_coco(write(tmp_path, content), found, ("bbox", "segm", "keypoints"), show=False)
    for entry in content["annotations"]:
        change(entry)
    values = evaluate_coco(write(tmp_path, content), found, ("bbox", "segm", "keypoints"), show=False)
    assert values == pytest.approx(right, nan_ok=True)
    for kind in ("bbox", "segm", "keypoints"):
        assert values[f"{kind}/AP"] == pytest.approx(100)


def test_what_is_found_in_a_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tree(MANY[:4])
    found = perfect(content)
    content["annotations"][0]["area"] = "64"
    evaluate_coco(write(tmp_path, content), found, show=False)
    assert capsys.readouterr().err == (
        "set.json: 1 object with area given as text (annotation 1); taken for the number it stands for\n"
    )
    content["annotations"][1]["image_id"] = 5
    with pytest.raises(UserError, match="annotation 2: image_id 5 is not among the images"):
        evaluate_coco(write(tmp_path, content), found, show=False)


def test_objects_whose_mask_covers_no_pixel_are_not_judged(tmp_path: Path) -> None:
    content = tree(MANY[:4])
    found = perfect(content)[1:]
    content["annotations"][0]["segmentation"] = polygon(-50, -50, 8, 8)
    values = evaluate_coco(write(tmp_path, content), found, show=False)
    assert values["bbox/AP"] == values["segm/AP"] == pytest.approx(100)


def test_classes_of_one_name_keep_their_own_numbers(tmp_path: Path) -> None:
    content = tree(MANY[:4], classes=3)
    content["categories"][0]["name"] = content["categories"][2]["name"] = "cell"
    found = [entry for entry in perfect(content) if entry["category_id"] != 3]
    values = evaluate_coco(write(tmp_path, content), found, ("bbox",), show=False)
    by_class = {name: value for name, value in values.items() if "AP-" in name}
    assert by_class == pytest.approx(
        {"bbox/AP-cell (1)": 100, "bbox/AP-class 2": 100, "bbox/AP-cell (3)": 0}, abs=1e-6
    )


def dataset_of(folder: Path, content: dict[str, Any]) -> CocoDataset:
    Image.new("RGB", (SIDE, SIDE), (10, 10, 10)).save(folder / "1.png")
    return read_coco(folder, write(folder, content))


def evaluated(
    folder: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, detections: int, **settings: Any
) -> dict[str, float]:
    monkeypatch.setattr(planted, "SLOTS", 330)
    dataset = dataset_of(folder, content)
    changes = small_config().model_dump()["model"]
    changes["box_head"]["detections"] = detections
    config = small_config(model=changes, data={"workers": 0}, evaluate={"pictures": 0, **settings})
    return run_evaluation(PlantedModel(dataset), dataset, config, output=folder / "out", progress=False)


def test_more_objects_than_coco_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = evaluated(tmp_path, tree(MANY), monkeypatch, 300)
    for kind in ("bbox", "segm"):
        assert values[f"{kind}/AP"] < 40  # COCO's number: the best 100
        assert values[f"{kind}@300/AP"] == pytest.approx(100)
        assert values[f"{kind}@300/APs"] == pytest.approx(100)
    printed = capsys.readouterr().out
    line = "AP counts the best 100 of a class in an image, which has up to 300 objects; "
    assert f"bbox/{line}bbox@300/AP counts 300" in printed
    assert "raise model.box_head.detections" not in printed


def test_a_model_that_gives_fewer_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = evaluated(tmp_path, tree(MANY), monkeypatch, 200)
    assert 60 < values["bbox@200/AP"] < 70
    assert "an image has 300 objects, but the model gives 200 detections; raise" in capsys.readouterr().out
    values = evaluated(tmp_path, tree(MANY), monkeypatch, 100)
    assert not any("@" in name for name in values)
    assert "set evaluate.max_dets and model.box_head.detections to count more" in capsys.readouterr().out


def test_a_limit_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = evaluated(tmp_path, tree(MANY), monkeypatch, 300, max_dets=300)
    assert values["segm/AP"] == pytest.approx(100)
    assert not any("@" in name for name in values)
    assert capsys.readouterr().out == ""
    # Of three classes with 100 objects each, COCO counts all.
    values = evaluated(tmp_path, tree(MANY, classes=3), monkeypatch, 300)
    assert values["segm/AP"] == pytest.approx(100)
    assert not any("@" in name for name in values)


def test_other_limits_of_keypoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tree(MANY[:30])
    found = perfect(content)
    file = write(tmp_path, content)
    assert evaluate_coco(file, found, ("keypoints",))["keypoints/AP"] < 70  # COCO's 20
    assert "maxDets= 20 ]" in capsys.readouterr().out
    assert evaluate_coco(file, found, ("keypoints",), max_dets=30)["keypoints/AP"] == pytest.approx(100)
    printed = capsys.readouterr().out
    assert "maxDets= 20 ]" not in printed
    assert "area=   all | maxDets= 30 ] = 1.000" in printed
