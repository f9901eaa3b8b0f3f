"""COCO's average precision: pycocotools' own numbers under detectron2's names."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from fastmrcnn.errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate_coco(
    annotations: str | Path | COCO,
    results: Sequence[dict[str, Any]],
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: int = 100,
    image_ids: Sequence[int] | None = None,
    show: bool = True,
) -> dict[str, float]:
    """Average precision of results against an annotation file.

    The numbers are those that pycocotools' COCOeval gives for a file of the same results. So objects
    are small, medium or large by the area of the box, for masks too: pycocotools takes the area of a
    result that holds a box from the box.

    Args:
        annotations: COCO-format file, or what `load_ground_truth` made of it.
        results: entries as `coco_results` makes them; may be empty. They are left as they are.
        iou_types: of "bbox" and "segm".
        max_dets: best detections that count in each image; more than 10.
        image_ids: images that were evaluated; none: all of the file.
        show: print COCO's table of each type.
    Returns:
        "bbox/AP", "bbox/AP50", ... "segm/APl" in 0..100, and "bbox/AP-<class>" where there are several
        classes. NaN where there is no object to find.
    Raises:
        UserError: the file is missing or not COCO format.
    """
    truth = annotations if isinstance(annotations, COCO) else load_ground_truth(annotations)
    names = [category["name"] for category in truth.loadCats(sorted(truth.getCatIds()))]
    values: dict[str, float] = {}
    for kind in iou_types:
        judge, table = _judge(truth, results, kind, max_dets, image_ids)
        if show:
            what = {"bbox": "box", "segm": "mask"}[kind]
            tqdm.write(f"COCO evaluation, {what} ({len(judge.params.imgIds)} images)\n{table}")
        values.update({f"{kind}/{name}": value for name, value in _metrics(judge, names).items()})
    return values


def load_ground_truth(path: str | Path) -> COCO:
    """Read an annotation file, and fill in what pycocotools needs and files often lack.

    `area` is the mask's, or the box's where there is no mask; `iscrowd` is 0; a region without a
    mask has the mask of its box.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a COCO-format JSON file ({error})") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or any(not isinstance(tree.get(part), list) for part in parts):
        raise UserError(f"{path}: not COCO format: it must hold lists of {', '.join(parts)}")
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    for entry in tree["annotations"]:
        entry.setdefault("iscrowd", 0)
        x, y, w, h = entry["bbox"]
        shape = entry.get("segmentation") or None
        if entry.get("area") is None:
            entry["area"] = w * h if shape is None else _mask_area(shape, *sizes[entry["image_id"]])
        if shape is None:
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if any(entry["id"] == 0 for entry in tree["annotations"]):
        print(
            f"warning: {path}: pycocotools takes annotation id 0 for 'no match' and counts its object as "
            "missed; number annotations from 1",
            file=sys.stderr,
        )
    truth = COCO()
    truth.dataset = tree
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _mask_area(shape: Any, height: int, width: int) -> float:
    if isinstance(shape, dict) and not isinstance(shape["counts"], list):
        return float(coco_mask.area(shape))
    rle = coco_mask.frPyObjects(shape, height, width)
    return float(coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle))


def _judge(
    truth: COCO, results: Sequence[dict[str, Any]], kind: str, max_dets: int, image_ids: Sequence[int] | None
) -> tuple[COCOeval, str]:
    """pycocotools' evaluation and its summary; its other chatter is left out."""
    table = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            # loadRes writes into the entries, and its masks are only read.
            found = truth.loadRes([copy.copy(entry) for entry in results])
        else:  # which loadRes cannot take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        judge = COCOeval(truth, found, kind)
        judge.params.maxDets = [1, 10, max_dets]
        if image_ids is not None:
            judge.params.imgIds = sorted(image_ids)
        judge.evaluate()
        judge.accumulate()
        with contextlib.redirect_stdout(table):
            judge.summarize()
    lines = table.getvalue().splitlines()
    if max_dets != 100:  # the first line of pycocotools' summary only knows 100
        value = _mean(judge.eval["precision"][..., 0, -1]) / 100
        lines[0] = (
            lines[0].replace("maxDets=100", f"maxDets={max_dets:>3d}").replace("-1.000", f"{value:0.3f}")
        )
    return judge, "\n".join(lines)


def _metrics(judge: COCOeval, class_names: Sequence[str]) -> dict[str, float]:
    # precision has axes IoU threshold, recall, class, area range (0 is all), limit on detections
    precision = judge.eval["precision"][..., -1]
    fifty, seventy_five = (int(np.argmin(abs(judge.params.iouThrs - t))) for t in (0.5, 0.75))
    every = precision[..., 0]
    parts = (every, every[fifty], every[seventy_five], *(precision[..., area] for area in (1, 2, 3)))
    found = {name: _mean(part) for name, part in zip(METRICS, parts, strict=True)}
    if len(class_names) > 1:
        found.update({f"AP-{name}": _mean(every[:, :, k]) for k, name in enumerate(class_names)})
    return found


def _mean(precision: np.ndarray) -> float:
    """In 0..100; pycocotools writes -1 where there is no object to find."""
    known = precision[precision > -1]
    return float(np.mean(known)) * 100 if known.size else float("nan")
