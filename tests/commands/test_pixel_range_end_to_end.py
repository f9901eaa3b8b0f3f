"""One range of values from the training set through checkpoint, evaluation and prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import TinyData, refusal

import fastmrcnn.predict as predict_command
from fastmrcnn import evaluate, propose, train
from fastmrcnn.data import worker
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.detection.detector import load
from fastmrcnn.errors import UserError
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint

RANGE = [0.0, 4095.0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """The shapes as a 12-bit camera gives them, grey in files of 16 bits."""
    found = TinyData(tmp_path_factory.mktemp("twelve"))
    for split in ("train", "val"):
        for path in Path(found.paths[f"{split}_images"]).iterdir():
            grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
            Image.fromarray(grey * 16).save(path)
    return found


@pytest.fixture(scope="module")
def run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.run(tmp_path_factory.mktemp("runs"), "train.steps=4", "evaluate.pictures=0", val=True)


@pytest.fixture
def brightest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each image that a loader reads."""
    real, found = worker.read_image, []

    def read_image(record: ImageRecord, *memory: Any) -> Any:
        pixels, note = real(record, *memory)
        found.append(int(pixels.max()))
        return pixels, note

    monkeypatch.setattr(worker, "read_image", read_image)
    return found


def image(data: TinyData) -> Path:
    return min(Path(data.paths["val_images"]).iterdir())


def old(run: Path, folder: Path) -> Path:
    """The run as an earlier version would have left it."""
    shutil.copytree(run, folder)
    path = find_checkpoint(folder)
    checkpoint = torch.load(path, weights_only=True)
    for key in ("pixel_range", "max_pixels", "missing"):
        del checkpoint["config"]["data"][key]
    torch.save(checkpoint, path)
    return folder


def test_the_range_goes_with_the_model(
    data: TinyData, run: Path, brightest: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["pixel_range"] == RANGE
    assert read_checkpoint(run)["config"]["data"]["pixel_range"] == RANGE
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(run), "--output", str(tmp_path / "evaluation")])
    assert "read as 0..4095 (data.pixel_range)" in capsys.readouterr().out
    assert len(brightest) == 3
    assert min(brightest) > 128
    detector = load(run, "cpu")
    wanted = np.asarray(Image.open(image(data))) * (255 / 4095)
    assert np.abs(detector(image(data)).image[:, :, 0] - wanted).max() <= 0.5
    np.testing.assert_array_equal(detector(Image.open(image(data))).image, detector(image(data)).image)


def test_training_reads_with_it(
    data: TinyData, brightest: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(data.arguments(tmp_path, "train.steps=1", "evaluate.pictures=0", val=True))
    assert len(brightest) >= 5
    assert min(brightest) > 128
    printed = capsys.readouterr().out
    assert "6 images are 16-bit, with values" in printed
    assert printed.count("read as 0..4095 (data.pixel_range)") == 2


def test_a_range_of_the_users_own(
    data: TinyData, brightest: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data.run(tmp_path, "train.steps=1", "data.pixel_range=[0, 65535]")
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["pixel_range"] == [0.0, 65535.0]
    assert max(brightest) <= 16
    assert "of which they are a small, dark part" in capsys.readouterr().out


def test_runs_of_earlier_versions_go_on_as_they_were(
    data: TinyData, run: Path, brightest: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = old(run, tmp_path / "old")
    capsys.readouterr()
    predict_command.main([str(image(data)), "--checkpoint", str(before), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "read as 0..65535, of which they are a small, dark part" in printed
    assert "the model was not trained with a data.pixel_range" in printed
    train.main(["--resume", str(before), "train.steps=5", "evaluate.pictures=0"])
    assert max(brightest) <= 16
    assert "read as 0..65535" in capsys.readouterr().out
    assert yaml.safe_load((before / "config.yaml").read_text())["data"]["pixel_range"] == "auto"
    train.main(["--resume", str(before), "--dry-run"])
    assert "read as 0..65535" in capsys.readouterr().out


def test_predict_says_what_does_not_fit(
    data: TinyData, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, most in (("a.png", 4095), ("b.png", 9000), ("c.png", 9001), ("d.png", 800)):
        Image.fromarray(np.linspace(0, most, 64 * 64).reshape(64, 64).astype(np.uint16)).save(folder / name)
    capsys.readouterr()
    predict_command.main([str(folder), "--checkpoint", str(run), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert (
        "b.png: 16-bit values 0..9000 reach beyond 0..4095 and are clipped (one of 2 such images)" in printed
    )
    assert (
        "d.png: 16-bit values 0..800 are read as 0..4095, of which they are a small, dark part\n" in printed
    )
    assert "a.png" not in printed


def test_propose_reads_with_it(
    data: TinyData, run: Path, brightest: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = data.paths
    propose.main(
        ["--checkpoint", str(run), "--images", str(paths["val_images"]), "--annotations",
         str(paths["val_annotations"]), "--output", str(tmp_path / "a.npz")]
    )  # fmt: skip
    assert min(brightest) > 128
    assert "read as 0..4095 (data.pixel_range)" in capsys.readouterr().out


def test_settings(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (
        "[4095, 0]",
        "[0]",
        "full",
        "7",
        "[a, b]",
        "[0, .nan]",
        "[0, .inf]",
        "[true, 5]",
        "null",
        "[[0], 1]",
    ):
        line = refusal(data.arguments(tmp_path, f"data.pixel_range={value}"), capsys, monkeypatch)
        assert "data.pixel_range: expected auto or [black, white]" in line
    line = refusal(data.arguments(tmp_path, "data.max_pixels=4095"), capsys, monkeypatch)
    assert "64 x 64 = 4,096 pixels, more than data.max_pixels = 4,095" in line
    assert "data.max_pixels=4096" in line
    assert "data.missing" in refusal(data.arguments(tmp_path, "data.missing=ignore"), capsys, monkeypatch)


def test_large_images_in_predict(
    data: TinyData, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = load(run, "cpu")
    assert detector.reading.max_pixels == 178_956_970
    arguments = [
        str(image(data)),
        "--checkpoint",
        str(run),
        "--output",
        str(tmp_path / "out"),
        "--max-pixels",
    ]
    with pytest.raises(UserError, match=r"more than data\.max_pixels = 4,095.*--max-pixels 4096"):
        predict_command.main([*arguments, "4095"])
    assert not (tmp_path / "out").exists()
    predict_command.main([*arguments, "4096"])
    assert "1 image" in capsys.readouterr().out


def test_missing_images_are_left_out_of_training_and_evaluation(
    data: TinyData, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(data.paths["val_images"], tmp_path / "images")
    gone = min(images.iterdir())
    gone.unlink()
    arguments = ["--checkpoint", str(run), f"data.val.images={images}", "--output", str(tmp_path / "out")]
    evaluate.main([*arguments, "data.missing=skip"])
    assert "left out 1 image with" in capsys.readouterr().out
    ids = {
        entry["id"]
        for entry in json.loads(Path(data.paths["val_annotations"]).read_text())["images"]
        if entry["file_name"] == gone.name
    }
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert not ids & {entry["image_id"] for entry in results}
