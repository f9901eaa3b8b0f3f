"""Whatever ends a run saves first, and the run that goes on from there ends where an unbroken one does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CrashError,
    TinyData,
    assert_same_state,
    at_step,
    break_at,
    newest_run,
    record,
    refusal,
)

from fastmrcnn import train
from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.errors import UserError
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.optim import Ema
from fastmrcnn.training.saving import reason_of
from fastmrcnn.weights import checkpoint
from fastmrcnn.weights.checkpoint import read_checkpoint

AUGMENT = ["data.augment.rotate90=0.5", "data.augment.brightness=0.2"]
BN_SGD = ["optim.name=sgd", "optim.lr=0.01", "model.backbone.norm=bn", "model.fpn.norm=bn"]
FULL = OSError(errno.ENOSPC, "No space left on device")
FORK = multiprocessing.get_start_method() == "fork"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("saving"))


def assert_goes_on_as(whole: Path, broken: Path) -> None:
    """The command that the last line of a run names brings it where the whole one is."""
    train.main(["--resume", str(broken)])
    states = [read_checkpoint(folder) for folder in (whole, broken)]
    assert states[0]["step"] == states[1]["step"] == 8
    assert_same_state(*states)
    assert record(whole) == record(broken)


def leftovers(run: Path) -> list[Path]:
    return list(run.rglob(".*"))


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("changes", "val", "number"),
    [
        pytest.param([*AUGMENT, "optim.ema=0.9", "train.evaluate_every=2"], True, signal.SIGTERM, id="ema"),
        pytest.param([*AUGMENT, *BN_SGD, "data.workers=2"], False, signal.SIGINT, id="bn-2-workers"),
        pytest.param(["runtime.precision=fp16", "optim.ema=0.9"], False, signal.SIGHUP, id="fp16-ema"),
        pytest.param(["train.log_every=5"], False, None, id="crash"),
    ],
)
def test_a_run_that_was_stopped_between_all_that_it_writes(
    changes: list[str],
    val: bool,
    number: int | None,
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = data.run(tmp_path / "whole", *changes, val=val)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    if number is None:
        break_at(monkeypatch, 7, CrashError())
        with pytest.raises(CrashError):
            data.run(tmp_path / "broken", *changes, val=val)
    else:
        at_step(monkeypatch, 6, send(number))
        with pytest.raises(SystemExit) as ended:
            data.run(tmp_path / "broken", *changes, val=val)
        assert ended.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in before} == before
    broken = newest_run(tmp_path / "broken")
    assert read_checkpoint(broken)["step"] == 7
    assert len(record(broken)) == len(record(whole)) - (2 if val else 1)
    assert_goes_on_as(whole, broken)


def test_a_crash_keeps_its_traceback_and_says_how_to_go_on(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_at(monkeypatch, 3, CrashError())
    with pytest.raises(CrashError) as caught:
        data.run(tmp_path)
    assert caught.traceback[-1].name == "fail"
    run = newest_run(tmp_path)
    assert capsys.readouterr().err.strip().split("\n")[-1] == (
        "the run was ended by CrashError; saved after step 3; go on from step_0000003.pt with: "
        f"python -m fastmrcnn.train --resume {run}"
    )


def test_statistics_of_a_step_that_failed_in_its_forward_pass(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = data.run(tmp_path / "whole", *BN_SGD)
    real = MaskRCNN.forward
    fails = []

    def forward(model: MaskRCNN, *arguments: Any) -> Any:
        found = real(model, *arguments)
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore of it")
        return found

    monkeypatch.setattr(MaskRCNN, "forward", forward)
    at_step(monkeypatch, 5, lambda: fails.append(True))
    with pytest.raises(UserError) as caught:
        data.run(tmp_path / "broken", *BN_SGD)
    broken = newest_run(tmp_path / "broken")
    assert str(caught.value) == (
        "the GPU's memory is full (CUDA out of memory. Tried to allocate 2 GiB.); lower train.batch or "
        "data.long_side_max; saved after step 5; go on from step_0000005.pt with: "
        f"python -m fastmrcnn.train --resume {broken}"
    )
    fails.clear()
    assert_goes_on_as(whole, broken)


@pytest.mark.parametrize("part", ["optimizer", "average"])
def test_half_an_update_is_never_saved(
    part: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["optim.ema=0.9", "optim.name=sgd"]
    whole = data.run(tmp_path / "whole", *changes)
    owner: Any = Ema if part == "average" else torch.optim.SGD
    name = "update" if part == "average" else "step"
    real = getattr(owner, name)

    def fail(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: patch.setattr(owner, name, fail))
        with pytest.raises(RuntimeError, match="broken"):
            data.run(tmp_path / "broken", *changes)
    broken = newest_run(tmp_path / "broken")
    assert [path.name for path in broken.glob("checkpoints/*.pt")] == ["step_0000004.pt"]
    assert_goes_on_as(whole, broken)


def test_what_is_said_of_half_an_update(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Ema.update

    def update(average: Ema, *arguments: Any) -> None:
        real(average, *arguments)
        raise OSError(errno.EIO, "Input/output error")

    at_step(monkeypatch, 6, lambda: monkeypatch.setattr(Ema, "update", update))
    line = refusal(data.arguments(tmp_path, "optim.ema=0.9"), capsys, monkeypatch)
    assert line == (
        "error: Input/output error; it came in the middle of an update, so what it learnt after step 4 is "
        "lost; go on from step_0000004.pt with: python -m fastmrcnn.train --resume "
        f"{newest_run(tmp_path)}"
    )


def full_from(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk is full, for checkpoints, from that one on; each leaves part of its file."""
    real = torch.save

    def save(tree: dict[str, Any], stream: Any) -> None:
        if tree["step"] >= step:
            stream.write(b"PK")
            raise FULL
        real(tree, stream)

    monkeypatch.setattr(checkpoint.torch, "save", save)


def test_a_disk_that_is_full_when_a_checkpoint_is_due(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_from(monkeypatch, 8)
    line = refusal(data.arguments(tmp_path), capsys, monkeypatch)
    run = newest_run(tmp_path)
    assert line == (
        f"error: {run / 'checkpoints' / 'step_0000008.pt'}: cannot be written (No space left on device); "
        "what it learnt after step 4 is lost; go on from step_0000004.pt with: "
        f"python -m fastmrcnn.train --resume {run}"
    )
    assert read_checkpoint(run)["step"] == 4
    assert leftovers(run) == []


def test_a_run_whose_first_checkpoint_cannot_be_written(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_from(monkeypatch, 0)
    line = refusal(data.arguments(tmp_path), capsys, monkeypatch)
    assert "step_0000004.pt: cannot be written (No space left on device); what it learnt is lost; " in line
    assert "nothing was saved yet" in line


def test_both_failures_are_named_when_saving_fails_too(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_from(monkeypatch, 6)
    break_at(monkeypatch, 6, UserError("an image"))
    line = refusal(data.arguments(tmp_path), capsys, monkeypatch)
    run = newest_run(tmp_path)
    assert line == (
        f"error: an image; saving failed too ({run / 'checkpoints' / 'step_0000006.pt'}: cannot be written "
        "(No space left on device)), so what it learnt after step 4 is lost; go on from step_0000004.pt "
        f"with: python -m fastmrcnn.train --resume {run}"
    )
    assert leftovers(run) == []


class Full:
    """A text file on a disk that has room for half a line more."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> None:
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise FULL

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("row", [1, 2, 3])
def test_a_row_of_metrics_that_could_not_be_written_is_not_lost(
    row: int, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is an evaluation (row 2)."""
    changes = ["train.evaluate_every=4"]
    whole = data.run(tmp_path / "whole", *changes, val=True)
    real = Metrics.write
    written: list[Any] = []

    def write(metrics: Any, values: dict[str, Any]) -> None:
        if len(written) == row:
            metrics._file = Full(metrics._file)
        written.append(values)
        real(metrics, values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write)
        with pytest.raises(
            UserError, match=r"metrics\.json .* cannot be written \(No space left on device\); "
        ):
            data.run(tmp_path / "broken", *changes, val=True)
    broken = newest_run(tmp_path / "broken")
    with pytest.raises(json.JSONDecodeError):
        record(broken)
    assert read_checkpoint(broken)["step"] == (4, 4, 6)[row - 1]
    assert_goes_on_as(whole, broken)


def test_a_row_that_was_written_in_the_end_is_not_doubled(tmp_path: Path) -> None:
    kept = {"iteration": 3, "total_loss": 1.5}
    (tmp_path / "metrics.json").write_text(json.dumps(kept) + "\n")
    carried = {
        "names": [],
        "sums": None,
        "most": None,
        "count": 0,
        "images": 0,
        "data_time": 0.0,
        "seconds": 0.0,
    }
    late = {"iteration": 3, "segm/AP": 2.5}
    metrics = Metrics(tmp_path, 4, {**carried, "rows": [kept, late]})
    metrics.close()
    assert record(tmp_path) == [kept, late]
    assert metrics.evaluated == {3}


@pytest.mark.parametrize(("steps", "owed"), [(4, 3), (8, 7)])
def test_an_evaluation_that_fails_is_made_up_for(
    steps: int, owed: int, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["train.evaluate_every=4", "train.checkpoint_every=100"]
    whole = data.run(tmp_path / "whole", *changes, val=True)
    real = train.run_evaluation
    calls: list[int] = []

    def run_evaluation(*arguments: Any, **options: Any) -> dict[str, float]:
        calls.append(len(calls) * 4 + 4)
        if calls[-1] == steps:
            raise UserError("image 2: 2.png: cannot be decoded")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "run_evaluation", run_evaluation)
        with pytest.raises(UserError, match=f"cannot be decoded; .*go on from step_{steps:07d}.pt with: "):
            data.run(tmp_path / "broken", *changes, val=True)
    broken = newest_run(tmp_path / "broken")
    assert [r["iteration"] for r in record(broken) if "segm/AP" in r] == [3][: owed // 4]
    assert_goes_on_as(whole, broken)
    assert (broken / "losses.png").exists()


def test_a_signal_does_not_wait_for_an_evaluation(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_evaluation(*arguments: Any, **options: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation goes on")

    monkeypatch.setattr(train, "run_evaluation", run_evaluation)
    with pytest.raises(SystemExit) as ended:
        data.run(tmp_path, "train.evaluate_every=3", val=True)
    assert ended.value.code == 143
    assert read_checkpoint(newest_run(tmp_path))["step"] == 3


def test_a_second_signal_stops_at_once(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()
        raise AssertionError("the step goes on")

    at_step(monkeypatch, 6, twice)
    line = refusal(data.arguments(tmp_path), capsys, monkeypatch, code=143)
    assert line == (
        "stopped by SIGTERM; go on from step_0000004.pt with: python -m fastmrcnn.train --resume "
        f"{newest_run(tmp_path)}"
    )


def test_a_second_signal_while_saving(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = torch.save

    def save(tree: dict[str, Any], stream: Any) -> None:
        if tree["step"] == 7:
            stream.write(b"PK")
            os.kill(os.getpid(), signal.SIGINT)
        real(tree, stream)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    at_step(monkeypatch, 6, send(signal.SIGINT))
    line = refusal(data.arguments(tmp_path), capsys, monkeypatch, code=130)
    run = newest_run(tmp_path)
    assert line == (
        "stopped; stopped at once, so what it learnt after step 4 is lost; go on from step_0000004.pt with: "
        f"python -m fastmrcnn.train --resume {run}"
    )
    assert leftovers(run) == []


def test_sigusr1_saves_and_goes_on(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.run(tmp_path / "whole", "train.log_every=5")
    at_step(monkeypatch, 6, send(signal.SIGUSR1))
    run = data.run(tmp_path / "asked", "train.log_every=5")
    assert sorted(path.name for path in run.glob("checkpoints/*.pt")) == [
        "step_0000004.pt",
        "step_0000007.pt",
        "step_0000008.pt",
    ]
    assert record(run) == record(whole)
    (run / "checkpoints" / "last_checkpoint").write_text("step_0000007.pt\n")
    (run / "checkpoints" / "step_0000008.pt").unlink()
    assert_goes_on_as(whole, run)


@pytest.mark.skipif(not FORK, reason="the killed one is found among the children")
def test_a_worker_that_is_killed_in_the_middle_of_a_step(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch raises out of a signal, wherever the program is; the step is whole all the same."""
    whole = data.run(tmp_path / "whole")

    def kill() -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.5)

    at_step(monkeypatch, 6, kill)
    line = refusal(data.arguments(tmp_path / "broken", "data.workers=2"), capsys, monkeypatch)
    broken = newest_run(tmp_path / "broken")
    assert line.startswith("error: a loader process died (DataLoader worker (pid ")
    assert line.endswith(
        "lower data.workers, or set it to 0; saved after step 7; go on from step_0000007.pt with: "
        f"python -m fastmrcnn.train --resume {shlex.quote(str(broken))}"
    )
    assert_goes_on_as(whole, broken)


def test_a_stop_while_a_loss_is_bad_saves_what_was_before(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train.new_model
    models: list[MaskRCNN] = []

    def new_model(*arguments: Any) -> MaskRCNN:
        models.append(real(*arguments))
        return models[0]

    def poison() -> None:
        assert models[0].rpn is not None
        with torch.no_grad():
            models[0].rpn.head.objectness.bias[0] = float("nan")

    def learning_rate(config: OptimConfig, step: int, *others: Any) -> float:
        if step == 5:
            poison()
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.001

    monkeypatch.setattr(train, "new_model", new_model)
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    arguments = data.arguments(tmp_path, "train.log_every=100", "train.checkpoint_every=100")
    line = refusal(arguments, capsys, monkeypatch, code=143)
    assert (
        "its loss was not finite at step 5, and what was before that is saved; go on from step_0000005"
        in line
    )
    assert read_checkpoint(newest_run(tmp_path))["extra"] == {"bad_step": {"seed": 0, "step": 5}}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "the memory is full; lower train.batch, data.workers or data.long_side_max"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "the memory is full; lower train.batch, data.workers or data.long_side_max",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (OSError("odd"), "odd"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nOriginal Traceback:\n"
                "  ...\nOSError: [Errno 24] Too many open files\n"
            ),
            "OSError: [Errno 24] Too many open files",
        ),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  ...\n"
                "RuntimeError: unable to write to file </torch_7_8_9>: No space left on device (28)"
            ),
            "no shared memory is left for loader processes (RuntimeError: unable to write to file "
            "</torch_7_8_9>: No space left on device (28)); lower data.workers, or set it to 0",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                "workers are out of shared memory. Please try to raise your shared memory limit."
            ),
            "a loader process died (DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
            "that dataloader's workers are out of shared memory. Please try to raise your shared memory limit"
            "), most often for lack of memory or of shared memory; lower data.workers, or set it to 0",
        ),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: ours"), None),
        (ValueError("ours"), None),
        (RuntimeError("ours"), None),
    ],
)
def test_what_a_user_can_mend(error: Exception, line: str | None) -> None:
    assert reason_of(error) == line
