"""What the numbers of an evaluation are called, before there is one."""

from __future__ import annotations

from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.evaluation.coco import KEYPOINT_METRICS, MAX_DETS, METRICS, class_labels, ground_truth
from fastmrcnn.evaluation.proposals import LIMITS
from fastmrcnn.evaluation.run import judged, most_objects


def metric_names(dataset: CocoDataset, config: Config) -> list[str]:
    """The names of the numbers that `run_evaluation` gives of this set, but for "candidates_cut"."""
    if not config.model.box_head.enabled:
        return [f"box_proposals/AR@{limit}" for limit in LIMITS]
    truth = ground_truth(dataset, keypoints=config.model.keypoint_head.enabled)
    labels = class_labels(truth)
    of_class, _ = most_objects(truth, {record.image_id for record in dataset.records})
    enough = min(of_class, config.model.box_head.detections)
    names: list[str] = []
    for kind in judged(config):
        own = [*(KEYPOINT_METRICS if kind == "keypoints" else METRICS)]
        own += [f"AP-{label}" for label in labels if len(labels) > 1]
        names += [f"{kind}/{name}" for name in own]
        if config.evaluate.max_dets is None and enough > MAX_DETS[kind]:
            names += [f"{kind}@{enough}/{name}" for name in own]
    return names
