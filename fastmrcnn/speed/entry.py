"""A row of the ladder under way: here, or in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.speed.apart import Apart, GoneError, LateError, one_line
from fastmrcnn.speed.graph_count import counting_graphs
from fastmrcnn.speed.step_workload import Workload, read_workload
from fastmrcnn.speed.timing import Stopwatch, recorded_step, summary, wait
from fastmrcnn.speed.torchvision_row import NotComparableError, TorchvisionRunner
from fastmrcnn.speed.training_rows import OurRunner, Row, Runner

MakeRunner = Callable[[Row, Workload, int], Runner]


def make_runner(row: Row, workload: Workload, mask_slots: int) -> Runner:
    if row.program == "torchvision":
        return TorchvisionRunner(row, workload)
    return OurRunner(row, workload, mask_slots)


def facts(row: Row) -> dict[str, Any]:
    return {
        "row": row.name,
        "program": row.program,
        "precision": row.precision,
        "layout": row.layout,
        "compiled": row.execution.compiled,
        "cuda_graphs": row.execution.cuda_graphs,
    }


class Entry:
    """A row in this process. Its methods return `found`: all that is known of the row so far, or `failure`,
    or `not_run` with the reason why there is no such row. After either they do nothing.
    """

    def __init__(self, row: Row, workload: Workload, make: MakeRunner = make_runner) -> None:
        self.row = row
        self.workload = workload
        self.make = make
        self.watch = Stopwatch(workload.device)
        self.runner: Runner | None = None
        self.losses: list[list[Tensor]] = []  # of each step
        self.found = facts(row)

    def prepare(self, mask_slots: int) -> dict[str, Any]:
        """Make the runner, compile and warm up.

        Args:
            mask_slots: an image, for a row that packs them.
        """
        if self.row.execution.compiled:
            _forget_graphs()
        if self.row.packed:
            self.found["mask_slots_per_image"] = mask_slots
        started = time.perf_counter()
        self._attempt(partial(self._prepare, mask_slots))
        self.found["warm_up_s"] = time.perf_counter() - started
        return self.found

    def _prepare(self, mask_slots: int) -> None:
        runner = self.runner = self.make(self.row, self.workload, mask_slots)
        if self.row.execution.compiled:
            with counting_graphs() as counter:
                runner.warm_up()
            self.found["compiled_graphs"] = counter.counts._asdict()
        else:
            runner.warm_up()
        self.found["first_losses"] = runner.first_losses
        if isinstance(runner, TorchvisionRunner):
            self.found["foreground"] = max(runner.foreground)
        if self.workload.device.type == "cuda":
            # Compiling and cuDNN's trials take memory that no step needs again.
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            runner.warm_up()  # what steps do need is there again before they are timed

    def steps(self, numbers: range) -> dict[str, Any]:
        """Make these steps, one after the other, and wait for the device."""
        if self.runner is not None:
            self._attempt(partial(self._steps, numbers))
        return self.found

    def _steps(self, numbers: range) -> None:
        assert self.runner is not None
        for number in numbers:
            self.losses.append(self.watch(partial(self.runner.step, number)))
        wait(self.workload.device)

    def finish(self) -> dict[str, Any]:
        """Work out the figures, and let go of the runner."""
        if self.runner is not None:
            self._attempt(self._finish)
        self.close()
        return self.found

    def _finish(self) -> None:
        runner, found, workload = self.runner, self.found, self.workload
        assert runner is not None
        times = self.watch.milliseconds()
        losses = [float(sum(parts)) for parts in self.losses]
        found.update(summary(times)._asdict(), total_s=sum(times) / 1e3, steps=len(times))
        found["processor_ms"] = self.watch.processor_ms()
        found["images_per_second"] = workload.images * found["steps"] / found["total_s"]
        last_fifth = losses[-max(1, len(losses) // 5) :]
        found["last_loss"] = sum(last_fifth) / len(last_fifth)
        found["moved"] = runner.moved()
        if workload.device.type == "cuda":
            # Of what is reserved, since graphs that are replayed have their tensors where nothing is
            # allocated any more.
            found["peak_bytes"] = torch.cuda.max_memory_reserved()
            if not self.row.execution.cuda_graphs:
                found["peak_tensor_bytes"] = torch.cuda.max_memory_allocated()
            # After the weights were looked at: the step that is recorded would move them on.
            calls, found["kernels"] = recorded_step(lambda: runner.step(workload.steps))
            found.update(calls._asdict())
        if self.row.execution.compiled:
            found["graphs"], found["graph_breaks"] = _count_graphs()

    def close(self) -> None:
        self.runner = None
        self.losses = []
        if self.workload.device.type == "cuda":
            gc.collect()
            with contextlib.suppress(RuntimeError):  # a device that is broken gives nothing back
                torch.cuda.empty_cache()

    def _attempt(self, function: Callable[[], Any]) -> None:
        """Whatever breaks ends this row, and no other."""
        try:
            function()
        except NotComparableError as error:
            self.found["not_run"] = str(error)
            self.runner = None
        except Exception as error:
            self.found["failure"] = one_line(error)
            self.runner = None


class EntryApart:
    """The same in a process of its own, which sleeps while nothing is asked of it.

    Args:
        file: of `Workload.on_disk`.
        limit_s: for all that the row is asked to do; None: none.
    """

    def __init__(self, row: Row, file: Path, limit_s: float | None = None) -> None:
        self.row = row
        self.found = facts(row)
        self.limit_s, self.left_s = limit_s, limit_s
        self.apart = Apart(entry_from, row, file)

    def prepare(self, mask_slots: int) -> dict[str, Any]:
        return self._ask("prepare", mask_slots)

    def steps(self, numbers: range) -> dict[str, Any]:
        return self._ask("steps", numbers)

    def finish(self) -> dict[str, Any]:
        found = self._ask("finish")
        found["waiting_processor_ms"] = self.apart.waiting_ms
        self.close()
        return found

    def close(self) -> None:
        self.apart.close()

    def _ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        if "failure" in self.found or "not_run" in self.found:
            return self.found
        started = time.perf_counter()
        try:
            self.found.update(self.apart.ask(method, *arguments, limit_s=self.left_s))
        except LateError:
            self.found["failure"] = f"stopped after {self.limit_s:g} s"
        except GoneError as error:
            self.found["failure"] = str(error)
        if self.left_s is not None:
            self.left_s = max(0.0, self.left_s - (time.perf_counter() - started))
        return self.found


def entry_from(row: Row, file: Path) -> Entry:
    return Entry(row, read_workload(file))


def _forget_graphs() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


def _count_graphs() -> tuple[int, int]:
    """Graphs since they were forgotten, and breaks between them."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
