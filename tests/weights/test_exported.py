"""A file in a model's place: batches, padding, images that do not fit, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from batches import small_config

from fastmrcnn.data.keypoints import COCO_PERSON
from fastmrcnn.errors import UserError
from fastmrcnn.structures import Batch
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.exported import (
    Arrays,
    ExportedCard,
    ExportedModel,
    as_text,
    from_text,
    load_exported,
    open_session,
)


class Recorder:
    """A file that finds one object in each image: the whole of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, pixels: np.ndarray, sizes: np.ndarray) -> Arrays:
        self.calls.append((pixels, sizes))
        zeros = np.zeros_like(sizes)
        boxes = np.concatenate([zeros, sizes[:, ::-1]], axis=1)[:, None].astype(np.float32)
        count = len(sizes)
        return {
            "boxes": boxes,
            "scores": np.linspace(0, 1, count, dtype=np.float32)[:, None],
            "classes": np.zeros((count, 1), np.int64),
            "valid": np.ones((count, 1), np.bool_),
            "masks": np.ones((count, 1, 28, 28), np.float32),
        }


def batch_of(*sizes: tuple[int, int], shape: tuple[int, int]) -> Batch:
    random = torch.Generator().manual_seed(0)
    pixels = torch.zeros((len(sizes), 3, *shape), dtype=torch.uint8)
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[:, :height, :width] = torch.randint(
            1, 256, (3, height, width), generator=random, dtype=torch.uint8
        )
    return Batch(pixels, torch.tensor(sizes))


def test_a_batch_goes_through_in_as_many_calls_as_it_takes() -> None:
    run = Recorder()
    batch = batch_of((40, 64), (64, 30), (10, 10), shape=(64, 64))
    found = ExportedModel(run, (64, 96), 2)(batch)
    assert [len(pixels) for pixels, _ in run.calls] == [2, 2]
    pixels = np.concatenate([pixels for pixels, _ in run.calls])[:3]
    assert pixels.shape == (3, 64, 96, 3)
    assert (pixels[:, :, :64].transpose(0, 3, 1, 2) == batch.pixels.numpy()).all()
    assert not pixels[:, :, 64:].any()
    assert found.boxes[:, 0].tolist() == [[0, 0, 64, 40], [0, 0, 30, 64], [0, 0, 10, 10]]
    assert found.scores.shape == (3, 1)
    assert found.masks is not None
    assert found.masks.shape == (3, 1, 28, 28)
    assert found.cut.tolist() == [0, 0, 0]


def test_an_image_that_does_not_fit_is_resized_and_its_boxes_come_back() -> None:
    run = Recorder()
    batch = batch_of((100, 50), (60, 64), shape=(128, 64))
    found = ExportedModel(run, (64, 64), 2)(batch)
    ((pixels, sizes),) = run.calls
    assert sizes.tolist() == [[64, 32], [60, 64]]
    assert pixels[0, :64, :32].all()
    assert not pixels[0, :, 32:].any()
    assert found.boxes[:, 0].tolist() == [[0, 0, 50, 100], [0, 0, 64, 60]]


def card() -> ExportedCard:
    config = small_config(data={"short_side_test": 77})
    return ExportedCard(ModelCard(config, ["ä", "b"], [3, 9], COCO_PERSON), (64, 96), 2, True)


def test_what_a_file_says_of_itself_comes_back() -> None:
    assert from_text(as_text(card()), Path("model.onnx")) == card()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "does not tell its classes"),
        ("{", "damaged"),
        ("{}", "damaged"),
        (as_text(card()).replace('"format_version": 1', '"format_version": 2'), "upgrade fastmrcnn"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str | None, word: str) -> None:
    with pytest.raises(UserError, match=r"model\.onnx: .*" + word):
        from_text(text, Path("model.onnx"))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="no such file"):
        load_exported(tmp_path / "model.onnx", "cpu")
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="onnxruntime cannot run it"):
        load_exported(tmp_path / "model.onnx", "cpu")
    with pytest.raises(UserError, match="this onnxruntime runs on"):
        open_session(tmp_path / "model.onnx", "cuda")


def test_without_onnxruntime_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_exported(tmp_path / "model.onnx", "cpu")
