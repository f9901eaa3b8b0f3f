"""A run ends within its time, with the schedule of the steps that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import CrashError, TinyData, break_at, newest_run, record

from fastmrcnn import train
from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.training import time_limit
from fastmrcnn.training.time_limit import Costs, TimeLimit, Work, seconds_left, shortened, steps_that_fit
from fastmrcnn.weights.checkpoint import read_checkpoint

WORK = Work(checkpoint_every=100, evaluate_every=50, evaluates=True)


def config_of(steps: int = 1000, milestones: tuple[int, ...] = (600, 800)) -> Config:
    return Config.model_validate({"train": {"steps": steps}, "optim": {"milestones": list(milestones)}})


@pytest.mark.parametrize("done", [0, 49, 50, 99, 100, 101])
@pytest.mark.parametrize("work", [WORK, WORK._replace(evaluate_every=None), WORK._replace(evaluates=False)])
def test_seconds_are_those_of_a_run_that_is_counted_out(done: int, work: Work) -> None:
    costs = Costs(2.0, 7.0, 5.0)
    for steps in range(done + 1, done + 205):
        seconds = 0.0
        for now in range(done + 1, steps + 1):
            seconds += costs.step
            seconds += costs.save * (now % work.checkpoint_every == 0 or now == steps)
            inner = work.evaluate_every is not None and now % work.evaluate_every == 0 and now < steps
            seconds += costs.evaluation * (inner + (now == steps)) * work.evaluates
        assert seconds_left(done, steps, work, costs) == seconds
    fit = steps_that_fit(done, done + 204, 200.0, work, costs)
    assert seconds_left(done, fit, work, costs) <= 200 < seconds_left(done, fit + 1, work, costs)
    assert steps_that_fit(done, done + 204, 1e9, work, costs) == done + 204
    assert steps_that_fit(done, done + 204, -1.0, work, costs) == done + 1


def test_milestones_keep_their_place() -> None:
    found = shortened(config_of(), 100)
    assert (found.train.steps, found.optim.milestones) == (100, [60, 80])
    assert found.optim.warmup_steps == config_of().optim.warmup_steps
    assert shortened(config_of(), 1).optim.milestones == [1, 1]


class Machine:
    """A clock that steps move on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run_on(machine: Machine, limit: TimeLimit, start: int, step: float, evaluation: float) -> tuple[int, int]:
    """Train as the loop does; returns the steps done and how often their number was changed."""
    done, changes, steps = start, 0, limit.steps
    while done < steps:
        machine.now += step
        done += 1
        if done % 50 == 0 and done < steps:
            machine.now += evaluation
            limit.evaluated(evaluation)
        limit.saved(0.0)
        if limit.measuring or done % 20 == 0:
            changes += limit.after(done) != steps
            steps = limit.steps
    machine.now += evaluation
    return done, changes


@pytest.mark.parametrize(
    ("step", "evaluation", "guess"), [(1.0, 10.0, 10.0), (1.0, 10.0, 0.0), (0.3, 40, 1.0)]
)
def test_a_run_ends_in_time_and_uses_it(step: float, evaluation: float, guess: float) -> None:
    machine = Machine()
    limit = TimeLimit(0.25, config_of(100_000), WORK, lambda _: guess, clock=machine, started=machine.now)
    machine.now += 30  # start-up
    done, changes = run_on(machine, limit, 0, step, evaluation)
    assert 0.85 * 900 < limit.elapsed <= 900
    assert done == limit.config.train.steps
    assert limit.config.optim.milestones == [round(0.006 * done), round(0.008 * done)]
    # Once, and once more where the first evaluation takes longer than was thought.
    assert changes == (1 if guess == evaluation else 2)


def test_processes_go_by_one_clock() -> None:
    leader, other = (TimeLimit(0.25, config_of(100_000), WORK, lambda _: 10.0, clock=Machine()) for _ in "ab")
    for done in range(1, 200):
        assert leader.measuring == other.measuring
        if leader.measuring or done % 20 == 0:
            leader.clock.now += 1  # type: ignore[attr-defined]
            other.adopt(leader.after(done), leader.fitted)
        assert other.config == leader.config
    assert leader.steps < 100_000


def test_a_run_that_has_time_is_left_alone() -> None:
    machine = Machine()
    limit = TimeLimit(1, config_of(200), WORK, lambda _: 1.0, clock=machine, started=machine.now)
    assert run_on(machine, limit, 0, 1.0, 1.0) == (200, 0)
    assert limit.config == config_of(200)


def test_steps_that_get_slower_shorten_the_run_once_more() -> None:
    machine = Machine()
    limit = TimeLimit(0.25, config_of(100_000), WORK, lambda _: 5.0, clock=machine, started=machine.now)
    limit.work = WORK._replace(evaluate_every=None)
    for done in range(1, 100):
        machine.now += 1
        limit.after(done)
    first = limit.steps
    run_on(machine, limit, 99, 1.5, 5.0)
    assert limit.steps < first
    assert limit.elapsed <= 905


def test_a_resumed_run_knows_the_time_that_was_used() -> None:
    machine = Machine()
    limit = TimeLimit(0.25, config_of(100_000), WORK, lambda _: 10.0, clock=machine, started=machine.now)
    for done in range(1, 201):
        machine.now += 1
        if limit.measuring or done % 20 == 0:
            limit.after(done)
    kept, config = limit.carried(), limit.config
    machine.now += 1e6  # nobody trains
    again = TimeLimit(0.25, config, WORK, lambda _: 10.0, kept, clock=machine, started=machine.now)
    assert (again.steps, again.elapsed, again.measuring) == (limit.steps, 200, False)
    assert again.asked == config_of(100_000)
    run_on(machine, again, 200, 1.0, 10.0)
    assert 0.85 * 900 < again.elapsed <= 900
    # Another limit: fitted anew, to what was asked for at first.
    more = TimeLimit(1, config, WORK, lambda _: 10.0, kept, clock=machine, started=machine.now)
    assert more.config == config_of(100_000)
    assert more.measuring
    # Other steps: those.
    other = TimeLimit(1, config_of(300), WORK, lambda _: 10.0, kept, clock=machine, started=machine.now)
    assert other.config == config_of(300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("limit"))


def test_a_run_from_its_command(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock of which each look takes a second; the limit is 40 s."""
    machine = Machine()
    real = TimeLimit.__init__

    def init(self: TimeLimit, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **{**named, "clock": machine, "started": machine.now})

    def after(self: TimeLimit, done: int) -> int:
        machine.now += 1
        return fit(self, done)

    fit = TimeLimit.after
    monkeypatch.setattr(TimeLimit, "__init__", init)
    monkeypatch.setattr(TimeLimit, "after", after)
    monkeypatch.setattr(time_limit, "WINDOW", 3)
    changes = [
        f"train.time_limit={40 / 3600}",
        "train.steps=1000",
        "train.log_every=1",
        "train.checkpoint_every=8",
        "optim.schedule=multistep",
        "optim.milestones=[500, 750]",
    ]
    break_at(monkeypatch, 10, CrashError())
    with pytest.raises(CrashError):
        data.run(tmp_path, *changes)
    assert "of 1000 steps fit, and the schedule is now that of" in capsys.readouterr().out
    run = newest_run(tmp_path)
    kept = load_config(run / "config.yaml")
    steps = kept.train.steps
    assert 30 <= steps <= 40
    assert kept.optim.milestones == [round(0.5 * steps), round(0.75 * steps)]
    machine.now += 1e5
    train.main(["--resume", str(run)])
    assert "fit" not in capsys.readouterr().out.replace("fitted", "")
    state = read_checkpoint(run)
    assert state["step"] == steps
    assert state["extra"]["time_limit"]["steps"] == 1000
    rates = {row["iteration"]: row["lr"] for row in record(run) if "lr" in row}
    assert rates[round(0.5 * steps)] == pytest.approx(0.1 * rates[round(0.5 * steps) - 1])
