"""Runs the rows of a ladder and judges whether they trained alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastmrcnn.speed.graph_count import counting_graphs
from fastmrcnn.speed.markdown import spread, table
from fastmrcnn.speed.step_workload import Workload
from fastmrcnn.speed.timing import Stopwatch, device_calls, summary
from fastmrcnn.speed.torchvision_row import NotComparableError, TorchvisionRunner
from fastmrcnn.speed.training_rows import OurRunner, Row, Runner
from fastmrcnn.structures import Counts

MASK_SLOTS = 48  # an image, where nothing else was said
SLOTS_MULTIPLE = 16  # mask slots that match torchvision's foreground are rounded up to this


class Tolerance(NamedTuple):
    """Largest relative differences between a row and the first of ours."""

    first: float  # of the loss at the common weights
    last: float  # of the loss at the end, mean over the last fifth of the steps
    moved: float  # of the distance that the weights have gone


# A choice between two nearly equal scores may fall the other way in any row, and then training goes on from
# other RoIs; bf16 has a relative step of 2**-8 besides. (On a small network on a CPU, 15 steps: bf16 is off
# by 3e-4 at first, 5e-4 at last and not at all in the distance.)
TOLERANCES = {"fp32": Tolerance(5e-3, 0.03, 0.05), "bf16": Tolerance(0.01, 0.05, 0.1)}

MakeRunner = Callable[[Row, Workload, int], Runner]


class Entry:
    """A row under way."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.row = row
        self.watch = Stopwatch(device)
        self.runner: Runner | None = None
        self.losses: list[list[Tensor]] = []  # of each step
        self.found: dict[str, Any] = {
            "row": row.name,
            "program": row.program,
            "precision": row.precision,
            "compiled": row.execution.compiled,
            "cuda_graphs": row.execution.cuda_graphs,
        }

    @property
    def running(self) -> bool:
        return self.runner is not None and "failure" not in self.found

    def attempt(self, function: Callable[[], Any]) -> None:
        """Whatever breaks ends this row, and no other."""
        try:
            function()
        except NotComparableError as error:
            self.found["not_run"] = str(error)
            self.runner = None
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            self.found["failure"] = f"{type(error).__name__}: {first_line}"
            self.runner = None


def make_runner(row: Row, workload: Workload, mask_slots: int) -> Runner:
    if row.program == "torchvision":
        return TorchvisionRunner(row, workload)
    return OurRunner(row, workload, mask_slots)


def climb(
    rows: Sequence[Row],
    workload: Workload,
    *,
    mask_slots: int | None = None,
    make: MakeRunner = make_runner,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure every row; returns a dictionary for each, with `failure` where it broke.

    On a GPU one row runs after the other, with the memory freed between. On a CPU, where other programs
    disturb, the rows take turns step by step, so that all are disturbed alike.

    Args:
        mask_slots: an image, of the rows that pack them; None: as many as torchvision has foreground RoIs
            in the run, rounded up to 16 for the batch, or MASK_SLOTS if torchvision does not run.
        report: is told what is going on.
    """
    entries = [Entry(row, workload.device) for row in rows]
    slots = mask_slots
    if workload.device.type == "cuda":
        for entry in entries:
            slots = slots or matching_slots(entries, workload.images)
            torch.cuda.reset_peak_memory_stats()
            _prepare(entry, workload, slots or MASK_SLOTS, make, report)
            for number in range(workload.steps):
                _step(entry, number)
            _finish(entry, workload)
            entry.found["peak_bytes"] = torch.cuda.max_memory_allocated()
            _free(entry)
    else:
        for entry in entries:
            slots = slots or matching_slots(entries, workload.images)
            _prepare(entry, workload, slots or MASK_SLOTS, make, report)
        for number in range(workload.steps):
            report(f"step {number + 1} of {workload.steps}, {len(entries)} rows")
            for entry in entries:
                _step(entry, number)
        for entry in entries:
            _finish(entry, workload)
            _free(entry)
    found = [entry.found for entry in entries]
    compare(found)
    return found


def matching_slots(entries: Sequence[Entry], images: int) -> int | None:
    """Mask slots an image that hold the most foreground RoIs that torchvision had in a batch."""
    counts = [entry.found["foreground"] for entry in entries if "foreground" in entry.found]
    if not counts:
        return None
    whole = math.ceil(max(counts) / SLOTS_MULTIPLE) * SLOTS_MULTIPLE
    return max(1, math.ceil(whole / images))


def _prepare(
    entry: Entry, workload: Workload, mask_slots: int, make: MakeRunner, report: Callable[[str], None]
) -> None:
    report(f"{entry.row.name}: warming up")
    if entry.row.execution.compiled:
        torch._dynamo.reset()
        counters.clear()
    if entry.row.packed:
        entry.found["mask_slots_per_image"] = mask_slots
    started = time.perf_counter()

    def prepare() -> None:
        entry.runner = make(entry.row, workload, mask_slots)
        if entry.row.execution.compiled:
            with counting_graphs() as counter:
                entry.runner.warm_up()
            entry.found["compiled_graphs"] = counter.counts._asdict()
        else:
            entry.runner.warm_up()
        entry.found["first_losses"] = entry.runner.first_losses
        if isinstance(entry.runner, TorchvisionRunner):
            entry.found["foreground"] = max(entry.runner.foreground)

    entry.attempt(prepare)
    entry.found["warm_up_s"] = time.perf_counter() - started


def _step(entry: Entry, number: int) -> None:
    if not entry.running:
        return
    runner = entry.runner
    assert runner is not None
    entry.attempt(lambda: entry.losses.append(entry.watch(lambda: runner.step(number))))


def _finish(entry: Entry, workload: Workload) -> None:
    if not entry.running:
        return
    runner, found = entry.runner, entry.found
    assert runner is not None

    def finish() -> None:
        times = entry.watch.milliseconds()
        losses = [float(sum(parts)) for parts in entry.losses]
        found.update(summary(times)._asdict(), total_s=sum(times) / 1e3, steps=len(times))
        found["processor_ms"] = entry.watch.processor_ms()
        found["images_per_second"] = workload.images * found["steps"] / found["total_s"]
        last_fifth = losses[-max(1, len(losses) // 5) :]
        found["last_loss"] = sum(last_fifth) / len(last_fifth)
        found["moved"] = runner.moved()
        # After the weights were looked at: the step that is counted would move them on.
        calls = device_calls(lambda: runner.step(workload.steps), workload.device)
        if calls is not None:
            found.update(calls._asdict())
        if entry.row.execution.compiled:
            found["graphs"] = counters["stats"]["unique_graphs"]
            found["graph_breaks"] = sum(counters["graph_break"].values())

    entry.attempt(finish)


def _free(entry: Entry) -> None:
    entry.runner = None
    entry.losses = []
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def compare(found: list[dict[str, Any]]) -> None:
    """Note as `disagrees` what sets a row of ours apart from the first of them."""
    ours = [row for row in found if row["program"] == "fastmrcnn" and "moved" in row]
    for row in ours:
        problems = [] if finite(row) else ["its loss is not finite"]
        if row is not ours[0] and not problems and finite(ours[0]):
            tolerance = TOLERANCES[row["precision"]]
            for name, allowed in tolerance._asdict().items():
                value, expected = _quantity(row, name), _quantity(ours[0], name)
                difference = abs(value - expected) / max(abs(expected), 1e-12)
                if difference > allowed:
                    label = {"first": "first loss", "last": "last loss", "moved": "distance of the weights"}
                    problems.append(
                        f"{label[name]} {value:.4g}, expected {expected:.4g} within {100 * allowed:g}%"
                    )
        if problems:
            row["disagrees"] = "; ".join(problems)


def finite(row: dict[str, Any]) -> bool:
    return all(math.isfinite(_quantity(row, name)) for name in Tolerance._fields)


def _quantity(row: dict[str, Any], name: str) -> float:
    if name == "first":
        return first_loss(row)
    return float(row["last_loss"] if name == "last" else row["moved"])


def first_loss(row: dict[str, Any]) -> float:
    return sum(value for name, value in row["first_losses"].items() if name not in Counts._fields)


def broken(found: list[dict[str, Any]]) -> bool:
    """Whether a row of ours failed or disagrees."""
    return any(row["program"] == "fastmrcnn" and ("failure" in row or "disagrees" in row) for row in found)


def ladder_table(rows: list[dict[str, Any]]) -> str:
    head = [
        "row",
        "images/s",
        "ms (p20 to p80)",
        "processor ms",
        "peak MB",
        "launches",
        "host syncs",
        "graphs, breaks",
        "kernels: Inductor's, libraries', ours",
        "GB in the graphs",
        "foreground RoIs, dropped",
        "loss at first, at last",
        "weights moved",
    ]
    return table(head, [[row["row"], *_cells(row)] for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    if "not_run" in row or "failure" in row:
        return [f"not run: {row['not_run']}" if "not_run" in row else f"FAILED: {row['failure']}"]
    losses = row["first_losses"]
    graphs = f"{row['graphs']}, {row['graph_breaks']}" if "graphs" in row else ""
    made = row.get("compiled_graphs", {})
    counts = f"{losses['num_fg']:.0f}" if "num_fg" in losses else ""
    if "masks_dropped" in losses:
        counts += f", {losses['masks_dropped']:.0f}"
    busy = row["processor_ms"]
    mark = f" DISAGREES: {row['disagrees']}" if "disagrees" in row else ""
    return [
        f"{row['images_per_second']:.2f}",
        spread(row),
        "" if busy is None else f"{busy:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        str(row.get("launches", "")),
        str(row.get("syncs", "")),
        graphs,
        f"{made['generated']}, {made['library']}, {made['ours']}" if made else "",
        f"{made['gigabytes']:.2f}" if made else "",
        counts,
        f"{first_loss(row):.4f}, {row['last_loss']:.4f}{mark}",
        f"{row['moved']:.3g}",
    ]
