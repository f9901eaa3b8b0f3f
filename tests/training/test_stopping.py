"""Signals as requests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fastmrcnn.training import stopping
from fastmrcnn.training.stopping import SAVE, STOP, Requests, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def steps() -> list[str]:
    return []


@pytest.fixture
def step(steps: list[str]) -> Callable[[Requests, list[int]], None]:
    """A step in which signals come."""

    def step(requests: Requests, numbers: list[int]) -> None:
        with requests.held():
            for number in numbers:
                send(number)
            steps.append("whole")

    return step


def test_between_steps_a_stop_is_raised_where_it_comes() -> None:
    with Requests() as requests, pytest.raises(Stopped) as caught:
        send(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    assert not caught.value.at_once
    assert requests.stop == signal.SIGTERM


def test_within_a_step_it_waits(
    step: Callable[[Requests, list[int]], None], steps: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with Requests() as requests, pytest.raises(Stopped) as caught:
        step(requests, [signal.SIGINT])
    assert steps == ["whole"]
    assert caught.value.number == signal.SIGINT
    assert "once more stops at once" in capfd.readouterr().err


def test_what_fails_within_is_not_hidden_by_the_stop() -> None:
    def failing() -> None:
        with requests.held():
            send(signal.SIGTERM)
            raise KeyError

    with Requests() as requests, pytest.raises(KeyError):
        failing()


@pytest.mark.parametrize("speaks", [True, False])
def test_together_a_stop_waits_until_all_agree(speaks: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with Requests() as requests, requests.together(speaks=speaks):
        with requests.held():
            pass
        send(signal.SIGTERM)
        assert requests.stop == signal.SIGTERM
        with requests.held():
            pass
        send(signal.SIGTERM)  # the same one, which a launcher has passed on
    assert capfd.readouterr().err.count("once more stops at once") == speaks


def test_together_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ECHO_S", 0.0)
    with Requests() as requests, requests.together(speaks=True):
        send(signal.SIGTERM)
        with pytest.raises(Stopped) as caught:
            send(signal.SIGTERM)
    assert caught.value.at_once


def test_amid_together_an_evaluation_stops_at_once() -> None:
    with Requests() as requests, requests.together(speaks=True):
        with pytest.raises(Stopped) as caught, requests.alone():
            send(signal.SIGTERM)
        assert not caught.value.at_once
        with pytest.raises(Stopped), requests.alone():
            pytest.fail("what was asked before was overlooked")
    with Requests() as requests, pytest.raises(Stopped):  # and all is as it was
        send(signal.SIGTERM)


def test_a_request_to_save_stops_nothing() -> None:
    with Requests() as requests:
        send(SAVE)
        assert requests.save
        assert requests.stop is None


def test_what_is_ignored_stays_ignored_and_all_is_put_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in (*STOP, SAVE)]
        with Requests():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in handlers
        assert [signal.getsignal(number) for number in (*STOP, SAVE)] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_nothing() -> None:
    found: list[Any] = []

    def run() -> None:
        with Requests() as requests, requests.held():
            found.extend(signal.getsignal(number) for number in (*STOP, SAVE))

    handlers = [signal.getsignal(number) for number in (*STOP, SAVE)]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == handlers


def test_the_end_of_a_child_waits_as_well(
    step: Callable[[Requests, list[int]], None], steps: list[str]
) -> None:
    """As torch's handler, which raises."""

    def raising(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, raising)
    try:
        with Requests() as requests:
            with pytest.raises(RuntimeError, match="pid 7"):
                step(requests, [signal.SIGCHLD])
            with pytest.raises(RuntimeError, match="pid 7"):
                send(signal.SIGCHLD)
        assert steps == ["whole"]
        assert signal.getsignal(signal.SIGCHLD) is raising
    finally:
        signal.signal(signal.SIGCHLD, before)
