"""Two processes that run commands together, as torchrun would start them, without the seconds that starting
them takes each time."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastmrcnn.speed.apart import Apart

LIMIT_S = 240.0


class Ended(NamedTuple):
    """How a command ended on one process."""

    code: int
    out: str
    err: str
    value: Any = None

    @property
    def last(self) -> str:
        """The last line of its errors."""
        return self.err.strip().split("\n")[-1]


class Desk:
    """In one of the processes."""

    def __init__(self, paths: Sequence[str]) -> None:
        sys.path[:0] = paths
        torch.set_num_threads(1)

    def pid(self) -> int:
        return os.getpid()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], place: dict[str, str]) -> Ended:
        """Call a function as the main function of a program."""
        os.environ.update(place)
        # Those of a shell's background job are ignored, and what is ignored stays so.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        out, err, code, value = io.StringIO(), io.StringIO(), 0, None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                value = function(*arguments)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 1
        if torch.distributed.is_initialized():  # a process would end here
            torch.distributed.destroy_process_group()
        for name in place:
            del os.environ[name]
        return Ended(code, out.getvalue(), err.getvalue(), value)


class Pair:
    """The two of them."""

    def __init__(self, size: int = 2) -> None:
        self.processes = [Apart(Desk, sys.path) for _ in range(size)]
        self.pids = [process.ask("pid") for process in self.processes]

    def call(
        self, function: Callable[..., Any], *arguments: Any, during: Callable[[], None] = lambda: None
    ) -> list[Ended]:
        """`function(*arguments)` on each of the two; of a list of two arguments each gets its own.

        Args:
            during: is called beside them.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with ThreadPoolExecutor(len(self.processes)) as pool:
            asked = []
            for rank, process in enumerate(self.processes):
                place = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(self.processes)),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                own = tuple(one[rank] if isinstance(one, Each) else one for one in arguments)
                asked.append(pool.submit(self._ask, process, function, own, place))
            during()
            return [one.result() for one in asked]

    def _ask(self, process: Apart, *arguments: Any) -> Ended:
        ended: Ended = process.ask("call", *arguments, limit_s=LIMIT_S)
        return ended

    def close(self) -> None:
        for process in self.processes:
            process.process.kill()  # nothing is left to do, and taking everything down takes seconds
            process.close()


class Each(tuple[Any, ...]):
    """An argument for each process."""


def command(module: str, argv: Sequence[str]) -> None:
    """A program of ours as from the shell."""
    import importlib

    from fastmrcnn.errors import run_main

    sys.argv = [module, *argv]
    run_main(importlib.import_module(f"fastmrcnn.{module}").main)


def broken_train(argv: Sequence[str], step: int, error: BaseException) -> None:
    """`train`, cut off by an error at the beginning of a step."""
    from tiny import break_at

    with pytest.MonkeyPatch.context() as patch:
        break_at(patch, step, error)
        command("train", argv)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
