"""A run that ends in time: how many of its steps fit, and a schedule for that many."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.group import Group

FIRST = 3  # steps that do not count: they compile, and fill caches
WINDOW = 20  # steps after which the time of one is taken as known
SHARE = 0.05  # of the limit, after which it is so in any case
MARGIN = 0.02  # of the limit, which stays free


class Costs(NamedTuple):
    """Seconds."""

    step: float
    evaluation: float = 0.0  # between steps, and at the end
    save: float = 0.0


class Work(NamedTuple):
    """What a run does besides steps."""

    checkpoint_every: int
    evaluate_every: int | None  # in line; None: at the end alone
    evaluates: bool  # whether there is a validation set


def seconds_left(done: int, steps: int, work: Work, costs: Costs) -> float:
    """What is left of a run of so many steps takes."""
    between = 0 if work.evaluate_every is None else _multiples(done, steps, work.evaluate_every)
    evaluations = between + 1 if work.evaluates else 0
    saves = _multiples(done, steps, work.checkpoint_every) + 1
    return (steps - done) * costs.step + evaluations * costs.evaluation + saves * costs.save


def steps_that_fit(done: int, steps: int, seconds: float, work: Work, costs: Costs) -> int:
    """The most steps, up to `steps`, whose run ends within so many seconds; at least one more than `done`."""
    low, high = done + 1, max(steps, done + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if seconds_left(done, middle, work, costs) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def shortened(asked: Config, steps: int) -> Config:
    """The configuration of a run of so many steps. Its milestones lie where those of `asked` do, as shares of
    the whole; the warm-up stays as long as it is."""
    share = steps / asked.train.steps
    milestones = [max(1, round(milestone * share)) for milestone in asked.optim.milestones]
    optim = asked.optim.model_copy(update={"milestones": milestones})
    return with_steps(asked, steps).model_copy(update={"optim": optim})


def with_steps(config: Config, steps: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


class TimeLimit:
    """Fits the number of steps to the hours that are given, once the time of a step has been measured. Later
    it is only lowered, if the run would overrun. The schedule is a function of the steps all the same, so
    that the configuration which the run keeps gives it again.

    Args:
        hours: in which all parts of the run are to end.
        config: as it was asked for; a resumed run's is the one that it kept.
        work: what else the run does.
        guess: seconds of an evaluation, from those of a step; until one has been made.
        carried: what a checkpoint kept, from `carried()`.
        started: of this part, by the clock.
    """

    def __init__(
        self,
        hours: float,
        config: Config,
        work: Work,
        guess: Callable[[float], float],
        carried: dict[str, Any] | None = None,
        *,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = 3600 * hours
        self.work, self.guess, self.clock = work, guess, clock
        self.started = clock() if started is None else started
        self.asked, self.used, self.fitted = config, 0.0, False
        if carried is not None:
            self.used = carried["used"]
            if carried["fitted"] == config.train.steps:  # else another number was asked for since
                optim = config.optim.model_copy(update={"milestones": list(carried["milestones"])})
                self.asked = with_steps(config, carried["steps"]).model_copy(update={"optim": optim})
                self.fitted = carried["seconds"] == self.seconds
        self.config = config if self.fitted else self.asked
        """What the run is to go on with: if the limit has changed, what was asked for at first."""
        self.steps = self.config.train.steps
        self._first: tuple[int, float] | None = None  # step and time at which measuring began
        self._seen = 0
        self._apart = 0.0  # seconds since then that no step took
        self._evaluation: float | None = None
        self._save = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of all parts of the run."""
        return self.used + self.clock() - self.started

    def carried(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "seconds": self.seconds,
            "used": self.elapsed,
            "fitted": self.steps if self.fitted else None,
            "steps": self.asked.train.steps,
            "milestones": list(self.asked.optim.milestones),
        }

    def evaluated(self, seconds: float) -> None:
        """An evaluation held training up for so long."""
        self._apart += seconds
        self._evaluation = max(seconds, self._evaluation or 0.0)

    def saved(self, seconds: float) -> None:
        self._apart += seconds
        self._save = max(seconds, self._save)

    @property
    def measuring(self) -> bool:
        """Whether the time of a step is not known yet, and `after` is to be called after each."""
        return not self.fitted

    def after(self, done: int) -> int:
        """To be called when the results of a step are there; returns the steps that fit, `config` with them.
        A line tells if they have changed."""
        before = self.steps
        fit = self._fit(done)
        if fit is not None:
            self.adopt(fit, fitted=True)
            tqdm.write(self._line(before))
        return self.steps

    def agreed(self, done: int, group: Group) -> int:
        """As `after`, of several processes by the clock of the first one."""
        if group.size == 1:
            return self.after(done)
        steps, fitted = group.lead(lambda: (self.after(done), self.fitted))
        if not group.leads:
            self.adopt(steps, fitted)
        return self.steps

    def adopt(self, steps: int, fitted: bool) -> None:
        """Go by the clock of another process of the run: the steps that it found, and whether it has."""
        self.fitted = fitted
        if steps != self.steps:
            self.steps, self.config = steps, shortened(self.asked, steps)

    def _fit(self, done: int) -> int | None:
        """The number of steps if it is to be another."""
        self._seen += 1
        now = self.clock()
        if self._first is None:
            if self._seen >= FIRST:
                self._first, self._apart = (done, now), 0.0
            return None
        count = done - self._first[0]
        took = now - self._first[1] - self._apart
        enough = count >= WINDOW or (count > 0 and took >= SHARE * self.seconds)
        if not enough or done >= self.steps:
            return None
        costs = self.costs(max(took, 0.0) / count)
        left = self.seconds - self.elapsed
        if self.fitted and seconds_left(done, self.steps, self.work, costs) <= left:
            return None
        self.fitted = True
        fit = steps_that_fit(done, self.steps, left - MARGIN * self.seconds, self.work, costs)
        return None if fit == self.steps else fit

    def costs(self, step: float) -> Costs:
        evaluation = self.guess(step) if self._evaluation is None else self._evaluation
        return Costs(step, evaluation, self._save)

    def _line(self, before: int) -> str:
        optim = self.config.optim
        milestones = f", milestones {optim.milestones}" if optim.schedule == "multistep" else ""
        return (
            f"train.time_limit={self.seconds / 3600:g}: {self.steps} of {before} steps fit, and the "
            f"schedule is now that of {self.steps} steps{milestones}."
        )


def time_limit_of(
    config: Config,
    state: Mapping[str, Any] | None,
    images: int,
    background: bool,
    started: float | None = None,
) -> TimeLimit | None:
    """What `train.time_limit` asks for.

    Args:
        state: the checkpoint that the run goes on from.
        images: of the validation set.
        background: evaluations between steps do not hold them up.
    """
    train = config.train
    if train.time_limit is None:
        return None
    work = Work(train.checkpoint_every, None if background else train.evaluate_every, images > 0)
    carried = None if state is None else state["extra"].get("time_limit")

    def guess(step: float) -> float:
        """To find and judge the objects of an image takes no longer than to learn from it."""
        return images * step / train.images

    return TimeLimit(train.time_limit, config, work, guess, carried, started=started)


def _multiples(done: int, steps: int, every: int) -> int:
    """How many of its multiples lie between, neither end included."""
    return max(0, (steps - 1) // every - done // every)
