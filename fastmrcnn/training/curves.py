"""Loss curves of a run, as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmrcnn.errors import UserError
from fastmrcnn.files import replacing
from fastmrcnn.structures import Losses


def plot_losses(metrics: str | Path, picture: str | Path) -> None:
    """Curves of the losses, the learning rate and, if there were evaluations, AP, as an image file.

    Args:
        metrics: JSON lines with detectron2's keys: iteration, total_loss, loss_*, lr, bbox/AP, segm/AP,
            keypoints/AP.
    Raises:
        UserError: the file is missing, is not JSON lines or holds no loss; the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _read_rows(Path(metrics))
    losses = sorted({key for row in rows for key in row if key in Losses._fields})
    kinds = {"bbox/AP": "box", "segm/AP": "mask", "keypoints/AP": "keypoint"}
    precision = [key for key in kinds if any(row.get(key) is not None for row in rows)]
    panels = 3 if precision else 2
    figure = Figure(figsize=(9, 3 + 1.9 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, height_ratios=[3, 1, 1.4][:panels])
    for key in ("total_loss", *losses):
        total = key == "total_loss"
        axes[0].plot(
            *_series(rows, key), label=key, color="black" if total else None, lw=1.8 if total else 1.2
        )
    axes[0].set_ylabel("loss")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(ncols=2, frameon=False)
    axes[1].plot(*_series(rows, "lr"), color="tab:gray")
    axes[1].set_ylabel("learning rate")
    axes[1].set_ylim(bottom=0)
    for key in precision:
        steps, values = _series(rows, key)
        axes[2].plot(steps, values, marker="o", label=f"{kinds[key]}, {values[-1]:.1f} at the end")
    if precision:
        axes[2].set_ylabel("AP")
        axes[2].set_ylim(0, 100)
        axes[2].legend(frameon=False, loc="upper left")
    axes[-1].set_xlabel("step")
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    with replacing(picture) as stream:
        figure.savefig(stream, dpi=120, format=Path(picture).suffix[1:])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines ({error})") from None
    if not any("total_loss" in row for row in rows):
        raise UserError(f"{path}: holds no losses to plot")
    return rows


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key; a value that was not finite is a gap."""
    known = [row for row in rows if key in row]
    values = [float("nan") if row[key] is None else row[key] for row in known]
    return [row["iteration"] for row in known], values
