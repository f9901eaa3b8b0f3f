"""Runs to be broken: their data, their processes, and the comparison with a run that nothing disturbed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastmrcnn.config.file import differing_keys, parse_config
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint
from fastmrcnn.weights.seal import fault_of

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 24, 2  # of a run; between checkpoints
LIMIT_S = 600.0  # for whatever is waited for
SETTINGS = [
    "data.shapes=false",
    "data.short_side=[64]",
    "data.long_side_max=64",
    "model.backbone.width=16",
    "model.fpn.channels=16",
    "model.anchors.sizes=[[8], [16], [24], [40], [64]]",
    "model.box_head.hidden=64",
    "model.mask_head.channels=16",
    "data.augment.rotate90=0.5",
    "optim.warmup_steps=2",
    "runtime.device=cpu",
    "runtime.precision=fp32",  # auto may choose by how fast the first steps are
    "runtime.threads=1",
    "train.batch=2",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={EVERY}",
    "train.log_every=3",
    "train.keep_checkpoints=3",
]
CLOCKS = ("time", "data_time", "images_per_second", "eta_seconds")
# Runs the command with a mistake planted in it: at the step of this number, or where its images are read.
PLANTED = """
import sys
from fastmrcnn import train
from fastmrcnn.data.worker import TrainSamples
owner, name = {"step": (train, "learning_rate"), "loader": (TrainSamples, "load")}[sys.argv[1]]
real, steps = getattr(owner, name), []
def mistaken(*arguments):
    steps.append(1)
    if len(steps) > int(sys.argv[2]):
        raise KeyError("a mistake that was planted")
    return real(*arguments)
setattr(owner, name, mistaken)
train.main(sys.argv[3:])
"""


class NotTriedError(Exception):
    """This machine does not let a fault be tried; why."""


class Running:
    """A process of the program."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        # Handlers of a shell's background job are ignored, and what is ignored stays so.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.pid = self.process.pid

    def wait(self) -> int:
        """The exit code; minus the signal's number of one that was killed."""
        return self.process.wait(LIMIT_S)

    def kill(self) -> None:
        """As `kill -9`, with the loader processes: nothing may go on writing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(LIMIT_S)

    def ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return True
        return False

    def until(self, what: Callable[[], Any], pause: float = 0.005) -> bool:
        """Wait for it; False if the process ended before."""
        end = time.monotonic() + LIMIT_S
        while not what():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"nothing happened in {LIMIT_S:g} s: {self.last()}"
            time.sleep(pause)
        return True

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last(self) -> str:
        """The last line on the screen."""
        lines = self.text().replace("\r", "\n").strip().split("\n")
        return lines[-1]

    def children(self) -> list[int]:
        """Processes under it that have none under themselves."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,command="], capture_output=True, text=True)
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        below, found = {self.pid}, set()
        for _ in range(4):  # generations
            below |= {int(row[0]) for row in rows if int(row[1]) in below}
        parents = {int(row[1]) for row in rows}
        for row in rows:
            pid = int(row[0])
            if pid in below - {self.pid} and pid not in parents and "resource_tracker" not in row[-1]:
                found.add(pid)
        return sorted(found)


class World:
    """Data, and a run that nothing disturbed.

    Args:
        root: a folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = write_shapes(root / "data", seed=5, train=12, val=2, size=64)
        self._numbers = itertools.count()
        began = time.perf_counter()
        self.whole = self.undisturbed()
        self.seconds = time.perf_counter() - began

    def undisturbed(self, *changes: str, launcher: Sequence[str] = ()) -> Path:
        """A run to compare with."""
        output = self.new_output()
        running = self.start(output, *changes, launcher=launcher)
        code = running.wait()
        assert code == 0, f"the undisturbed run ended with {code}: {running.last()}"
        return run_in(output)

    def new_output(self) -> Path:
        return self.root / f"output_{next(self._numbers)}"

    def start(
        self, output: Path, *changes: str, data: Path | None = None, launcher: Sequence[str] = ()
    ) -> Running:
        """A new run.

        Args:
            data: in place of the world's own.
            launcher: words before the module's name, in place of `-m`.
        """
        folder = self.root / "data" if data is None else data
        split = [f"data.train.images={folder / 'train'}", f"data.train.annotations={folder / 'train.json'}"]
        recipe = ["--config", str(ROOT / "configs" / "demo.yaml")]
        return self.run([*recipe, *SETTINGS, *split, f"output={output}", *changes], launcher)

    def resume(self, run: Path, *more: str, launcher: Sequence[str] = ()) -> Running:
        return self.run(["--resume", str(run), *more], launcher)

    def run(self, arguments: Sequence[str], launcher: Sequence[str] = ()) -> Running:
        command = [sys.executable, *(launcher or ["-m", "fastmrcnn.train"]), *arguments]
        return Running(command, self.root / f"log_{next(self._numbers)}.txt")

    def goes_on(self, run: Path, whole: Path | None = None, launcher: Sequence[str] = ()) -> str:
        """Resume a run to its end, and compare it with the whole one; returns what was said.

        Raises:
            AssertionError: it does not go on, or ends otherwise.
        """
        running = self.resume(run, launcher=launcher)
        code = running.wait()
        assert code == 0, f"--resume ended with {code}: {running.last()}"
        same_run(self.whole if whole is None else whole, run)
        return running.text()

    def copy(self, run: Path) -> Path:
        """Of a run, for what damages it."""
        folder = self.new_output() / run.name
        return Path(shutil.copytree(run, folder))


def run_in(output: Path) -> Path:
    """The one run of an output folder."""
    found = sorted(output.glob("run_*"))
    assert found, f"there is no run in {output}"
    return found[-1]


def saved_step(run: Path) -> int:
    """Of the last checkpoint, which must be whole; 0 if there is none."""
    try:
        file = find_checkpoint(run)
    except UserError:
        return 0
    fault = fault_of(file)
    assert fault is None, f"{file.name} {fault}"
    return int(file.stem.removeprefix("step_"))


def steps_shown(running: Running) -> int:
    """By the progress bar."""
    shown = re.findall(rf"(\d+)/{STEPS} \[", running.text())
    return int(shown[-1]) if shown else 0


def trained_a_while(
    world: World, output: Path, draw: random.Random, *changes: str, wait: float = 0.5
) -> Running:
    """A run that has saved, or made steps, and goes on for a random while."""
    running = world.start(output, *changes)
    wait_for(world, running, output, draw, wait)
    return running


def wait_for(world: World, running: Running, output: Path, draw: random.Random, wait: float = 0.5) -> None:
    def trains() -> bool:
        checkpoints = list(output.glob("run_*/checkpoints/last_checkpoint"))
        return bool(checkpoints) or steps_shown(running) > EVERY

    assert running.until(trains), f"it ended before it was broken: {running.last()}"
    time.sleep(draw.uniform(0, wait))
    assert running.process.poll() is None, "it ended before it was broken; it needs more steps"


def temporary_files(output: Path) -> list[Path]:
    """What is being written, or was when a process died."""
    return [path for path in output.rglob(".*.tmp") if path.name.startswith(".step_")]


def same_run(whole: Path, other: Path) -> None:
    """AssertionError unless two runs ended with the same bits and the same rows of metrics."""
    ends = [read_checkpoint(run) for run in (whole, other)]
    assert ends[0]["step"] == ends[1]["step"], f"it ended at step {ends[1]['step']}"
    one, two = (parse_config(end["config"], "the checkpoint") for end in ends)
    settings = [key for key in differing_keys(one, two) if key != "output" and not key.startswith("data.")]
    assert not settings, f"it was another run: {', '.join(settings)} differ"
    for part in ("model", "optimizer", "scaler", "ema"):
        values, shape = pytree.tree_flatten(ends[0][part])
        others, other_shape = pytree.tree_flatten(ends[1][part])
        assert shape == other_shape, f"{part}: another structure"
        for mine, theirs in zip(values, others, strict=True):
            same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
            assert same, f"{part}: other numbers"
    assert rows_of(whole) == rows_of(other), "metrics.json: other rows"


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Of metrics.json, without what depends on the clock."""
    lines = (run / "metrics.json").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes at `folder`; what is yielded makes it larger.

    Raises:
        NotTriedError: only the superuser of a Linux machine can have one.
    """
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield lambda larger: _mount("-o", f"remount,size={larger}", str(folder))
    finally:
        subprocess.run(["umount", str(folder)], check=False)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be written, whoever asks. Raises NotTriedError as `small_disk`."""
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        before = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(before)
        return
    _mount("--bind", str(folder), str(folder))  # permissions do not hold the superuser
    try:
        _mount("-o", "remount,ro,bind", str(folder))
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise NotTriedError(f"mount: {said.strip().splitlines()[-1]}") from None
