"""Proposals of a data set, and their recall, whatever the class: what an RPN is judged by."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import evaluation_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.records import ImageProposals
from fastmrcnn.detection.objects import split_detections
from fastmrcnn.device import choose_precision
from fastmrcnn.evaluation.coco import load_ground_truth
from fastmrcnn.model.mask_rcnn import MaskRCNN, as_detections
from fastmrcnn.structures import to_device

LIMITS = (100, 300, 1000)


def collect_proposals(
    model: MaskRCNN,
    dataset: CocoDataset,
    config: Config,
    *,
    device: torch.device | None = None,
    progress: bool = True,
) -> dict[int, ImageProposals]:
    """Proposals of every image, in its own pixels, by image id.

    Args:
        model: in eval mode, with an RPN.
        config: its sections data, evaluate and runtime.precision are used.
        device: of the model; none: that of its first parameter.
    """
    place = device or next(model.parameters()).device
    how = choose_precision(config.runtime.precision, place)
    found: dict[int, ImageProposals] = {}
    with tqdm(total=len(dataset), unit="img", desc="propose", disable=not progress) as bar:
        for loaded in evaluation_loader(dataset, config):
            with torch.no_grad(), torch.autocast(place.type, dtype=how.dtype, enabled=how.autocast):
                batch = to_device(loaded.batch, place)
                proposals = as_detections(model.propose(model.features(batch), batch))
            each = split_detections(proposals, loaded.to_original, loaded.original_sizes)
            for image_id, one in zip(loaded.image_ids, each, strict=True):
                found[image_id] = ImageProposals(one.boxes.numpy(), one.scores.numpy())
            bar.update(loaded.real)
    return found


def proposal_recall(
    annotations: str | Path | COCO,
    proposals: Mapping[int, ImageProposals],
    limits: Sequence[int] = LIMITS,
    show: bool = True,
) -> dict[str, float]:
    """Average recall over IoU 0.50:0.95 of the best proposals of each image, by pycocotools.

    Args:
        annotations: COCO-format file, or what `load_ground_truth` made of it.
        proposals: by image id, for the images that are judged.
        limits: numbers of proposals, ascending.
        show: print it.
    Returns:
        "box_proposals/AR@100", ... in 0..100; NaN where there is no object to find.
    """
    truth = annotations if isinstance(annotations, COCO) else load_ground_truth(annotations)
    category = truth.getCatIds()[0]  # any that there is; pycocotools drops those it does not know
    entries = []
    for image_id, one in proposals.items():
        corners, sides = one.boxes[:, :2], one.boxes[:, 2:] - one.boxes[:, :2]
        for box, score in zip(np.hstack([corners, sides]).tolist(), one.scores.tolist(), strict=True):
            entries.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        if entries:
            found = truth.loadRes(entries)
        else:  # which loadRes cannot take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.params.useCats = 0
        judge.params.maxDets = list(limits)
        judge.params.imgIds = sorted(proposals)
        judge.evaluate()
        judge.accumulate()
    recall = judge.eval["recall"]  # IoU threshold, class, area range (0 is all), limit
    values = {}
    for index, limit in enumerate(limits):
        known = recall[:, 0, 0, index]
        known = known[known > -1]
        values[f"box_proposals/AR@{limit}"] = float(known.mean()) * 100 if known.size else float("nan")
    if show:
        print("Proposals: " + ", ".join(f"{name[14:]} {value:.1f}" for name, value in values.items()))
    return values
