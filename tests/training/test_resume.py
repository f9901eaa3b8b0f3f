"""A run that is cut off and resumed ends where an unbroken one does, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import CrashError, TinyData, assert_same_state, break_at, never_saves_first, record

from fastmrcnn import train
from fastmrcnn.errors import UserError
from fastmrcnn.weights.checkpoint import read_checkpoint

AUGMENT = [
    "data.augment.flip_vertical=0.5",
    "data.augment.rotate90=0.5",
    "data.augment.brightness=0.2",
    "data.augment.contrast=0.2",
]
COMPOSE = [
    "data.augment.crop=[64, 96]",
    "data.augment.scale=[0.5, 2.0]",
    "data.augment.rotate=10",
    "data.augment.saturation=0.2",
    "data.augment.copy_paste=0.5",
    "data.augment.mosaic=0.5",
]
SGD = ["optim.name=sgd", "optim.lr=0.01", "model.backbone.norm=bn", "model.fpn.norm=bn"]
WIDE = ["model.backbone.width=16", "model.fpn.channels=16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("resume"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "val"),
    [
        pytest.param([*AUGMENT, "optim.ema=0.9", "train.evaluate_every=2"], True, id="augmented-evaluated"),
        pytest.param([*AUGMENT, *SGD, "data.workers=2", "optim.clip_norm=1.0"], False, id="bn-2-workers"),
        pytest.param([*SGD, *WIDE, "runtime.threads=2"], False, id="bn-2-threads"),
        pytest.param(["runtime.precision=fp16", "optim.schedule=cosine", "optim.ema=0.9"], False, id="fp16"),
        pytest.param(["train.log_every=3"], False, id="saved-between-reads"),
        pytest.param([*COMPOSE, "data.workers=2"], False, id="several-images"),
    ],
)
def test_a_run_that_was_killed_is_resumed_exactly(
    changes: list[str], val: bool, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = data.run(tmp_path / "whole", *changes, val=val)
    break_at(monkeypatch, 6, CrashError())  # two steps after the checkpoint, one line of metrics beyond it
    with monkeypatch.context() as patch:
        never_saves_first(patch)
        with pytest.raises(CrashError):
            data.run(tmp_path / "broken", *changes, val=val)
    broken = tmp_path / "broken" / "run_001"
    assert record(broken)[-1]["iteration"] == 5
    train.main(["--resume", str(broken)])
    states = [read_checkpoint(folder) for folder in (whole, broken)]
    assert states[0]["step"] == states[1]["step"] == 8
    assert_same_state(*states)
    assert record(whole) == record(broken)


def test_a_run_that_ended_goes_on_with_more_steps(data: TinyData, tmp_path: Path) -> None:
    """And to a state that the steps in between did change."""
    whole = data.run(tmp_path / "whole", *SGD)
    short = data.run(tmp_path / "short", *SGD, "train.steps=4")
    middle = read_checkpoint(short)
    train.main(["--resume", str(short / "checkpoints" / "step_0000004.pt"), "train.steps=8"])
    assert_same_state(read_checkpoint(whole), read_checkpoint(short))
    assert record(whole) == record(short)
    ended = read_checkpoint(short)["model"]
    moved = [name for name, value in ended.items() if not torch.equal(value, middle["model"][name])]
    assert len(moved) > 0.9 * len(ended)


def test_another_seed_is_another_run(data: TinyData, tmp_path: Path) -> None:
    one, other = (data.run(tmp_path, "train.steps=2", f"train.seed={seed}") for seed in (0, 1))
    assert record(one) != record(other)


def test_what_cannot_be_resumed(data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume goes on .* leave out --config"):
        train.main(["--resume", str(tmp_path), "--config", str(data.recipe)])
    with pytest.raises(UserError, match="no such checkpoint file or run folder"):
        train.main(["--resume", str(tmp_path / "none")])
    run = data.run(tmp_path, "train.steps=1")
    moved = shutil.copy(run / "checkpoints" / "step_0000001.pt", tmp_path / "moved.pt")
    with pytest.raises(UserError, match="where its run wrote it"):
        train.main(["--resume", str(moved)])
