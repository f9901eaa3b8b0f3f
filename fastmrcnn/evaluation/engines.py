"""What compares results with a ground truth: pycocotools, or code that gives its numbers faster."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import hotcoco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

EngineName = Literal["auto", "pycocotools"]
Compute = Callable[[Params], dict[str, Any]]
"""From pycocotools' parameters to what its `COCOeval.eval` holds: precision and scores (T, R, K, A, M) and
recall (T, K, A, M), of IoU thresholds, recall thresholds, classes, area ranges, limits on detections."""


def by_pycocotools(truth: COCO, results: Sequence[dict[str, Any]], kinds: Sequence[str]) -> Compute:
    """The reference. The results are left as they are."""

    def compute(params: Params) -> dict[str, Any]:
        # pycocotools writes into the entries; the masks it only reads.
        judge = new_judge(truth, [copy.copy(entry) for entry in results], params.iouType)
        judge.params = params
        with contextlib.redirect_stdout(io.StringIO()):
            judge.evaluate()
            judge.accumulate()
        return dict(judge.eval)

    return compute


def by_hotcoco(truth: COCO, results: Sequence[dict[str, Any]], kinds: Sequence[str]) -> Compute:
    """hotcoco does in Rust what pycocotools does, in the same order, on all cores. Results and ground truth
    are taken over once for all kinds; of what else a file holds it is given nothing, since not all of it can
    be: half of a pair of JSON's escapes, for one."""
    keys = ["image_id", "category_id", "bbox", "segmentation", "score"]
    own = ["id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"]
    if "keypoints" in kinds:
        keys.append("keypoints")
        own += ["keypoints", "num_keypoints"]
    dataset = {
        "images": _only(truth.dataset["images"], ("id", "height", "width")),
        "categories": [{"id": c["id"], "name": str(k)} for k, c in enumerate(truth.dataset["categories"])],
        "annotations": _only(truth.dataset["annotations"], own),
    }
    known = hotcoco.COCO(dataset)
    found = known.load_res(_only(results, keys))

    def compute(params: Params) -> dict[str, Any]:
        judge = hotcoco.COCOeval(known, found, params.iouType)
        if params.iouType == "keypoints":
            judge.params.kpt_oks_sigmas = [float(sigma) for sigma in params.kpt_oks_sigmas]
        judge.params.max_dets = list(params.maxDets)
        judge.params.img_ids = list(params.imgIds)
        judge.params.cat_ids = list(params.catIds)
        judge.evaluate()
        judge.accumulate()
        assert judge.eval is not None
        return {**judge.eval, "params": params}

    return compute


ENGINES: Mapping[EngineName, Callable[[COCO, Sequence[dict[str, Any]], Sequence[str]], Compute]] = {
    "auto": by_hotcoco,
    "pycocotools": by_pycocotools,
}
"""Each takes a ground truth, results, and the kinds that will be asked for."""


def _only(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in keys if key in entry} for entry in entries]


def new_judge(truth: COCO, results: list[dict[str, Any]], kind: str) -> COCOeval:
    """pycocotools' evaluation of results, which it writes into, by their "bbox", "segm" or "keypoints"."""
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            found = truth.loadRes(results)
        else:  # which loadRes cannot take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        return COCOeval(truth, found, kind)
