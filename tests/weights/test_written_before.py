"""Run folders that version 0.1 wrote: they load, detect, are judged and go on as they did then.

The bounds are ten times and more what changed between AVX-512, AVX2 and no vectors, one thread and two:
7e-5 in boxes and keypoints, 9e-7 in scores, 6e-7 in losses, nothing in areas and AP.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FIXTURES
from pycocotools import mask as coco_mask
from tiny import record

from fastmrcnn import evaluate, load_checkpoint, train
from fastmrcnn.predict import main as predict_main

STEPS = 600  # of both runs


@pytest.fixture(params=["masks", "keypoints"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of a run, from the folder that its configuration's paths start from."""
    shutil.copytree(FIXTURES / "checkpoint_0_1", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield Path(request.param)
    torch.set_num_threads(before)


def recorded(run: Path) -> dict[str, Any]:
    return json.loads(Path("recorded.json").read_text(encoding="utf-8"))[run.name]


def test_detects_what_it_did(run: Path) -> None:
    assert load_checkpoint(run, "cpu").model.training is False
    predict_main(["arrows", "--checkpoint", str(run), "--output", "found", "--device", "cpu"])
    found = json.loads(Path("found/predictions.json").read_text(encoding="utf-8"))
    expected = recorded(run)["objects"]
    assert [Path(entry["file_name"]).name for entry in found] == [entry["file"] for entry in expected]
    for entry, then in zip(found, expected, strict=True):
        assert entry["category_name"] == "arrow"
        assert entry["bbox"] == pytest.approx(then["bbox"], abs=1e-3)
        assert entry["score"] == pytest.approx(then["score"], abs=1e-4)
        assert ("segmentation" in entry) == (run.name == "masks") == ("mask_area" in then)
        assert ("keypoints" in entry) == (run.name == "keypoints") == ("keypoints" in then)
        if "mask_area" in then:
            assert coco_mask.area(entry["segmentation"]) == pytest.approx(then["mask_area"], abs=1)
        else:
            assert entry["keypoints"] == pytest.approx(then["keypoints"], abs=1e-3)


def test_is_judged_as_it_was(run: Path) -> None:
    evaluate.main(["--checkpoint", str(run), "--output", "judged", "--device", "cpu", "evaluate.pictures=0"])
    found = json.loads(Path("judged/metrics.json").read_text(encoding="utf-8"))
    expected = recorded(run)["metrics"]
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(expected)


def test_goes_on_as_it_did(run: Path) -> None:
    train.main(["--resume", str(run), f"train.steps={STEPS + 3}", "train.log_every=1"])
    rows = [row for row in record(run) if row["iteration"] >= STEPS and "total_loss" in row]
    expected = recorded(run)["losses"]
    assert len(rows) == len(expected) == 3
    for row, then in zip(rows, expected, strict=True):
        assert {name: row[name] for name in then} == pytest.approx(then, rel=1e-4, abs=1e-5)
    assert (run / "checkpoints" / f"step_{STEPS + 3:07d}.pt").is_file()
