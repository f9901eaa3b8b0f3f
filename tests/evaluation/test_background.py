"""Evaluations beside the steps of a run: the same numbers, whatever becomes of their process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CrashError, TinyData, assert_same_state, break_at, newest_run, record
from torch import nn

from fastmrcnn import train
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.background import Evaluator
from fastmrcnn.training import evaluations
from fastmrcnn.training.evaluations import MOST_WAITING, Evaluations, in_background
from fastmrcnn.training.stopping import Requests
from fastmrcnn.weights.checkpoint import read_checkpoint

CHANGES = ["train.evaluate_every=2", "optim.ema=0.9", "train.keep_best=bbox/AP"]
CHANGES += ["model.box_head.score_threshold=0.0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("background"))


@pytest.fixture(scope="module")
def in_line(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.run(tmp_path_factory.mktemp("in_line"), *CHANGES, "evaluate.background=off", val=True)


def judged(run: Path) -> list[dict[str, Any]]:
    rows = [row for row in record(run) if "total_loss" not in row]
    assert [row["iteration"] for row in rows] == [1, 3, 5, 7]
    return rows


def assert_same_run(run: Path, in_line: Path) -> None:
    """To the last digit, apart from when a row was written."""
    assert judged(run) == judged(in_line)
    assert sorted(map(str, record(run))) == sorted(map(str, record(in_line)))
    assert_same_state(read_checkpoint(run), read_checkpoint(in_line))
    ours, theirs = (read_checkpoint(one / "checkpoints" / "best.pt") for one in (run, in_line))
    assert ours["step"] == theirs["step"]
    assert ours["extra"] == theirs["extra"]
    assert_same_state(ours, theirs)
    results = [(one / "evaluation" / "coco_instances_results.json").read_bytes() for one in (run, in_line)]
    assert results[0] == results[1]
    assert list((run / "evaluation").glob("pending/*")) == []


def test_a_run_that_is_judged_in_the_background(
    data: TinyData, in_line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Evaluator] = []
    closed: list[int] = []
    real = Evaluator.close

    def close(self: Evaluator) -> None:
        assert self._process is not None
        made.append(self)
        closed.append(self._process.result())
        real(self)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made in this process")

    monkeypatch.setattr(Evaluator, "close", close)
    monkeypatch.setattr(train, "judge_snapshot", never)
    run = data.run(tmp_path, *CHANGES, "evaluate.background=on", val=True)
    assert_same_run(run, in_line)
    assert len(closed) == 1  # one process for all
    assert closed[0] != os.getpid()
    made[0]._pool.shutdown(wait=True)
    with pytest.raises(ProcessLookupError):
        os.kill(closed[0], 0)


def test_a_process_that_is_killed(
    data: TinyData,
    in_line: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Evaluator.submit
    begun: list[int] = []

    def submit(self: Evaluator, snapshot: Path) -> Future[dict[str, float]]:
        answer = real(self, snapshot)
        assert self._process is not None
        if not begun:
            begun.append(self._process.result())
            os.kill(begun[0], signal.SIGKILL)
        return answer

    monkeypatch.setattr(Evaluator, "submit", submit)
    run = data.run(tmp_path, *CHANGES, "evaluate.background=on", val=True)
    assert_same_run(run, in_line)
    printed = "".join(capsys.readouterr())
    assert "The evaluation after step 2 is made in line, since its process has died." in printed


class Desk:
    """Stands in for the other process; answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Path, Future[dict[str, float]]]] = []
        self.closed = 0

    def submit(self, snapshot: Path) -> Future[dict[str, float]]:
        assert snapshot.is_file()
        self.asked.append((snapshot, Future()))
        return self.asked[-1][1]

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("mode", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_what_a_run_owes_is_made_up_for(
    mode: str, data: TinyData, in_line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps before the checkpoint; those after it come again."""
    desk = Desk()
    with monkeypatch.context() as patch:
        patch.setattr(train, "background_of", lambda *_: desk)
        break_at(patch, 7, CrashError())
        with pytest.raises(CrashError):
            data.run(tmp_path, *CHANGES, val=True)
    assert desk.closed == 1
    run = newest_run(tmp_path)
    pending = run / "evaluation" / "pending"
    assert sorted(file.name for file in pending.iterdir()) == [f"step_000000{k}.pt" for k in (2, 4, 6)]
    for later in (run / "checkpoints").glob("step_0000007.pt"):  # as after a power cut
        later.unlink()
    (run / "checkpoints" / "last_checkpoint").write_text("step_0000004.pt\n")
    train.main(["--resume", str(run), f"evaluate.background={mode}"])
    assert_same_run(run, in_line)


class Rows:
    """Of metrics.json."""

    def __init__(self) -> None:
        self.evaluated: set[int] = set()
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.evaluated.add(row["iteration"])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Evaluations]:
    monkeypatch.setattr(evaluations, "light_checkpoint", lambda step, *_: {"step": step})

    def make(desk: Desk | None, **named: Any) -> Evaluations:
        def refuse(*_: Any) -> dict[str, float]:
            raise AssertionError("not in line")

        given: dict[str, Any] = {"in_line": refuse, "from_file": refuse, **named}
        card: Any = lambda: SimpleNamespace()  # noqa: E731
        rows: Any = Rows()
        return Evaluations(5, tmp_path, nn.Linear(1, 1), card, rows, Requests(), background=desk, **given)

    return make


def test_steps_go_on_and_results_come_in_order(make: Callable[..., Evaluations]) -> None:
    desk = Desk()
    run = make(desk)
    for done in range(1, 5 * (1 + MOST_WAITING) + 5):
        run.after(done, 1000)
    assert len(desk.asked) == 1 + MOST_WAITING
    assert run.metrics.evaluated == set()
    assert not run.is_due(5, 1000)  # it is under way
    desk.asked[1][1].set_result({"segm/AP": 2.0})
    run.after(19, 1000)
    assert run.metrics.evaluated == set()  # the one before is not there yet
    desk.asked[0][1].set_result({"segm/AP": 1.0})
    run.after(20, 1000)
    assert run.metrics.evaluated == {4, 9}
    assert [file.exists() for file, _ in desk.asked] == [False, False, True, True]
    for number, (_, answer) in enumerate(desk.asked[2:]):
        answer.set_result({"segm/AP": 3.0 + number})
    run.wait()
    rows: Any = run.metrics
    assert rows.rows == [{"iteration": 5 * k - 1, "segm/AP": float(k)} for k in (1, 2, 3, 4)]
    assert run.last == {"segm/AP": 4.0}


def test_training_waits_when_too_much_is_waiting(make: Callable[..., Evaluations]) -> None:
    class Slow(Desk):
        def submit(self, snapshot: Path) -> Future[dict[str, float]]:
            answer = super().submit(snapshot)
            if len(self.asked) == 2 + MOST_WAITING:  # else the next line waits for good
                self.asked[0][1].set_result({"segm/AP": 1.0})
            return answer

    run = make(Slow())
    for done in range(1, 5 * (2 + MOST_WAITING) + 1):
        run.after(done, 1000)
    assert run.metrics.evaluated == {4}


def test_where_evaluations_are_made() -> None:
    def config(mode: str) -> Config:
        return Config.model_validate({"evaluate": {"background": mode}})

    found = [[in_background(config(mode), gpu) for gpu in (False, True)] for mode in ("off", "auto", "on")]
    assert found == [[False, False], [False, True], [True, True]]
    assert not in_background(config("auto"), True, processes=2)
    with pytest.raises(UserError, match="goes with one process, and this run has 2"):
        in_background(config("on"), True, processes=2)


def test_failures_in_the_other_process(
    make: Callable[..., Evaluations], capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk()
    run = make(
        desk, from_file=lambda file: {"segm/AP": float(file.stem[-2:])}, in_line=lambda: {"segm/AP": 9.0}
    )
    for done in (5, 10, 15):
        run.after(done, 1000)
    desk.asked[0][1].set_exception(torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    run.after(16, 1000)
    out = "".join(capsys.readouterr())
    assert (
        "after step 5 is made in line, since its process failed (OutOfMemoryError: CUDA out of memory.)"
        in out
    )
    assert run.background is desk
    for _, answer in desk.asked[1:]:
        answer.set_exception(BrokenProcessPool("gone"))
    run.after(17, 1000)
    assert run.background is None
    run.after(20, 1000)
    rows: Any = run.metrics
    assert [row["segm/AP"] for row in rows.rows] == [5.0, 10.0, 15.0, 9.0]

    desk = Desk()
    run = make(desk)
    run.after(25, 1000)
    desk.asked[0][1].set_exception(UserError("an image"))
    with pytest.raises(UserError, match="an image"):  # as in line: the run saves and stops
        run.after(26, 1000)
    assert desk.asked[0][0].exists()
