"""torchrun starts a run, and starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT
from tiny import TinyData, assert_same_state, newest_run, record

from fastmrcnn.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow  # four starts of torchrun and its processes
HELPERS = ROOT / "tests" / "helpers"
CHANGES = ["optim.ema=0.9", "data.augment.rotate90=0.5", "train.log_every=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    process = torchrun(["-m", "fastmrcnn.train", *data.arguments(output, *CHANGES)])
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return newest_run(output)


def torchrun(words: list[str], *options: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *options,
            *words,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_costs_nothing(
    rank: int, data: TinyData, whole: Path, tmp_path: Path
) -> None:
    """torchrun starts all again, and they go on from the last checkpoint by themselves: that of step 4
    if it was the first that died, else the one that it made when it saw that the other was gone."""
    words = [str(HELPERS / "dying.py"), str(rank), "6", *data.arguments(tmp_path, *CHANGES)]
    process = torchrun(words, "--max-restarts=2")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    run = newest_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    step = 4 if rank == 0 else 6
    assert printed.count("Started again by torchrun: going on from ") == 1
    assert f"going on from {run / 'checkpoints' / f'step_{step:07d}.pt'}" in printed
    states = [read_checkpoint(folder) for folder in (whole, run)]
    assert states[0]["step"] == states[1]["step"] == 8
    assert_same_state(*states)
    assert record(whole) == record(run)


def test_torchrun_passes_a_signal_on(data: TinyData, tmp_path: Path) -> None:
    words = data.arguments(tmp_path, "train.steps=100000", "train.checkpoint_every=99999")
    process = torchrun(["-m", "fastmrcnn.train", *words])
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("run_001/metrics.json")) or not record(tmp_path / "run_001"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    run = tmp_path / "run_001"
    step = read_checkpoint(run)["step"]
    told = [line for line in errors.split("\n") if line.startswith("stopped by SIGTERM; ")]
    assert told == [
        f"stopped by SIGTERM; saved after step {step}; go on from step_{step:07d}.pt with: "
        f"python -m fastmrcnn.train --resume {run}"
    ]
