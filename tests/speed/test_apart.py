"""Objects in processes of their own: answers, failures, the end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from fastmrcnn.speed.apart import Apart, GoneError, LateError


class Counter:
    """Something to ask, in another process."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("no counter\nbelow 0")
        self.value = start

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def where(self) -> int:
        return os.getpid()

    def work(self) -> None:
        """Wakes all of torch's threads."""
        torch.ones(512, 512) @ torch.ones(512, 512)

    def fail(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self) -> None:
        time.sleep(60)


def test_an_object_lives_on_and_waiting_costs_nothing() -> None:
    with Apart(Counter, 5) as counter:
        assert counter.ask("where") != os.getpid()
        assert counter.ask("add", 2) == 7
        with pytest.raises(GoneError, match=r"^RuntimeError: CUDA error: an illegal memory access$"):
            counter.ask("fail")
        counter.ask("work")
        before = counter.waiting_ms
        time.sleep(2)
        assert counter.ask("add", 1) == 8
        assert counter.waiting_ms - before < 100  # of 2,000; threads spin for a moment after their work
    assert not counter.process.is_alive()


def test_a_process_that_dies_or_is_late_is_told_of() -> None:
    with Apart(Counter, 0) as counter:
        with pytest.raises(GoneError, match=r"^its process ended with exit code -9$"):
            counter.ask("die")
        with pytest.raises(GoneError, match="ended with exit code -9"):
            counter.ask("add", 1)
    with Apart(Counter, 0) as counter:
        started = time.perf_counter()
        with pytest.raises(LateError, match=r"^stopped after 0\.5 s$"):
            counter.ask("sleep", limit_s=0.5)
    assert time.perf_counter() - started < 30
    assert not counter.process.is_alive()
    with Apart(Counter, -1) as counter, pytest.raises(GoneError, match=r"^ValueError: no counter$"):
        counter.ask("add", 1)
