"""One process and two, on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TREE

from fastmrcnn.config.file import parse_config
from fastmrcnn.errors import UserError
from fastmrcnn.speed.scaling import check_devices, measure_scaling, scaling_table
from fastmrcnn.speed.step_workload import Workload


@pytest.mark.slow  # starts three
def test_two_processes_are_measured_beside_one() -> None:
    config = parse_config(TREE, "the test")
    workload = Workload(config, torch.device("cpu"), (64, 64), images=1, steps=2, num_classes=3)
    told: list[str] = []
    found = measure_scaling(workload, 2, report=told.append)
    assert told == ["1 process", "2 processes"]
    assert [row["processes"] for row in found["rows"]] == [1, 2]
    assert found["backend"] == "gloo"
    rates = [row["images_per_second"] for row in found["rows"]]
    assert found["efficiency"] == pytest.approx(rates[1] / (2 * rates[0]))
    # The second makes a step of two images: they share a loss, which is not that of the first image.
    losses = [row["loss"] for row in found["rows"]]
    assert all(map(math.isfinite, losses))
    assert losses[0] != losses[1]
    lines = scaling_table(found).splitlines()
    assert lines[2].startswith(f"| 1 | {rates[0]:.2f} |")
    assert lines[-1].startswith("1 images a process and step, over gloo; efficiency ")


def test_each_process_needs_a_device() -> None:
    with pytest.raises(UserError, match="at least 2"):
        check_devices(1, torch.device("cpu"))
    check_devices(5, torch.device("cpu"))
    with pytest.raises(UserError, match=r"each needs a GPU, and there are \d+ here"):
        check_devices(1000, torch.device("cuda"))
