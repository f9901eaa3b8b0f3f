"""Detect in all images of a set, judge what was found, and draw some of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import evaluation_loader
from fastmrcnn.data.coco import CocoDataset, ImageRecord, object_bitmap
from fastmrcnn.data.images import read_image
from fastmrcnn.data.keypoints import choose_sigmas
from fastmrcnn.data.proposals import write_proposals
from fastmrcnn.detection.draw import Instances, draw_comparison
from fastmrcnn.detection.objects import ImageDetections, coco_results, split_detections
from fastmrcnn.detection.paste import paste_to_host
from fastmrcnn.detection.run import run_model
from fastmrcnn.evaluation.coco import evaluate_coco
from fastmrcnn.evaluation.proposals import collect_proposals, proposal_recall
from fastmrcnn.files import make_folder, replacing, write_json
from fastmrcnn.model.mask_rcnn import MaskRCNN

RESULTS = "coco_instances_results.json"
PICTURE_SCORE = 0.5  # detections below it are not drawn


def run_evaluation(
    model: nn.Module,
    dataset: CocoDataset,
    config: Config,
    *,
    output: Path,
    pictures: int | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Detect in all images of a set, write the results as COCO JSON, judge them, draw some.

    Args:
        model: in eval mode, its classes those of `dataset`.
        config: its sections data, evaluate, model and runtime.precision are used.
        output: folder for coco_instances_results.json, and pictures/ with ground truth beside
            predictions; made if it is not there. What an earlier evaluation wrote is replaced.
        pictures: how many to draw; none: `evaluate.pictures`.
        device: of the model; none: that of its first parameter.
        progress: show a progress bar and COCO's tables.
    Returns:
        As `evaluate_coco`, or as `proposal_recall` of a model that is an RPN alone, whose proposals go to
        proposals.npz instead; and "candidates_cut" if class scores were cut before NMS.
    Raises:
        UserError: an image cannot be read; a file cannot be written.
    """
    if not config.model.box_head.enabled:
        assert isinstance(model, MaskRCNN)
        proposals = collect_proposals(model, dataset, config, device=device, progress=progress)
        make_folder(output)
        write_proposals(output / "proposals.npz", proposals)
        return proposal_recall(dataset.annotations, proposals, show=progress)
    chosen = choose_pictures(dataset, config.evaluate.pictures if pictures is None else pictures)
    threshold, offset = config.model.mask_head.threshold, config.data.keypoint_offset
    loader = evaluation_loader(dataset, config)
    sigmas = config.evaluate.oks_sigmas
    if dataset.num_keypoints is not None:
        choose_sigmas(dataset.num_keypoints, sigmas)  # a mistake in them is told at once
    results = []
    kept: dict[int, ImageDetections] = {}
    cut = 0
    with tqdm(
        total=len(dataset), unit="img", desc="evaluate", dynamic_ncols=True, disable=not progress
    ) as bar:
        for loaded in loader:
            detections = run_model(model, loaded.batch, config.runtime.precision, device)
            cut += int(detections.cut[: loaded.real].sum())
            found = split_detections(detections, loaded.to_original, loaded.original_sizes)
            ids = loaded.image_ids
            results += coco_results(found, ids, dataset.category_ids, threshold, offset)
            for image_id, one in zip(ids, found, strict=True):
                if image_id in chosen:
                    kept[image_id] = one
            bar.update(loaded.real)
    make_folder(output)
    write_json(output / RESULTS, results)
    values = evaluate_coco(
        dataset.annotations,
        results,
        judged(config),
        image_ids=[record.image_id for record in dataset.records],
        show=progress,
        oks_sigmas=sigmas,
    )
    if cut:
        values["candidates_cut"] = cut
        tqdm.write(
            f"{cut} class scores above model.box_head.score_threshold did not go into NMS; "
            f"raise model.box_head.candidates (now {config.model.box_head.candidates}) to keep them"
        )
    for image_id, one in kept.items():
        draw_picture(chosen[image_id], one, dataset, threshold, output / "pictures")
    return values


def judged(config: Config) -> tuple[str, ...]:
    """COCO's names of what a model finds."""
    masks = ("segm",) if config.model.mask_head.enabled else ()
    keypoints = ("keypoints",) if config.model.keypoint_head.enabled else ()
    return ("bbox", *masks, *keypoints)


def choose_pictures(dataset: CocoDataset, count: int) -> dict[int, ImageRecord]:
    """Images spread evenly over the set, by id."""
    count = min(count, len(dataset))
    records = [dataset.records[index * len(dataset) // count] for index in range(count)]
    return {record.image_id: record for record in records}


def draw_picture(
    record: ImageRecord, found: ImageDetections, dataset: CocoDataset, threshold: float, folder: Path
) -> None:
    """Write ground truth beside the better predictions as `folder/<image id>_<stem>.png`."""
    class_names = dataset.class_names
    skeleton = () if dataset.keypoints is None else dataset.keypoints.skeleton
    keep = found.scores >= PICTURE_SCORE
    boxes, classes = found.boxes[keep], found.classes[keep].tolist()
    masks = None
    if found.masks is not None:
        masks = paste_to_host(found.masks[keep], boxes, found.height, found.width, threshold)
    predicted = Instances(
        boxes.numpy(),
        masks,
        [class_names[k] for k in classes],
        found.scores[keep],
        classes,
        None if found.keypoints is None else found.keypoints[keep],
        skeleton,
    )
    truth = ground_truth(record, dataset)
    if len(class_names) == 1:  # then colours are better spent on telling the objects apart
        truth, predicted = truth._replace(classes=None), predicted._replace(classes=None)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{record.image_id}_{record.path.stem}.png") as stream:
        sheet = draw_comparison(read_image(record), truth, predicted)
        Image.fromarray(sheet).save(stream, format="PNG")


def ground_truth(record: ImageRecord, dataset: CocoDataset) -> Instances:
    """The objects of an image, crowd regions included, as they are drawn."""
    masks = np.zeros((len(record.objects), record.height, record.width), dtype=bool)
    for mask, item in zip(masks, record.objects, strict=True):
        bitmap, (x, y, w, h) = object_bitmap(item, record.height, record.width)
        mask[y : y + h, x : x + w] = bitmap
    classes = [item.class_index for item in record.objects]
    names = [
        dataset.class_names[item.class_index] + (" (crowd)" if item.crowd else "") for item in record.objects
    ]
    boxes = [item.box for item in record.objects]
    if dataset.keypoints is None:
        return Instances(boxes, masks, names, None, classes)
    points = np.zeros((len(boxes), len(dataset.keypoints.names), 3), np.float32)
    for row, item in zip(points, record.objects, strict=True):
        row[:] = 0 if item.keypoints is None else item.keypoints
    return Instances(boxes, masks, names, None, classes, points, dataset.keypoints.skeleton)
