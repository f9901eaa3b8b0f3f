"""What a benchmark writes: where it ran, and its tables."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.speed.ladder import first_loss
from fastmrcnn.speed.workload import Workload

Row = dict[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit that figures come from; `gpu` is None on a CPU."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("triton", "torchvision"):
        # Of the package, not of the module: one that was built for another torch does not import.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": driver.splitlines()[0] if driver else None,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "versions": versions,
    }


def describe(workload: Workload) -> dict[str, Any]:
    """What was run, in words that need no configuration file."""
    height, width = workload.shape
    roi = workload.config.model.roi
    return {
        "images": workload.images,
        "height": height,
        "width": width,
        "steps": workload.steps,
        "objects_per_image": workload.objects,
        "classes": workload.num_classes,
        "seed": workload.seed,
        "backbone": workload.config.model.backbone.name,
        "architecture": workload.config.model.architecture,
        "sampling_ratio": roi.sampling_ratio,
        "rois_per_image": roi.batch_per_image,
    }


def heading(facts: dict[str, Any], what: dict[str, Any]) -> str:
    where = facts["gpu"] or f"CPU ({facts['cpu']}, {facts['threads']} threads)"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    small = "" if facts["gpu"] else " A CPU's figures say nothing about a GPU."
    return (
        f"{where}{driver}, {versions}, commit {facts['commit'] or 'unknown'}.\n"
        f"{what['backbone']} {what['architecture']}, random weights, {what['images']} images of "
        f"{what['height']}x{what['width']} a step, noise with {what['objects_per_image']} objects an image, "
        f"{what['rois_per_image']} RoIs an image, {what['steps']} steps.{small}"
    )


def ladder_table(rows: list[Row]) -> str:
    head = [
        "row",
        "images/s",
        "ms (p20 to p80)",
        "processor ms",
        "peak MB",
        "launches",
        "host syncs",
        "graphs, breaks",
        "foreground RoIs, dropped",
        "loss at first, at last",
        "weights moved",
    ]
    return table(head, [[row["row"], *_cells(row)] for row in rows])


def _cells(row: Row) -> list[str]:
    if "not_run" in row or "failure" in row:
        reason = f"not run: {row['not_run']}" if "not_run" in row else f"FAILED: {row['failure']}"
        return [reason.replace("|", "/")] + [""] * 9
    losses = row["first_losses"]
    graphs = f"{row['graphs']}, {row['graph_breaks']}" if "graphs" in row else ""
    counts = f"{losses['num_fg']:.0f}" if "num_fg" in losses else ""
    if "masks_dropped" in losses:
        counts += f", {losses['masks_dropped']:.0f}"
    busy = row["processor_ms"]
    mark = f" DISAGREES: {row['disagrees']}" if "disagrees" in row else ""
    return [
        f"{row['images_per_second']:.2f}",
        f"{row['p50_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})",
        "" if busy is None else f"{busy:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        str(row.get("launches", "")),
        str(row.get("syncs", "")),
        graphs,
        counts,
        f"{first_loss(row):.4f}, {row['last_loss']:.4f}{mark}",
        f"{row['moved']:.3g}",
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
