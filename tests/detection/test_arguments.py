"""What the Python interface refuses, in one line that names the argument, and what a list gives."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import small_config, small_model
from PIL import Image

import fastmrcnn
from fastmrcnn.detection.detector import load, predict
from fastmrcnn.errors import UserError
from fastmrcnn.weights.card import ModelCard

SCORE = 0.06  # below what a model finds that has learnt nothing
PIXELS = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def detector() -> fastmrcnn.Detector:
    config = small_config(data={"short_side_test": 75, "long_side_max": 130})
    return fastmrcnn.Detector(small_model().eval(), ModelCard(config, ["ant", "bee", "cat"], [4, 5, 9]))


def refusal(act: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(ValueError, match=r"^\w") as caught:
        act(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut_off() -> Image.Image:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()[:3000]))


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        (None, ["must be a file, a Pillow image", "got None"]),
        (7, ["got 7"]),
        (b"\x89PNG" * 20, ["got a bytes", "PIL.Image.open(io.BytesIO"]),
        ({"image": 1}, ["got {'image': 1}"]),
        ((PIXELS for _ in range(2)), ["got a generator", "or a list of such"]),
        ("", ["must be text or a Path, got ''"]),
        (np.zeros((0, 0, 3), np.uint8), ["got (0, 0, 3) uint8", "no pixel"]),
        (np.zeros(0, np.uint8), ["got (0,) uint8"]),
        (np.array(None), ["got () object"]),
        (PIXELS / 255, ["got (50, 60, 3) float64", "scale white to 255"]),
        (PIXELS > 100, ["got (50, 60, 3) bool"]),
        (PIXELS.astype(np.uint16), ["uint16"]),
        (PIXELS[:, :, [0, 1, 2, 0]], ["got (50, 60, 4) uint8", "transparency"]),
        (PIXELS[:, :, :1], ["got (50, 60, 1) uint8", "[:, :, 0]"]),
        (PIXELS[:, :, :2], ["got (50, 60, 2) uint8"]),
        (PIXELS.transpose(2, 0, 1), ["got (3, 50, 60) uint8", "colours come last"]),
        (PIXELS[None], ["got (1, 50, 60, 3) uint8", "as a list"]),
        (torch.zeros(3, 50, 60, dtype=torch.uint8), ["got (3, 50, 60) uint8", "colours come last"]),
        (torch.zeros(50, 60, 3), ["got (50, 60, 3) float32", "scale white to 255"]),
        (torch.zeros(50, 60, 3, dtype=torch.uint8, device="meta"), ["on the CPU", "on meta"]),
        (torch.zeros(5, 6, dtype=torch.uint8).to_sparse(), ["dense", "sparse"]),
        (Image.new("RGB", (0, 5)), ["no pixel: width 0, height 5"]),
        (cut_off(), ["image cannot be used: ", "truncated"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_images_that_are_none(image: Any, parts: list[str], detector: fastmrcnn.Detector) -> None:
    message = refusal(detector, image)
    assert message.startswith("image")
    for part in parts:
        assert part in message
    assert refusal(detector, [PIXELS, image]).startswith("image[1]")
    assert refusal(predict, detector, image) == refusal(detector, image)


@pytest.mark.parametrize("score", [50, 1.01, -0.1, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_scores_that_are_none(score: Any, detector: fastmrcnn.Detector) -> None:
    message = refusal(detector, PIXELS, score)
    assert message.startswith(f"score must be a number in 0..1, got {score!r}")
    assert ("50 % are 0.5" in message) == (score == 50)
    assert refusal(detector, [], score) == message


@pytest.mark.parametrize("score", [0, 1, np.float32(0.5), np.int64(1)])
def test_scores_of_any_type_of_number(score: Any, detector: fastmrcnn.Detector) -> None:
    assert (detector(PIXELS, score).scores >= score).all()


@pytest.mark.parametrize("batch", [0, -1, 2.0, None, True, "2"])
def test_batches_that_are_none(batch: Any, detector: fastmrcnn.Detector) -> None:
    assert refusal(detector, [PIXELS], batch=batch).startswith("batch must be a whole number above 0, got ")


@pytest.mark.parametrize("path", [None, "", b"run", 5, ["run"]])
def test_paths_that_are_none(path: Any, detector: fastmrcnn.Detector) -> None:
    for act in (load, detector(PIXELS).save):
        assert refusal(act, path) == f"path must be text or a Path, got {path!r}"


def test_detectors_that_are_none(detector: fastmrcnn.Detector) -> None:
    assert refusal(predict, None, PIXELS) == "detector must be what fastmrcnn.load gives, got a NoneType"
    assert "got a MaskRCNN" in refusal(predict, detector.model, PIXELS)


def test_files_that_are_none(detector: fastmrcnn.Detector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder; give the files in it as a list"):
        detector(tmp_path)
    with pytest.raises(UserError, match=r"gone\.png"):
        detector([PIXELS, tmp_path / "gone.png"])


def test_any_layout_in_memory(detector: fastmrcnn.Detector) -> None:
    expected = detector(PIXELS, SCORE)
    assert len(expected) > 0
    wide = np.repeat(PIXELS, 2, axis=1)
    read_only = PIXELS.copy()
    read_only.flags.writeable = False
    for image in (
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()).permute(1, 2, 0),
        wide[:, ::2],
        PIXELS[:, :, ::-1].copy()[:, :, ::-1],
        np.asfortranarray(PIXELS),
        read_only,
    ):
        found = detector(image, SCORE)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.image, PIXELS)
    grey = detector(torch.from_numpy(PIXELS[:, :, 0].copy()), SCORE)
    np.testing.assert_array_equal(grey.boxes, detector(PIXELS[:, :, 0], SCORE).boxes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (3, 3)])
def test_small_and_narrow_images(shape: tuple[int, int], detector: fastmrcnn.Detector) -> None:
    found = detector(np.full(shape, 90, np.uint8), 0)
    assert found.image.shape == (*shape, 3)
    assert found.masks is not None
    assert found.masks.shape == (len(found), *shape)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_list_gives_what_its_images_give_one_by_one(
    batch: int, detector: fastmrcnn.Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    sizes = [(50, 60), (60, 40), (52, 60), (50, 60), (61, 40), (40, 70)]
    images: list[Any] = [rng.integers(0, 255, (*size, 3), np.uint8) for size in sizes]
    Image.fromarray(images[1]).save(tmp_path / "1.png")
    images[1], images[2] = tmp_path / "1.png", Image.fromarray(images[2])
    alone = [detector(image, SCORE) for image in images]
    seen = []
    real = type(detector.model).forward

    def forward(self: Any, given: Any) -> Any:
        seen.append(len(given.pixels))
        return real(self, given)

    monkeypatch.setattr(type(detector.model), "forward", forward)
    for given in (images, tuple(images)):
        found = detector(given, SCORE, batch=batch)
        assert len(found) == len(images)
        for one, other in zip(found, alone, strict=True):
            assert len(one) == len(other) > 0
            np.testing.assert_array_equal(one.image, other.image)
            np.testing.assert_array_equal(one.classes, other.classes)
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            assert one.masks is not None
            assert other.masks is not None
            assert (one.masks != other.masks).mean() < 1e-3
    # Three of one padded shape, two of another, one of a third.
    assert sorted(seen[: len(seen) // 2]) == {1: [1] * 6, 2: [1, 1, 2, 2], 8: [1, 2, 3]}[batch]
    assert detector([]) == detector(()) == []
