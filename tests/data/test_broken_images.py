"""Images that turn out not to be readable while training: who stands in for them, and how many may be."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import TinyData, assert_same_state, newest_run, record, refusal
from torch import Tensor

from fastmrcnn import train
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.loader import EvalLoader, TrainLoader
from fastmrcnn.data.order import substitutes
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.data.transforms import Augment
from fastmrcnn.data.worker import MOST_TRIES
from fastmrcnn.errors import UserError
from fastmrcnn.structures import tree_map
from fastmrcnn.weights.checkpoint import read_checkpoint

EVERYTHING = Augment(0.5, 0.5, 0.5, 0.2, 0.2)


def damage(path: Path) -> None:
    """The header stays whole."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def shapes(folder: Path, images: int = 10) -> CocoDataset:
    paths = write_shapes(folder, seed=3, train=images, val=1, size=48)
    return read_coco(paths["train_images"], paths["train_annotations"])


def loader(dataset: CocoDataset, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {
        "batch": 3,
        "short_sides": [40, 48],
        "long_side_max": 96,
        "steps": 9,
        "seed": 1,
        "augment": EVERYTHING,
        "max_broken": 0.2,
    }
    return TrainLoader(dataset, **(defaults | options))


def tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(found.append, batch)
    return found


def test_another_image_stands_in_whatever_the_workers_and_the_start(tmp_path: Path) -> None:
    dataset = shapes(tmp_path)
    whole = list(loader(dataset))
    for index in (2, 6):
        damage(dataset.records[index].path)
    once = list(loader(dataset))
    gone = {dataset.records[index].image_id for index in (2, 6)}
    assert all(loaded.left_out == {} for loaded in whole)
    told = [image_id for loaded in once for image_id in loaded.left_out]
    assert sorted(told) == sorted(gone)  # each once
    assert all("cannot be decoded" in fault for loaded in once for fault in loaded.left_out.values())
    replaced = 0
    for before, after in zip(whole, once, strict=True):
        for one, other in zip(before.image_ids, after.image_ids, strict=True):
            assert other not in gone
            assert one == other or one in gone
            replaced += one in gone
    assert replaced >= 4
    for options in ({"workers": 2}, {"start_step": 4}, {"start_step": 4, "workers": 1}):
        again = list(loader(dataset, **options))
        for one, other in zip(once[-len(again) :], again, strict=True):
            assert one.image_ids == other.image_ids
            assert all((a == b).all() for a, b in zip(tensors(one.batch), tensors(other.batch), strict=True))


def test_it_fits_where_the_other_would_have_been(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number, (height, width) in enumerate([(30, 80)] * 3 + [(80, 30)] * 7, start=1):
        Image.new("RGB", (width, height), (number, 0, 0)).save(tmp_path / f"{number}.png")
        tree["images"] += [{"id": number, "file_name": f"{number}.png", "width": width, "height": height}]
        one = {"id": number, "image_id": number, "category_id": 1, "bbox": [2, 2, 20, 20], "area": 400}
        tree["annotations"] += [{**one, "segmentation": [[2, 2, 22, 2, 22, 22, 2, 22]], "iscrowd": 0}]
    (tmp_path / "set.json").write_text(json.dumps(tree))
    dataset = read_coco(tmp_path, tmp_path / "set.json")
    damage(tmp_path / "2.png")
    found = list(loader(dataset, short_sides=[30], long_side_max=80, augment=None, steps=30))
    assert {number for loaded in found for number in loaded.left_out} == {2}
    for loaded in found:
        wide = loaded.batch.pixels.shape[2:] == (32, 96)
        assert all((number <= 3) == wide and number != 2 for number in loaded.image_ids)
        assert loaded.batch.pixels[:, 0, 0, 0].tolist() == loaded.image_ids  # it is that image indeed


def test_a_folder_that_has_gone_is_not_searched_to_its_end(tmp_path: Path) -> None:
    dataset = shapes(tmp_path, images=MOST_TRIES + 10)
    shutil.rmtree(dataset.records[0].path.parent)
    with pytest.raises(UserError, match=f"no such image file.*, nor can {MOST_TRIES - 1} others") as caught:
        list(loader(dataset, max_broken=1.0))
    assert "\n" not in str(caught.value)


def test_an_only_image(tmp_path: Path) -> None:
    dataset = shapes(tmp_path, images=1)
    damage(dataset.records[0].path)
    with pytest.raises(UserError, match=r"cannot be decoded .*; no other image can stand in for it"):
        list(loader(dataset, max_broken=1.0))


def test_more_than_the_share_is_an_error(tmp_path: Path) -> None:
    dataset = shapes(tmp_path)
    for index in (2, 6, 7):
        damage(dataset.records[index].path)
    with pytest.raises(UserError) as caught:
        list(loader(dataset))
    assert "; 3 of 10 images could not be read so far, or leave" in str(caught.value)
    assert "data.max_broken=0.3 or more (the share of the images that may be, now 0.2)" in str(caught.value)
    assert len(list(loader(dataset, max_broken=0.3))) == 9
    with pytest.raises(UserError, match=r"cannot be decoded .* data\.max_broken=0\.[123] or more .* now 0\)"):
        list(loader(dataset, max_broken=0.0))


def test_evaluation_leaves_nothing_out(tmp_path: Path) -> None:
    dataset = shapes(tmp_path)
    damage(dataset.records[4].path)
    with pytest.raises(UserError, match=f"image {dataset.records[4].image_id} of"):
        list(EvalLoader(dataset, batch=2, short_side=48, long_side_max=96))


def test_substitutes_are_a_function_of_seed_and_sample() -> None:
    orders = [list(substitutes(20, *key)) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]


@pytest.fixture
def data(tmp_path: Path) -> TinyData:
    """Image 3 of 6 is broken where only its pixels are."""
    data = TinyData(tmp_path)
    file = data.paths["train_annotations"]
    tree = json.loads(file.read_text())
    [entry] = [entry for entry in tree["images"] if entry["id"] == 3]
    entry["file_name"] = "3.jpg"
    file.write_text(json.dumps(tree))
    path = data.paths["train_images"] / "3.jpg"
    Image.effect_noise((entry["width"], entry["height"]), 50).convert("RGB").save(path, quality=95)
    damage(path)
    return data


def test_a_run_lists_what_it_left_out(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data.run(tmp_path / "runs", "data.max_broken=0.2")
    printed = capsys.readouterr()
    assert "1 training image could not be read and did not count:\n  image 3: " in printed.out
    assert (printed.out + printed.err).count("left out, others stand in for it: ") == 1
    assert record(run)[-1]["iteration"] == 7


def test_a_run_that_met_too_many_goes_on_as_if_it_had_known(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["train.batch=1", "train.seed=1"]  # image 3 comes fourth
    whole = data.run(tmp_path / "whole", *changes, "data.max_broken=0.2")
    line = refusal(data.arguments(tmp_path / "broken", *changes), capsys, monkeypatch)
    broken = newest_run(tmp_path / "broken")
    step = read_checkpoint(broken)["step"]
    assert step == 3
    assert "3.jpg: cannot be decoded" in line
    assert "data.max_broken=0.167 or more" in line
    assert line.endswith(
        f"; saved after step {step}; go on from step_{step:07d}.pt with: "
        f"python -m fastmrcnn.train --resume {broken}"
    )
    train.main(["--resume", str(broken), "data.max_broken=0.167", "data.workers=2"])
    assert_same_state(read_checkpoint(whole), read_checkpoint(broken))
    assert record(whole) == record(broken)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="there SIGTERM is obeyed")
def test_a_loader_process_obeys_its_parent_alone(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    batches = iter(loader(shapes(tmp_path), workers=1, steps=40))
    ids = [next(batches).image_ids]
    [child] = set(multiprocessing.active_children()) - before
    for name in ("TERM", "INT", "HUP", "USR1"):  # from a process that is not its parent
        subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)
    time.sleep(0.2)
    ids += [loaded.image_ids for loaded in batches]
    assert len(ids) == 40
    batches = iter(loader(shapes(tmp_path / "other"), workers=1, steps=40))
    next(batches)
    [child] = set(multiprocessing.active_children()) - before
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    child.join(timeout=10)
    assert child.exitcode == 0
