"""Evaluation against pycocotools itself, on detections that are known."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import small_config, small_model
from PIL import Image
from planted import CATEGORIES, PlantedModel, write_set
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from fastmrcnn import evaluate
from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import read_split
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.detection import fetch, paste
from fastmrcnn.detection.fetch import split_detections
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.coco import METRICS, evaluate_coco
from fastmrcnn.evaluation.run import RESULTS, run_evaluation
from fastmrcnn.structures import Batch, Detections
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import save_checkpoint


def config_for(dataset: CocoDataset, batch: int = 2) -> Config:
    """Non-square images, resized by odd factors, padded to a multiple of 32."""
    paths = {"images": str(dataset.records[0].path.parent), "annotations": str(dataset.annotations)}
    return small_config(
        data={"val": paths, "short_side_test": 75, "long_side_max": 130, "workers": 0},
        evaluate={"batch": batch, "pictures": 2},
    )


def official(annotations: Path, results: Path, kind: str, max_dets: int = 100) -> COCOeval:
    """pycocotools from file to file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        judge = COCOeval(truth, truth.loadRes(str(results)), kind)
        judge.params.maxDets = [1, 10, max_dets]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def shuffled(boxes: Tensor, classes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some boxes moved, some classes exchanged, in a new order of scores."""
    r = torch.Generator().manual_seed(len(boxes) + int(boxes.sum()))
    moved = boxes + torch.randn(boxes.shape, generator=r) * 2
    wrong = torch.rand(len(boxes), generator=r) < 0.3
    return moved, torch.where(wrong, 1 - classes.clamp(max=1), classes), scores.flip(0)


@pytest.mark.parametrize("batch", [1, 3])
def test_perfect_detections(tmp_path: Path, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_set(tmp_path / "data")
    model = PlantedModel(dataset)
    values = run_evaluation(model, dataset, config_for(dataset, batch), output=tmp_path / "out")
    assert {shape[0] for shape in model.seen} == {batch}
    assert values["bbox/AP"] == pytest.approx(100)
    assert values["segm/AP"] >= 98  # 28 x 28 cells do not draw a disc's rim quite right
    assert values["segm/AP50"] == pytest.approx(100)
    assert values["segm/AP-box"] == pytest.approx(100)
    assert math.isnan(values["bbox/AP-absent"])
    assert set(values) == {
        f"{kind}/{name}" for kind in ("bbox", "segm") for name in (*METRICS, "AP-box", "AP-disc", "AP-absent")
    }
    printed = capsys.readouterr().out
    assert printed.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ]") == 2
    assert "Loading and preparing" not in printed
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert {entry["category_id"] for entry in results} == {3, 7}
    assert len(results) == 9
    assert not list((tmp_path / "out").glob(".*"))


def test_numbers_are_those_of_pycocotools(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data")
    model = PlantedModel(dataset, change=shuffled)
    values = run_evaluation(model, dataset, config_for(dataset), output=tmp_path, pictures=0)
    assert 0 < values["segm/AP"] < 90
    assert 0 < values["bbox/AP"] < 90
    for kind in ("bbox", "segm"):
        stats = official(dataset.annotations, tmp_path / RESULTS, kind).stats
        mine = [values[f"{kind}/{name}"] for name in METRICS]
        want = [float("nan") if value == -1 else value * 100 for value in stats[:6].tolist()]
        np.testing.assert_array_equal(mine, want)


def test_other_limit_on_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_set(tmp_path / "data")
    model = PlantedModel(dataset, change=shuffled)
    run_evaluation(model, dataset, config_for(dataset), output=tmp_path, pictures=0, progress=False)
    results = json.loads((tmp_path / RESULTS).read_text())
    before = json.dumps(results)
    values = evaluate_coco(dataset.annotations, results, ("segm",), max_dets=30)
    assert json.dumps(results) == before, "the results were changed"
    judge = official(dataset.annotations, tmp_path / RESULTS, "segm", max_dets=30)
    assert judge.stats[0] == -1, "pycocotools now knows other limits: drop the repair of its first line"
    known = judge.eval["precision"][:, :, :, 0, 2]
    assert values["segm/AP"] == known[known > -1].mean() * 100
    first = next(line for line in capsys.readouterr().out.splitlines() if "0.50:0.95" in line)
    assert f"maxDets= 30 ] = {values['segm/AP'] / 100:.3f}" in first


def test_the_host_waits_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the place of a GPU's, whose values come by `cpu`."""
    dataset = write_set(tmp_path / "data")
    model = PlantedModel(dataset, change=shuffled)
    config = config_for(dataset, batch=3)
    expected = run_evaluation(model, dataset, config, output=tmp_path / "a", pictures=0, progress=False)
    for room in (fetch, paste):
        monkeypatch.setattr(room, "on_accelerator", lambda masks: True)
    waits = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: waits.append(self.shape) or real(self))
    model.seen.clear()
    values = run_evaluation(model, dataset, config, output=tmp_path / "b", pictures=0, progress=False)
    assert len(waits) == len(model.seen) < len(dataset)
    np.testing.assert_equal(values, expected)
    assert (tmp_path / "a" / RESULTS).read_bytes() == (tmp_path / "b" / RESULTS).read_bytes()


def test_no_detections(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data")

    def nothing(boxes: Tensor, classes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(boxes), classes, scores  # boxes without area are not detections

    model = PlantedModel(dataset, change=nothing)
    values = run_evaluation(model, dataset, config_for(dataset), output=tmp_path)
    assert json.loads((tmp_path / RESULTS).read_text()) == []
    assert values["bbox/AP"] == values["segm/AP"] == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_files_without_area_and_iscrowd(tmp_path: Path) -> None:
    whole, bare = write_set(tmp_path / "a"), write_set(tmp_path / "b", drop=("area", "iscrowd"))
    values: list[dict[str, float]] = []
    for dataset in (whole, bare):
        # The crowd region is an object in the bare file: leave it out of both.
        tree = json.loads(dataset.annotations.read_text())
        tree["annotations"] = tree["annotations"][:-1]
        dataset.annotations.write_text(json.dumps(tree))
        model = PlantedModel(whole, change=shuffled)
        output = dataset.annotations.parent
        values.append(run_evaluation(model, dataset, config_for(dataset), output=output, pictures=0))
    assert "area" not in json.loads(bare.annotations.read_text())["annotations"][0]
    np.testing.assert_equal(values[0], values[1])


def test_a_crowd_region_without_a_mask_is_its_box(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data")
    tree = json.loads(dataset.annotations.read_text())
    assert tree["annotations"][-1]["iscrowd"] == 1
    # The region's own mask is the same as its box.
    in_region: dict[str, Any] = {"image_id": 11, "category_id": 3, "bbox": [82, 5, 8, 40], "score": 0.99}
    run_evaluation(PlantedModel(dataset), dataset, config_for(dataset), output=tmp_path, pictures=0)
    results: list[dict[str, Any]] = json.loads((tmp_path / RESULTS).read_text())
    polygon = [[82, 5, 90, 5, 90, 45, 82, 45]]
    encoded = coco_mask.frPyObjects(polygon, 60, 92)[0]
    in_region["segmentation"] = {"size": [60, 92], "counts": encoded["counts"].decode()}
    with_mask = evaluate_coco(dataset.annotations, [*results, in_region], show=False)
    del tree["annotations"][-1]["segmentation"]
    dataset.annotations.write_text(json.dumps(tree))
    np.testing.assert_equal(evaluate_coco(dataset.annotations, [*results, in_region], show=False), with_mask)
    # It lies in the region, so it is no mistake; without the region it is one.
    assert with_mask["segm/AP-box"] == pytest.approx(100)
    del tree["annotations"][-1]
    dataset.annotations.write_text(json.dumps(tree))
    alone = evaluate_coco(dataset.annotations, [*results, in_region], show=False)
    assert alone["segm/AP-box"] < 90


def test_a_validation_set_is_judged_by_what_was_read(tmp_path: Path) -> None:
    """Its file is read once, however often it is evaluated on; of a training set the file is let go."""
    dataset = write_set(tmp_path / "data", drop=("area", "iscrowd"))
    config, model = config_for(dataset), PlantedModel(dataset, change=shuffled)
    from_file = run_evaluation(model, dataset, config, output=tmp_path, pictures=0)
    assert from_file["segm/AP"] > 0
    val = read_split(config, "val")
    paths = config.data.val.model_dump()
    assert dataset.tree is read_split(small_config(data={"train": paths}), "train").tree is None
    dataset.annotations.unlink()
    for _ in range(2):
        values = run_evaluation(model, val, config, output=tmp_path, pictures=0)
        np.testing.assert_equal(values, from_file)


def test_only_the_images_that_were_evaluated(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data")
    run_evaluation(PlantedModel(dataset), dataset, config_for(dataset), output=tmp_path, pictures=0)
    results = [r for r in json.loads((tmp_path / RESULTS).read_text()) if r["image_id"] == 5]
    assert evaluate_coco(dataset.annotations, results, image_ids=[5], show=False)["bbox/AP"] == pytest.approx(
        100
    )
    assert evaluate_coco(dataset.annotations, results, show=False)["bbox/AP"] < 50


def test_one_class_has_no_table_by_class(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data", categories=[{"id": 7, "name": "disc"}])
    values = run_evaluation(PlantedModel(dataset), dataset, config_for(dataset), output=tmp_path)
    assert set(values) == {f"{kind}/{name}" for kind in ("bbox", "segm") for name in METRICS}


def test_cut_candidates_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_set(tmp_path / "data")
    model = PlantedModel(dataset, cut=5)
    values = run_evaluation(model, dataset, config_for(dataset, batch=3), output=tmp_path, pictures=0)
    assert values["candidates_cut"] == 5 * 4  # four images; what fills up a batch does not count
    assert "20 class scores" in capsys.readouterr().out


def test_pictures_show_ground_truth_and_predictions(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data")
    run_evaluation(PlantedModel(dataset), dataset, config_for(dataset), output=tmp_path, pictures=4)
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"11_11.png", "5_5.png", "8_8.png", "2_2.png"}
    picture = np.asarray(Image.open(tmp_path / "pictures" / "11_11.png")).astype(int)
    left, right = np.array_split(picture[40:], 2, axis=1)
    for half in (left, right):  # the image itself is grey
        coloured = np.ptp(half, axis=2) > 30
        assert coloured.mean() > 0.2


def test_boxes_are_mapped_scaled_and_clipped() -> None:
    boxes = torch.tensor([[[10.0, 8.0, 30.0, 24.0], [-6.0, 8.0, 90.0, 100.0], [90.0, 8.0, 99.0, 24.0]]])
    detections = Detections(
        boxes,
        torch.tensor([[0.9, 0.8, 0.7]]),
        torch.tensor([[2, 0, 1]]),
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
        torch.rand(1, 3, 4, 4),
    )
    affine = torch.tensor([[[0.5, 0.0, 1.0], [0.0, 2.0, -4.0]]])
    (found,) = split_detections(detections, affine, [(50, 40)])
    # The third lies beyond the right border.
    assert found.boxes.tolist() == [[6.0, 12.0, 16.0, 44.0], [0.0, 12.0, 40.0, 50.0]]
    assert found.classes.tolist() == [2, 0]
    assert found.probabilities is not None
    assert torch.equal(found.probabilities, detections.masks[0, :2])  # type: ignore[index]
    (better,) = split_detections(detections, affine, [(50, 40)], score=0.85)
    assert better.scores is not None
    assert better.scores.tolist() == pytest.approx([0.9])


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """As training leaves it, with the weights of a model that has learnt nothing."""
    dataset = write_set(tmp_path / "data")
    model = small_model(len(dataset.class_names))
    save_checkpoint(
        tmp_path / "run" / "checkpoints",
        step=3,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        card=ModelCard(config_for(dataset), dataset.class_names, dataset.category_ids),
        keep=1,
    )
    return tmp_path / "run"


def test_command(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        evaluate.main(["--checkpoint", str(run_folder), "evaluate.pictures=1", "runtime.threads=1"])
        folder = run_folder / f"evaluation_{number:03d}"
        assert str(folder) in capsys.readouterr().out
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["segm/AP-absent"] is None
        assert len(list((folder / "pictures").iterdir())) == 1
    one, two = ((run_folder / f"evaluation_00{k}" / RESULTS).read_bytes() for k in (1, 2))
    assert one == two


def test_a_set_that_lacks_a_class(run_folder: Path, tmp_path: Path) -> None:
    """Class indices are the checkpoint's, whatever the file's own would be."""
    fewer = write_set(tmp_path / "fewer", categories=[CATEGORIES[0]])
    output = tmp_path / "asked"
    overrides = [
        f"data.val.images={fewer.records[0].path.parent}",
        f"data.val.annotations={fewer.annotations}",
        "model.box_head.score_threshold=0.0",
        "evaluate.pictures=1",
    ]
    evaluate.main(["--checkpoint", str(run_folder), "--output", str(output), *overrides])
    results = json.loads((output / RESULTS).read_text())
    with_its_own = evaluate.load_overridden(str(run_folder), "cpu", overrides[2:3]).model
    whole = write_set(tmp_path / "whole")
    run_evaluation(with_its_own, whole, config_for(whole), output=tmp_path, pictures=0)
    assert results == json.loads((tmp_path / RESULTS).read_text())
    assert len(results) > 20
    stats = official(fewer.annotations, output / RESULTS, "segm").stats
    assert json.loads((output / "metrics.json").read_text())["segm/AP"] == stats[0] * 100


def test_overrides_reach_the_model(run_folder: Path) -> None:
    overrides = ["model.box_head.detections=3", "model.box_head.score_threshold=0.0"]
    trained = evaluate.load_overridden(str(run_folder), "cpu", overrides)
    assert trained.card.config.model.box_head.detections == 3
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    found = trained.model(Batch(pixels, torch.tensor([[64, 64]])))
    assert found.scores.shape == (1, 3)
    with pytest.raises(UserError, match="mask_head"):
        evaluate.load_overridden(str(run_folder), "cpu", ["model.mask_head.channels=24"])


def test_mistakes(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = str(run_folder / "checkpoints" / "step_0000003.pt")

    def message(*arguments: str) -> str:
        with pytest.raises(UserError) as caught:
            evaluate.main(list(arguments))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--checkpoint" in message()
    assert "--chekpoint" in message("--checkpoint", checkpoint, "--chekpoint", "x")
    assert "nowhere.pt" in message("--checkpoint", "nowhere.pt")
    assert "evaluate.batch" in message("--checkpoint", checkpoint, "evaluate.bach=2")
    assert "nowhere.json" in message("--checkpoint", checkpoint, "data.val.annotations=nowhere.json")
    assert "data.val.images=DIR" in message("--checkpoint", checkpoint, "data.val.images=null")
    other = write_set(tmp_path / "other", categories=[{"id": 7, "name": "plate"}])
    assert "'plate'" in message("--checkpoint", checkpoint, f"data.val.annotations={other.annotations}")
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoints"]


def test_an_unreadable_image_leaves_nothing_behind(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "images" / "8.png").write_bytes(b"no image")
    for output in ([], ["--output", str(tmp_path / "asked")]):
        with pytest.raises(UserError, match=r"8\.png"):
            evaluate.main(["--checkpoint", str(run_folder), *output])
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoints"]
    assert not (tmp_path / "asked").exists()


def test_results_are_never_overwritten(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "asked"
    output.mkdir()
    (output / RESULTS).write_text("precious")
    with pytest.raises(UserError, match="holds the results of an earlier evaluation"):
        evaluate.main(["--checkpoint", str(run_folder), "--output", str(output)])
    assert (output / RESULTS).read_text() == "precious"


def test_a_model_without_masks(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "data")
    config = config_for(dataset)
    tree = config.model_dump()
    tree["model"]["mask_head"]["enabled"] = False
    config = Config.model_validate(tree)
    planted = PlantedModel(dataset)
    forward = planted.forward
    planted.forward = lambda batch: forward(batch)._replace(masks=None)  # type: ignore[method-assign]
    values = run_evaluation(planted, dataset, config, output=tmp_path, pictures=1)
    assert values["bbox/AP"] == pytest.approx(100)
    assert not any(name.startswith("segm/") for name in values)
    assert "segmentation" not in json.loads((tmp_path / RESULTS).read_text())[0]
