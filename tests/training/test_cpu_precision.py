"""Which precision a CPU computes in, and what makes its threads wait."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny import CrashError, TinyData, assert_same_state, break_at, never_saves_first, newest_run, record

from fastmrcnn import device, train
from fastmrcnn.config.file import load_config
from fastmrcnn.device import Trial, choose_precision, cpu_quota, detecting_precision, try_both
from fastmrcnn.speed.training_rows import cpu_rows
from fastmrcnn.training import precision
from fastmrcnn.training.precision import describe_trial
from fastmrcnn.weights.checkpoint import read_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "on_cpu", "trained", "detects", "detects_without"),
    [
        ("auto", "auto", "fp32", "bf16", "fp32"),
        ("auto", "fp32", "fp32", "fp32", "fp32"),
        ("auto", "bf16", "bf16", "bf16", "fp32"),  # a run goes on as it began; detection may do otherwise
        ("fp32", "bf16", "fp32", "fp32", "fp32"),
        ("bf16", "fp32", "bf16", "bf16", "bf16"),
        ("fp16", "auto", "fp16", "fp16", "fp16"),
    ],
)
def test_what_the_settings_mean(
    name: str,
    on_cpu: str,
    trained: str,
    detects: str,
    detects_without: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "bf16_convolves_faster", lambda: True)
    assert choose_precision(name, CPU, on_cpu).name == trained
    assert detecting_precision(name, CPU, on_cpu) == detects_without
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    assert detecting_precision(name, CPU, on_cpu) == detects
    expected = "bf16" if name == "auto" else name
    assert choose_precision(name, CUDA, on_cpu).name == detecting_precision(name, CUDA, on_cpu) == expected
    monkeypatch.setattr(device, "bf16_convolves_faster", lambda: False)
    assert detecting_precision("auto", CPU) == "fp32"


def test_the_trial_takes_turns_and_the_best_times() -> None:
    order: list[str] = []
    times = iter([0, 9, 9, 18, 20, 23, 30, 31, 40, 42, 50, 54.0])  # the first of each does not count
    found = try_both(lambda: order.append("fp32"), lambda: order.append("bf16"), clock=lambda: next(times))
    assert order == ["fp32", "bf16"] * 3
    assert found == Trial(2, 1)
    assert found.faster
    assert not Trial(2, 1.81).faster


def test_the_convolution_is_timed_for_real() -> None:
    assert device.bf16_convolves_faster.__wrapped__() in (True, False)


def test_the_ladder_has_bf16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [row for row in cpu_rows(compiled=True) if row.precision == "bf16"]
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    found = [row for row in cpu_rows(compiled=False) if row.precision == "bf16"]
    assert [(row.program, row.name) for row in found] == [
        ("torchvision", "torchvision, eager AMP bf16"),
        ("fastmrcnn", "+ bf16"),
    ]


def test_the_line_on_the_trial() -> None:
    line = describe_trial(Trial(1.9, 0.98), 2)
    assert "a step of 2 images takes 1.9 s in fp32 and 0.98 s in bf16, so the run takes bf16" in line
    assert "(runtime.precision=fp32 to do otherwise)" in line
    assert "0.0152 s in fp32 and 0.014 s in bf16, so the run takes fp32" in describe_trial(
        Trial(0.0152, 0.0140), 1
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("precision"))


def clock_of(fp32: float, bf16: float) -> Callable[[], float]:
    """Of a machine whose steps take so long."""
    now = itertools.accumulate(itertools.chain([0.0], itertools.cycle([fp32, 0.0, bf16, 0.0])))
    return lambda: next(now)


def test_a_run_that_takes_bf16_keeps_to_it(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, tried = precision.try_both, []

    def trial(fp32: Callable[[], None], bf16: Callable[[], None], clock: object) -> Trial:
        tried.append(True)
        return real(fp32, bf16, clock=clock_of(2.0, 1.0))

    monkeypatch.setattr(device, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "try_both", trial)
    whole = data.run(tmp_path / "whole", "runtime.precision=auto", "optim.ema=0.9")
    out = capsys.readouterr().out
    assert "takes 2 s in fp32 and 1 s in bf16, so the run takes bf16" in out
    assert "On cpu: bf16, " in out
    kept = load_config(whole / "config.yaml")
    assert (kept.runtime.precision, kept.runtime.cpu_precision) == ("auto", "bf16")

    # The same weights as a run that was told so, and not those of fp32: the trial has left no trace.
    told = data.run(tmp_path / "told", "runtime.precision=bf16", "optim.ema=0.9")
    fp32 = data.run(tmp_path / "fp32", "runtime.precision=fp32", "optim.ema=0.9")
    states = [read_checkpoint(run) for run in (whole, told, fp32)]
    assert_same_state(states[0], states[1])
    weights = [torch.cat([w.flatten().float() for w in state["model"].values()]) for state in states]
    assert not torch.equal(weights[0], weights[2])

    never_saves_first(monkeypatch)
    with monkeypatch.context() as patch:
        break_at(patch, 6, CrashError())
        with pytest.raises(CrashError):
            data.run(tmp_path / "broken", "runtime.precision=auto", "optim.ema=0.9")
    broken = newest_run(tmp_path / "broken")
    assert len(tried) == 2
    train.main(["--resume", str(broken)])
    assert len(tried) == 2
    assert_same_state(states[0], read_checkpoint(broken))
    assert record(whole) == record(broken)


def test_what_a_container_may_use(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 2
    old = tmp_path / "old" / "cpu"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "old") is None
    (old / "cpu.cfs_quota_us").write_text("400000\n")
    assert cpu_quota(tmp_path / "old") == 4


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for quota, given in ((None, None), (16, None), (2, None), (2, 5)):
        monkeypatch.setattr(device, "cpu_quota", lambda quota=quota: quota)
        device.set_threads(given)
    assert chosen == [2, 5]


def waits_asleep(*command: str, **environment: str) -> str:
    """OMP_WAIT_POLICY of a process after `fastmrcnn` has been imported."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP_", "KMP_"))}
    known |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, *command], env=known, cwd="/", text=True, capture_output=True, check=True
    )
    return done.stdout.strip()


def test_threads_of_commands_wait_asleep(tmp_path: Path) -> None:
    ask = "import fastmrcnn, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert waits_asleep("-c", ask) == "None"  # whoever imports the package has decided already
    command = tmp_path / "fastmrcnn"
    command.mkdir()
    (command / "__init__.py").write_bytes((ROOT / "fastmrcnn" / "__init__.py").read_bytes())
    (command / "ask.py").write_text(ask.replace("fastmrcnn, ", ""))
    place = {"PYTHONPATH": str(tmp_path)}
    assert waits_asleep("-m", "fastmrcnn.ask", **place) == "PASSIVE"
    assert waits_asleep("-m", "fastmrcnn.ask", **place, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert waits_asleep("-m", "fastmrcnn.ask", **place, GOMP_SPINCOUNT="9") == "None"
