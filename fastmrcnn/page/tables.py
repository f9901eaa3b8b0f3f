"""Counts, areas and places of what was found: for the page, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.detection.draw import object_colours
from fastmrcnn.page.found import Found, subset
from fastmrcnn.page.units import PixelSize, area_unit, shown_area
from fastmrcnn.weights.card import ModelCard

ROWS_SHOWN = 500


def class_table(found: Found, places: NDArray[np.int64], card: ModelCard, size: PixelSize | None) -> str:
    """HTML: how many there are of each class, and how much they cover."""
    what = "area" if found.has_masks else "box area"
    heads = ["Class", "Count", f"Total {what} ({area_unit(size)})", f"Mean {what}", "Share of the image"]
    classes, areas = found.objects.classes[places], found.areas[places]
    colours = object_colours(subset(found.objects, places), card.class_names)
    several = len(card.class_names) > 1
    pixels = found.objects.height * found.objects.width
    rows = []
    for label in dict.fromkeys(sorted(classes.tolist(), key=lambda one: -int((classes == one).sum()))):
        own = areas[classes == label]
        first = int(np.flatnonzero(classes == label)[0])
        name = _coloured(card.class_names[label], colours[first] if several else None)
        rows.append([name, *_summary(own, size, pixels)])
    if len(rows) > 1:
        rows.append(["All", *_summary(areas, size, pixels)])
    return _table(heads, rows, total=len(rows) > 1) if rows else ""


def object_table(found: Found, places: NDArray[np.int64], card: ModelCard, size: PixelSize | None) -> str:
    """HTML: a row for each object, by falling score."""
    what = "Area" if found.has_masks else "Box area"
    heads = ["No.", "Class", "Score", f"{what} ({area_unit(size)})", "Left, top (pixels)", "Width x height"]
    colours = object_colours(subset(found.objects, places), card.class_names)
    scores, boxes = _scores(found), found.objects.boxes
    rows = []
    for place, colour in zip(places.tolist()[:ROWS_SHOWN], colours, strict=False):
        x0, y0, x1, y1 = boxes[place].tolist()
        rows.append(
            [
                str(place + 1),
                _coloured(card.class_names[int(found.objects.classes[place])], colour),
                f"{scores[place]:.2f}",
                shown_area(int(found.areas[place]), size),
                f"{x0:.0f}, {y0:.0f}",
                f"{x1 - x0:.0f} x {y1 - y0:.0f}",
            ]
        )
    more = len(places) - len(rows)
    rest = f"<p>{more:,} more objects are in the CSV table.</p>" if more else ""
    return _table(heads, rows) + rest if rows else ""


def as_csv(found: Found, places: NDArray[np.int64], card: ModelCard, size: PixelSize | None) -> str:
    """The table of objects for other programs: areas in pixels and in the unit, boxes and keypoints."""
    what = "area" if found.has_masks else "box_area"
    heads = ["number", "class", "score", f"{what}_px"]
    if size is not None:
        heads.append(f"{what}_{size.ascii_unit}2")
    heads += ["left_px", "top_px", "width_px", "height_px"]
    points = found.objects.keypoints
    if card.keypoints is not None and points is not None:
        heads += [f"{name}_{part}" for name in card.keypoints.names for part in ("x_px", "y_px", "score")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    scores = _scores(found)
    for place in places.tolist():
        pixels = int(found.areas[place])
        x0, y0, x1, y1 = found.objects.boxes[place].tolist()
        row = [place + 1, card.class_names[int(found.objects.classes[place])], f"{scores[place]:.6f}", pixels]
        if size is not None:
            row.append(f"{size.area(pixels):.6g}")
        row += [f"{number:.2f}" for number in (x0, y0, x1 - x0, y1 - y0)]
        if points is not None:
            row += [f"{number:.4f}" for number in points[place].ravel().tolist()]
        writer.writerow(row)
    return text.getvalue()


def _scores(found: Found) -> NDArray[np.float32]:
    assert found.objects.scores is not None, "what was found has them"
    return found.objects.scores


def _summary(areas: NDArray[np.int64], size: PixelSize | None, pixels: int) -> list[str]:
    return [
        f"{len(areas):,}",
        shown_area(int(areas.sum()), size),
        shown_area(float(areas.mean()), size),
        f"{areas.sum() / pixels:.1%}",
    ]


def _coloured(name: str, colour: tuple[int, int, int] | None) -> str:
    if colour is None:
        return escape(name)
    return f'<span class="swatch" style="background: rgb{colour}"></span>{escape(name)}'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """Of cells that are HTML already; the last row is set apart if it is the total."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = [
        f"<tr{' class=total' if total and number == len(rows) else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows, start=1)
    ]
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
