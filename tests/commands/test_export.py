"""The command from a run to a file, and the file in the hands of those who have nothing of this program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from places import FIXTURES

import fastmrcnn
from fastmrcnn import evaluate, export, propose
from fastmrcnn.deployment.parity import FULL
from fastmrcnn.errors import UserError
from fastmrcnn.predict import main as predict

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

OLD = FIXTURES / "checkpoint_0_1"
ARROWS = OLD / "arrows"
VAL = [f"data.val.images={ARROWS}", f"data.val.annotations={ARROWS / 'set.json'}"]
BESIDE = ["config.pbtxt", "labels.txt", "preprocessing.json", "run_model.py"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an exported file in it."""
    run = shutil.copytree(OLD / "masks", tmp_path_factory.mktemp("export") / "run")
    export.main(["--checkpoint", str(run), "--batch", "2", "--paste", *VAL])
    return run / "exported_001" / "model.onnx"


@pytest.fixture
def cached(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported next is that file's graph: to trace one takes seconds."""
    import onnx

    model = onnx.load(str(exported))
    del model.metadata_props[:]
    monkeypatch.setattr(export, "as_onnx", lambda *arguments: model)


def test_files_stand_beside_it(exported: Path) -> None:
    assert sorted(path.name for path in exported.parent.iterdir()) == sorted([*BESIDE, "model.onnx"])
    assert (exported.parent / "labels.txt").read_text(encoding="utf-8") == "arrow\n"
    rule = json.loads((exported.parent / "preprocessing.json").read_text(encoding="utf-8"))
    assert rule["inputs"]["pixels"]["shape"] == [2, 64, 64, 3]
    assert rule["resize"]["fit"] == [64, 64]
    text = (exported.parent / "config.pbtxt").read_text(encoding="utf-8")
    import onnxruntime

    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    for value in (*session.get_inputs(), *session.get_outputs()):
        assert f'name: "{value.name}"' in text
        assert f"dims: {list(value.shape)}" in text
    assert [value.name for value in session.get_outputs()][-1] == "bits"


def test_it_has_operators_of_onnx_alone(exported: Path) -> None:
    import onnx

    model = onnx.load(str(exported))
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("RoiAlign") == 2  # one for all levels: of boxes, of masks
    assert kinds.count("NonMaxSuppression") == 2
    assert "NonZero" not in kinds
    shapes = [[side.dim_value for side in one.type.tensor_type.shape.dim] for one in model.graph.output]
    assert all(side > 0 for shape in shapes for side in shape)


def test_the_runner_works_elsewhere(exported: Path, tmp_path: Path) -> None:
    place = shutil.copytree(exported.parent, tmp_path / "elsewhere")
    shutil.copy(ARROWS / "2.png", place / "image.png")
    done = subprocess.run(
        [sys.executable, "run_model.py", "image.png"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    objects = json.loads(done.stdout)["objects"]
    found = fastmrcnn.load(exported)(ARROWS / "2.png")
    assert len(found) == 2
    assert [one["label"] for one in objects] == found.names
    np.testing.assert_allclose([one["score"] for one in objects], found.scores, atol=1e-6)
    np.testing.assert_allclose([one["box"] for one in objects], found.boxes, atol=1e-3)
    assert found.masks is not None
    areas = found.masks.sum((1, 2))
    assert np.abs(areas - [one["area"] for one in objects]).max() <= 1  # where a probability is at 0.5


def test_it_finds_what_the_run_finds(exported: Path, tmp_path: Path) -> None:
    run, file = fastmrcnn.load(OLD / "masks", "cpu"), fastmrcnn.load(exported)
    # The third has boxes of exactly equal scores, of which torch takes any.
    images: list[Any] = [np.asarray(Image.open(ARROWS / f"{i}.png").convert("RGB")) for i in (1, 2)]
    images.append(np.asarray(Image.fromarray(images[0]).resize((40, 52))))
    for one, other in zip(run(images), file(images), strict=True):
        assert len(one) > 0
        assert one.names == other.names
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
        assert one.masks is not None
        assert other.masks is not None
        assert (one.masks != other.masks).mean() < 1e-3
    predict([str(ARROWS / "1.png"), "--checkpoint", str(exported), "--output", str(tmp_path / "found")])
    entries = json.loads((tmp_path / "found" / "predictions.json").read_text(encoding="utf-8"))
    assert [entry["category_name"] for entry in entries] == ["arrow"]


def test_pasted_bits_are_the_masks_in_the_image(exported: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    image = np.asarray(Image.open(ARROWS / "2.png").convert("RGB"))
    feeds = {"pixels": np.stack([image, image]), "sizes": np.full((2, 2), 64, np.int32)}
    bits, valid = session.run(["bits", "valid"], feeds)
    masks = np.unpackbits(bits, axis=-1)
    assert valid.sum(1).tolist() == [2, 2]
    assert not masks[:, 2:].any()
    wanted = fastmrcnn.load(OLD / "masks", "cpu")(image).masks
    assert wanted is not None
    assert (masks[0, :2] != wanted).sum() <= 2
    assert (masks[0] == masks[1]).all()


def test_out_of_tolerance_nothing_is_written(
    cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "FULL", FULL._replace(boxes=-1.0))
    target = tmp_path / "new" / "model.onnx"
    with pytest.raises(SystemExit) as end:
        export.main(["--checkpoint", str(OLD / "masks"), "--batch", "2", "--output", str(target), *VAL])
    assert end.value.code == 1
    assert "boxes differ by" in capsys.readouterr().err
    assert not target.parent.exists()


def test_noise_will_do_where_there_are_no_images(
    cached: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "own.onnx"
    words = ["--checkpoint", str(OLD / "masks"), "--batch", "2", "--images", "1", "--shape", "64", "64"]
    export.main([*words, "--output", str(target), f"data.val.images={tmp_path / 'gone'}", VAL[1]])
    assert "checked with noise, since" in capsys.readouterr().out
    assert target.is_file()
    assert '"own.onnx"' in (tmp_path / "run_model.py").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="already there"):
        export.main([*words, "--output", str(target), *VAL])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "64", "65"], "the nearest is 64 64 or 64 96"),
        (["--batch", "0"], "must be at least 1"),
        (["--output", "model.pt"], r"must end in \.onnx"),
        (["model.roi.op=warp", "model.roi.mode=max"], "RoIWarp of the largest sample"),
        (["model.roi.mode=max", "model.roi.sampling_ratio=0"], "adaptive number of samples"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export.main(["--checkpoint", str(OLD / "masks"), *words, *VAL])


def test_an_exported_file_is_no_run(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is exported already"):
        export.main(["--checkpoint", str(exported), *VAL])
    with pytest.raises(UserError, match="with the settings of its model in it"):
        evaluate.main(["--checkpoint", str(exported), *VAL, "model.box_head.detections=3"])
    with pytest.raises(UserError, match="gives no proposals"):
        propose.main(
            [
                *("--checkpoint", str(exported), "--output", str(tmp_path / "proposals.npz")),
                *("--images", str(ARROWS), "--annotations", str(ARROWS / "set.json")),
            ]
        )


def test_without_the_packages_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        UserError, match=r"onnxscript is not installed.*pip install onnx onnxscript onnxruntime"
    ):
        export.main(["--checkpoint", str(OLD / "masks")])
