"""Plots of the report, as SVG. Their words are names of networks and metrics, which both editions share."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastmrcnn.study.statistics import Estimate, Judged

COLOURS = ("#2f6fb3", "#d1701f", "#3a9150", "#b5382f", "#7b58a8", "#7a6652")
GREY = "#777b82"


def svg(figure: Any) -> bytes:
    """The file of a matplotlib figure, the same whenever it is drawn; its text is text."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return file.getvalue()


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def plot_cells(
    labels: Sequence[str],
    metrics: Sequence[str],
    found: Mapping[tuple[str, str], Estimate],
    values: Mapping[tuple[str, str], Sequence[float]],
    cells: Sequence[str],
) -> bytes:
    """A panel a metric: means of the cells with their intervals, and each run as a dot."""
    figure = new_figure(2.0 + 1.9 * len(metrics), 2.9)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        plain(axes)
        for place, cell in enumerate(cells):
            if (cell, metric) not in found:
                continue
            one, colour = found[cell, metric], COLOURS[place % len(COLOURS)]
            error = None if math.isnan(one.half_width) else [one.half_width]
            axes.bar(place, one.mean, 0.62, color=colour, alpha=0.35)
            axes.errorbar(place, one.mean, yerr=error, color=colour, capsize=4, marker="_", ms=12)
            runs = values[cell, metric]
            step = 0.3 / max(1, len(runs) - 1)
            spots = [place - 0.15 + step * number for number in range(len(runs))]
            axes.plot(spots, runs, "o", color=colour, ms=3.5)
        axes.set_xticks(range(len(cells)), labels, rotation=35, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(cells) - 0.4)
        axes.set_title(metric, fontsize=10)
        axes.set_ylim(bottom=0)
    return svg(figure)


def plot_effects(judged: Sequence[Judged], labels: Mapping[str, str]) -> bytes:
    """A row a claim: the difference here with its interval, and the paper's as a diamond."""
    figure = new_figure(6.4, 0.9 + 0.42 * len(judged))
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.axvline(0, color=GREY, lw=1)
    names = []
    for row, one in enumerate(judged):
        claim = one.claim
        names.append(f"{labels[claim.one]} - {labels[claim.other]}, {claim.metric}")
        if one.difference is not None:
            error = None if math.isnan(one.difference.half_width) else [[one.difference.half_width]] * 2
            axes.errorbar(one.difference.mean, row, xerr=error, fmt="o", color=COLOURS[0], capsize=4)
        if claim.paper is not None:
            axes.plot(claim.paper, row, "D", color=COLOURS[1], mfc="none", ms=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("AP", fontsize=9)
    return svg(figure)


def plot_losses_over_time(rows: Mapping[str, Sequence[float | None]]) -> bytes:
    """The terms of the loss by step, of one run."""
    figure = new_figure(6.4, 3.0)
    axes = figure.subplots()
    plain(axes)
    terms = [name for name in rows if name not in ("iteration", "total_loss")]
    for number, name in enumerate(terms):
        values = [math.nan if value is None else value for value in rows[name]]
        axes.plot(rows["iteration"], values, color=COLOURS[number % len(COLOURS)], label=name)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return svg(figure)
