"""Clocks of a GPU, as nvidia-smi prints them, by a stand-in for it."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmrcnn.speed import clocks

CUDA = torch.device("cuda")
SCRIPT = """#!/bin/sh
case "$*" in *clocks_event_reasons*) exit 2;; esac  # an older driver
case "$*" in *--id=GPU-17*) ;; *) exit 3;; esac
case "$*" in *--loop-ms=*) while :; do echo "1980, 2619, 690.5, 61, 0x4"; sleep 0.05; done;; esac
echo "345, 2619, 70.0, 30, 0x1"
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    clocks._query.cache_clear()
    monkeypatch.setattr(clocks, "_uuid", lambda device: "GPU-17")
    yield
    clocks._query.cache_clear()


def test_clocks_are_read_while_something_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SCRIPT, encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with clocks.watching_clocks(CUDA) as found:
        time.sleep(1)
        assert found == {}
    assert found.pop("readings") >= 1
    assert found == {
        "sm_mhz": [1980, 1980, 1980],
        "memory_mhz": [2619, 2619, 2619],
        "watts": 690.5,
        "celsius": 61,
        "slowed_by": {"power cap": 1.0},
    }
    assert clocks.describe(found) == "1980 (1980 to 1980); power cap 100%"


def test_nothing_is_said_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for device in (CUDA, torch.device("cpu")):
        with clocks.watching_clocks(device) as found:
            pass
        assert found == {}
    assert clocks.describe(found) == ""


def test_readings_are_summed_up() -> None:
    lines = "345, 2619, 70.0, 30, 0x1\n1980, 2619, 500.0, 50, 0x24\n1755, 2619, [N/A], 62, 0x4\nhalf a li"
    found = clocks.summary(lines)
    assert found["sm_mhz"] == [345, 1755, 1980]
    assert found["watts"] == 285
    assert found["celsius"] == 62
    assert found["slowed_by"] == pytest.approx({"power cap": 2 / 3, "thermal, by software": 1 / 3})
    assert clocks.summary("") == {}
    hidden = clocks.summary("[N/A], [N/A], [N/A], [N/A], [N/A]\n")
    assert hidden == {"readings": 1}
    assert clocks.describe(hidden) == ""
