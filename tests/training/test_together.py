"""Two processes make the run that one makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Each, Ended, Pair, broken_train, command, files_of
from PIL import Image
from tiny import CrashError, TinyData, assert_same_state, newest_run, record

from fastmrcnn import evaluate, train
from fastmrcnn.evaluation.run import RESULTS
from fastmrcnn.training import run as preparation
from fastmrcnn.weights.checkpoint import read_checkpoint

CHANGES = [
    "data.augment.rotate90=0.5",
    "data.augment.brightness=0.2",
    "optim.name=sgd",
    "optim.lr=0.01",
    "optim.clip_norm=1.0",
    "optim.ema=0.9",
    "train.evaluate_every=4",
    "train.log_every=3",
    "model.box_head.score_threshold=0.0",
    # All that is proposed is learnt from: else rounding would now and then choose another RoI.
    "model.roi.batch_per_image=128",
    "model.mask_head.slots_per_image=null",
]
# Sums over two processes come in another order than those of one, in float32: 8 steps of SGD end within 3e-8.
# AdamW divides a gradient by its own size, so that the last bits of the smallest count, and ends within 1e-4.
WEIGHTS, LOSSES = 1e-6, 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def whole(data: TinyData, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    for one in pair.call(command, "train", data.arguments(output, *CHANGES, val=True)):
        assert one.code == 0, one.err
    return newest_run(output)


def resume(pair: Pair, run: Path, *changes: str) -> list[Ended]:
    ended = pair.call(command, "train", ["--resume", str(run), *changes])
    assert [one.code for one in ended] == [0, 0], ended
    return ended


def assert_near(one: Path, other: Path) -> None:
    """Weights, averages and records are those of the same run, but for rounding."""
    states = [read_checkpoint(folder) for folder in (one, other)]
    assert states[0]["step"] == states[1]["step"] == 8
    for part in ("model", "ema"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=0, atol=WEIGHTS, msg=name)
    rows = [[row for row in record(run) if "total_loss" in row] for run in (one, other)]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=LOSSES, abs=LOSSES)


def assert_same_run(one: Path, other: Path) -> None:
    """To the last bit."""
    states = [read_checkpoint(folder) for folder in (one, other)]
    assert states[0]["step"] == states[1]["step"] == 8
    assert_same_state(*states)
    assert record(one) == record(other)


def test_two_processes_make_the_run_of_one(data: TinyData, whole: Path, tmp_path: Path) -> None:
    alone = data.run(tmp_path, *CHANGES, val=True)
    assert_near(alone, whole)
    start = read_checkpoint(whole / "checkpoints" / "step_0000004.pt")["model"]
    ended = read_checkpoint(whole)["model"]
    moved = max(float((ended[name] - start[name]).abs().max()) for name in start)
    assert moved > 1000 * WEIGHTS  # the tolerance could tell a run that learns something else
    written = [
        files_of(run) - {name for name in files_of(run) if "tensorboard" in name} for run in (alone, whole)
    ]
    assert written[0] == written[1]


def test_the_first_process_decides_and_writes(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    """What it says and where it writes is what one process would; the other one's command line counts for
    nothing."""
    words = [data.arguments(tmp_path / name, "train.steps=2", val=True) for name in ("first", "second")]
    first, second = pair.call(command, "train", Each(words))
    assert (first.code, second.code) == (0, 0)
    assert (second.out, second.err) == ("", "")
    assert "On 2 processes, the first one on cpu" in first.out
    assert first.out.count("COCO evaluation, mask (3 images)") == 1
    assert not (tmp_path / "second").exists()
    assert len(list((tmp_path / "first" / "run_001" / "tensorboard").iterdir())) == 1


def test_an_evaluation_is_that_of_one_process(
    data: TinyData, pair: Pair, whole: Path, tmp_path: Path
) -> None:
    """Results byte for byte, and numbers to the last digit, of three images: two and one."""
    outputs = [tmp_path / "alone", tmp_path / "two"]
    words = ["--checkpoint", str(whole), "evaluate.batch=1", "data.workers=1", "--output"]
    torch.set_num_threads(1)
    evaluate.main([*words, str(outputs[0])])
    ended = pair.call(command, "evaluate", [*words, str(outputs[1])])
    assert [one.code for one in ended] == [0, 0], ended
    assert len(ended[1].out) == 0
    assert files_of(outputs[0]) == files_of(outputs[1])
    for name in (RESULTS, "metrics.json"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    assert (outputs[0] / RESULTS).stat().st_size > 1000


def test_a_run_goes_on_with_as_many_processes_to_the_last_bit(
    data: TinyData, pair: Pair, whole: Path, tmp_path: Path
) -> None:
    """Also when it was a signal to one of them that ended it, and with loader processes."""
    words = data.arguments(tmp_path, *CHANGES, "data.workers=1", val=True)
    ended = pair.call(send_at, Each((words, words)), Each((None, 5)), signal.SIGTERM)
    assert [one.code for one in ended] == [143, 143], ended
    assert ended[0].last.startswith("stopped by SIGTERM; saved after step ")
    assert ended[1].err.strip() == ""
    broken = newest_run(tmp_path)
    step = read_checkpoint(broken)["step"]
    assert step in (5, 6)
    resume(pair, broken, "data.workers=0")
    assert_same_run(whole, broken)


def test_a_run_goes_on_with_another_number_of_processes(
    data: TinyData, pair: Pair, whole: Path, tmp_path: Path
) -> None:
    for one in pair.call(command, "train", data.arguments(tmp_path, *CHANGES, "train.steps=4", val=True)):
        assert one.code == 0, one.err
    run = newest_run(tmp_path)
    train.main(["--resume", str(run), "train.steps=8", "data.workers=1"])
    assert_near(whole, run)


def test_patience_comes_to_its_end_in_all_at_once(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    """And the first process alone keeps the best weights."""
    keeps = ["train.keep_best=segm/AP", "train.patience=1", "train.evaluate_every=1", "train.steps=50"]
    words = [data.arguments(tmp_path / name, *CHANGES, *keeps, val=True) for name in ("first", "second")]
    first, second = pair.call(command, "train", Each(words))
    assert (first.code, second.code, second.err) == (0, 0, ""), (first, second)
    assert "has not risen" in first.out
    run = newest_run(tmp_path / "first")
    assert read_checkpoint(run)["step"] < 50
    assert (run / "checkpoints" / "best.pt").exists()
    assert not (tmp_path / "second").exists()


def test_the_clock_of_the_first_decides_for_all(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    words = data.arguments(tmp_path, "train.steps=100000", "train.time_limit=0.002")
    first, second = pair.call(command, "train", words)
    assert (first.code, second.code, second.err) == (0, 0, ""), (first, second)
    assert "steps fit, and the schedule is now that of" in first.out
    assert read_checkpoint(newest_run(tmp_path))["step"] < 100000


@pytest.mark.slow
def test_batches_that_are_gathered_to_a_step(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    """Two processes, each with two batches of one image, take the images of one process's two of two."""
    changes = [*CHANGES, "train.batch=4", "train.accumulate=2", "train.evaluate_every=null", "data.workers=0"]
    alone = data.run(tmp_path / "alone", *changes)
    for one in pair.call(command, "train", data.arguments(tmp_path / "two", *changes)):
        assert one.code == 0, one.err
    assert_near(alone, newest_run(tmp_path / "two"))


@pytest.mark.slow
def test_sigusr1_to_any_process_saves(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    words = data.arguments(tmp_path, "train.steps=6", "train.checkpoint_every=6")
    ended = pair.call(send_at, Each((words, words)), Each((None, 2)), signal.SIGUSR1)
    assert [one.code for one in ended] == [0, 0], ended
    assert "saved, as SIGUSR1 asked: " in ended[0].out
    names = sorted(path.name for path in (newest_run(tmp_path) / "checkpoints").glob("*.pt"))
    assert names in (["step_0000003.pt", "step_0000006.pt"], ["step_0000004.pt", "step_0000006.pt"])


def test_a_process_that_breaks_ends_all_and_loses_nothing(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    """Its error is told by itself, with the traceback, and by the first, with what was saved."""
    words = data.arguments(tmp_path, *CHANGES)
    first, second = pair.call(broken_train, words, Each((99, 6)), CrashError("a bug"))
    assert (first.code, second.code) == (2, 1), (first, second)
    assert "CrashError: a bug" in second.err
    run = newest_run(tmp_path)
    assert first.last == (
        "error: process 1: CrashError: a bug; saved after step 6; go on from step_0000006.pt with: "
        f"python -m fastmrcnn.train --resume {run}"
    )
    assert "Traceback" not in first.err


def test_images_that_cannot_be_read_are_counted_over_all(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    tree = json.loads(data.paths["train_annotations"].read_text())
    for entry in tree["images"]:
        source = data.paths["train_images"] / entry["file_name"]
        if entry["id"] in (2, 3):  # broken where only the pixels are
            noise = Image.effect_noise((entry["width"], entry["height"]), 50).convert("RGB")
            entry["file_name"] = f"{entry['id']}.jpg"
            noise.save(tmp_path / entry["file_name"], quality=95)
            content = (tmp_path / entry["file_name"]).read_bytes()
            (tmp_path / entry["file_name"]).write_bytes(content[: len(content) * 2 // 3])
        else:
            shutil.copy(source, tmp_path)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(tree))
    sets = [f"data.train.images={tmp_path}", f"data.train.annotations={file}"]
    words = data.arguments(tmp_path / "runs", *sets, "data.max_broken=0.4")
    first, second = pair.call(command, "train", words)
    assert (first.code, second.code, second.err) == (0, 0, ""), first
    assert "2 training images could not be read and did not count:" in first.out
    assert first.out.count("left out, others stand in for it: ") == 2
    first, second = pair.call(command, "train", [*words, "data.max_broken=0.2"])
    assert (first.code, second.code) == (2, 2)
    assert "2 of 6 images could not be read so far" in first.last
    assert first.err.count("error: ") == 1
    assert second.err == ""


def test_a_bad_loss_names_the_images_of_all(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    words = data.arguments(tmp_path, "optim.lr=1e30", "optim.name=sgd", "train.log_every=1")
    first, second = pair.call(command, "train", words)
    assert (first.code, second.code, second.err) == (2, 2, "")
    found = re.search(r"not finite at step (\d+) \(image ids \[(\d+), (\d+)\]\)", first.last)
    assert found, first.last


def test_mistakes_are_told_once(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    for changes, line in (
        (
            ["train.batch=3"],
            "train.batch=3 images a step cannot be shared out evenly to 2 processes; it can with 1, 3",
        ),
        (["train.stepz=3"], "unknown key 'train.stepz'"),
        (["runtime.device=toaster"], "toaster"),
        (["--dry-run"], "--dry-run estimates the cost in one process"),
        ([f"data.train.images={tmp_path / 'none'}"], "none"),
    ):
        first, second = pair.call(command, "train", data.arguments(tmp_path / "runs", *changes))
        assert first.code == second.code == 2, (changes, first, second)
        assert line in first.last
        assert "Traceback" not in first.err
        assert second.err == "", changes
        assert not list((tmp_path / "runs").glob("*")), changes


def test_machines_with_different_copies_of_the_data(data: TinyData, pair: Pair, tmp_path: Path) -> None:
    first, second = pair.call(lacking_an_image, data.arguments(tmp_path / "runs"))
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert "train.json: process 1 reads 5 images there, the first one 6" in first.last
    assert not list((tmp_path / "runs").glob("*"))


def lacking_an_image(argv: list[str]) -> None:
    """`train`, which finds an image less on the second process."""
    real = preparation.read_sets

    def read_sets(*arguments: Any, **options: Any) -> Any:
        train_set, val_set = real(*arguments, **options)
        if os.environ["RANK"] == "1":
            train_set = replace(train_set, records=train_set.records[:2] + train_set.records[3:])
        return train_set, val_set

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "read_sets", read_sets)
        command("train", argv)


def send_at(argv: list[str], step: int | None, number: int) -> None:
    """`train`, in which this process sends itself a signal at the beginning of a step."""
    from tiny import at_step

    with pytest.MonkeyPatch.context() as patch:
        if step is not None:
            at_step(patch, step, lambda: os.kill(os.getpid(), number))
        command("train", argv)
