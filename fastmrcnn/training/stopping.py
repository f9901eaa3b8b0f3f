"""What the system, a scheduler or a terminal asks of a run: to stop, or to save and go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE = signal.SIGUSR1
ECHO_S = 1.0  # a signal that comes again so soon is the same one


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end. As Ctrl-C does, it passes every `except Exception`.

    Args:
        at_once: it was the second one, which waits for nothing.
        note: what was saved, as `Saver.rescue` says it.
    """

    def __init__(self, number: int, *, at_once: bool = False, note: str = "") -> None:
        super().__init__(number)
        self.number, self.at_once, self.note = number, at_once, note


def signal_of(stop: KeyboardInterrupt) -> tuple[int, str]:
    """The number of the signal that asked for it, and " by SIGTERM" for messages; nothing of Ctrl-C."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    return number, "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"


class Requests:
    """A block in which signals become requests.

    SIGINT (Ctrl-C), SIGTERM (Slurm, `docker stop`) and SIGHUP (a closed terminal) raise `Stopped`, or
    within `held()` when that ends; a second one raises it wherever it comes. SIGUSR1 sets `save`. The end
    of a loader process, which torch reports by an exception out of a signal, waits for the end of
    `held()` too. What is ignored when the block begins (as under nohup) stays ignored, and only in the main
    thread is anything changed.

    Within `together()` nothing is raised but by a second signal: the processes of a run first agree.

    Args:
        kept: what is awaited within `held()`, for the line that says so.
    """

    def __init__(self, kept: str = "this step is saved") -> None:
        self._kept = kept
        self.save = False
        self.stop: int | None = None
        self._held = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._child_waits = self._installed = False
        self._together, self._speaks = False, True
        self._asked = 0.0  # when

    def __enter__(self) -> Requests:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            for number in (*STOP, SAVE):
                before = signal.getsignal(number)
                if before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._on_save if number == SAVE else self._on_stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is raised within, but for a second request to stop."""
        self.hold()
        try:
            yield
        finally:
            self._held = False
        if self.stop is not None and not self._together:
            raise Stopped(self.stop)
        if self._child_waits:
            self._child_waits = False
            self._before[signal.SIGCHLD](signal.SIGCHLD, None)

    @contextlib.contextmanager
    def together(self, *, speaks: bool) -> Iterator[None]:
        """A block in which the caller asks for `stop` and raises what all processes of a run agree on.

        Args:
            speaks: whether this process says that it has heard.
        """
        self._together, self._speaks = True, speaks
        try:
            yield
        finally:
            self._together, self._speaks = False, True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A block within `together()` in which a signal acts on this process at once, as outside of it."""
        before, self._together = self._together, False
        try:
            if before and self.stop is not None:  # it came since they agreed
                raise Stopped(self.stop)
            yield
        finally:
            self._together = before

    def hold(self) -> None:
        """As `held`, from now on."""
        self._held = True
        # torch's own handler, which it sets with its first loader process.
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current != self._on_child and self._installed:
            self._before[signal.SIGCHLD] = current
            signal.signal(signal.SIGCHLD, self._on_child)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that has not set its own yet
            return
        if self.stop is not None:
            # A launcher passes on what a scheduler has sent to its processes too.
            if self._together and time.monotonic() < self._asked + ECHO_S:
                return
            raise Stopped(number, at_once=True)
        self.stop, self._asked = number, time.monotonic()
        if not self._held and not self._together:
            raise Stopped(number)
        if not self._speaks:
            return
        # Not print: this may have interrupted one.
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopping as soon as {self._kept}; once more stops at once\n".encode())

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._child_waits = True
        else:
            self._before[signal.SIGCHLD](number, frame)
