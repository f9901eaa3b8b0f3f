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


def by_pycocotools(truth: COCO, results: Sequence[dict[str, Any]]) -> Compute:
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


def by_hotcoco(truth: COCO, results: Sequence[dict[str, Any]]) -> Compute:
    """hotcoco does in Rust what pycocotools does, in the same order, on all cores. Results and ground truth
    are taken over once for all kinds."""
    own = hotcoco.COCO(truth.dataset)
    found = own.load_res(list(results))

    def compute(params: Params) -> dict[str, Any]:
        judge = hotcoco.COCOeval(own, found, params.iouType)
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


ENGINES: Mapping[EngineName, Callable[[COCO, Sequence[dict[str, Any]]], Compute]] = {
    "auto": by_hotcoco,
    "pycocotools": by_pycocotools,
}


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
