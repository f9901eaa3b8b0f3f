"""Clocks and counters: milliseconds of a step, calls to the device, and the two ceilings of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")

STEP = "the measured step"  # marks it in a profile
# The runtime's names end in a version, as in cudaLaunchKernelExC_v11060; driver calls begin with cu.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
BLOCKING_COPY = "cudaMemcpy"


class Times(NamedTuple):
    p20_ms: float
    p50_ms: float
    p80_ms: float
    total_s: float  # of all steps
    steps: int


class DeviceCalls(NamedTuple):
    launches: int  # kernels, graphs, copies and fills
    syncs: int  # waits of the host


class Ceilings(NamedTuple):
    """What a device gives at best, measured: no operation is done faster, no byte moved."""

    flops: float  # a second, of a large matrix product
    bytes: float  # a second, read and written, of a large copy
    dtype: str  # of that product


def summary(milliseconds: Iterable[float]) -> Times:
    times = torch.tensor(list(milliseconds), dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Times(p20, p50, p80, float(times.sum()) / 1e3, len(times))


class Stopwatch:
    """Times calls on a device: between events on it, read at the end; on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.pairs: list[tuple[Any, Any]] = []
        self.clock: list[float] = []
        self.busy: list[float] = []  # of all threads of this process; other programs do not disturb it

    def __call__(self, function: Callable[[], T]) -> T:
        if not self.on_device:
            start, busy = time.perf_counter(), time.process_time()
            value = function()
            self.clock.append(1e3 * (time.perf_counter() - start))
            self.busy.append(1e3 * (time.process_time() - busy))
            return value
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # A step begins where the one before it ended, so that the device's waiting counts.
        first = self.pairs[-1][1] if self.pairs else pair[0]
        if not self.pairs:
            pair[0].record()
        value = function()
        pair[1].record()
        self.pairs.append((first, pair[1]))
        return value

    def times(self) -> Times:
        """Of all calls; waits for the device."""
        if not self.on_device:
            return summary(self.clock)
        torch.cuda.synchronize()
        return summary(first.elapsed_time(last) for first, last in self.pairs)

    def processor_ms(self) -> float | None:
        """Processor time of the median call, all threads together; None on a GPU."""
        return summary(self.busy).p50_ms if self.busy else None


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_calls(function: Callable[[], Any], device: torch.device) -> DeviceCalls | None:
    """Calls to the CUDA runtime in one call of `function`; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function(STEP):
            function()
        torch.cuda.synchronize()
    return count_calls(recorded.events())


def count_calls(events: Iterable[Any]) -> DeviceCalls:
    """Count launches and waits within the marked step: the profiler itself waits after it."""
    names = [event.name for event in marked_step(list(events))[0]]
    return DeviceCalls(
        launches=sum(name.startswith(LAUNCHES) for name in names),
        syncs=sum(name.startswith(SYNCS) or name == BLOCKING_COPY for name in names),
    )


def marked_step(events: Sequence[Any]) -> tuple[list[Any], float]:
    """Of torch.profiler's events those that the host had within the marked step, and its microseconds."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    mark = next(event.time_range for event in on_host if event.name == STEP)
    within = [event for event in on_host if mark.start <= event.time_range.start <= mark.end]
    return within, mark.end - mark.start


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Rate of a matrix product and of a copy, the best of several, on data that is not constant."""
    side, count = (8192, 1 << 28) if device.type == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = _best(lambda: torch.mm(a, b, out=product), device)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copying = _best(lambda: target.copy_(source), device)
    return Ceilings(2 * side**3 / seconds, 2 * source.nbytes / copying, str(dtype).removeprefix("torch."))


def _best(function: Callable[[], Tensor], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    for _ in range(3):
        function()
    found = []
    for _ in range(repeats):
        watch = Stopwatch(device)
        watch(function)
        found.append(watch.times().total_s)
    return min(found)
