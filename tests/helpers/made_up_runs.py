"""Runs of experiments that nobody trained: what their processes leave, and a report on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastmrcnn.errors import UserError
from fastmrcnn.study.runs import Bench, Run, Split
from fastmrcnn.study.small import SMALL
from fastmrcnn.study.writing import write_report

NOWHERE = Split(*[Path("nowhere")] * 4)


class FakeTraining:
    """Stands in for the process that trains: leaves the metrics of a run, or fails."""

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.commands: list[list[str]] = []
        self.fails = fails

    def __call__(self, bench: Bench, command: list[str], log: Path, run: Run) -> None:
        self.commands.append(command)
        if command[1] == "fastmrcnn.propose":
            Path(command[command.index("--output") + 1]).touch()
            return
        if run.cell.name in self.fails:
            raise UserError(f"{run.name}: exit code 1")
        folder = bench.folder(run) / "run_001"
        folder.mkdir(parents=True, exist_ok=True)
        value = 20 + len(run.cell.name) + run.seed
        rows = [
            {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.0, "time": 0.5},
            {"iteration": 39, "total_loss": 1.0, "loss_cls": 0.5, "time": 0.5},
            {"iteration": 39, "bbox/AP": value, "segm/AP": value - 2.0, "keypoints/AP": None},
        ]
        (folder / "metrics.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def bench_in(folder: Path, *extra: str) -> Bench:
    lines: list[str] = []
    return Bench(SMALL, folder, folder / "work", lambda name: NOWHERE, extra=extra, tell=lines.append)


def made_up_report(folder: Path) -> Path:
    """A folder with a whole report, of three seeds of each cell."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = FakeTraining()
        monkeypatch.setattr(Bench, "_python", lambda bench, *rest: fake(bench, *rest))
        monkeypatch.setattr(Bench, "keep", lambda *_: None)
        bench = bench_in(folder)
        bench.run_all(bench.runs_of(SMALL.comparisons, seeds=3), jobs=2)
    paths = write_report(SMALL, folder)
    assert [path.name for path in paths] == ["report.md", "report.html", "report.zh.md", "report.zh.html"]
    return folder
