"""Figures that explain Mask R-CNN, drawn from the program itself: its tensors, its sampling points."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn.config.file import load_config
from fastmrcnn.model.build import build_model
from fastmrcnn.structures import Batch, Detections
from fastmrcnn.study.plots import COLOURS, GREY, new_figure, svg
from fastmrcnn.study.runs import CONFIGS

SHAPE, CLASSES = (800, 1344), 80
BINS = 4  # a side of the RoI in the figure of sampling; networks have 7 or 14


def tensor_shapes() -> dict[str, str]:
    """Part of the network: shape of what it gives for an image of COCO, by a run that computes nothing."""
    config = load_config(CONFIGS / "paper_r50_fpn.yaml")
    shapes: dict[str, str] = {}
    with FakeTensorMode(), torch.no_grad():
        model = build_model(config.model, CLASSES, None).eval()
        batch = Batch(torch.zeros(1, 3, *SHAPE, dtype=torch.uint8), torch.tensor([SHAPE]))
        shapes["image"] = _shape(batch.pixels)
        for number, one in enumerate(model.backbone(model.normalize(batch)), start=2):
            shapes[f"res{number}"] = _shape(one)
        features = model.features(batch)
        for number, one in enumerate(features, start=2):
            shapes[f"p{number}"] = _shape(one)
        proposals = model.propose(features, batch)
        shapes["proposals"] = _shape(proposals.boxes)
        rois = model.box_features(features, proposals.boxes, proposals.valid)
        shapes["RoIAlign, boxes"] = _shape(rois)
        found = model(batch)
        assert isinstance(found, Detections)
        shapes["boxes"] = _shape(found.boxes)
        assert found.masks is not None
        shapes["masks"] = _shape(found.masks)
    return shapes


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape)


def draw_architecture() -> bytes:
    """From pixels to masks, each box with the shape of its tensor."""
    shapes = tensor_shapes()
    figure = new_figure(7.4, 4.2)
    axes = figure.subplots()
    axes.axis("off")
    axes.set_xlim(0, 10.4)
    axes.set_ylim(-0.2, 6.4)

    def box(x: float, y: float, width: float, name: str, colour: str) -> None:
        axes.add_patch(_rectangle(x, y, width, 0.78, colour))
        axes.text(x + width / 2, y + 0.51, name, ha="center", va="center", fontsize=8, weight="bold")
        axes.text(x + width / 2, y + 0.22, shapes.get(name, ""), ha="center", va="center", fontsize=6.5)

    def arrow(x0: float, y0: float, x1: float, y1: float) -> None:
        axes.annotate(
            "", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1, "shrinkA": 0}
        )

    box(0, 0, 2.1, "image", COLOURS[5])
    for row in range(4):
        box(0, 1.2 + 1.2 * row, 2.1, f"res{row + 2}", COLOURS[0])
        arrow(1.05, 0.78 + 1.2 * row, 1.05, 1.2 + 1.2 * row)
        box(2.8, 1.2 + 1.2 * row, 2.1, f"p{row + 2}", COLOURS[2])
        arrow(2.1, 1.59 + 1.2 * row, 2.8, 1.59 + 1.2 * row)
        if row:
            arrow(3.85, 1.2 + 1.2 * row, 3.85, 0.78 + 1.2 * row)
        arrow(4.9, 1.59 + 1.2 * row, 5.6, 3.6)
    box(5.6, 3.6, 2.1, "proposals", COLOURS[4])
    box(5.6, 2.0, 2.1, "RoIAlign, boxes", COLOURS[1])
    arrow(6.65, 3.6, 6.65, 2.78)
    arrow(4.9, 1.59, 5.6, 2.3)
    box(8.3, 2.0, 2.1, "boxes", COLOURS[3])
    arrow(7.7, 2.39, 8.3, 2.39)
    box(8.3, 0.4, 2.1, "masks", COLOURS[3])
    arrow(9.35, 2.0, 9.35, 1.18)
    return svg(figure)


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none", alpha=0.28
    )


def draw_sampling(features: Path) -> bytes:
    """RoIPool's cells and RoIAlign's points on a map that `keep_features` wrote."""
    tree = json.loads(features.read_text(encoding="utf-8"))
    values, stride = np.array(tree["map"]), tree["stride"]
    x0, y0, x1, y1 = (value / stride for value in tree["box"])
    figure = new_figure(7.0, 3.4)
    for axes, name in zip(figure.subplots(1, 2), ("RoIPool", "RoIAlign"), strict=True):
        height, width = values.shape
        axes.imshow(values, cmap="Greys", extent=(0, width, height, 0), alpha=0.6)
        axes.set_xticks(range(width + 1), [])
        axes.set_yticks(range(height + 1), [])
        axes.grid(color="white", lw=0.8)
        axes.tick_params(length=0)
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=COLOURS[3], lw=2)
        axes.set_title(name, fontsize=10)
        if name == "RoIPool":
            for left, top, right, bottom in pooled_bins(x0, y0, x1, y1):
                axes.plot(
                    [left, right, right, left, left], [top, top, bottom, bottom, top], color=COLOURS[0], lw=1
                )
        else:
            bin_width, bin_height = (x1 - x0) / BINS, (y1 - y0) / BINS
            for number in range(BINS + 1):
                axes.plot([x0 + number * bin_width] * 2, [y0, y1], color=COLOURS[0], lw=0.8)
                axes.plot([x0, x1], [y0 + number * bin_height] * 2, color=COLOURS[0], lw=0.8)
            spots = (np.arange(2 * BINS) + 0.5) / 2
            xs, ys = np.meshgrid(x0 + spots * bin_width, y0 + spots * bin_height)
            axes.plot(xs.ravel(), ys.ravel(), ".", color=COLOURS[1], ms=4)
        margin = 1.5
        axes.set_xlim(max(0, x0 - margin), min(width, x1 + margin))
        axes.set_ylim(min(height, y1 + margin), max(0, y0 - margin))
    return svg(figure)


def pooled_bins(x0: float, y0: float, x1: float, y1: float) -> list[tuple[int, int, int, int]]:
    """The cells of each bin of RoIPool (arXiv 1504.08083): the box is rounded, and so is each bin.

    Args:
        x0, y0, x1, y1: of the box, in cells of the map.
    Returns:
        left, top, right, bottom of each bin in whole cells, the right and lower ones beyond it.
    """
    left, top, right, bottom = (math.floor(value + 0.5) for value in (x0, y0, x1, y1))
    width, height = max(right - left + 1, 1), max(bottom - top + 1, 1)
    found = []
    for row in range(BINS):
        for column in range(BINS):
            found.append(
                (
                    left + math.floor(column * width / BINS),
                    top + math.floor(row * height / BINS),
                    left + math.ceil((column + 1) * width / BINS),
                    top + math.ceil((row + 1) * height / BINS),
                )
            )
    return found
