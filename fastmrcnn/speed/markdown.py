"""What a benchmark writes: what was run, and its tables."""

from __future__ import annotations

from typing import Any

from fastmrcnn.speed.ladder import first_loss
from fastmrcnn.speed.step_workload import Workload

Row = dict[str, Any]


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
        "kernels: Inductor's, libraries', ours",
        "GB in the graphs",
        "foreground RoIs, dropped",
        "loss at first, at last",
        "weights moved",
    ]
    return table(head, [[row["row"], *_cells(row)] for row in rows])


def _cells(row: Row) -> list[str]:
    if "not_run" in row or "failure" in row:
        reason = f"not run: {row['not_run']}" if "not_run" in row else f"FAILED: {row['failure']}"
        return [reason.replace("|", "/")] + [""] * 11
    losses = row["first_losses"]
    graphs = f"{row['graphs']}, {row['graph_breaks']}" if "graphs" in row else ""
    made = row.get("compiled_graphs", {})
    kernels = f"{made['generated']}, {made['library']}, {made['ours']}" if made else ""
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
        kernels,
        f"{made['gigabytes']:.2f}" if made else "",
        counts,
        f"{first_loss(row):.4f}, {row['last_loss']:.4f}{mark}",
        f"{row['moved']:.3g}",
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
