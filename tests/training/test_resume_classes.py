"""A run that goes on with another file keeps the meaning of its class numbers, or is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from arrows import write_arrows
from tiny import TREE, TinyData, assert_same_state, newest_run, refusal

from fastmrcnn import train
from fastmrcnn.weights.checkpoint import read_checkpoint

Tree = dict[str, Any]
SHORT = ["train.steps=2", "train.checkpoint_every=2", "evaluate.pictures=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def started(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    return data.run(tmp_path_factory.mktemp("runs"), *SHORT, val=True)


@pytest.fixture
def run(started: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(started, tmp_path / "runs" / "run_001"))


def rewritten(file: Path, folder: Path, change: Callable[[Tree], None]) -> Path:
    tree = json.loads(file.read_text(encoding="utf-8"))
    change(tree)
    path = folder / f"again_{file.name}"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def renumber(ids: Callable[[int], int]) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        for entry in tree["categories"]:
            entry["id"] = ids(entry["id"])
        for entry in tree["annotations"]:
            entry["category_id"] = ids(entry["category_id"])

    return change


@pytest.mark.parametrize(
    "ids", [lambda number: 6 - number, lambda number: 10 * number], ids=["reversed", "times ten"]
)
def test_other_ids_of_the_same_names_change_nothing(
    ids: Callable[[int], int],
    data: TinyData,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither the weights, bit for bit, nor the numbers of the evaluation, nor what classes are called."""
    same = Path(shutil.copytree(run, tmp_path / "same" / "run_001"))
    train.main(["--resume", str(same), "train.steps=4"])
    files = [rewritten(data.paths[f"{s}_annotations"], tmp_path, renumber(ids)) for s in ("train", "val")]
    assert [c["id"] for c in json.loads(files[0].read_text())["categories"]] == [ids(i) for i in range(1, 6)]
    given = [f"data.{s}.annotations={f}" for s, f in zip(("train", "val"), files, strict=True)]
    capsys.readouterr()
    train.main(["--resume", str(run), "train.steps=4", *given])
    assert (
        "classes are matched with the checkpoint by name, since their ids differ" in capsys.readouterr().out
    )
    expected, found = read_checkpoint(same), read_checkpoint(run)
    assert found["step"] == 4
    assert_same_state(expected, found)
    assert found["class_names"] == expected["class_names"]
    assert found["category_ids"] == [ids(number) for number in expected["category_ids"]]
    results = [
        json.loads((r / "evaluation" / "coco_instances_results.json").read_text()) for r in (same, run)
    ]
    assert len(results[0]) > 0
    for one, other in zip(*results, strict=True):
        assert other == one | {"category_id": ids(one["category_id"])}
    # And once more, from the checkpoint that was written with the new ids.
    train.main(["--resume", str(run), "train.steps=5"])
    assert read_checkpoint(run)["class_names"] == expected["class_names"]


def rename(tree: Tree) -> None:
    tree["categories"][1]["name"] = "lime"


def extend(tree: Tree) -> None:
    tree["categories"].append({"id": 6, "name": "lime"})


def shorten(tree: Tree) -> None:
    last = tree["categories"].pop()
    tree["annotations"] = [e for e in tree["annotations"] if e["category_id"] != last["id"]]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            rename,
            "its 5 classes do not match the 5 of the run: category 2 is 'lime' here, but 'square' there",
        ),
        (extend, "its 6 classes do not match the 5 of the run: category 6 'lime' is not there"),
        (shorten, "its 4 classes do not match the 5 of the run: the file lacks 'ring'"),
    ],
)
def test_what_has_no_match_is_refused_with_the_way_out(
    change: Callable[[Tree], None],
    words: str,
    dry: list[str],
    data: TinyData,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (run / "config.yaml").read_bytes()
    file = rewritten(data.paths["train_annotations"], tmp_path, change)
    arguments = ["--resume", str(run), "train.steps=4", f"data.train.annotations={file}"]
    line = refusal([*arguments, *dry], capsys, monkeypatch)
    assert words in line
    assert str(file) in line
    assert "model.weights=RUN to start anew" in line
    assert (run / "config.yaml").read_bytes() == before
    assert [path.name for path in (run / "checkpoints").glob("*.pt")] == ["step_0000002.pt"]


def test_other_weights_are_not_taken_for_an_order(
    data: TinyData, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(["--resume", str(run), f"model.weights={run}"], capsys, monkeypatch)
    assert "model.weights starts a new run and goes with --config" in line


def test_keypoints_in_another_order_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_arrows(tmp_path / "arrows", 1, 2)
    tree = copy.deepcopy(TREE)
    tree["model"]["keypoint_head"] = {"enabled": True, "convs": 1, "channels": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    given = [f"data.train.images={file.parent}", f"data.train.annotations={file}", f"output={tmp_path}/runs"]
    train.main(["--config", str(tmp_path / "recipe.yaml"), *given, *SHORT])

    def exchange(content: Tree) -> None:
        content["categories"][0]["keypoints"] = ["centre", "tip", "left_barb", "right_barb"]

    again = rewritten(file, tmp_path, exchange)
    run = newest_run(tmp_path / "runs")
    line = refusal(["--resume", str(run), f"data.train.annotations={again}"], capsys, monkeypatch)
    assert "its keypoints do not match the checkpoint: centre, tip, left_barb, right_barb here" in line
    assert "model.weights=RUN to start anew" in line
