"""Prediction from files, arrays and Pillow images, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import small_config
from PIL import Image
from places import ROOT
from planted import CATEGORIES, SIZES, PlantedModel, write_set
from pycocotools import mask as coco_mask

import fastmrcnn.predict as command
from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.masks import bitmap
from fastmrcnn.detection.detector import Detector, load
from fastmrcnn.errors import UserError, run_main
from fastmrcnn.model.build import build_model
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import save_checkpoint


def config() -> Config:
    return small_config(data={"short_side_test": 75, "long_side_max": 130})


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    return write_set(tmp_path / "data")


@pytest.fixture
def planted(dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> Detector:
    """Finds the objects of the set; the command gets it in place of a checkpoint's."""
    card = ModelCard(config(), dataset.class_names, dataset.category_ids)
    detector = Detector(PlantedModel(dataset), card)  # type: ignore[arg-type]
    monkeypatch.setattr(command, "load", lambda path, device: detector)
    return detector


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_objects_in_the_pixels_of_the_image(dataset: CocoDataset, planted: Detector) -> None:
    record = dataset.records[0]
    found = planted(record.path, score=0.0)
    objects = [item for item in record.objects if not item.crowd]
    assert found.image.shape == (60, 92, 3)
    assert found.masks is not None
    assert found.masks.shape == (3, 60, 92)
    assert found.masks.dtype == bool
    assert len(found) == 3
    assert found.names == ["disc", "disc", "box"]
    assert found.scores.tolist() == pytest.approx([0.95, 0.75, 0.55])
    for box, mask, item in zip(found.boxes, found.masks, objects, strict=True):
        assert box.tolist() == pytest.approx(item.box, abs=1e-3)
        crop, (x, y, w, h) = bitmap(item.segmentation, 60, 92)
        whole = np.zeros((60, 92), dtype=bool)
        whole[y : y + h, x : x + w] = crop
        assert iou(mask, whole) > 0.94
    # Resized to 75 x 115, padded to a multiple of 32.
    assert planted.model.seen == [(1, 3, 96, 128)]


def test_whatever_holds_an_image(dataset: CocoDataset, planted: Detector) -> None:
    path = dataset.records[1].path
    pixels = np.asarray(Image.open(path))
    for image in (path, str(path), pixels, pixels[:, :, 0], Image.open(path), Image.open(path).convert("L")):
        found = planted(image)
        assert found.boxes.tolist() == planted(path).boxes.tolist()
        np.testing.assert_array_equal(found.image, pixels)
    assert planted(path, score=0.7).scores.tolist() == pytest.approx([0.95, 0.75])
    assert len(planted(path, score=0.99)) == 0
    with pytest.raises(ValueError, match=r"pixels must be .* got \(4, 5, 4\) uint8"):
        planted(np.zeros((4, 5, 4), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        planted(np.zeros((4, 5, 3)))
    with pytest.raises(UserError, match=r"nowhere\.png"):
        planted("nowhere.png")


def test_draw_and_save(dataset: CocoDataset, planted: Detector, tmp_path: Path) -> None:
    found = planted(dataset.records[0].path)
    drawn = found.draw()
    assert drawn.shape == (360, 552, 3)
    found.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn)
    with pytest.raises(UserError, match="no_folder"):
        found.save(tmp_path / "no_folder" / "a.png")


def test_command(
    dataset: CocoDataset, planted: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = dataset.records[0].path.parent, tmp_path / "new" / "out"
    (images / "notes.txt").write_text("not an image, and not taken for one")
    command.main([str(images), "--checkpoint", "x", "--output", str(output), "--score", "0.6"])
    assert "4 images, 6 objects" in capsys.readouterr().out
    overlays = {f"{image}.png" for image in SIZES}
    assert {path.name for path in output.iterdir()} == overlays | {"predictions.json"}
    entries = json.loads((output / "predictions.json").read_text())
    assert len(entries) == 6
    assert all(entry["score"] >= 0.6 for entry in entries)
    ids = {category["name"]: category["id"] for category in CATEGORIES}
    # In the order of the file names.
    numbers = {str(images / f"{image}.png"): k for k, image in enumerate((11, 2, 5, 8), start=1)}
    for entry in entries:
        assert entry["category_id"] == ids[entry["category_name"]]
        assert entry["image_id"] == numbers[entry["file_name"]]
        assert entry["overlay"] == Path(entry["file_name"]).name
        size = SIZES[int(Path(entry["file_name"]).stem)]
        assert tuple(entry["segmentation"]["size"]) == size
        x, y, w, h = entry["bbox"]
        assert coco_mask.toBbox(entry["segmentation"]).tolist() == pytest.approx([x, y, w, h], abs=2)


def test_equal_names_do_not_collide(dataset: CocoDataset, planted: Detector, tmp_path: Path) -> None:
    first = dataset.records[0].path
    others = []
    for k, name in enumerate(("a/11.png", "b/11.png", "b/11.bmp", "b/11_2.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.open(dataset.records[k % 3].path).save(path)
        others.append(str(path))
    # The first comes twice, which counts once.
    command.main([str(first), *others, str(first), "--checkpoint", "x", "--output", str(tmp_path / "out")])
    written = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert written == ["11.png", "11_2.png", "11_2_2.png", "11_3.png", "11_4.png"]
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    overlays = {entry["file_name"]: entry["overlay"] for entry in entries}
    assert list(overlays) == [str(first), *others]
    assert len(set(overlays.values())) == 5


def test_nothing_found(
    dataset: CocoDataset, planted: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dataset.records[3].path
    command.main([str(path), "--checkpoint", "x", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == []
    assert (tmp_path / "out" / "2.png").exists()
    assert "lower --score" in capsys.readouterr().out


def test_mistakes(dataset: CocoDataset, planted: Detector, tmp_path: Path) -> None:
    images = dataset.records[0].path.parent
    image, output = str(images / "8.png"), tmp_path / "out"
    (tmp_path / "empty").mkdir()

    def message(*arguments: str, to: Path = output) -> str:
        with pytest.raises(UserError) as caught:
            command.main([*arguments, "--checkpoint", "x", "--output", str(to)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such image file or folder" in message("nowhere")
    assert "no image in this folder" in message(str(tmp_path / "empty"))
    both = message("nowhere", str(tmp_path / "empty"))
    assert "no such image file or folder" in both
    assert "no image in this folder" in both
    assert "0..1" in message(image, "--score", "5")
    assert "--score" in message(image, "--score", "high")
    assert "must name a folder" in message(image, to=Path(image))
    assert not output.exists()
    # Nothing is written over: not an image by its own overlay, not an earlier run's file.
    assert "is already there" in message(image, to=images)
    assert sorted(path.name for path in images.iterdir()) == ["11.png", "2.png", "5.png", "8.png"]
    command.main([image, "--checkpoint", "x", "--output", str(output)])
    assert "predictions.json: is already there" in message(str(images / "5.png"))
    assert "--output" in message_without_output(image)


def message_without_output(image: str) -> str:
    with pytest.raises(UserError) as caught:
        command.main([image, "--checkpoint", "x"])
    return str(caught.value)


def of_one_precision(config: Config) -> Config:
    """Which a process of its own does not choose for itself."""
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"precision": "fp32"})})


def untrained_checkpoint(dataset: CocoDataset, folder: Path) -> Path:
    torch.manual_seed(0)
    model = build_model(config().model, 3)
    return save_checkpoint(
        folder / "run" / "checkpoints",
        step=1,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        card=ModelCard(of_one_precision(config()), dataset.class_names, dataset.category_ids),
        keep=1,
    )


def test_command_in_a_process_of_its_own(dataset: CocoDataset, tmp_path: Path) -> None:
    """A real checkpoint; and the package, whose attribute `predict` may be the function."""
    path = untrained_checkpoint(dataset, tmp_path)
    image, output = dataset.records[0].path, tmp_path / "out"
    module = [sys.executable, "-W", "error::RuntimeWarning", "-m", "fastmrcnn.predict"]
    arguments = [str(image), "--checkpoint", str(path), "--output", str(output), "--score", "0.06"]
    done = subprocess.run([*module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    entries = json.loads((output / "predictions.json").read_text())
    same = load(path, "cpu")(image, score=0.06)
    assert len(same) > 0
    assert [entry["score"] for entry in entries] == pytest.approx(same.scores.tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_a_stop_of_the_whole_group_keeps_what_was_found(
    number: signal.Signals, dataset: CocoDataset, tmp_path: Path
) -> None:
    """As a terminal or a scheduler sends it: to the processes that draw too, which end with the command."""
    path = untrained_checkpoint(dataset, tmp_path)
    images, output = tmp_path / "many", tmp_path / "out"
    images.mkdir()
    for k in range(400):
        shutil.copy(dataset.records[0].path, images / f"{k:03d}.png")
    words = [str(images), "--checkpoint", str(path), "--output", str(output), "--score", "0.06"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmrcnn.predict", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(1200):
        if len(list(output.glob("*.png"))) >= 5 or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    pictures = {path.name for path in output.glob("*.png")}
    assert f"after {len(pictures)} of 400 images; what was found in them is in" in error
    entries = json.loads((output / "predictions.json").read_text())
    assert {entry["overlay"] for entry in entries} == pictures
    assert not list(output.glob(".*"))
    for _ in range(100):  # who drew is gone
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes that draw live on")


def test_a_mistake_is_one_line_and_exit_code_2(
    dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tmp_path / "none.pt"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["predict", str(dataset.records[0].path), *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_main(command.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert "none.pt" in printed.err
    assert not (tmp_path / "out").exists()
