"""Runs of a suite: each is trained in a process of its own and leaves one small metrics file.

A metrics file is written when its run is finished, whole or not at all. It carries a key, a hash of all that
the run was told; a file with another key is of other settings, and is not taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.files import make_folder, write_json
from fastmrcnn.speed.environment import environment
from fastmrcnn.study.keepsakes import keep_features, keep_pictures
from fastmrcnn.study.places import features_file, metrics_file, picture_folder, truth_folder
from fastmrcnn.study.suite import Cell, Suite

CONFIGS = Path(__file__).parents[1] / "configs"
DRAWING = 1  # of the scenes; a change of what scenes.py draws raises it


class Run(NamedTuple):
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.name}/seed_{self.seed}"


class Split(NamedTuple):
    """Of one set: what the configuration's data.train and data.val take."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path

    def settings(self) -> list[str]:
        return [
            f"data.{split}.{kind}={getattr(self, f'{split}_{kind}')}"
            for split in ("train", "val")
            for kind in ("images", "annotations")
        ]


@dataclass
class Bench:
    """Where a suite runs, and what with.

    Args:
        suite: what is run.
        output: of the report; metrics files go to `metrics/<suite>/<cell>/seed_<k>.json` in it.
        work: runs, with weights; may be removed when all is done.
        data: for each set that a cell names: makes it, and returns where it is.
        threads: CPU threads of a run.
        extra: settings of all runs, such as train.steps of a test.
        tell: takes lines for the user.
    """

    suite: Suite
    output: Path
    work: Path
    data: Callable[[str], Split]
    threads: int = 1
    extra: tuple[str, ...] = ()
    tell: Callable[[str], None] = print
    splits: dict[str, Split] = field(default_factory=dict)
    keeping: threading.Lock = field(default_factory=threading.Lock)

    def metrics_file(self, run: Run) -> Path:
        return metrics_file(self.output, self.suite.name, run.cell.name, run.seed)

    def finished(self, run: Run) -> dict[str, Any] | None:
        """What its metrics file says; None if there is none of these settings.

        Raises:
            UserError: the file is damaged.
        """
        path = self.metrics_file(run)
        if not path.exists():
            return None
        found = read_metrics(path)
        return found if found["key"] == self.key(run) else None

    def config(self, run: Run) -> Config:
        """Of a run, without data and output."""
        settings = [*run.cell.settings, *self.extra, f"train.seed={run.seed}"]
        return load_config(CONFIGS / f"{run.cell.recipe}.yaml", settings)

    def key(self, run: Run) -> str:
        """Hash of what decides a run: its configuration, its data, and the run that it stands on.

        Settings at their defaults are left out, so that a new one leaves what is finished valid.
        """
        config = self.config(run).model_dump(mode="json", exclude_defaults=True)
        for name in ("output", "runtime"):
            config.pop(name, None)
        told: list[Any] = [config, run.cell.data, DRAWING]
        if run.cell.proposals_of is not None:
            told.append(self.key(self.before(run)))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def before(self, run: Run) -> Run:
        """The run whose proposals this one takes."""
        assert run.cell.proposals_of is not None
        return Run(self.suite.cells[run.cell.proposals_of], run.seed)

    def folder(self, run: Run) -> Path:
        return self.work / self.suite.name / run.name

    def runs_of(self, comparisons: Sequence[Any], seeds: int) -> list[Run]:
        """All seeds of one number before the next, so that an interrupted suite has a result of each cell."""
        cells = self.suite.needed(tuple(comparisons))
        return [Run(cell, seed) for seed in range(seeds) for cell in cells]

    def run_all(self, runs: Sequence[Run], jobs: int) -> None:
        """Train what has no metrics file yet, `jobs` at a time.

        Raises:
            UserError: a run failed; the others that had begun were finished first.
        """
        waiting = [run for run in runs if self.finished(run) is None]
        for name in {run.cell.data for run in waiting}:
            self.splits[name] = self.data(name)
        done = {run for run in runs if run not in waiting}
        total = len(waiting)
        failure: UserError | None = None
        with ThreadPoolExecutor(jobs) as pool:
            going: dict[Future[dict[str, Any]], Run] = {}
            while waiting or going:
                for run in list(waiting):
                    if failure is not None or len(going) == jobs:
                        break
                    if run.cell.proposals_of is not None and self.before(run) not in done:
                        continue
                    waiting.remove(run)
                    going[pool.submit(self.train, run)] = run
                if not going:
                    break
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    run = going.pop(future)
                    try:
                        found = future.result()
                    except UserError as error:
                        failure = failure or error
                        continue
                    done.add(run)
                    shown = ", ".join(
                        f"{name} {found['metrics'][name]:.1f}"
                        for name in ("bbox/AP", "segm/AP", "keypoints/AP")
                        if name in found["metrics"]
                    )
                    number = total - len(waiting) - len(going)
                    self.tell(f"{number}/{total} {run.name}: {shown} ({found['seconds']:.0f} s)")
        if failure is not None:
            raise failure

    def train(self, run: Run) -> dict[str, Any]:
        """Train, or go on with what was interrupted, and write the metrics file.

        Raises:
            UserError: training failed; names the log.
        """
        folder, key = self.folder(run), self.key(run)
        stamp = folder / "key"
        if folder.exists() and (not stamp.exists() or stamp.read_text(encoding="utf-8") != key):
            shutil.rmtree(folder)  # of other settings
        make_folder(folder)
        stamp.write_text(key, encoding="utf-8")
        log = folder / "log.txt"
        command = ["-m", "fastmrcnn.train"]
        begun = sorted(folder.glob("run_*/checkpoints/last_checkpoint"))
        if begun:
            command += ["--resume", str(begun[-1].parents[1])]
        else:
            command += ["--config", str(CONFIGS / f"{run.cell.recipe}.yaml"), *run.cell.settings]
            command += [*self.extra, f"train.seed={run.seed}", *self.splits[run.cell.data].settings()]
            command += [f"output={folder}", f"runtime.threads={self.threads}"]
            if run.cell.proposals_of is not None:
                command += self.proposals(run, log)
        self._python(command, log, run)
        place = sorted(folder.glob("run_*"))[-1]
        rows = [json.loads(line) for line in (place / "metrics.json").read_text("utf-8").splitlines()]
        losses = [row for row in rows if "total_loss" in row]
        judged = [row for row in rows if "total_loss" not in row]
        result = {
            "suite": self.suite.name,
            "cell": run.cell.name,
            "seed": run.seed,
            "key": key,
            "settings": [run.cell.recipe, *run.cell.settings, *self.extra],
            "metrics": {
                name: value for name, value in judged[-1].items() if name != "iteration" and value is not None
            },
            "losses": {
                name: [None if row.get(name) is None else round(row[name], 5) for row in losses]
                for name in ("iteration", *(n for n in losses[-1] if n.startswith(("loss_", "total_loss"))))
            },
            "seconds": round(sum(row["time"] for row in losses) * _steps_between(losses), 1),
            "environment": environment(torch.device("cpu")),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        }
        if run.seed == 0:
            with self.keeping:  # two runs of one set draw the same ground truth
                self.keep(run, place)
        make_folder(self.metrics_file(run).parent)
        write_json(self.metrics_file(run), result)
        return result

    def keep(self, run: Run, place: Path) -> None:
        """Pictures of what the run finds; and of the network with one map a map of features."""
        parts = self.config(run).model
        if parts.box_head.enabled and parts.rpn.enabled:
            pictures = picture_folder(self.output, self.suite.name, run.cell.name)
            keep_pictures(place, pictures, truth_folder(self.output, self.suite.name, run.cell.data))
            if run.cell.name == self.suite.cells["c4"].name:
                keep_features(place, features_file(self.output, self.suite.name))

    def proposals(self, run: Run, log: Path) -> list[str]:
        """Settings that name the proposals of the run before, which are made if they are not there."""
        source, settings = self.folder(self.before(run)), []
        place = sorted(source.glob("run_*"))
        if not place:
            raise UserError(
                f"{source}: the weights of {self.before(run).name} are gone; remove "
                f"{self.metrics_file(self.before(run))} to train it again"
            )
        for split in ("train", "val"):
            made = self.folder(run) / f"{split}_proposals.npz"
            if not made.exists():
                images = getattr(self.splits[run.cell.data], f"{split}_images")
                annotations = getattr(self.splits[run.cell.data], f"{split}_annotations")
                command = ["-m", "fastmrcnn.propose", "--checkpoint", str(place[-1])]
                command += ["--images", str(images), "--annotations", str(annotations)]
                self._python([*command, "--output", str(made)], log, run)
            settings.append(f"data.{split}.proposals={made}")
        return settings

    def _python(self, command: list[str], log: Path, run: Run) -> None:
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                env={**os.environ, **threads},
            )
        if done.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no output"
            raise UserError(
                f"{run.name}: exit code {done.returncode} ({last}); all of its output is in {log}"
            )


def _steps_between(losses: Sequence[dict[str, Any]]) -> int:
    """Of two rows of metrics.json."""
    return losses[1]["iteration"] - losses[0]["iteration"] if len(losses) > 1 else losses[0]["iteration"] + 1


def read_metrics(path: Path) -> dict[str, Any]:
    """A metrics file of a run.

    Raises:
        UserError: it is not one.
    """
    return read_json(path, {"cell", "seed", "key", "metrics", "losses", "seconds"})


def read_json(path: Path, needed: set[str]) -> dict[str, Any]:
    """An object with these keys.

    Raises:
        UserError: it is not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if needed <= found.keys():
            return found
        fault = "lacks what a run writes"
    except (OSError, ValueError, AttributeError) as error:
        fault = str(error)
    raise UserError(f"{path}: is no metrics file of an experiment ({fault}); remove it to run that one again")
