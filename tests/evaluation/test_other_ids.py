"""A validation set whose categories have other ids, or another order, gives the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TinyData

from fastmrcnn import evaluate, train
from fastmrcnn.weights.checkpoint import read_checkpoint

NAMES = ["circle", "square", "triangle", "star", "ring"]


def test_numbers_stay_and_results_have_the_files_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = TinyData(tmp_path)
    run = data.run(tmp_path / "runs", "train.steps=2", "optim.lr=0.01")
    file = data.paths["val_annotations"]
    tree = json.loads(file.read_text(encoding="utf-8"))
    new = {number: 60 - 10 * number for number in range(1, 6)}
    for entry in tree["categories"]:
        entry["id"] = new[entry["id"]]
    for entry in tree["annotations"]:
        entry["category_id"] = new[entry["category_id"]]
    (tmp_path / "other.json").write_text(json.dumps(tree), encoding="utf-8")

    found = {}
    for name, judged in (("same", file), ("other", tmp_path / "other.json")):
        given = [f"data.val.images={data.paths['val_images']}", f"data.val.annotations={judged}"]
        output = tmp_path / name
        arguments = ["--checkpoint", str(run), *given, "--output", str(output), "evaluate.pictures=0"]
        capsys.readouterr()
        evaluate.main([*arguments, "model.box_head.score_threshold=0"])
        said = capsys.readouterr().out
        assert ("other.json: classes are matched with" in said) == (name == "other")
        results = json.loads((output / evaluate.RESULTS).read_text(encoding="utf-8"))
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        found[name] = (results, metrics)
    assert {f"bbox/AP-{name}" for name in NAMES} <= found["same"][1].keys()
    assert found["other"][1] == found["same"][1]
    assert len({entry["category_id"] for entry in found["same"][0]}) > 1
    assert found["other"][0] == [
        entry | {"category_id": new[entry["category_id"]]} for entry in found["same"][0]
    ]


def test_training_from_a_run_with_its_classes_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new run has its file's order, and rows that say the same."""
    data = TinyData(tmp_path)
    run = data.run(tmp_path / "first", "train.steps=2")
    tree = json.loads(data.paths["train_annotations"].read_text(encoding="utf-8"))
    for entry in tree["categories"]:
        entry["id"] = 6 - entry["id"]
    for entry in tree["annotations"]:
        entry["category_id"] = 6 - entry["category_id"]
    data.paths["train_annotations"].write_text(json.dumps(tree), encoding="utf-8")
    capsys.readouterr()
    train.main(data.arguments(tmp_path / "second", f"model.weights={run}", "train.steps=1", "optim.lr=1e-9"))
    line = "Taken over by name, 5 of 5 classes: ring, star, triangle, square, circle"
    assert line in capsys.readouterr().out.splitlines()
    before, after = read_checkpoint(run), read_checkpoint(tmp_path / "second")
    assert after["class_names"] == before["class_names"][::-1] == NAMES[::-1]
    for key in ("box_head.classes.weight", "mask_head.predictor.weight"):
        rows = before["model"][key][:5].flip(0)
        assert after["model"][key][:5].allclose(rows, atol=1e-6), key
        assert not before["model"][key][:5].allclose(rows, atol=1e-6)
