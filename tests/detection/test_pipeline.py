"""What is read ahead of the model, encoded and drawn behind it: in order, so much at a time, nothing lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT

from fastmrcnn.detection import drawing
from fastmrcnn.detection.drawing import Artists, save_overlay
from fastmrcnn.detection.objects import Objects, encoded
from fastmrcnn.detection.pipeline import Behind, ahead, in_turn
from fastmrcnn.errors import UserError

LINUX = "fork" in multiprocessing.get_all_start_methods() and os.path.exists("/proc/self")


class Held:
    """Counts what is alive at once, of things that are made and let go."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()

    def take(self, number: int) -> int:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        return number

    def drop(self, number: int) -> int:
        with self.lock:
            self.now -= 1
        return number


def test_a_long_list_never_piles_up() -> None:
    """Whichever part is the slow one."""
    for slow_reader, slow_writer in ((0.002, 0.0), (0.0, 0.002), (0.0, 0.0)):
        held = Held()

        def read(number: int, held: Held = held, pause: float = slow_reader) -> int:
            time.sleep(pause if number % 40 == 0 else 0)
            return held.take(number)

        def write(number: int, held: Held = held, pause: float = slow_writer) -> int:
            time.sleep(pause if number % 40 == 0 else 0)
            return held.drop(number)

        with contextlib.closing(ahead(range(2000), read, 3)) as pairs:
            done = list(in_turn((future.result() for _, future in pairs), write, 4))
        assert done == list(range(2000))
        assert held.now == 0
        assert held.most <= (3 + 2 + 3) + (2 * 4 + 1)


def test_results_keep_their_order_whoever_is_first() -> None:
    def work(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number

    assert list(in_turn(range(20), work, 4)) == list(range(20))
    assert list(in_turn([], work, 4)) == []
    with contextlib.closing(ahead(range(20), work, 4)) as pairs:
        assert [(item, future.result()) for item, future in pairs] == [(k, k) for k in range(20)]


def test_heavy_things_wait_alone() -> None:
    held = Held()
    gate = threading.Event()

    def work(weight: int) -> int:
        held.take(weight)
        gate.wait(5)
        return held.drop(weight)

    found: list[int] = []
    with Behind[int](threads=4, most=10) as behind:
        for weight in (4, 5):
            found += behind.put(work, weight, weight=weight)
        assert found == []
        later = threading.Timer(0.05, gate.set)
        later.start()
        found += behind.put(work, 50, weight=50)
        assert found == [4, 5]
        found += behind.put(work, 1, weight=1)
        found += behind.rest()
    assert found == [4, 5, 50, 1]
    assert held.most == 2


def fails_at_two(number: int) -> int:
    if number == 2:
        raise KeyError(number)
    return number


def test_an_error_comes_in_its_turn() -> None:
    with contextlib.closing(ahead(range(5), fails_at_two, 2)) as pairs:
        for number, future in pairs:
            if number == 2:
                with pytest.raises(KeyError):
                    future.result()
            else:
                assert future.result() == number
    found: list[int] = []
    with Behind[int](threads=8) as behind:

        def all_of_them() -> None:
            for number in range(5):
                for done in behind.put(fails_at_two, number):
                    found.append(done)
            for done in behind.rest():
                found.append(done)

        with pytest.raises(KeyError):
            all_of_them()
        assert found == [0, 1]
        found += behind.whatever_works()
    assert found[:2] == [0, 1]
    assert set(found) <= {0, 1, 3, 4}


def test_what_waits_when_the_reader_is_closed_is_not_read() -> None:
    read: list[int] = []
    pairs = ahead(range(100), read.append, 2)
    next(pairs)[1].result()
    pairs.close()
    count = len(read)
    assert count <= 5
    time.sleep(0.05)
    assert len(read) == count


# Drawing


def picture(seed: int = 0) -> tuple[np.ndarray, Objects]:
    r = np.random.default_rng(seed)
    masks = np.zeros((2, 60, 80), dtype=bool)
    masks[0, 10:30, 20:50], masks[1, 25:58, 5:40] = True, True
    boxes = np.array([[20, 10, 50, 30], [5, 25, 40, 58]], np.float32)
    found = Objects(60, 80, boxes, np.array([0, 1]), np.array([0.9, 0.6], np.float32), masks=masks)
    return r.integers(0, 255, (60, 80, 3), np.uint8), found


@pytest.fixture
def artists(monkeypatch: pytest.MonkeyPatch) -> Iterator[Artists]:
    """Processes, also for the few pictures of a test, on any machine."""
    monkeypatch.setattr(drawing, "WORTH_IT", 1)
    monkeypatch.setattr(drawing, "cores", lambda: 3)
    with Artists(2) as artists:
        yield artists


NAMES = ["ant", "bee"]


@pytest.mark.skipif(not LINUX, reason="there are no forks")
def test_processes_draw_what_this_one_would(artists: Artists, tmp_path: Path) -> None:
    assert artists.pool is not None
    assert artists.threads == 2
    for seed in range(3):
        image, found = picture(seed)
        artists.draw(tmp_path / "a.png", image, found, NAMES, None, 0.5)
        save_overlay(tmp_path / "b.png", image, found, NAMES, None, 0.5)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match=r"none/a\.png: cannot be written"):
        artists.draw(tmp_path / "none" / "a.png", image, found, NAMES, None, 0.5)


def test_run_lengths_are_drawn_as_bitmaps_are(tmp_path: Path) -> None:
    image, found = picture()
    one = Objects(60, 80, found.boxes, found.classes, found.scores, probabilities=torch.rand(2, 28, 28))
    save_overlay(tmp_path / "a.png", image, one, NAMES, None, 0.5)
    save_overlay(tmp_path / "b.png", image, encoded([one], 0.5)[0], NAMES, None, 0.5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.skipif(not LINUX, reason="there are no forks")
def test_a_process_that_dies_is_one_line(artists: Artists, tmp_path: Path) -> None:
    assert artists.pool is not None
    process = artists.pool.submit(os.getpid).result()
    assert process != os.getpid()
    os.kill(process, signal.SIGKILL)

    def draw_some() -> None:
        for _ in range(50):
            artists.draw(tmp_path / "a.png", *picture(), NAMES, None, 0.5)
            time.sleep(0.1)

    with pytest.raises(UserError, match="a process that draws died") as caught:
        draw_some()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not LINUX, reason="there are no forks")
def test_signals_to_the_whole_group_pass_them_by(artists: Artists, tmp_path: Path) -> None:
    assert artists.pool is not None
    process = artists.pool.submit(os.getpid).result()
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(process, number)
    artists.draw(tmp_path / "a.png", *picture(), NAMES, None, 0.5)
    assert (tmp_path / "a.png").exists()


ORPHANS = """
import time
from fastmrcnn.detection import drawing
drawing.WORTH_IT, drawing.cores = 1, lambda: 4
artists = drawing.Artists(3)
print(*artists.pool._processes, flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="there are no forks")
def test_who_draws_ends_with_a_parent_that_is_killed() -> None:
    words = [sys.executable, "-c", ORPHANS]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        processes = [Path("/proc", number) for number in parent.stdout.readline().split()]
        assert len(processes) == 3
        parent.kill()
    for _ in range(100):
        if not any(process.exists() for process in processes):
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes that draw live on")


def test_few_pictures_are_drawn_here(tmp_path: Path) -> None:
    with Artists(1) as artists:
        assert artists.pool is None
        artists.draw(tmp_path / "a.png", *picture(), NAMES, None, 0.5)
    assert (tmp_path / "a.png").exists()
