"""python -m fastmrcnn.export --format pt2: what it writes, who can run it, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden import FIXTURES

import fastmrcnn
from fastmrcnn import evaluate, export
from fastmrcnn.errors import UserError

SURE = 0.95
"""The other detections of this small network tie with their neighbours: which one stays is rounding."""
ARROWS = ["data.val.images=arrows", "data.val.annotations=arrows/set.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs and a small set that stand where the runs' paths start from, which is the working folder."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(FIXTURES / "checkpoint_0_1", folder, dirs_exist_ok=True)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """The masks' run, as a program for the images of the set."""
    export.main(["--checkpoint", "masks", "--format", "pt2", "--output", "to/model.pt2", *ARROWS])
    return folder / "to" / "model.pt2"


def test_what_is_written(exported: Path) -> None:
    beside = sorted(path.name for path in exported.parent.iterdir())
    assert beside == ["labels.txt", "model.pt2", "preprocessing.json", "run_model.py"]
    told = json.loads(exported.with_name("preprocessing.json").read_text(encoding="utf-8"))
    assert told["outputs"] == ["boxes", "scores", "classes", "valid", "masks"]
    assert told["file"] == {"compiled": False, "device": "cpu"}


def test_it_loads_and_finds_what_the_run_finds(exported: Path) -> None:
    file, run = fastmrcnn.load(exported, "cpu"), fastmrcnn.load("masks", "cpu")
    assert file.card == run.card
    images = sorted(Path("arrows").glob("*.png"))
    for ours, expected in zip(file(images, 0.3), run(images, 0.3), strict=True):
        assert ours.names == expected.names
        assert len(ours.names) > 0
        assert ours.scores == pytest.approx(expected.scores, abs=1e-4)
        sure = expected.scores > SURE
        assert ours.boxes[sure] == pytest.approx(expected.boxes[sure], abs=1e-2)
        assert (ours.masks[sure] != expected.masks[sure]).sum() <= 2


def test_the_runner_needs_pytorch_alone(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported.parent, tmp_path / "elsewhere")
    shutil.copy("arrows/2.png", tmp_path)
    program = "import runpy, sys; sys.modules['fastmrcnn'] = None; sys.modules['onnxruntime'] = None; "
    program += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, "elsewhere/run_model.py", "2.png"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, check=True, capture_output=True, timeout=300
    )
    (line,) = done.stdout.decode().splitlines()
    found = json.loads(line)["objects"]
    expected = fastmrcnn.load("masks", "cpu")("arrows/2.png", 0.5)
    assert [one["label"] for one in found] == expected.names
    assert expected.scores.max() > SURE
    for one, score, box, mask in zip(found, expected.scores, expected.boxes, expected.masks, strict=True):
        assert one["score"] == pytest.approx(float(score), abs=1e-4)
        if score <= SURE:
            continue
        assert one["box"] == pytest.approx(box.tolist(), abs=2e-2)
        assert one["area"] == pytest.approx(int(mask.sum()), abs=3)


def test_what_is_refused(folder: Path) -> None:
    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(UserError, match=message):
            export.main(["--checkpoint", "masks", *arguments])

    refused("--aot goes with --format pt2", "--aot", "cpu")
    refused(r"must end in \.pt2", "--format", "pt2", "--output", "model.onnx")
    if not torch.cuda.is_available():
        refused("finds 0 CUDA devices", "--format", "pt2", "--aot", "cuda")
    assert not list(folder.glob("masks/exported*"))


@pytest.mark.slow
@pytest.mark.parametrize("aot", [[], ["--aot", "cpu"]], ids=["program", "package"])
def test_it_is_judged_as_the_run(folder: Path, aot: list[str]) -> None:
    """By keypoints: in the run with masks two boxes of one object have the same score to the last bit."""
    run = "keypoints"
    file = f"judged_{run}_{len(aot)}/model.pt2"
    export.main(["--checkpoint", run, "--format", "pt2", "--batch", "2", "--output", file, *aot, *ARROWS])
    numbers = []
    for place, checkpoint in enumerate((run, file)):
        output = Path(f"judged_{run}_{len(aot)}_{place}")
        evaluate.main(["--checkpoint", checkpoint, "--output", str(output), "--device", "cpu"])
        numbers.append(json.loads((output / "metrics.json").read_text(encoding="utf-8")))
    expected, found = numbers
    judged = [key for key in expected if "AP" in key]
    assert judged
    for key in judged:
        assert found[key] == pytest.approx(expected[key], abs=0.05), key  # of 100: three digits
