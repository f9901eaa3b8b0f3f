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

from fastmrcnn.data.keypoints import COCO_KEYPOINTS, UNIFORM_SIGMA, choose_sigmas
from fastmrcnn.errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl")  # COCO labels no keypoints on small objects


def evaluate_coco(
    annotations: str | Path | COCO,
    results: Sequence[dict[str, Any]],
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: int = 100,
    image_ids: Sequence[int] | None = None,
    show: bool = True,
    oks_sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """Average precision of results against an annotation file.

    The numbers are those that pycocotools' COCOeval gives for a file of the same results. So objects
    are small, medium or large by the area of the box, for masks too: pycocotools takes the area of a
    result that holds a box from the box.

    Args:
        annotations: COCO-format file, or what `load_ground_truth` made of it.
        results: entries as `coco_results` makes them; may be empty. They are left as they are.
        iou_types: of "bbox", "segm" and "keypoints".
        max_dets: best detections that count in each image; more than 10. For keypoints it is 20.
        image_ids: images that were evaluated; none: all of the file.
        show: print COCO's table of each type.
        oks_sigmas: how far each keypoint may be off, as `choose_sigmas` takes them.
    Returns:
        "bbox/AP", "bbox/AP50", ... "segm/APl" in 0..100, and "bbox/AP-<class>" where there are several
        classes. NaN where there is no object to find. Keypoints have no APs.
    Raises:
        UserError: the file is missing or not COCO format; sigmas that do not fit.
    """
    truth = annotations if isinstance(annotations, COCO) else load_ground_truth(annotations)
    names = [category["name"] for category in truth.loadCats(sorted(truth.getCatIds()))]
    values: dict[str, float] = {}
    for kind in iou_types:
        judge, note = _new_judge(truth, results, kind), ""
        if kind == "keypoints":
            count = keypoint_count(truth.dataset)
            if oks_sigmas is None and count != COCO_KEYPOINTS:
                note = f", OKS with a sigma of {UNIFORM_SIGMA} for each keypoint"
            judge.params.kpt_oks_sigmas = choose_sigmas(count, oks_sigmas, judge.params.kpt_oks_sigmas)
        else:
            judge.params.maxDets = [1, 10, max_dets]
        table = _run(judge, image_ids)
        if show:
            what = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}[kind]
            tqdm.write(f"COCO evaluation, {what} ({len(judge.params.imgIds)} images{note})\n{table}")
        values.update({f"{kind}/{name}": value for name, value in _metrics(judge, names).items()})
    return values


def load_ground_truth(path: str | Path) -> COCO:
    """Read an annotation file, and fill in what pycocotools needs and files often lack.

    `area` is the mask's, or the box's where there is no mask; `iscrowd` is 0; a region without a
    mask has the mask of its box. Where categories name keypoints, an object without any has them
    unlabelled.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a COCO-format JSON file ({error})") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or any(not isinstance(tree.get(part), list) for part in parts):
        raise UserError(f"{path}: not COCO format: it must hold lists of {', '.join(parts)}")
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    count = keypoint_count(tree)
    for entry in tree["annotations"]:
        entry.setdefault("iscrowd", 0)
        if count:
            entry["keypoints"] = entry.get("keypoints") or [0] * 3 * count
            entry.setdefault("num_keypoints", sum(flag > 0 for flag in entry["keypoints"][2::3]))
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


def keypoint_count(tree: dict[str, Any]) -> int:
    """J of a COCO file; 0 if its categories name none."""
    return max((len(category.get("keypoints") or ()) for category in tree["categories"]), default=0)


def _mask_area(shape: Any, height: int, width: int) -> float:
    if isinstance(shape, dict) and not isinstance(shape["counts"], list):
        return float(coco_mask.area(shape))
    rle = coco_mask.frPyObjects(shape, height, width)
    return float(coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle))


def _new_judge(truth: COCO, results: Sequence[dict[str, Any]], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            # loadRes writes into the entries, and its masks are only read.
            found = truth.loadRes([copy.copy(entry) for entry in results])
        else:  # which loadRes cannot take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        return COCOeval(truth, found, kind)


def _run(judge: COCOeval, image_ids: Sequence[int] | None) -> str:
    """pycocotools' evaluation and its summary; its other chatter is left out."""
    table = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        if image_ids is not None:
            judge.params.imgIds = sorted(image_ids)
        judge.evaluate()
        judge.accumulate()
        with contextlib.redirect_stdout(table):
            judge.summarize()
    lines = table.getvalue().splitlines()
    max_dets = judge.params.maxDets[-1]
    # The first line of pycocotools' summary of boxes and masks only knows 100.
    if judge.params.iouType != "keypoints" and max_dets != 100:
        value = _mean(judge.eval["precision"][..., 0, -1]) / 100
        lines[0] = (
            lines[0].replace("maxDets=100", f"maxDets={max_dets:>3d}").replace("-1.000", f"{value:0.3f}")
        )
    return "\n".join(lines)


def _metrics(judge: COCOeval, class_names: Sequence[str]) -> dict[str, float]:
    # precision has axes IoU threshold, recall, class, area range (0 is all), limit on detections
    precision = judge.eval["precision"][..., -1]
    fifty, seventy_five = (int(np.argmin(abs(judge.params.iouThrs - t))) for t in (0.5, 0.75))
    every = precision[..., 0]
    areas = range(1, precision.shape[-1])  # small, medium and large, or the last two for keypoints
    parts = (every, every[fifty], every[seventy_five], *(precision[..., area] for area in areas))
    names = KEYPOINT_METRICS if judge.params.iouType == "keypoints" else METRICS
    found = {name: _mean(part) for name, part in zip(names, parts, strict=True)}
    if len(class_names) > 1:
        found.update({f"AP-{name}": _mean(every[:, :, k]) for k, name in enumerate(class_names)})
    return found


def _mean(precision: np.ndarray) -> float:
    """In 0..100; pycocotools writes -1 where there is no object to find."""
    known = precision[precision > -1]
    return float(np.mean(known)) * 100 if known.size else float("nan")
