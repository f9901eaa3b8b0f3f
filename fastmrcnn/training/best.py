"""The best weights of a run so far, in a file of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmrcnn.errors import UserError
from fastmrcnn.files import make_folder
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import judged_weights, pack, read_checkpoint, write_tensors

BEST = "best.pt"


def check_metric(metric: str, known: Sequence[str]) -> None:
    """UserError if evaluations, which give numbers of the names that are known, do not give this one."""
    if metric not in known:
        raise UserError(
            f"train.keep_best: evaluations of this model on data.val give no '{metric}'; they give "
            f"{', '.join(known)}"
        )


class Best:
    """Keeps the weights whose evaluation was best, and counts those that were not.

    `best.pt` is a checkpoint without an optimizer: `predict`, `evaluate` and `export` take it, and a new run
    can start from it. Its `extra["best"]` has the metric, its value and all others of that evaluation.

    Args:
        metric: its name, which `check_metric` has let pass; more is better.
        patience: evaluations without a better one after which it is `exhausted`; None: any number.
        folder: of the checkpoints.
        rows: of the evaluations before this part of the run, from metrics.json.
    """

    def __init__(
        self,
        metric: str,
        patience: int | None,
        folder: Path,
        rows: Iterable[Mapping[str, Any]],
    ) -> None:
        self.metric, self.patience, self.path = metric, patience, folder / BEST
        self.writes = True
        """False: another process of the run writes the file, and this one only counts."""
        self.value: float | None = None
        self.step = 0
        self.since = 0
        """Evaluations after the best one."""
        kept = kept_metric(self.path) == metric
        for row in rows:
            self._count(row["iteration"] + 1, row.get(metric))
        if not kept:  # nothing that a new one would have to be better than
            self.value = None

    def take(self, step: int, found: Mapping[str, float], tree: Callable[[], dict[str, Any]]) -> bool:
        """Whether the evaluation after so many steps is the best so far; if so, its weights are kept.

        Args:
            tree: makes what `light_checkpoint` does.
        Raises:
            UserError: the file cannot be written. The one before is still there.
        """
        if not self._count(step, found[self.metric]):
            return False
        if not self.writes:
            return True
        content = tree()
        # As in metrics.json: null where there was no object to find.
        numbers = {name: value if math.isfinite(value) else None for name, value in found.items()}
        content["extra"] = {"best": {"metric": self.metric, "value": self.value, "metrics": numbers}}
        make_folder(self.path.parent)
        write_tensors(self.path, content)
        return True

    def _count(self, step: int, value: float | None) -> bool:
        # Null in metrics.json, NaN here: there was no object to find.
        if value is not None and value == value and (self.value is None or value > self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def describe(self) -> str | None:
        """A line for the end of a run; none if there is no such file."""
        if self.value is None or not self.path.exists():
            return None
        return f"The best {self.metric}, {self.value:.1f} after step {self.step}, is in {self.path}"


def kept_metric(path: Path) -> str | None:
    """By which metric a `best.pt` was chosen; None if there is none, or none that can be read."""
    try:
        tree = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return str(tree["extra"]["best"]["metric"])
    except Exception:  # whatever is wrong with it: it will be written anew
        return None


def light_checkpoint(step: int, judged: nn.Module, card: ModelCard) -> dict[str, Any]:
    """A checkpoint of the weights that are judged, without what only training needs."""
    return pack(step=step, model=judged, card=card)


def light_copy(snapshot: Path) -> dict[str, Any]:
    """The same of a file that holds one."""
    tree = read_checkpoint(snapshot)
    weights: Mapping[str, Tensor] = judged_weights(tree)
    return {**tree, "model": dict(weights), "ema": None, "optimizer": None, "scaler": None}
