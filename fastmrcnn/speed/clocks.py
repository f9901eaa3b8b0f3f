"""How fast a GPU ran while something was measured, and what slowed it: from nvidia-smi, where it is there."""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

EVERY_MS = 200
FIELDS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
# The newer drivers' name, and the older ones'.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of nvmlClocksEventReasons (nvml.h). Being idle is not among them: then there was nothing to do.
SLOWED_BY = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


@contextlib.contextmanager
def watching_clocks(device: torch.device) -> Iterator[dict[str, Any]]:
    """Gives a dictionary that `summary` fills when the block ends; it stays empty without nvidia-smi.

    A process beside this one reads the clocks, so that nothing here waits for it.
    """
    found: dict[str, Any] = {}
    query = _query(_uuid(device)) if device.type == "cuda" else None
    if query is None:
        yield found
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as lines:
        process = subprocess.Popen([*query, f"--loop-ms={EVERY_MS}"], stdout=lines, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            lines.seek(0)
            found.update(summary(lines.read()))


def summary(lines: str) -> dict[str, Any]:
    """Of lines of nvidia-smi, a reading each; {} if there is none.

    Returns:
        `readings`; least, median and largest `sm_mhz` and `memory_mhz`; median `watts`; largest `celsius`;
        `slowed_by`, of each reason the share of readings. What a GPU does not tell is left out.
    """
    readings = [values for line in lines.splitlines() if len(values := line.split(",")) == 5]
    if not readings:
        return {}

    def column(index: int) -> list[float]:
        return [number for values in readings if (number := _number(values[index])) is not None]

    found: dict[str, Any] = {"readings": len(readings)}
    for index, name in enumerate(("sm_mhz", "memory_mhz")):
        if numbers := column(index):
            found[name] = [min(numbers), statistics.median(numbers), max(numbers)]
    watts, celsius = column(2), column(3)
    if watts:
        found["watts"] = statistics.median(watts)
    if celsius:
        found["celsius"] = max(celsius)
    with contextlib.suppress(ValueError):  # [N/A]
        bits = [int(values[4], 16) for values in readings]
        shares = {name: sum(bool(b & bit) for b in bits) / len(bits) for bit, name in SLOWED_BY.items()}
        found["slowed_by"] = {name: share for name, share in shares.items() if share > 0}
    return found


def describe(found: dict[str, Any]) -> str:
    """In a cell of a table: the median clock of the multiprocessors, its range, and what slowed it."""
    if "sm_mhz" not in found:
        return ""
    least, median, most = found["sm_mhz"]
    slowed = [f"{name} {100 * share:.0f}%" for name, share in found.get("slowed_by", {}).items()]
    return "; ".join([f"{median:.0f} ({least:.0f} to {most:.0f})", *slowed])


@functools.cache
def _query(uuid: str) -> list[str] | None:
    """A command that prints one reading; None if none works here."""
    for reasons in REASONS:
        query = f"--query-gpu={FIELDS},{reasons}"
        command = ["nvidia-smi", f"--id={uuid}", query, "--format=csv,noheader,nounits"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    return None


def _uuid(device: torch.device) -> str:
    """As nvidia-smi names it: its numbers do not heed CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None
