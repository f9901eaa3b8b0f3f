"""Time of a step by part, forward and backward, beside the least that its operations must take."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastmrcnn.errors import UserError
from fastmrcnn.speed.markdown import table
from fastmrcnn.speed.parts import OTHER, PARTS, PREFIX, Costs, Parts, Place
from fastmrcnn.speed.timing import STEP, ceilings, marked_step
from fastmrcnn.speed.training_rows import OurRunner

BACKWARD_SCOPE = 1  # of torch's RecordScope: a node of the backward pass
TRACE = "trace.json"


def profile_step(runner: OurRunner, folder: Path) -> dict[str, Any]:
    """Profile one eager step of a runner that is warm; writes a trace for chrome://tracing or Perfetto.

    Times are of the device; on a CPU, where that is the host, of the host. The profiler slows the host
    down, so that on a CPU small operations look longer than they are.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot hold a trace ({error.strerror}); choose another folder") from None
    workload = runner.workload
    make_step, device = runner.make_step, workload.device
    parts, cuda = Parts(), device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with parts.watching(make_step):
        runner.step(0)  # what is wrapped for the first time is also warm
        parts.ranges.clear()
        with profile(activities=activities) as recorded:
            with record_function(STEP):
                runner.step(0)
            if cuda:
                torch.cuda.synchronize()
        events = list(recorded.events())
        times, whole = times_by_part(events, parts, on_device=cuda)
        recorded.export_chrome_trace(str(folder / TRACE))
        limits = ceilings(device, torch.bfloat16 if runner.precision.autocast else torch.float32)
        parts.ranges.clear()
        with Costs(parts, limits) as costs:
            runner.step(0)
    rows = []
    for part in PARTS:
        for backward in (False, True):
            place = Place(part, backward)
            if place not in times and place not in costs.found:
                continue
            seconds, cost = times.get(place, 0.0), costs.found[place]
            rows.append(
                {
                    "part": part,
                    "pass": "backward" if backward else "forward",
                    "ms": 1e3 * seconds,
                    "gflop": cost.flops / 1e9,
                    "gb": cost.bytes / 1e9,
                    "floor_ms": 1e3 * cost.floor_s,
                }
            )
    return {
        "step_ms": 1e3 * whole,
        "precision": runner.precision.name,
        "matmul_tflops": limits.flops / 1e12,
        "matmul_dtype": limits.dtype,
        "copy_gb_per_s": limits.bytes / 1e9,
        "parts": rows,
    }


def times_by_part(events: list[Any], parts: Parts, *, on_device: bool) -> tuple[dict[Place, float], float]:
    """Seconds of each part, and of the whole marked step.

    Args:
        events: of torch.profiler.
        on_device: count the kernels that an operation launched, and not the operation itself. The whole
            is then all kernels' time, and idle time of the device is in no part.
    """
    within, whole = marked_step(events)
    found: dict[Place, float] = defaultdict(float)
    for event in within:
        micros = kernel_time(event) if on_device else event.self_cpu_time_total
        if micros > 0:
            found[place_of(event, parts)] += micros / 1e6
    return found, sum(found.values()) if on_device else whole / 1e6


def kernel_time(event: Any) -> float:
    """Microseconds of the kernels that an operation itself launched."""
    # A marked stretch of the device's time line comes among them, if it is there at all.
    return sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith((PREFIX, STEP)))


def place_of(event: Any, parts: Parts) -> Place:
    """The innermost part or backward node around an event."""
    while event is not None:
        if event.scope == BACKWARD_SCOPE:
            return parts.backward_of(event.sequence_nr)
        if event.name.startswith(PREFIX):
            return Place(event.name.removeprefix(PREFIX), False)
        event = event.cpu_parent
    return Place(OTHER, False)


def profile_table(found: dict[str, Any]) -> str:
    """A line for each part and pass, and one for all."""
    head = ["part", "pass", "ms", "share", "GFLOP", "GB", "floor ms", "of the floor"]
    lines = [[row["part"], row["pass"], *_cells(row, found["step_ms"])] for row in found["parts"]]
    total = {key: sum(row[key] for row in found["parts"]) for key in ("ms", "gflop", "gb", "floor_ms")}
    lines.append(["all parts", "", *_cells(total, found["step_ms"])])
    matmul = f"{found['matmul_dtype']} matrices at {found['matmul_tflops']:.2f} TFLOP/s"
    lead = (
        f"Eager {found['precision']} step under the profiler, {found['step_ms']:.1f} ms. This device "
        f"multiplies {matmul} and copies at {found['copy_gb_per_s']:.1f} GB/s. The floor is what each "
        "operation, as it is, must take at least from and to memory; what lies in a cache may be faster."
    )
    return f"{lead}\n\n{table(head, lines)}"


def _cells(row: dict[str, Any], whole_ms: float) -> list[str]:
    share = f"{100 * row['floor_ms'] / row['ms']:.0f}%" if row["ms"] > 0 else ""
    return [
        f"{row['ms']:.2f}",
        f"{100 * row['ms'] / whole_ms:.1f}%",
        f"{row['gflop']:.2f}",
        f"{row['gb']:.3f}",
        f"{row['floor_ms']:.2f}",
        share,
    ]
