"""The checkpoints of a run. Whatever ends it saves first, and says how to go on."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.data.transport import dead_worker
from fastmrcnn.errors import UserError
from fastmrcnn.group import LostError, lost_peer
from fastmrcnn.training.console import how_to_go_on
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.training.stopping import Requests, Stopped, signal_of
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import save_checkpoint


class BadLossError(UserError):
    """The gate has shut at a step; the weights are those before it."""

    def __init__(self, step: int, image_ids: Sequence[int]) -> None:
        super().__init__(
            f"the loss or its gradient is not finite at step {step} (image ids {list(image_ids)})"
        )
        self.step = step


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: of the run.
        keep: how many checkpoints stay.
        start: steps that were done, and saved, before.
        writes: false: it only counts, as in all processes of a run but the first.
    """

    def __init__(
        self,
        folder: Path,
        make_step: TrainingStep,
        card: ModelCard,
        metrics: Metrics,
        *,
        keep: int,
        start: int,
        writes: bool = True,
    ) -> None:
        self.writes = writes
        self.folder, self.make_step, self.card, self.metrics = folder, make_step, card, metrics
        self.keep = keep
        self.done = start
        """Whole steps; the caller counts."""
        self.saved = start
        """Steps in the last checkpoint; 0 if there is none."""
        self.path: Path | None = None
        """The last one that was written here."""
        self.bad_step: int | None = None
        """The first whose loss or gradient was not finite."""
        self.carry: Callable[[], dict[str, Any]] = dict
        """What else a checkpoint is to carry, by name."""
        self._failed = False

    def save(self, step: int | None = None) -> Path:
        """Write a checkpoint of the first `step` steps; None: of all that are done."""
        step = self.done if step is None else step
        if not self.writes:
            self.saved = step
            return self.folder
        gathered = self.metrics.carried() if step == self.done else {}
        ema = self.make_step.ema
        extra: dict[str, Any] = {"metrics": gathered} if gathered else {}
        if step == self.bad_step:  # what --replay runs again
            extra["bad_step"] = {"seed": self.make_step.seed, "step": step}
        try:
            self.path = save_checkpoint(
                self.folder / "checkpoints",
                step=step,
                model=self.make_step.model,
                optimizer=self.make_step.optimizer,
                scaler=self.make_step.update,
                ema=None if ema is None else ema.model,
                card=self.card,
                extra={**self.carry(), **extra},
                keep=self.keep,
            )
        except Exception:
            self._failed = True
            raise
        self.saved = step
        return self.path

    def rescue(self) -> str:
        """Save the last whole step unless it is saved, whatever has happened; returns what came of it, for
        the middle of a message."""
        update = self.make_step.update
        if not self.writes:
            return ""
        if update.phase == "update":
            return f"it came in the middle of an update, so {self._lost()}; "
        if self.done == self.saved:
            return ""
        if self._failed:
            return f"{self._lost()}; "
        try:
            update.undo_forward()
            bad_step = int(update.first_bad_step)
            self.bad_step = bad_step if bad_step >= 0 else None
            self.save(bad_step if bad_step >= 0 else self.done)
        except Stopped:
            return f"stopped at once, so {self._lost()}; "
        except Exception as error:
            return f"saving failed too ({reason_of(error) or repr(error)}), so {self._lost()}; "
        if bad_step >= 0:
            return f"its loss was not finite at step {bad_step}, and what was before that is saved; "
        return f"saved after step {self.saved}; "

    def _lost(self) -> str:
        return f"what it learnt after step {self.saved} is lost" if self.saved else "what it learnt is lost"


@contextlib.contextmanager
def saving_first(saver: Saver, requests: Requests) -> Iterator[None]:
    """A block that trains. If it fails, the last whole step is saved before the failure is told.

    Raises:
        UserError: one line with the reason, what was saved and how to go on, for what a user can mend.
        Stopped: by a signal, with a note of what was saved.
    """
    try:
        yield
    except BaseException as error:
        requests.hold()
        if isinstance(error, SystemExit):  # the first process knows why, and saves
            raise
        stop = _stop_of(error, requests)
        note = "" if stop is not None and stop.at_once else saver.rescue()
        if stop is not None:
            raise Stopped(stop.number, note=note) from None
        reason = reason_of(error)
        how = f"{note}{how_to_go_on(saver.folder)}"
        if reason is None:
            with contextlib.suppress(OSError):
                print(f"\nthe run was ended by {type(error).__name__}; {how}", file=sys.stderr)
            raise
        if isinstance(error, BadLossError) and saver.saved == error.step and saver.path is not None:
            raise UserError(
                f"{reason}; the weights are those before it, saved in {saver.path}; lower optim.lr, lengthen "
                f"optim.warmup_steps or set optim.clip_norm, then go on with --resume {saver.path}; "
                f"--resume {shlex.quote(str(saver.folder))} --replay {error.step} names the operation"
            ) from error
        if saver.done == 0:  # nothing that could be gone on from
            raise UserError(reason) from error
        raise UserError(f"{reason}; {how}") from error


def tell_stop(stop: KeyboardInterrupt, folder: Path | None, *, speaks: bool = True) -> int:
    """Print the one line on which a run ends that was asked to; returns the exit code.

    Args:
        folder: of the run, as far as it has one.
        speaks: false: print nothing.
    """
    number, by = signal_of(stop)
    if not speaks:
        return 128 + number
    note = stop.note if isinstance(stop, Stopped) else ""
    how = "nothing was begun" if folder is None else how_to_go_on(folder)
    with contextlib.suppress(OSError):
        print(f"\nstopped{by}; {note}{how}", file=sys.stderr)
    return 128 + number


def reason_of(error: BaseException) -> str | None:
    """One line for what a user can mend; none for what is our own mistake."""
    if isinstance(error, UserError):
        return str(error)
    if (death := dead_worker(error)) is not None:
        return death
    if (loss := lost_peer(error)) is not None:
        return loss
    lines = str(error).strip().splitlines() or [""]
    # Of what a loader process raised torch tells the traceback, at whose end is what it was.
    said = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full ({said}); lower train.batch or data.long_side_max"
    # The second is how torch says it of the CPU.
    if isinstance(error, MemoryError) or "can't allocate memory" in said:
        return "the memory is full; lower train.batch, data.workers or data.long_side_max"
    # A container has 64 MB of shared memory unless it is told otherwise.
    if isinstance(error, RuntimeError | OSError) and ("shared memory" in said or "</torch_" in said):
        return f"no shared memory is left for loader processes ({said}); lower data.workers, or set it to 0"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or said or type(error).__name__}"
    return None


def _stop_of(error: BaseException, requests: Requests) -> Stopped | None:
    """The request to stop that an error is, or that came with it."""
    if isinstance(error, Stopped):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    # What a closing terminal or a dying process group breaks is not the reason.
    if requests.stop is None or (isinstance(error, UserError) and not isinstance(error, LostError)):
        return None
    return Stopped(requests.stop)
