"""What a suite still has to run, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastmrcnn.study.runs import Bench, Run
from fastmrcnn.study.suite import Comparison


class Row(NamedTuple):
    comparison: str
    cells: int
    runs: int  # that no comparison above has counted
    finished: int
    hours: float  # of those that are left, one after another; NaN: not known


def plan(
    bench: Bench, comparisons: Sequence[Comparison], seeds: int, expected: Callable[[Run], float]
) -> list[Row]:
    """A row a comparison.

    Args:
        expected: seconds of a run; NaN if they are not known.
    """
    counted: set[Run] = set()
    rows = []
    for one in comparisons:
        runs = [run for run in bench.runs_of([one], seeds) if run not in counted]
        counted |= set(runs)
        left = [run for run in runs if bench.finished(run) is None]
        hours = math.fsum(expected(run) for run in left) / 3600
        rows.append(Row(one.name, len(one.cells), len(runs), len(runs) - len(left), hours))
    return rows


class PastTimes:
    """Seconds of a run, as its cell has taken so far; else as the others of its recipe have."""

    def __init__(self, bench: Bench) -> None:
        self.of_cell: dict[str, list[float]] = {}
        self.of_recipe: dict[str, list[float]] = {}
        for cell in bench.suite.cells.values():
            folder = bench.metrics_file(Run(cell, 0)).parent
            for path in sorted(folder.glob("seed_*.json")):
                found = bench.finished(Run(cell, int(path.stem.removeprefix("seed_"))))
                if found is not None:
                    self.of_cell.setdefault(cell.name, []).append(found["seconds"])
                    self.of_recipe.setdefault(cell.recipe, []).append(found["seconds"])

    def __call__(self, run: Run) -> float:
        known = self.of_cell.get(run.cell.name) or self.of_recipe.get(run.cell.recipe)
        return sum(known) / len(known) if known else math.nan
