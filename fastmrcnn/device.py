"""Where a program runs: the device, the precision there, and what makes it slow."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastmrcnn.errors import UserError


class Precision(NamedTuple):
    autocast: bool
    dtype: torch.dtype
    loss_scale: float | None  # fp16 only
    name: str = "fp32"


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is not one; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}': torch {torch.__version__} finds {torch.cuda.device_count()} CUDA "
            "devices; use auto or cpu"
        )
    return device


def set_up_cuda(device: torch.device) -> None:
    """Make a CUDA device the current one, on which streams and graphs are made without being told where.

    cuDNN may time its algorithms for each shape that it meets: here they are few, and come again.
    """
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None: as many as it chooses, but no more than a container may."""
    quota = cpu_quota()
    if threads is not None:
        torch.set_num_threads(threads)
    elif quota is not None and quota < torch.get_num_threads():
        torch.set_num_threads(quota)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processors' worth of time that Linux grants this container, rounded up; None: it sets no limit.

    More threads than that are stopped in turns while the others wait for them, and torch counts the
    machine's processors.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            words = " ".join((root / name).read_text(encoding="utf-8") for name in names).split()
            quota, period = int(words[0]), int(words[1])  # "max": none
            return -(-quota // period) if quota > 0 and period > 0 else None
    return None


def busy_machine(device: torch.device) -> str | None:
    """A line of advice if others keep the processor busy and torch's threads spin while they wait for each
    other, which commands of this program tell them not to do."""
    cores = os.cpu_count() or 1
    if device.type != "cpu" or not hasattr(os, "getloadavg") or torch.get_num_threads() == 1:
        return None
    load = os.getloadavg()[0]
    if load < 1.5 * cores or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return None
    return (
        f"This machine is busy (load {load:.0f}, {cores} cores); OMP_WAIT_POLICY=PASSIVE in the environment, "
        "or runtime.threads=1, is often several times faster then."
    )


def choose_precision(name: str, device: torch.device, on_cpu: str = "auto") -> Precision:
    """What `runtime.precision` means.

    Args:
        on_cpu: what auto means on a CPU, `runtime.cpu_precision`; auto: fp32.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" or on_cpu == "bf16" else "fp32"
    if name == "fp32":
        return Precision(False, torch.bfloat16, None)
    if name == "bf16":
        return Precision(True, torch.bfloat16, None, name)
    return Precision(True, torch.float16, 2.0**16, name)


def detecting_precision(name: str, device: torch.device, on_cpu: str = "auto") -> str:
    """What `runtime.precision` means for a trained model: the name of a precision.

    Where auto has not been decided in its training, a convolution is timed in both, once in a process.

    Args:
        on_cpu: as in `choose_precision`.
    """
    if name != "auto" or device.type == "cuda":
        return choose_precision(name, device).name
    if is_undecided(name, device, on_cpu):
        return "bf16" if bf16_convolves_faster() else "fp32"
    return "bf16" if on_cpu == "bf16" and has_bf16() else "fp32"


def is_undecided(name: str, device: torch.device, on_cpu: str) -> bool:
    """Whether the precision of a run is left to what turns out to be faster."""
    return name == on_cpu == "auto" and device.type == "cpu" and has_bf16()


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by instructions of its own: AVX-512 BF16 or AMX."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # there is no public one
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, check, lambda: False)() for check in checks
    )


class Trial(NamedTuple):
    """Seconds that the same work takes in fp32 and in bf16."""

    fp32: float
    bf16: float

    @property
    def faster(self) -> bool:
        """Whether bf16 saves a tenth: less is not worth its rounding."""
        return self.bf16 < 0.9 * self.fp32


def try_both(
    fp32: Callable[[], object],
    bf16: Callable[[], object],
    *,
    times: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """Run each once to warm up, then in turns, and keep the best time of each: what else the machine does
    can only make a run longer."""
    best = [float("inf"), float("inf")]
    for turn in range(times + 1):
        for which, run in enumerate((fp32, bf16)):
            started = clock()
            run()
            seconds = clock() - started
            if turn > 0:
                best[which] = min(best[which], seconds)
    return Trial(*best)


@functools.cache
def bf16_convolves_faster() -> bool:
    """Tried with a convolution like those of a pyramid."""
    maps, weight = torch.ones(1, 128, 64, 64), torch.ones(128, 128, 3, 3)

    def convolve(bf16: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return torch.nn.functional.conv2d(maps, weight, padding=1)

    return try_both(lambda: convolve(False), lambda: convolve(True), times=3).faster
