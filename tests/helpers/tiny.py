"""Training runs of seconds: a data set of a few small images, a model of a few channels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastmrcnn import train
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import run_main
from fastmrcnn.training.saving import Saver

TREE: dict[str, Any] = {
    "data": {"short_side": [64], "short_side_test": 64, "long_side_max": 64, "workers": 0},
    "model": {
        "backbone": {"name": "resnet18", "norm": "gn", "frozen_stages": 0, "width": 8},
        "fpn": {"channels": 8},
        "anchors": {"sizes": [[8], [16], [24], [40], [64]]},
        "rpn": {
            "pre_nms_top_n": 30,
            "pre_nms_top_n_test": 30,
            "post_nms_top_n": 20,
            "post_nms_top_n_test": 20,
            "batch_per_image": 32,
        },
        "roi": {"batch_per_image": 16, "sampling_ratio": 2},
        "box_head": {"hidden": 16, "detections": 10},
        "mask_head": {"convs": 1, "channels": 8, "slots_per_image": 4},
    },
    "optim": {"name": "adamw", "lr": 0.002, "reference_batch": 2, "warmup_steps": 2},
    "train": {"steps": 8, "batch": 2, "log_every": 2, "checkpoint_every": 4},
    "runtime": {"device": "cpu", "precision": "fp32"},
    "evaluate": {"batch": 2, "pictures": 1},
}
TIMES = ("time", "data_time", "images_per_second", "eta_seconds")


class TinyData:
    """A recipe and the shapes, 6 images to train on and 3 to judge by, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.paths = write_shapes(folder / "data", seed=3, train=6, val=3, size=64)
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(yaml.safe_dump(TREE), encoding="utf-8")
        self.train = self._split("train")
        self.val = self._split("val")

    def _split(self, split: str) -> list[str]:
        return [f"data.{split}.{kind}={self.paths[f'{split}_{kind}']}" for kind in ("images", "annotations")]

    def arguments(self, output: Path, *changes: str, val: bool = False) -> list[str]:
        """Of the command line."""
        sets = self.train + (self.val if val else [])
        return ["--config", str(self.recipe), *sets, f"output={output}", *changes]

    def run(self, output: Path, *changes: str, val: bool = False) -> Path:
        """Train in this process; returns the run's folder."""
        train.main(self.arguments(output, *changes, val=val))
        return newest_run(output)


def newest_run(output: Path) -> Path:
    return sorted(output.glob("run_*"))[-1]


class CrashError(Exception):
    """Not one of the program's own errors."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """The next run that comes to `step`, counted from 0, begins it with `act`."""
    real = train.learning_rate

    def learning_rate(config: Any, now: int, *others: Any) -> float:
        if now == step:
            monkeypatch.setattr(train, "learning_rate", real)
            act()
        return real(config, now, *others)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def break_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """The next run is cut off by `error` when it comes to `step`."""

    def fail() -> None:
        raise error

    at_step(monkeypatch, step, fail)


def never_saves_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off leaves what one leaves that was killed: nothing but what was saved before."""
    monkeypatch.setattr(Saver, "rescue", lambda saver: "")


def record(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.json, without what depends on the clock."""
    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Two trees of a checkpoint are equal, bit for bit, and hold nothing that is not finite."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{place}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{place} differs by {(a.double() - b.double()).abs().max()}"
        assert a.isfinite().all(), place
    else:
        assert a == b, place


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    """All of two checkpoints that is learnt."""
    for part in ("model", "optimizer", "scaler", "ema"):
        assert_same(a[part], b[part], part)


def refusal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int = 2
) -> str:
    """The one line on which the program ends, as from the shell."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(train.main)
    assert ended.value.code == code
    text = capsys.readouterr().err.strip()
    line = text.split("\n")[-1]
    assert "Traceback" not in text
    return line
