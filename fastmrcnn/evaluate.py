"""python -m fastmrcnn.evaluate: COCO's numbers, and pictures, of a checkpoint on a data set."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.config.checks import proposals_problem
from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import evaluation_loader, read_split
from fastmrcnn.data.coco import CocoDataset, ImageRecord, align_classes, object_bitmap
from fastmrcnn.data.images import read_image
from fastmrcnn.data.keypoints import check_same_keypoints, choose_sigmas
from fastmrcnn.data.proposals import write_proposals
from fastmrcnn.detection.draw import Instances, draw_comparison
from fastmrcnn.detection.objects import ImageDetections, coco_results, split_detections
from fastmrcnn.detection.paste import paste_to_host
from fastmrcnn.detection.run import run_model
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import make_folder, new_run_folder, replacing, write_json
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.proposal_eval import collect_proposals, proposal_recall
from fastmrcnn.weights.card import card_of
from fastmrcnn.weights.checkpoint import find_checkpoint
from fastmrcnn.weights.detectors import load_overridden, load_recipe
from fastmrcnn.weights.files import is_url

RESULTS = "coco_instances_results.json"
PICTURE_SCORE = 0.5  # detections below it are not drawn


def main(argv: list[str]) -> None:
    parser = Parser("evaluate", "COCO's average precision of a checkpoint: boxes, masks, keypoints.")
    parser.add_argument(
        "--checkpoint",
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument(
        "--config", help="instead: recipe whose model.weights are to be judged; see configs/zoo/"
    )
    parser.add_argument("--output", help="new folder (default: evaluation_001, ... beside the checkpoints)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the checkpoint's configuration, such as data.val.images=DIR data.val.annotations=FILE",
    )
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.checkpoint is None) == (arguments.config is None):
        raise UserError("give either --checkpoint or --config (a recipe with model.weights)")
    if arguments.config is None:
        model, config = load_overridden(arguments.checkpoint, arguments.device, arguments.overrides)
    else:
        model, config = load_recipe(arguments.config, arguments.device, arguments.overrides)
    dataset = read_validation_set(config, model, arguments.checkpoint or arguments.config)
    print(*dataset.summary(), sep="\n")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    folder = evaluation_folder(arguments.checkpoint, arguments.output, config.output)
    try:
        values = run_evaluation(model, dataset, config, output=folder)
        write_json(folder / "metrics.json", {k: v if math.isfinite(v) else None for k, v in values.items()})
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing has been written
        raise
    print(f"\nResults, metrics and pictures are in {folder}")


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
        config: its sections data, evaluate, model and train.precision are used.
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
            detections = run_model(model, loaded.batch, config.train.precision, device)
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


def read_validation_set(config: Config, model: nn.Module, checkpoint: str) -> CocoDataset:
    """The set that data.val names, its class indices those of the model."""
    split, card = config.data.val, card_of(model)
    if split.images is None or split.annotations is None:
        raise UserError(
            "no validation set: give data.val.images=DIR and data.val.annotations=FILE on the command line"
        )
    if problem := proposals_problem(config, "val"):
        raise UserError(problem)
    dataset = read_split(config, "val")
    check_same_keypoints(dataset.keypoints, card.keypoints, dataset.annotations, checkpoint)
    return align_classes(dataset, card.class_names, card.category_ids, checkpoint)


def evaluation_folder(checkpoint: str | None, output: str | None, root: str = "runs") -> Path:
    """The folder that was asked for, or a new one beside the checkpoints; never one with results.

    Args:
        root: where the new one comes if the weights are no file here.
    """
    if output is None:
        if checkpoint is None or is_url(checkpoint):
            return new_run_folder(root, "evaluation")
        parent = find_checkpoint(checkpoint).parent
        return new_run_folder(parent.parent if parent.name == "checkpoints" else parent, "evaluation")
    folder = Path(output)
    if (folder / RESULTS).exists():
        raise UserError(f"{folder}: holds the results of an earlier evaluation; choose another --output")
    make_folder(folder)
    return folder


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


if __name__ == "__main__":
    run_main(main)
