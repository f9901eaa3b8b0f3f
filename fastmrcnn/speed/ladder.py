"""Runs the rows of a ladder and judges whether they trained alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from fastmrcnn.speed import clocks
from fastmrcnn.speed.entry import Entry, EntryApart
from fastmrcnn.speed.markdown import spread, table
from fastmrcnn.speed.step_workload import Workload, on_disk
from fastmrcnn.speed.training_rows import Row
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


class Running(Protocol):
    """What `Entry` does, and `EntryApart` in a process of its own."""

    row: Row
    found: dict[str, Any]

    def prepare(self, mask_slots: int) -> dict[str, Any]: ...

    def steps(self, numbers: range) -> dict[str, Any]: ...

    def finish(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


Start = Callable[[Row, Workload], Running]


def takes_turns(device: torch.device) -> bool:
    """Whether rows take turns step by step. A GPU has not memory enough for all of them."""
    return device.type != "cuda"


def climb_apart(
    rows: Sequence[Row],
    workload: Workload,
    *,
    mask_slots: int | None = None,
    limit_s: float | None = None,
    report: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """As `climb`, each row in a process of its own: one that breaks or spoils the device spoils no other.

    Args:
        limit_s: of a row, its compilation included; None: none. A row that takes longer has failed.
    """
    with on_disk(workload) as file:

        def start(row: Row, workload: Workload) -> EntryApart:
            return EntryApart(row, file, limit_s)

        return climb(rows, workload, mask_slots=mask_slots, start=start, report=report, keep=keep)


def climb(
    rows: Sequence[Row],
    workload: Workload,
    *,
    mask_slots: int | None = None,
    start: Start = Entry,
    report: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """Measure every row; returns a dictionary for each, with `failure` where it broke.

    On a GPU one row runs after the other, each with all of its memory, and how fast the clocks were is noted.
    On a CPU, where other programs disturb, the rows take turns step by step, so that all are disturbed alike.

    Args:
        mask_slots: an image, of the rows that pack them; None: as many as torchvision has foreground RoIs
            in the run, rounded up to 16 for the batch, or MASK_SLOTS if torchvision does not run.
        report: is told what is going on.
        keep: is given what has been found so far whenever a row is ready to run, or done.
    """
    found: list[dict[str, Any]] = []
    slots = mask_slots
    in_turns = takes_turns(workload.device)
    every = range(workload.steps)
    for group in [rows] if in_turns else [[row] for row in rows]:
        entries: list[Running] = []
        try:
            for row in group:
                entries.append(start(row, workload))
            found += [entry.found for entry in entries]
            for entry in entries:
                slots = slots or matching_slots(found, workload.images)
                report(f"{entry.row.name}: warming up")
                entry.prepare(slots or MASK_SLOTS)
                keep(found)
            with clocks.watching_clocks(workload.device) as speeds:
                for numbers in [every[n : n + 1] for n in every] if in_turns else [every]:
                    if in_turns:
                        report(f"step {numbers.start + 1} of {workload.steps}, {len(entries)} rows")
                    for entry in entries:
                        entry.steps(numbers)
            for entry in entries:
                if speeds:
                    entry.found["clocks"] = speeds
                entry.finish()
                compare(found)
                keep(found)
        finally:
            for entry in entries:
                entry.close()
    return found


def matching_slots(found: Sequence[dict[str, Any]], images: int) -> int | None:
    """Mask slots an image that hold the most foreground RoIs that torchvision had in a batch."""
    counts = [row["foreground"] for row in found if "foreground" in row]
    if not counts:
        return None
    whole = math.ceil(max(counts) / SLOTS_MULTIPLE) * SLOTS_MULTIPLE
    return max(1, math.ceil(whole / images))


def compare(found: list[dict[str, Any]]) -> None:
    """Note in each row of ours which one it is `compared_with`, the first, and how it `disagrees` with it."""
    ours = [row for row in found if row["program"] == "fastmrcnn" and "moved" in row]
    for row in ours:
        problems = [] if finite(row) else ["its loss is not finite"]
        if row is not ours[0]:
            row["compared_with"] = ours[0]["row"]
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
    """With a line on rows of ours that nothing was held against."""
    head = [
        "row",
        "images/s",
        "ms (p20 to p80)",
        "processor ms",
        "peak MB",
        "SM MHz, slowed by",
        "launches",
        "host syncs",
        "graphs, breaks",
        "kernels: Inductor's, libraries', ours",
        "GB in the graphs",
        "foreground RoIs, dropped",
        "loss at first, at last",
        "weights moved",
    ]
    text = table(head, [[row["row"], *_cells(row)] for row in rows])
    ours = [row for row in rows if row["program"] == "fastmrcnn" and "moved" in row]
    if len(ours) == 1:
        text += f"\n\nThere is no other row of ours to hold the loss of '{ours[0]['row']}' against."
    return text


def kernel_table(row: dict[str, Any], count: int) -> str:
    """What a GPU did in one step of a row, by time; empty where that is not known."""
    kernels = row.get("kernels", [])
    if not kernels:
        return ""
    calls, busy = sum(kernel[1] for kernel in kernels), sum(kernel[2] for kernel in kernels)
    lines = [[f"{ms:.3f}", str(times), name[:120]] for name, times, ms in kernels[:count]]
    lead = f"{row['row']}: {calls} kernels, copies and fills in a step, {busy:.2f} ms"
    return f"{lead}\n\n{table(['ms', 'calls', 'name'], lines)}"


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
        clocks.describe(row.get("clocks", {})),
        str(row.get("launches", "")),
        str(row.get("syncs", "")),
        graphs,
        f"{made['generated']}, {made['library']}, {made['ours']}" if made else "",
        f"{made['gigabytes']:.2f}" if made else "",
        counts,
        f"{first_loss(row):.4f}, {row['last_loss']:.4f}{mark}",
        f"{row['moved']:.3g}",
    ]
