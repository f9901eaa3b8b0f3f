"""The training record. The only place where the host reads device scalars, once every log_every steps."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastmrcnn.errors import UserError
from fastmrcnn.files import write_text
from fastmrcnn.structures import Counts, Losses, present


class Metrics:
    """Gathers losses on the device and writes metrics.json (JSON lines, detectron2's keys) and TensorBoard.

    Args:
        folder: of the run.
        start_step: lines at or beyond this step, from a run that was cut off, are dropped.
        carried: what a checkpoint kept of a row that was not full, from `carried()`.
        writes: false: only gather, as all processes of a run but the first do.
    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int = 0,
        carried: dict[str, Any] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.path = folder / "metrics.json"
        self.evaluated: set[int] = set()
        """Steps of the rows of evaluations."""
        self._file: TextIO | None = None
        self._board: Any = None
        kept = self._open(start_step) if writes else []
        self.evaluations = [row for row in kept if "total_loss" not in row]
        """Their rows, of the parts of the run before this one."""
        self.evaluated |= {row["iteration"] for row in self.evaluations}
        self._unwritten: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._most: Tensor | None = None
        self.most_foreground = 0  # RoIs of a batch so far
        self.masks_dropped = 0  # of all batches so far
        self._count = 0
        self._images = 0
        self._data_time = 0.0
        self._since = time.perf_counter()
        if carried:
            self._take_up(carried, kept)

    def _open(self, start_step: int) -> list[dict[str, Any]]:
        """The rows that stay."""
        from torch.utils.tensorboard import SummaryWriter

        kept = self._drop_from(start_step)
        with self._writing():
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start_step)
        return kept

    def _drop_from(self, step: int) -> list[dict[str, Any]]:
        """The rows that stay."""
        if not self.path.exists():
            return []
        kept = [
            line for line in self.path.read_text(encoding="utf-8").splitlines() if _iteration(line) < step
        ]
        write_text(self.path, "".join(line + "\n" for line in kept))
        return [json.loads(line) for line in kept]

    def carried(self) -> dict[str, Any]:
        """For a checkpoint between two rows: what the next one has gathered, and those that could not be
        written. Empty if there is neither."""
        if self._sums is None and not self._unwritten:
            return {}
        return {
            "names": self._names,
            "sums": self._sums,
            "most": self._most,
            "count": self._count,
            "images": self._images,
            "data_time": self._data_time,
            "seconds": time.perf_counter() - self._since,
            "rows": self._unwritten,
        }

    def _take_up(self, carried: dict[str, Any], written: list[dict[str, Any]]) -> None:
        self._names, self._sums, self._most = carried["names"], carried["sums"], carried["most"]
        self._count, self._images = carried["count"], carried["images"]
        self._data_time = carried["data_time"]
        self._since -= carried["seconds"]
        for row in carried["rows"]:
            if row not in written:  # it may have been written in the end
                self.write(row)

    def add(self, losses: Losses, counts: Counts, images: int, data_time: float) -> None:
        """Take the losses and counts of a step, without waiting for them."""
        named = present(losses, counts)
        values = torch.stack([value.detach().float() for value in named.values()])
        # Steps after a bad one are not trained on; their losses are not to drown the message.
        if self._sums is None or self._most is None:
            self._sums, self._most = values, values
        else:  # of a resumed run they come from a file, and move to the device once
            self._sums = self._sums.to(values.device) + values
            self._most = torch.maximum(self._most.to(values.device), values)
        self._names = list(named)
        self._count += 1
        self._images += images
        self._data_time += data_time

    def read(
        self, step: int, first_bad_step: Tensor, lr: float, steps_left: int
    ) -> tuple[dict[str, Any], int]:
        """Means since the last read, and the number of the first bad step or -1. Waits for the device."""
        assert self._sums is not None, "read() before add()"
        assert self._most is not None
        # The one host read of the loop: every loss and the flag in a single transfer.
        *values, bad = torch.cat([self._sums, self._most, first_bad_step.float().reshape(1)]).tolist()
        count = len(self._names)
        sums, most = values[:count], dict(zip(self._names, values[count:], strict=True))
        seconds = time.perf_counter() - self._since
        means = {name: value / self._count for name, value in zip(self._names, sums, strict=True)}
        per_step = seconds / self._count
        row: dict[str, Any] = {
            "iteration": step,
            "total_loss": sum(means[name] for name in Losses._fields if name in means),
            **means,
            "lr": lr,
            "time": per_step,
            "data_time": self._data_time / self._count,
            "images_per_second": self._images / seconds,
            "eta_seconds": per_step * steps_left,
        }
        if "num_fg" in most:
            row["num_fg_max"] = most["num_fg"]
        if torch.cuda.is_available() and first_bad_step.is_cuda:
            row["max_mem_mb"] = torch.cuda.max_memory_allocated() / 2**20
        if bad < 0:
            self.most_foreground = max(self.most_foreground, int(most.get("num_fg", 0)))
            self.masks_dropped += round(means.get("masks_dropped", 0) * self._count)
        self._sums, self._most = None, None
        self._count, self._images, self._data_time = 0, 0, 0.0
        self._since = time.perf_counter()
        if bad < 0:
            self.write(row)
        return row, int(bad)

    def write(self, row: dict[str, Any]) -> None:
        """Append a line; `iteration` must be in it. What is not finite becomes null."""
        if "total_loss" not in row and self._file is None:
            self.evaluated.add(row["iteration"])
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._unwritten.append(clean)
        with self._writing():
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
            self._unwritten.pop()
            for name, value in clean.items():
                if name != "iteration" and value is not None:
                    self._board.add_scalar(name, value, row["iteration"])
            self._board.flush()
        if "total_loss" not in row:
            self.evaluated.add(row["iteration"])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} or what is in tensorboard/ beside it cannot be written "
                f"({error.strerror or error})"
            ) from error

    def exclude(self, seconds: float) -> None:
        """Leave out of the next row what was not training: an evaluation, a checkpoint."""
        self._since += seconds

    def close(self) -> None:
        for stream in (self._file, self._board):
            if stream is None:
                continue
            with contextlib.suppress(OSError):  # each row has been flushed, or its failure told
                stream.close()


def _iteration(line: str) -> float:
    """Of a line of metrics.json; infinite for one that a killed run left unfinished."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf
