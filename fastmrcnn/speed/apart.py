"""An object in a process of its own: what breaks there, or spoils the device, touches nothing else."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

GRACE_S = 10.0  # for a process to let go of its device, before it is killed


class GoneError(Exception):
    """Why there is no answer, in one line."""


class LateError(GoneError):
    """There was none in time."""


class Apart:
    """Makes an object in a new process, and calls its methods there. In between the process sleeps.

    Args:
        make: with its arguments, as everything that is sent, it must pickle.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        # Not forked: a fork of a process that has touched CUDA cannot use it.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()
        theirs.close()
        self.asked = False  # and not answered yet
        self.waiting_ms = 0.0  # processor time of that process while nothing was asked of it, so far

    def ask(self, method: str, *arguments: Any, limit_s: float | None = None) -> Any:
        """What the method returns.

        Raises:
            LateError: it took longer than `limit_s`, and its process was killed.
            GoneError: it raised, or its process died.
        """
        self.asked = True
        try:
            self.pipe.send((method, arguments))
            if not self.pipe.poll(limit_s):
                self.process.kill()
                raise LateError(f"stopped after {limit_s:g} s")
            value, self.waiting_ms = self.pipe.recv()
            self.asked = False
        except (EOFError, OSError):
            self.process.join(GRACE_S)
            raise GoneError(f"its process ended with exit code {self.process.exitcode}") from None
        if isinstance(value, GoneError):
            raise value
        return value

    def close(self) -> None:
        """End the process, at once if it has not answered."""
        self.pipe.close()
        if self.asked:
            self.process.kill()
        self.process.join(GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def one_line(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both, and the parent ends this one
    sys.stdout = sys.stderr  # the parent's output is its tables
    served, waiting_ms = None, 0.0
    while True:
        busy = time.process_time()
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        if served is not None:
            waiting_ms += 1e3 * (time.process_time() - busy)
        try:
            served = make(*arguments) if served is None else served
            answer = getattr(served, method)(*given)
        except Exception as error:
            answer = GoneError(one_line(error))
        try:
            pipe.send((answer, waiting_ms))
        except BrokenPipeError:
            return
