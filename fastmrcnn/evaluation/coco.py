"""COCO's average precision: pycocotools' own numbers under detectron2's names."""

from __future__ import annotations

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.contents import read_contents
from fastmrcnn.data.keypoints import COCO_KEYPOINTS, UNIFORM_SIGMA, KeypointOptions, choose_sigmas
from fastmrcnn.data.records import Problems
from fastmrcnn.data.values import all_finite
from fastmrcnn.evaluation.engines import ENGINES, EngineName

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl")  # COCO labels no keypoints on small objects
MAX_DETS = {"bbox": 100, "segm": 100, "keypoints": 20}  # of COCO


def evaluate_coco(
    annotations: str | Path | CocoDataset | COCO,
    results: Sequence[dict[str, Any]],
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: int | None = None,
    image_ids: Sequence[int] | None = None,
    show: bool = True,
    oks_sigmas: Sequence[float] | None = None,
    engine: EngineName = "auto",
) -> dict[str, float]:
    """Average precision of results against an annotation file.

    The numbers are those that pycocotools' COCOeval gives for a file of the same results, to the last bit
    whichever engine computes them. So objects
    are small, medium or large by the area of the box, for masks too: pycocotools takes the area of a
    result that holds a box from the box.

    Args:
        annotations: what `ground_truth` takes.
        results: entries as `coco_results` makes them; may be empty. They are left as they are.
        iou_types: of "bbox", "segm" and "keypoints".
        max_dets: best detections of a class that count in each image, more than 10; None: COCO's 100, and 20
            for keypoints.
        image_ids: images that were evaluated; None: all of the file.
        show: print COCO's table of each type.
        oks_sigmas: how far each keypoint may be off, as `choose_sigmas` takes them.
        engine: "pycocotools", the reference; or "auto", which is many times faster.
    Returns:
        "bbox/AP", "bbox/AP50", ... "segm/APl" in 0..100, and "bbox/AP-<class>" where there are several
        classes, with the id behind a name that two of them have. NaN where there is no object to find.
        Keypoints have no APs.
    Raises:
        UserError: the file is missing or not COCO format; sigmas that do not fit.
    """
    truth = ground_truth(annotations, keypoints="keypoints" in iou_types)
    names = class_labels(truth)
    values: dict[str, float] = {}
    compute = ENGINES[engine](truth, results, iou_types)
    for kind in iou_types:
        judge, note = COCOeval(iouType=kind), ""
        judge.params.imgIds = sorted(truth.getImgIds() if image_ids is None else image_ids)
        judge.params.catIds = sorted(truth.getCatIds())
        if kind == "keypoints":
            count = keypoint_count(truth.dataset)
            if oks_sigmas is None and count != COCO_KEYPOINTS:
                note = f", OKS with a sigma of {UNIFORM_SIGMA} for each keypoint"
            judge.params.kpt_oks_sigmas = choose_sigmas(count, oks_sigmas, judge.params.kpt_oks_sigmas)
        limit = max_dets or MAX_DETS[kind]
        judge.params.maxDets[-1] = limit
        judge.eval = compute(judge.params)
        table = _summary(judge, limit)
        if show:
            what = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}[kind]
            tqdm.write(f"COCO evaluation, {what} ({len(judge.params.imgIds)} images{note})\n{table}")
        values.update({f"{kind}/{name}": value for name, value in _metrics(judge, names).items()})
    return values


def ground_truth(annotations: str | Path | CocoDataset | COCO, keypoints: bool = False) -> COCO:
    """The annotations as pycocotools judges by them.

    Args:
        annotations: COCO-format file; or a data set, whose tree is taken if it was kept, else its file is
            read again; or what this function returned. What is found in a file that is given by its name goes
            to stderr.
        keypoints: check the keypoints of a file, too.
    Raises:
        UserError: the file is missing, not COCO format, or has mistakes.
    """
    if isinstance(annotations, COCO):
        return annotations
    known = isinstance(annotations, CocoDataset)
    tree = annotations.tree if isinstance(annotations, CocoDataset) else None
    if tree is None:
        path = annotations.annotations if isinstance(annotations, CocoDataset) else Path(annotations)
        problems = Problems()
        options = KeypointOptions(flip_pairs=()) if keypoints else None
        tree = read_contents(path, Path(), "data.val", problems, keypoints=options, keep_tree=True).tree
        problems.check(path)
        for finding in () if known else problems.told():
            print(f"{path.name}: {finding.line()}", file=sys.stderr)
    fill_in(tree)
    truth = COCO()
    truth.dataset = tree
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def class_labels(truth: COCO) -> list[str]:
    """The names of the classes by rising id, each with its id behind it where two have the same name."""
    categories = truth.loadCats(sorted(truth.getCatIds()))
    times = Counter(category["name"] for category in categories)
    return [c["name"] if times[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories]


def keypoint_count(tree: dict[str, Any]) -> int:
    """J of a COCO file; 0 if its categories name none."""
    lists = [category.get("keypoints") for category in tree["categories"]]
    return max((len(names) for names in lists if isinstance(names, list)), default=0)


def fill_in(tree: dict[str, Any]) -> None:
    """Write into a tree from `read_contents` what else pycocotools needs. A second time changes nothing.

    A region without a mask has the mask of its box. Where categories name keypoints, an object without
    any, or with what no keypoints are, has them unlabelled.
    """
    count = keypoint_count(tree)
    for entry in tree["annotations"]:
        points = entry.get("keypoints")
        if count and not (isinstance(points, list) and len(points) == 3 * count and all_finite(points)):
            entry["keypoints"], entry["num_keypoints"] = [0] * 3 * count, 0
        if not entry.get("segmentation"):
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _summary(judge: COCOeval, limit: int) -> str:
    """COCO's table. pycocotools' code knows of no limit on detections but its own."""
    usual = MAX_DETS[judge.params.iouType]
    table = io.StringIO()
    judge.params.maxDets[-1] = usual
    with contextlib.redirect_stdout(table):
        judge.summarize()
    judge.params.maxDets[-1] = limit
    return table.getvalue().rstrip().replace(f"maxDets={usual:>3d}", f"maxDets={limit:>3d}")


def _metrics(judge: COCOeval, class_names: Sequence[str]) -> dict[str, float]:
    # precision has axes IoU threshold, recall, class, area range (0 is all), limit on detections
    precision = judge.eval["precision"][..., -1]
    fifty, seventy_five = (int(np.argmin(abs(judge.params.iouThrs - t))) for t in (0.5, 0.75))
    every = precision[..., 0]
    areas = range(1, precision.shape[-1])  # small, medium and large, or the last two for keypoints
    parts = (every, every[fifty], every[seventy_five], *(precision[..., area] for area in areas))
    names = KEYPOINT_METRICS if judge.params.iouType == "keypoints" else METRICS
    found = {name: mean_known(part) for name, part in zip(names, parts, strict=True)}
    if len(class_names) > 1:
        found.update({f"AP-{name}": mean_known(every[:, :, k]) for k, name in enumerate(class_names)})
    return found


def mean_known(values: NDArray[np.float64]) -> float:
    """In 0..100, NaN if none is known; pycocotools writes -1 where there is no object to find."""
    known = values[values > -1]
    return float(np.mean(known)) * 100 if known.size else float("nan")
