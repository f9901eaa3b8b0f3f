"""The evaluations within a run: when they are due, where they are made, what follows from them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn
from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.files import make_folder
from fastmrcnn.training.best import Best, light_checkpoint, light_copy
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.stopping import Requests
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import write_tensors

MOST_WAITING = 2  # snapshots, besides the one that is judged; with more training waits
Found = dict[str, float]


class Background(Protocol):
    """What judges snapshots in a process of its own."""

    def submit(self, snapshot: Path) -> Future[Found]: ...

    def close(self) -> None: ...


class Pending(NamedTuple):
    done: int  # steps
    snapshot: Path
    answer: Future[Found]


class Evaluations:
    """
    In line, an evaluation is made between two steps. In the background the weights are written to
    `RUN/evaluation/pending/`, and the row of the result comes to metrics.json when it is there, under the
    step that it belongs to. A snapshot stays until then: what a run that was ended owes is made up for.

    Args:
        every: steps between them; None: there are none.
        folder: of the run.
        judged: the model whose weights are judged.
        card: gives the run's card.
        in_line: evaluates `judged` as it is.
        from_file: evaluates a snapshot in this process.
        background: None: in line.
        best: None: no best weights are kept.
    """

    def __init__(
        self,
        every: int | None,
        folder: Path,
        judged: nn.Module,
        card: Callable[[], ModelCard],
        metrics: Metrics,
        requests: Requests,
        *,
        in_line: Callable[[], Found],
        from_file: Callable[[Path], Found],
        background: Background | None = None,
        best: Best | None = None,
    ) -> None:
        self.every, self.folder, self.judged, self.card = every, folder / "evaluation", judged, card
        self.metrics, self.requests = metrics, requests
        self.in_line, self.from_file = in_line, from_file
        self.background, self.best = background, best
        self.waiting: deque[Pending] = deque()
        self.last: Found = {}
        """The last result that has come."""

    def last_step(self, done: int, steps: int) -> int:
        """The steps of the run: if `train.patience` has come to its end one more, with all that belongs to a
        last one. A line says so."""
        best = self.best
        if best is None or not best.exhausted or done + 1 >= steps:
            return steps
        above = "" if best.value is None else f" above {best.value:.1f}, after step {best.step},"
        tqdm.write(
            f"{best.metric} has not risen{above} in {best.since} evaluations (train.patience): the next step "
            "is the last."
        )
        return done + 1

    def describe_best(self) -> str | None:
        return None if self.best is None else self.best.describe()

    def is_due(self, done: int, steps: int) -> bool:
        """Whether one follows so many of all steps. A run that was stopped may owe it."""
        if self.every is None or not 0 < done < steps or done % self.every != 0:
            return False
        return done - 1 not in self.metrics.evaluated and all(done != one.done for one in self.waiting)

    def make_up(self, start: int) -> None:
        """Before the first step: what an earlier part of the run owes, and left snapshots of."""
        for done, snapshot in sorted(self._snapshots().items()):
            if done > start or done - 1 in self.metrics.evaluated:
                snapshot.unlink(missing_ok=True)  # the run comes there again; or all but this was done
            elif self.background is None:
                self.take(done, self.from_file(snapshot), snapshot)
            else:
                self.waiting.append(Pending(done, snapshot, self.background.submit(snapshot)))

    def after(self, done: int, steps: int) -> None:
        """After a step: begin an evaluation that is due, and take the results that have come."""
        while self.waiting and self.waiting[0].answer.done():
            self._collect()
        if not self.is_due(done, steps):
            return
        if self.background is None:
            self.take(done, self.in_line())
            return
        snapshot = self.folder / "pending" / f"step_{done:07d}.pt"
        make_folder(snapshot.parent)
        with self.requests.held():
            write_tensors(snapshot, light_checkpoint(done, self.judged, self.card()))
        self.waiting.append(Pending(done, snapshot, self.background.submit(snapshot)))
        while len(self.waiting) > 1 + MOST_WAITING:
            self._collect()

    def wait(self) -> None:
        """For all that have begun."""
        if self.waiting:
            steps = ", ".join(str(one.done) for one in self.waiting)
            tqdm.write(f"Waiting for the evaluation after step {steps}.")
        while self.waiting:
            self._collect()

    def close(self) -> None:
        """Break off what has begun; its snapshots stay."""
        if self.background is not None:
            self.background.close()

    def _collect(self) -> None:
        """Take the next result, and wait for it if it is not there."""
        done, snapshot, answer = self.waiting[0]
        try:
            found = answer.result()
        except UserError:
            raise
        except Exception as error:
            tqdm.write(f"The evaluation after step {done} is made in line, since {reason(error)}.")
            if isinstance(error, BrokenProcessPool):
                self._give_up()
            found = self.from_file(snapshot)
        self.take(done, found, snapshot)
        self.waiting.popleft()

    def _give_up(self) -> None:
        """All others are made in line, too: what ended the process once may do so again."""
        self.close()
        self.background = None

    def take(self, done: int, found: Found, snapshot: Path | None = None) -> None:
        """Write down what an evaluation has found, of the weights as they are or in a file."""

        def light() -> dict[str, Any]:
            if snapshot is None:
                return light_checkpoint(done, self.judged, self.card())
            return light_copy(snapshot)

        with self.requests.held():
            if self.best is not None:
                self.best.take(done, found, light)  # first: the row says that all is done
            self.metrics.write({"iteration": done - 1, **found})
            self.last = found
            if snapshot is not None:
                parts = [f"{name} {value:.1f}" for name, value in found.items() if name.endswith("/AP")]
                tqdm.write(f"evaluation after step {done}: {', '.join(parts)}")
                snapshot.unlink(missing_ok=True)

    def _snapshots(self) -> dict[int, Path]:
        found = ((re.fullmatch(r"step_(\d+)\.pt", file.name), file) for file in self.folder.glob("pending/*"))
        return {int(match[1]): file for match, file in found if match}


def reason(error: BaseException) -> str:
    """In the middle of a line, why a process gave no result."""
    if isinstance(error, BrokenProcessPool):
        return "its process has died"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"its process failed ({type(error).__name__}: {first})"


def in_background(config: Config, on_gpu: bool, processes: int = 1) -> bool:
    """What `evaluate.background` means. Several processes share an evaluation between their steps instead.

    Raises:
        UserError: it is on in a run of several.
    """
    chosen = config.evaluate.background
    if chosen == "on" and processes > 1:
        raise UserError(
            f"evaluate.background=on goes with one process, and this run has {processes}, which share an "
            "evaluation; leave it out"
        )
    return chosen == "on" or (chosen == "auto" and on_gpu and processes == 1)
