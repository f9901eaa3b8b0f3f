"""From a file to a detector to what it finds in an image: the library's own road."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import small_config, small_model
from PIL import Image
from places import ROOT

import fastmrcnn
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.weights import trained
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import save_checkpoint
from fastmrcnn.weights.peers.programs import export_state

NAMES = ["ant", "bee", "cat"]
SCORE = 0.06  # below what a model finds that has learnt nothing


def config() -> Config:
    return small_config(data={"short_side_test": 75, "long_side_max": 130})


@pytest.fixture
def detector() -> fastmrcnn.Detector:
    return fastmrcnn.Detector(small_model().eval(), ModelCard(config(), NAMES, [4, 5, 9]))


@pytest.fixture
def checkpoint(detector: fastmrcnn.Detector, tmp_path: Path) -> Path:
    return save_checkpoint(
        tmp_path / "run" / "checkpoints",
        step=1,
        model=detector.model,
        optimizer=torch.optim.SGD(detector.model.parameters(), lr=0.1),
        card=detector.card,
        keep=1,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def assert_finds_the_same(loaded: fastmrcnn.Detector, original: fastmrcnn.Detector, image: Path) -> None:
    found, expected = loaded(image, score=SCORE), original(image, score=SCORE)
    assert isinstance(found, fastmrcnn.Prediction)
    assert len(expected) > 0
    for name in ("image", "boxes", "masks", "scores", "classes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.class_names == loaded.class_names


def test_of_a_checkpoint_and_of_a_run(detector: fastmrcnn.Detector, checkpoint: Path, image: Path) -> None:
    for path in (checkpoint, str(checkpoint), checkpoint.parent, checkpoint.parent.parent):
        loaded = fastmrcnn.load(path, "cpu")
        assert loaded.card == detector.card
        assert loaded.class_names == NAMES
        assert_finds_the_same(loaded, detector, image)


def test_of_a_published_file(
    detector: fastmrcnn.Detector,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Read with the recipe that is found from its architecture; here there is one for the small model."""
    monkeypatch.setattr(trained, "published_recipe", lambda *found: (config(), "small"))
    path = tmp_path / "theirs.pth"
    torch.save(export_state(detector.model.state_dict(), "torchvision", path, [1, 2, 3]), path)
    for source in (path, path.as_uri()):
        loaded = fastmrcnn.load(source, "cpu")
        assert "configuration: configs/zoo/small.yaml" in capsys.readouterr().out
        assert loaded.class_names == ["class 1", "class 2", "class 3"]
        assert_finds_the_same(loaded, detector, image)


def test_no_such_device(detector: fastmrcnn.Detector, checkpoint: Path) -> None:
    assert detector.to("cpu") is detector
    for act in (lambda: detector.to("cuda:77"), lambda: fastmrcnn.load(checkpoint, "cuda:77")):
        with pytest.raises(UserError, match="cuda:77"):
            act()


@pytest.mark.parametrize("missing", [["rpn"], ["box_head", "mask_head"]])
def test_half_a_detector_is_none(missing: list[str]) -> None:
    tree = config().model_dump()
    for head in missing:
        tree["model"][head]["enabled"] = False
    half = Config.model_validate(tree)
    with pytest.raises(UserError, match="half a detector"):
        fastmrcnn.Detector(build_model(half.model, 3).eval(), ModelCard(half, NAMES, [1, 2, 3]))


def test_the_earlier_names(detector: fastmrcnn.Detector, checkpoint: Path, image: Path) -> None:
    """In a process of its own: where the command fastmrcnn.predict was imported, it has the name."""
    code = f"""
from fastmrcnn import load_checkpoint, predict
model = load_checkpoint({str(checkpoint)!r}, "cpu")
print(len(predict(model, {str(image)!r}, score={SCORE})), model.class_names)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == f"{len(detector(image, score=SCORE))} {NAMES}\n", done.stderr
