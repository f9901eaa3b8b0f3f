"""Keypoints from the command line: train, evaluate, predict; the numbers are pycocotools' own."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from arrows import NAMES, write_arrows
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import TREE, newest_run

from fastmrcnn import evaluate, load, train
from fastmrcnn.data.coco import read_coco
from fastmrcnn.data.keypoints import KeypointOptions, choose_sigmas
from fastmrcnn.detection.fetch import split_detections
from fastmrcnn.detection.objects import coco_results
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.coco import KEYPOINT_METRICS, METRICS, evaluate_coco, ground_truth
from fastmrcnn.predict import main as predict_main
from fastmrcnn.structures import Detections

HEAD = {"enabled": True, "convs": 2, "channels": 32}


def official(annotations: Path, results: Path, sigmas: list[float]) -> COCOeval:
    """pycocotools from file to file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        judge = COCOeval(truth, truth.loadRes(str(results)), "keypoints")
        judge.params.kpt_oks_sigmas = np.array(sigmas)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def run(
    folder: Path, *, masks: bool, val: int, train_images: int, changes: dict[str, Any]
) -> tuple[Path, Path]:
    """Train on arrows; returns the run's folder and the validation file."""
    sets = {
        name: write_arrows(folder / name, seed, images, masks=masks)
        for name, seed, images in (("train", 1, train_images), ("val", 2, val))
    }
    tree = copy.deepcopy(TREE)
    tree["model"]["mask_head"] = {**tree["model"]["mask_head"], "enabled": masks}
    tree["model"]["keypoint_head"] = HEAD
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    tree["data"] |= {
        name: {"images": str(file.parent), "annotations": str(file)} for name, file in sets.items()
    }
    tree["output"] = str(folder / "runs")
    recipe = folder / "arrows.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    train.main(["--config", str(recipe)])
    return newest_run(folder / "runs"), sets["val"]


def last_row(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.parametrize("masks", [False, True])
def test_train_evaluate_predict(tmp_path: Path, masks: bool, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"train": {**TREE["train"], "steps": 4}, "evaluate": {"batch": 2, "pictures": 2}}
    folder, val = run(tmp_path, masks=masks, val=3, train_images=4, changes=changes)
    printed = capsys.readouterr().out
    assert "4 keypoints, labelled on" in printed
    assert "COCO evaluation, keypoint (3 images, OKS with a sigma of 0.05 for each keypoint)" in printed
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["loss_keypoint"] > 0
    assert rows[0]["keypoints_dropped"] == 0
    assert ("loss_mask" in rows[0]) == masks
    kinds = {"bbox": METRICS, "keypoints": KEYPOINT_METRICS} | ({"segm": METRICS} if masks else {})
    wanted = {f"{kind}/{name}" for kind, names in kinds.items() for name in names}
    assert {key for key in rows[-1] if "/" in key} == wanted
    assert len(list(folder.rglob("pictures/*.png"))) == 2

    output = tmp_path / "evaluated"
    evaluate.main(["--checkpoint", str(folder), "--output", str(output), "evaluate.pictures=0"])
    values = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert set(values) == wanted
    results = json.loads((output / evaluate.RESULTS).read_text(encoding="utf-8"))
    assert results
    assert all(len(entry["keypoints"]) == 3 * len(NAMES) for entry in results)
    assert all(("segmentation" in entry) == masks for entry in results)

    images = tmp_path / "predicted"
    words = [str(val.parent / "1.png"), "--checkpoint", str(folder), "--output", str(images), "--score", "0"]
    predict_main(words)
    with Image.open(images / "1.png") as overlay:
        assert min(overlay.size) >= 64
    entries = json.loads((images / "predictions.json").read_text(encoding="utf-8"))
    assert all(len(entry["keypoints"]) == 3 * len(NAMES) for entry in entries)
    detector = load(folder, "cpu")
    assert detector.card.keypoints is not None
    assert detector.card.keypoints.names == NAMES
    assert detector.card.keypoints.mirror == [0, 1, 3, 2]
    found = detector(val.parent / "1.png", score=0.0)
    assert found.keypoints is not None
    assert found.keypoints.shape == (len(found), 4, 3)
    first = np.array(entries[0]["keypoints"]).reshape(-1, 3)
    np.testing.assert_allclose(found.keypoints[0], first + np.array([0.5, 0.5, 0]), atol=1e-4)


@pytest.mark.slow
def test_learns_the_keypoints(tmp_path: Path) -> None:
    changes = {
        "data": {**TREE["data"], "augment": {"flip_horizontal": 0.5}},
        "evaluate": {"oks_sigmas": [0.1] * 4},
        "train": {**TREE["train"], "steps": 300, "batch": 4, "checkpoint_every": 300},
        "optim": {**TREE["optim"], "schedule": "cosine", "warmup_steps": 20, "clip_norm": 5.0},
    }
    changes["model"] = {
        **TREE["model"],
        "backbone": {**TREE["model"]["backbone"], "width": 16},
        "fpn": {"channels": 32},
        "mask_head": {"enabled": False},
        "keypoint_head": {**HEAD, "slots_per_image": 6},
    }
    folder, val = run(tmp_path, masks=False, val=20, train_images=60, changes=changes)
    row = last_row(folder)
    print({key: round(value, 1) for key, value in row.items() if "/AP" in key and value is not None})
    assert row["keypoints/AP"] >= 45
    # Someone who finds every object and puts all its keypoints into the middle of the box.
    tree = json.loads(val.read_text(encoding="utf-8"))
    middle = []
    for entry in tree["annotations"]:
        x, y, w, h = entry["bbox"]
        points = [x + w / 2 - 0.5, y + h / 2 - 0.5, 1.0] * len(NAMES)
        middle.append({**entry, "keypoints": points, "score": 0.9})
    assert evaluate_coco(val, middle, ("keypoints",), show=False, oks_sigmas=[0.1] * 4)["keypoints/AP"] < 10


def planted(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A set, and its objects as results whose keypoints are moved at random."""
    file = write_arrows(folder / "set", seed=5, images=8)
    tree = json.loads(file.read_text(encoding="utf-8"))
    r = np.random.default_rng(0)
    results = []
    for entry in tree["annotations"]:
        points = np.array(entry["keypoints"], np.float64).reshape(-1, 3)
        points[:, :2] += r.normal(0, 0.6, points[:, :2].shape)
        one = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        results.append({**one, "score": float(r.uniform()), "keypoints": points.ravel().tolist()})
    return file, results


@pytest.mark.parametrize("sigmas", [None, [0.02, 0.05, 0.1, 0.1]])
def test_numbers_are_those_of_pycocotools(tmp_path: Path, sigmas: list[float] | None) -> None:
    file, results = planted(tmp_path)
    values = evaluate_coco(file, results, ("keypoints",), show=False, oks_sigmas=sigmas)
    (tmp_path / "results.json").write_text(json.dumps(results))
    judge = official(file, tmp_path / "results.json", sigmas or [0.05] * 4)
    assert 5 < values["keypoints/AP"] < 95
    expected = [value * 100 if value >= 0 else math.nan for value in judge.stats[:5].tolist()]
    np.testing.assert_allclose(
        [values[f"keypoints/{name}"] for name in KEYPOINT_METRICS], expected, rtol=1e-12
    )
    assert set(values) == {f"keypoints/{name}" for name in KEYPOINT_METRICS}
    truth = ground_truth(file)
    for _ in range(2):  # what is kept for the next evaluation still says the same
        again = evaluate_coco(truth, results, ("keypoints", "bbox"), show=False, oks_sigmas=sigmas)
        np.testing.assert_equal({name: again[name] for name in values}, values)
        assert again["bbox/AP"] == pytest.approx(100)


def test_sigmas_of_a_person_are_cocos_own(tmp_path: Path) -> None:
    names = [str(index) for index in range(17)]
    points = [number for index in range(17) for number in (10.0 + index, 20.0, 2)]
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "area": 900.0, "iscrowd": 0}
    bare = {**entry, "id": 2, "bbox": [40, 5, 10, 10]}  # no keypoints: neither found nor missed
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [{**entry, "keypoints": points, "num_keypoints": 17}, bare],
        "categories": [{"id": 1, "name": "person", "keypoints": names}],
    }
    file = tmp_path / "set.json"
    file.write_text(json.dumps(tree))
    moved = [number + (4.0 if place % 3 == 0 else 0) for place, number in enumerate(points)]
    results = [{"image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "score": 0.9, "keypoints": moved}]
    sigmas = COCOeval(iouType="keypoints").params.kpt_oks_sigmas
    similarity = np.exp(-(4.0**2) / (2 * 900 * (2 * sigmas) ** 2)).mean()
    passed = sum(similarity >= threshold for threshold in np.linspace(0.5, 0.95, 10))
    assert 0 < passed < 10
    assert evaluate_coco(file, results, ("keypoints",), show=False)["keypoints/AP"] == pytest.approx(
        10 * passed
    )
    with pytest.raises(UserError, match=r"evaluate\.oks_sigmas has 3 values, but there are 17 keypoints"):
        choose_sigmas(17, [0.1, 0.1, 0.1])


def test_no_detections_and_no_objects(tmp_path: Path) -> None:
    file = write_arrows(tmp_path / "set", seed=5, images=2)
    assert evaluate_coco(file, [], ("keypoints",), show=False)["keypoints/AP"] == 0
    tree = json.loads(file.read_text())
    for entry in tree["annotations"]:
        del entry["keypoints"], entry["num_keypoints"]
    file.write_text(json.dumps(tree))
    assert math.isnan(evaluate_coco(file, [], ("keypoints",), show=False)["keypoints/AP"])


def test_keypoints_come_back_in_the_pixels_of_the_image() -> None:
    heatmaps = torch.zeros(1, 3, 2, 56, 56)
    heatmaps[0, 1, 0, 28, 28], heatmaps[0, 1, 1, 0, 55] = 20, 20
    detections = Detections(
        boxes=torch.tensor([[[0.0, 0, 8, 8], [10, 20, 66, 76], [0, 0, 9, 9]]]),
        scores=torch.tensor([[0.9, 0.8, 0.1]]),
        classes=torch.zeros(1, 3, dtype=torch.int64),
        valid=torch.tensor([[False, True, True]]),
        cut=torch.zeros(1, dtype=torch.int64),
        heatmaps=heatmaps,
    )
    affine = torch.tensor([[[0.5, 0, 1.0], [0, 2, 0]]])
    [found] = split_detections(detections, affine, [(200, 100)], score=0.5)
    assert found.keypoints is not None
    assert found.keypoints.shape == (1, 2, 3)
    np.testing.assert_allclose(found.keypoints[0, 0, :2], [38.5 * 0.5 + 1, 48.5 * 2])
    np.testing.assert_allclose(found.keypoints[0, 1, :2], [65.5 * 0.5 + 1, 20.5 * 2])
    assert (found.keypoints[..., 2] > 0.99).all()
    for offset in (0.5, 0.0):
        [entry] = coco_results([found], [7], [4], keypoint_offset=offset)
        assert entry["keypoints"][:2] == pytest.approx([20.25 - offset, 97 - offset])
    [entry] = coco_results([replace(found, keypoints=None)], [7], [4])
    assert "keypoints" not in entry


def test_another_sets_keypoints_are_refused(tmp_path: Path) -> None:
    file = write_arrows(tmp_path / "set", seed=5, images=2)
    dataset = read_coco(file.parent, file, keypoints=KeypointOptions())
    assert dataset.num_keypoints == 4
    tree = json.loads(file.read_text())
    tree["categories"][0]["keypoints"] = ["tip", "centre", "right_barb", "left_barb"]
    (file.parent / "val.json").write_text(json.dumps(tree))
    split = f"data.{{}}.images={file.parent}"
    words = [split.format("train"), f"data.train.annotations={file}"]
    words += [split.format("val"), f"data.val.annotations={file.parent / 'val.json'}"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TREE, "model": {**TREE["model"], "keypoint_head": HEAD}}))
    with pytest.raises(UserError, match=r"val\.json: its keypoints do not match .*set\.json"):
        train.main(["--config", str(recipe), *words, f"output={tmp_path / 'runs'}"])
    with pytest.raises(UserError, match=r"evaluate\.oks_sigmas has 2 values, but there are 4 keypoints"):
        train.main(["--config", str(recipe), *words[:2], "evaluate.oks_sigmas=[0.1, 0.1]"])
