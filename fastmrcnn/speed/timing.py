"""Clocks and counters: milliseconds of a step, calls to the device, and the two ceilings of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")

STEP = "the measured step"  # marks it in a profile
# The runtime's names end in a version, as in cudaLaunchKernelExC_v11060; driver calls begin with cu.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
BLOCKING_COPY = "cudaMemcpy"
HEAD_START = 1_000_000  # clock cycles that the GPU sleeps, so that the host is ahead with its launches


class Times(NamedTuple):
    """Percentiles of a number of calls."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


class DeviceCalls(NamedTuple):
    launches: int  # kernels, graphs, copies and fills
    syncs: int  # waits of the host


class Kernel(NamedTuple):
    """All that a device did under one name."""

    name: str
    calls: int
    ms: float


class Ceilings(NamedTuple):
    """What a device gives at best, measured: no operation is done faster, no byte moved."""

    flops: float  # a second, of a large matrix product
    bytes: float  # a second, read and written, of a large copy
    dtype: str  # of that product


def summary(milliseconds: Iterable[float]) -> Times:
    times = torch.tensor(list(milliseconds), dtype=torch.float64)
    return Times(*times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


class Stopwatch:
    """Times calls in a row: between events on the device, read at the end; on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.pairs: list[tuple[Any, Any]] = []
        self.clock: list[float] = []
        self.busy: list[float] = []  # of all threads of this process; other programs do not disturb it

    def __call__(self, function: Callable[[], T]) -> T:
        if not self.on_device:
            busy, start = time.process_time(), time.perf_counter()
            value = function()
            self.clock.append(1e3 * (time.perf_counter() - start))
            self.busy.append(1e3 * (time.process_time() - busy))
            return value
        # A step begins where the one before it ended, so that the device's waiting counts.
        first = self.pairs[-1][1] if self.pairs else _event()
        value = function()
        self.pairs.append((first, _event()))
        return value

    def milliseconds(self) -> list[float]:
        """Of every call; waits for the device."""
        return _between(self.pairs) if self.on_device else self.clock

    def processor_ms(self) -> float | None:
        """Processor time of the median call, all threads together; None on a GPU."""
        return summary(self.busy).p50_ms if self.busy else None


def call_times(
    calls: Iterable[Callable[[], Any]], device: torch.device, before: Callable[[], Any] = lambda: None
) -> list[float]:
    """Milliseconds of each call by itself: by events on a GPU, by the clock on a CPU.

    The GPU sleeps before each call, so that the host's launches do not count while they fit into it.

    Args:
        before: is called before each of them, and not timed.
    """
    if device.type != "cuda":
        watch = Stopwatch(device)
        for call in calls:
            before()
            watch(call)
        return watch.milliseconds()
    pairs = []
    for call in calls:
        before()
        torch.cuda._sleep(HEAD_START)
        start = _event()
        call()
        pairs.append((start, _event()))
    return _between(pairs)


def waited_for(function: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What it returns, and its milliseconds from when the device is idle to when it is again."""
    wait(device)
    started = time.perf_counter()
    value = function()
    wait(device)
    return value, 1e3 * (time.perf_counter() - started)


def _event() -> Any:
    """Recorded here and now on the device."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(pairs: list[tuple[Any, Any]]) -> list[float]:
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in pairs]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recorded_step(function: Callable[[], Any]) -> tuple[DeviceCalls, list[Kernel]]:
    """Calls to the CUDA runtime in one call of `function`, and what it made the current device do."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function(STEP):
            function()
        torch.cuda.synchronize()
    events = recorded.events()
    return count_calls(events), kernels_by_time(events)


def count_calls(events: Iterable[Any]) -> DeviceCalls:
    """Count launches and waits within the marked step: the profiler itself waits after it."""
    names = [event.name for event in marked_step(list(events))[0]]
    return DeviceCalls(
        launches=sum(name.startswith(LAUNCHES) for name in names),
        syncs=sum(name.startswith(SYNCS) or name == BLOCKING_COPY for name in names),
    )


def kernels_by_time(events: Iterable[Any]) -> list[Kernel]:
    """The kernels, copies and fills among torch.profiler's events, those of one name together, longest
    first."""
    found: dict[str, list[float]] = {}
    for event in events:
        # The marked step has a stretch on the device's time line, too.
        if event.device_type == DeviceType.CUDA and event.name != STEP:
            found.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
    kernels = (Kernel(name, len(micros), sum(micros) / 1e3) for name, micros in found.items())
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def marked_step(events: Sequence[Any]) -> tuple[list[Any], float]:
    """Of torch.profiler's events those that the host had within the marked step, and its microseconds."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    mark = next(event.time_range for event in on_host if event.name == STEP)
    within = [event for event in on_host if mark.start <= event.time_range.start <= mark.end]
    return within, mark.end - mark.start


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Rate of a matrix product and of a copy, on data that is not constant."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = _fastest(lambda: torch.mm(a, b, out=product), device)
    return Ceilings(2 * side**3 / seconds, copy_bandwidth(device), str(dtype).removeprefix("torch."))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the better of two plain copies, of 1 GiB on a GPU."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    return 2 * source.nbytes / min(_fastest(copy, device) for copy in copies)


def _fastest(function: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Seconds of the fastest of some calls."""
    for _ in range(3):
        function()
    return min(call_times([function] * repeats, device)) / 1e3
