"""Evaluations in a process of their own, so that a run need not wait for them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import torch
from tqdm import tqdm

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.device import set_threads, set_up_cuda
from fastmrcnn.evaluation.run import run_evaluation
from fastmrcnn.weights.trained import load_trained

# What a terminal or a scheduler sends to every process of a run; the run itself decides what follows.
PASSING = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Evaluator:
    """Judges snapshots one after another in another process, which begins with the first one.

    Args:
        dataset: the set to judge by, which goes there as it is.
        output: folder, as of `run_evaluation`.
        device: of the model there.
        threads: as `runtime.threads`.
    """

    def __init__(
        self, dataset: CocoDataset, output: Path, device: torch.device, threads: int | None = None
    ) -> None:
        # By a file: what goes through the pipe to a new process is waited for until that has started.
        with tempfile.NamedTemporaryFile(suffix=".pickle", delete=False) as stream:
            pickle.dump((dataset, output, device, threads), stream)
        self._given = Path(stream.name)
        # Not forked: a fork of a process that has touched CUDA cannot use it.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _begin, (self._given,))
        self._process: Future[int] | None = None

    def submit(self, snapshot: Path) -> Future[dict[str, float]]:
        """What `judge_snapshot` gives, as soon as it is there; or what it raises, or BrokenProcessPool if the
        process has died."""
        with _held_back():  # the process inherits it until it has handlers of its own
            if self._process is None:
                self._process = self._pool.submit(os.getpid)
            return self._pool.submit(_judge, snapshot)

    def close(self) -> None:
        """End the process at once, whatever it is doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        started = self._process
        if started is not None and started.done() and started.exception() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started.result(), signal.SIGKILL)
        self._given.unlink(missing_ok=True)


def judge_snapshot(
    snapshot: Path, dataset: CocoDataset, output: Path, device: torch.device
) -> dict[str, float]:
    """As `run_evaluation` without pictures and tables, of the model in a file.

    Raises:
        UserError: the file or an image cannot be read; the results cannot be written.
    """
    trained = load_trained(snapshot, device)
    return run_evaluation(
        trained.model, dataset, trained.card.config, output=output, pictures=0, progress=False
    )


_given: tuple[CocoDataset, Path, torch.device, int | None]
"""In the other process: what its initializer was given."""


def _begin(given: Path) -> None:
    global _given
    _given = pickle.loads(given.read_bytes())
    given.unlink(missing_ok=True)
    for number in PASSING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own would be left over whenever this process is killed
    # What is found there is told again by the evaluation at the end of the run.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _judge(snapshot: Path) -> dict[str, float]:
    dataset, output, device, threads = _given
    set_up_cuda(device)
    set_threads(threads)
    found = judge_snapshot(snapshot, dataset, output, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # until the next one the memory is the run's
    return found


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process has been started by a run"
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
