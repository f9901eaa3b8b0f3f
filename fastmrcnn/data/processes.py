"""Signals in a loader process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from types import TracebackType


def obey_parent_alone(worker: int) -> None:
    """Let signals to the whole group pass, so that the parent can save what needs no more batches.

    Ctrl-C, a scheduler and `docker stop` send their signals to every process of a run. SIGTERM still ends
    this process if the parent sends it, which is how torch ends what does not answer.

    Args:
        worker: number of the process, which torch gives.
    """
    sys.excepthook = tell_but_of_lost_connections
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none; there SIGTERM stays what torch makes of it
        parent = multiprocessing.parent_process()
        assert parent is not None, "a loader process has been started by someone"
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_for, args=(parent.pid,), daemon=True).start()


def tell_but_of_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """In place of `sys.excepthook`, which the thread calls that hands batches over: a parent that ends in the
    middle of taking one is no news. What a loader process itself raises does not come by here."""
    if not issubclass(kind, (OSError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_for(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
