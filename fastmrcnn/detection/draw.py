"""Pictures for people: objects drawn into an image, ground truth beside predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fastmrcnn.detection.fonts import FIRST, Line, drawable_names
from fastmrcnn.detection.objects import Objects
from fastmrcnn.detection.paste import paste_to_host
from fastmrcnn.files import replacing, to_write

MIN_LONG_SIDE = 480  # smaller images are enlarged, or their labels would hide them
FILL, OUTLINE = 0.45, 0.95  # opacity
KEYPOINT_SCORE = 0.05  # keypoints below it are not drawn
COLOURS = (
    (255, 87, 51),
    (38, 145, 255),
    (46, 204, 87),
    (255, 200, 31),
    (186, 85, 255),
    (0, 212, 212),
    (255, 105, 180),
    (154, 224, 40),
    (255, 140, 0),
    (112, 128, 255),
    (0, 190, 140),
    (232, 60, 110),
    (210, 170, 110),
    (120, 200, 255),
    (200, 120, 160),
    (170, 190, 60),
)


def draw_objects(
    image: NDArray[np.uint8],
    objects: Objects,
    class_names: Sequence[str],
    skeleton: Sequence[tuple[int, int]] = (),
    *,
    boxes: bool = True,
    labels: Sequence[str] | None = None,
    threshold: float = 0.5,
) -> NDArray[np.uint8]:
    """The image with translucent masks, their outlines, boxes, keypoints and labels.

    Colours tell the classes apart, or the objects if there is but one class (`object_colours`).

    Args:
        image: (h, w, 3) uint8 RGB. An image with a long side under 480 is enlarged by a whole factor.
        objects: of the image. A keypoint whose visibility or score is under 0.05 is not drawn. Masks that
            are still probabilities are pasted one after the other, so that many of a large image fit.
        skeleton: keypoints to join.
        boxes: whether to draw them.
        labels: of the objects, "" for none; None: their names and scores.
        threshold: of a mask that is still probabilities.
    Returns:
        (factor * h, factor * w, 3) uint8 RGB; the input is left as it is.
    Raises:
        ValueError: the image is not of the objects' size, or there are more or fewer labels than objects.
    """
    height, width = objects.height, objects.width
    if labels is not None and len(labels) != len(objects):
        raise ValueError(f"{len(objects)} objects need as many labels, got {len(labels)}")
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(f"image must be ({height}, {width}, 3) uint8, got {image.shape} {image.dtype}")
    places, points = objects.boxes, objects.keypoints
    factor = math.ceil(MIN_LONG_SIDE / max(height, width))
    size = (width * factor, height * factor)
    canvas = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    line = max(2, round(max(size) / 450))
    colours = object_colours(objects, class_names)

    # Large objects first, so that what lies on them stays visible.
    area = (places[:, 2] - places[:, 0]) * (places[:, 3] - places[:, 1])
    order = np.argsort(-area, kind="stable").tolist()
    for index in order:
        mask = _mask_of(objects, index, threshold)
        if mask is not None:
            _blend_mask(canvas, mask, colours[index], factor, line)
    drawn = Image.fromarray(canvas)
    pen = ImageDraw.Draw(drawn)
    for index in order if boxes else ():
        x0, y0, x1, y1 = (places[index] * factor).tolist()
        pen.rectangle(
            (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)),
            outline=colours[index],
            width=max(1, round(max(size) / 700)),
        )
    if points is not None:
        points = points * (factor, factor, 1)
        for index in order:
            _draw_keypoints(pen, points[index], skeleton, colours[index], line)
    texts = object_labels(objects, class_names) if labels is None else labels
    written = [index for index, text in enumerate(texts) if text]
    _draw_labels(
        drawn,
        places[written] * factor,
        [texts[index] for index in written],
        [colours[index] for index in written],
        size,
    )
    return np.array(drawn)


def object_colours(objects: Objects, class_names: Sequence[str]) -> list[tuple[int, int, int]]:
    """The colour in which each object is drawn: its class's, or its own if there is but one class."""
    kinds = objects.classes.tolist() if len(class_names) > 1 else range(len(objects))
    return [COLOURS[kind % len(COLOURS)] for kind in kinds]


def draw_comparison(
    image: NDArray[np.uint8],
    truth: Objects,
    found: Objects,
    class_names: Sequence[str],
    skeleton: Sequence[tuple[int, int]] = (),
) -> NDArray[np.uint8]:
    """Ground truth on the left, predictions on the right, a caption over each. Returns (h', w', 3) uint8."""
    panels = [draw_objects(image, objects, class_names, skeleton) for objects in (truth, found)]
    height, width = panels[0].shape[:2]
    letters = round(9 + max(height, width) / 90)
    bar, gap = round(letters * 1.8), max(4, round(width / 100))
    sheet = Image.new("RGB", (2 * width + gap, bar + height), "white")
    font = ImageFont.truetype(FIRST, letters)
    pen = ImageDraw.Draw(sheet)
    for place, (title, objects, panel) in enumerate(
        zip(("ground truth", "predictions"), (truth, found), panels, strict=True)
    ):
        left = place * (width + gap)
        caption = f"{title} ({len(objects)})"
        pen.text((left + width / 2, bar / 2), caption, font=font, fill="black", anchor="mm")
        sheet.paste(Image.fromarray(panel), (left, bar))
    return np.array(sheet)


def save_picture(path: str | Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture as PNG. What stood there is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(to_write(path)) as stream:
        Image.fromarray(picture).save(stream, format="PNG")


def _mask_of(objects: Objects, index: int, threshold: float) -> NDArray[np.bool_] | None:
    if objects.masks is not None or objects.probabilities is None:
        return None if objects.masks is None else objects.masks[index]
    one = slice(index, index + 1)
    box = torch.from_numpy(objects.boxes[one])
    return paste_to_host(objects.probabilities[one], box, objects.height, objects.width, threshold)[0]


def _blend_mask(
    canvas: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int], factor: int, line: int
) -> None:
    """Tint the mask's pixels and trace its outline, both with soft edges, within its own window."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    margin = line + 2
    y0, x0 = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    y1, x1 = rows[-1] + 1 + margin, columns[-1] + 1 + margin
    # Beyond the border of the image the mask goes on as it was, so that no outline runs along it.
    part = np.pad(mask[y0:y1, x0:x1], margin, mode="edge").astype(np.uint8) * 255
    size = (part.shape[1] * factor, part.shape[0] * factor)
    enlarged = Image.fromarray(part).resize(size, Image.Resampling.BILINEAR)
    soft = (
        np.asarray(enlarged.filter(ImageFilter.GaussianBlur(max(0.8 * line, 0.5 * factor))), dtype=np.float32)
        / 255
    )
    cut = margin * factor
    soft = soft[cut:-cut, cut:-cut, None]
    inside = np.clip((soft - 0.5) * 4 + 0.5, 0, 1)
    outline = np.clip(1.6 - np.abs(soft - 0.5) * 5, 0, 1)
    opacity = np.maximum(FILL * inside, OUTLINE * outline)
    top, left = y0 * factor, x0 * factor
    window = canvas[top : top + soft.shape[0], left : left + soft.shape[1]]
    window[:] = np.round(window + opacity * (np.array(colour, dtype=np.float32) - window))


def _draw_keypoints(
    pen: ImageDraw.ImageDraw,
    points: NDArray[np.float32],
    skeleton: Sequence[tuple[int, int]],
    colour: tuple[int, int, int],
    line: int,
) -> None:
    """Dots of the keypoints that are known, and the lines between them."""
    known = points[:, 2] >= KEYPOINT_SCORE
    for a, b in skeleton:
        if known[a] and known[b]:
            pen.line((*points[a, :2].tolist(), *points[b, :2].tolist()), fill=colour, width=line)
    radius = 1.5 * line
    for x, y in points[known, :2].tolist():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white")


def object_labels(objects: Objects, class_names: Sequence[str]) -> list[str]:
    """Name and score of each object, in letters that can be drawn here."""
    names = drawable_names(tuple(class_names))
    labels = [names[kind] for kind in objects.classes.tolist()]
    if objects.crowd is not None:
        ends = [" (crowd)" if crowd else "" for crowd in objects.crowd]
        labels = [label + end for label, end in zip(labels, ends, strict=True)]
    if objects.scores is not None:
        labels = [
            f"{label} {score:.2f}" for label, score in zip(labels, objects.scores.tolist(), strict=True)
        ]
    return labels


def _draw_labels(
    image: Image.Image,
    boxes: NDArray[np.float32],
    labels: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    size: tuple[int, int],
) -> None:
    """Each label at its box, above, below or within, where it hides least of other labels and the box."""
    crowded = len(labels) > 25
    letters = max(11, round((7 + max(size) / 120) * (0.8 if crowded else 1)))
    pad = max(1, round(letters / 6))
    placed: list[tuple[float, float, float, float]] = []
    texts = []
    lines = [Line(label, letters) for label in labels]
    for (x0, y0, x1, y1), line in zip(boxes.tolist(), lines, strict=True):
        left, right = line.bounds()
        w, h = right - left + 2 * pad, letters + 2 * pad
        spots = [(x0, y0 - h), (x0, y1), (x1 - w, y0 - h), (x1 - w, y1), (x0, y0), (x0, y1 - h)]
        fitted = [(min(max(x, 0), size[0] - w), min(max(y, 0), size[1] - h)) for x, y in spots]
        areas = [(x, y, x + w, y + h) for x, y in fitted]
        taken = [*placed, (x0, y0, x1, y1)]
        best = min(areas, key=lambda area: sum(_overlap(area, other) for other in taken))
        placed.append(best)
        texts.append((best[0] + pad - left, best[1] + pad + letters * 0.82))
    # The first are the best: they end up on top.
    for area, text, line, colour in reversed(list(zip(placed, texts, lines, colours, strict=True))):
        ImageDraw.Draw(image).rectangle(area, fill=colour)
        bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 120
        line.draw(image, text, "black" if bright else "white")


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
