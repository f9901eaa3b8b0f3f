"""metrics.json and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmrcnn.structures import Counts, Losses
from fastmrcnn.training.metrics import Metrics

GOOD = torch.tensor(-1)


def numbers(value: float) -> tuple[Losses, Counts]:
    names = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    parts = {
        name: torch.tensor(value * factor, requires_grad=True) for factor, name in enumerate(names, start=1)
    }
    return Losses(**parts), Counts(num_fg=torch.tensor(7), masks_dropped=torch.tensor(0))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_a_row_holds_means_under_detectron2s_names(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add(*numbers(1.0), images=4, data_time=0.5)
    metrics.add(*numbers(3.0), images=4, data_time=1.5)
    row, bad = metrics.read(19, GOOD, lr=0.01, steps_left=80)
    metrics.close()
    assert bad == -1
    assert lines(tmp_path) == [row]
    times = {key: row.pop(key) for key in ("time", "images_per_second", "eta_seconds")}
    assert row == {
        "iteration": 19,
        "total_loss": pytest.approx(30),
        "loss_rpn_cls": 2,
        "loss_rpn_loc": 4,
        "loss_cls": 6,
        "loss_box_reg": 8,
        "loss_mask": 10,
        "num_fg": 7,
        "num_fg_max": 7,
        "masks_dropped": 0,
        "lr": 0.01,
        "data_time": 1.0,
    }
    assert times["images_per_second"] == pytest.approx(4 / times["time"])
    assert times["eta_seconds"] == pytest.approx(80 * times["time"])


def test_each_row_starts_afresh_and_leaves_out_what_is_excluded(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add(*numbers(1.0), 2, 0.0)
    metrics.read(0, GOOD, 0.1, 1)
    metrics.add(*numbers(5.0), 2, 0.0)
    metrics.exclude(-1000.0)  # as if the step had taken that much longer
    row, _ = metrics.read(1, GOOD, 0.1, 0)
    metrics.close()
    assert row["loss_rpn_cls"] == 5
    assert 1000 < row["time"] < 1100


def test_a_bad_step_is_reported_and_not_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add(*numbers(math.nan), 2, 0.0)
    _, bad = metrics.read(5, torch.tensor(4), 0.1, 0)
    metrics.close()
    assert bad == 4
    assert lines(tmp_path) == []


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.write({"iteration": 3, "segm/AP": math.nan, "bbox/AP": 12.5, "x": math.inf})
    metrics.close()
    assert lines(tmp_path) == [{"iteration": 3, "segm/AP": None, "bbox/AP": 12.5, "x": None}]


def test_lines_of_a_run_that_went_further_are_dropped(tmp_path: Path) -> None:
    first = Metrics(tmp_path)
    for step in (1, 3, 5):
        first.write({"iteration": step, "segm/AP": float(step)})
    first.close()
    with (tmp_path / "metrics.json").open("a", encoding="utf-8") as stream:
        stream.write('{"iteration": 7, "total_lo')  # killed while writing
    again = Metrics(tmp_path, start_step=4)
    again.write({"iteration": 5, "segm/AP": 50.0})
    again.close()
    assert [(row["iteration"], row["segm/AP"]) for row in lines(tmp_path)] == [(1, 1), (3, 3), (5, 50)]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add(*numbers(1.0), 2, 0.0)
    metrics.read(9, GOOD, 0.1, 0)
    metrics.write({"iteration": 9, "segm/AP": 44.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"total_loss", "loss_mask", "lr", "segm/AP"} <= set(events.Tags()["scalars"])
    (point,) = events.Scalars("total_loss")
    assert (point.step, point.value) == (9, 15)
