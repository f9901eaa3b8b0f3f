"""The heats of the race: each is one contender on one set, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastmrcnn.errors import UserError
from fastmrcnn.files import make_folder
from fastmrcnn.speed.torchvision_row import torchvision_problem
from fastmrcnn.study.places import race_file
from fastmrcnn.study.race import CONTENDERS, DEFAULTS, MINUTES, TRACKS


class Heat(NamedTuple):
    data: str
    contender: str
    seed: int

    @property
    def name(self) -> str:
        return f"race {self.data}, {self.contender}, seed {self.seed}"

    @property
    def seconds(self) -> float:
        """Of training, which is what the clock allows."""
        return 60 * (MINUTES[-1] if self.contender == DEFAULTS else sum(MINUTES))


def heats_of(given: Mapping[str, Path], seeds: int) -> list[Heat]:
    """Of the sets that were given; contenders of one set and seed follow one another."""
    return [
        Heat(data, contender, seed)
        for seed in range(seeds)
        for data in TRACKS
        if data in given
        for contender in CONTENDERS
    ]


def waiting(heats: Sequence[Heat], output: Path) -> list[Heat]:
    """Those that have no metrics file yet."""
    return [heat for heat in heats if not race_file(output, *heat).exists()]


def why_no_race(given: Mapping[str, Path]) -> str | None:
    """A line that says what the race lacks; None: nothing."""
    if not any(name in given for name in TRACKS):
        return f"it needs a real set: --data NAME=DIR, where NAME is one of {', '.join(TRACKS)}"
    return torchvision_problem()


def run_heats(
    heats: Sequence[Heat],
    given: Mapping[str, Path],
    output: Path,
    work: Path,
    jobs: int,
    tell: Callable[[str], None] = print,
) -> None:
    """Run what has no metrics file yet, `jobs` at a time, each on one thread.

    Raises:
        UserError: a heat failed; the others that had begun were finished first.
    """

    def run(heat: Heat) -> UserError | None:
        log = work / "race" / f"{heat.data}_{heat.contender}_seed_{heat.seed}.txt"
        make_folder(log.parent)
        command = [sys.executable, "-m", "fastmrcnn.study.race", heat.data, heat.contender]
        command += [str(given[heat.data]), str(output), "--seed", str(heat.seed)]
        with log.open("w", encoding="utf-8") as file:
            ended = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        if ended.returncode:
            return UserError(
                f"{heat.name}: exit code {ended.returncode} ({lines[-1]}); all of its output is in {log}"
            )
        tell(f"{heat.name}: {lines[-1]}")
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(run, waiting(heats, output)) if failure is not None]
    if failures:
        raise failures[0]
