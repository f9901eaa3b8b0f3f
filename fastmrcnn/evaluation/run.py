"""Detect in all images of a set, judge what was found, and draw some of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from torch import nn
from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import read_objects
from fastmrcnn.data.images import read_image
from fastmrcnn.data.keypoints import choose_sigmas
from fastmrcnn.data.masks import whole_bitmaps
from fastmrcnn.data.pixel_range import clipped_line
from fastmrcnn.data.proposals import write_proposals
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.data.worker import LoadedBatch
from fastmrcnn.detection.draw import draw_comparison, save_picture
from fastmrcnn.detection.fetch import Fetched
from fastmrcnn.detection.objects import Objects, coco_results, encoded, pasted
from fastmrcnn.detection.pipeline import cores, in_turn
from fastmrcnn.evaluation.coco import MAX_DETS, evaluate_coco, ground_truth
from fastmrcnn.evaluation.detections import detect, of_all
from fastmrcnn.evaluation.proposals import collect_proposals, proposal_recall
from fastmrcnn.files import make_folder, write_json
from fastmrcnn.group import ALONE, Group
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
    progress: bool = True,
    group: Group = ALONE,
) -> dict[str, float]:
    """Detect in all images of a set, write the results as COCO JSON, judge them, draw some.

    Several processes share out the images. The first one gets what the others found, and judges and writes
    what it would alone.

    Args:
        model: in eval mode, its classes those of `dataset`; the same on all processes.
        config: its sections data, evaluate, model and runtime are used.
        output: folder for coco_instances_results.json, and pictures/ with ground truth beside
            predictions; made if it is not there. What an earlier evaluation wrote is replaced.
        pictures: how many to draw; None: `evaluate.pictures`.
        progress: show a progress bar and COCO's tables.
        group: the processes, all of which call this and get its result.
    Returns:
        As `judge_results`, or as `proposal_recall` of a model that is an RPN alone, whose proposals go to
        proposals.npz instead; and "candidates_cut" if class scores were cut before NMS.
    Raises:
        UserError: an image cannot be read; a file cannot be written.
    """
    if not config.model.box_head.enabled:
        assert isinstance(model, MaskRCNN)
        proposals = collect_proposals(model, dataset, config, progress=progress, group=group)

        def recall() -> dict[str, float]:
            make_folder(output)
            write_proposals(output / "proposals.npz", proposals)
            return proposal_recall(dataset, proposals, show=progress)

        return group.lead(recall)
    chosen = choose_pictures(dataset, config.evaluate.pictures if pictures is None else pictures)
    sigmas = config.evaluate.oks_sigmas
    if dataset.num_keypoints is not None:
        choose_sigmas(dataset.num_keypoints, sigmas)  # a mistake in them is told at once
    own = group.each(partial(_detected, model, dataset, config, chosen, progress, group))
    batches = of_all(own, group)
    return group.lead(partial(_judged, batches, dataset, config, output, chosen, progress))


class FoundInBatch(NamedTuple):
    """What came of a batch."""

    entries: list[dict[str, Any]]  # COCO's
    kept: dict[int, Objects]  # of the images that are drawn, by id
    clipped: dict[int, str]
    cut: int


def _detected(
    model: nn.Module,
    dataset: CocoDataset,
    config: Config,
    chosen: Mapping[int, ImageRecord],
    progress: bool,
    group: Group,
) -> list[FoundInBatch]:
    """In this process's images. The bar is the first one's, and counts for all."""
    threshold, offset = config.model.mask_head.threshold, config.data.keypoint_offset

    def finish(begun: tuple[LoadedBatch, Fetched]) -> tuple[int, FoundInBatch]:
        """On the host, while the model is at work on the next batch."""
        loaded, fetched = begun
        found = encoded(fetched.objects(), threshold)
        entries = coco_results(found, loaded.image_ids, dataset.category_ids, threshold, offset)
        kept = {k: one for k, one in zip(loaded.image_ids, found, strict=True) if k in chosen}
        return loaded.real, FoundInBatch(entries, kept, loaded.clipped, int(fetched.cut.sum()))

    batches = []
    silent = not progress or not group.leads
    bar = tqdm(total=len(dataset), unit="img", desc="evaluate", dynamic_ncols=True, disable=silent)
    detections = detect(model, dataset, config, group=group)
    with bar, contextlib.closing(in_turn(detections, finish, threads=1)) as finished:
        for real, found in finished:
            batches.append(found)
            bar.update(min(real * group.size, len(dataset) - bar.n))
    return batches


def _judged(
    batches: Sequence[FoundInBatch],
    dataset: CocoDataset,
    config: Config,
    output: Path,
    chosen: Mapping[int, ImageRecord],
    progress: bool,
) -> dict[str, float]:
    """Write, judge and draw what was found in all batches."""
    threshold = config.model.mask_head.threshold
    results = [entry for batch in batches for entry in batch.entries]
    kept = {image_id: one for batch in batches for image_id, one in batch.kept.items()}
    clipped = {image_id: note for batch in batches for image_id, note in batch.clipped.items()}
    cut = sum(batch.cut for batch in batches)
    make_folder(output)
    write_json(output / RESULTS, results)
    values = judge_results(dataset, results, config, show=progress)
    if clipped:
        tqdm.write(clipped_line(clipped.values()))
    if cut:
        values["candidates_cut"] = cut
        tqdm.write(
            f"{cut} class scores above model.box_head.score_threshold did not go into NMS; "
            f"raise model.box_head.candidates (now {config.model.box_head.candidates}) to keep them"
        )
    folder = output / "pictures"

    def draw(image_id: int) -> None:
        draw_picture(chosen[image_id], kept[image_id], dataset, threshold, folder)

    for _ in in_turn(kept, draw, threads=min(4, cores())):
        pass
    return values


def judge_results(
    dataset: CocoDataset, results: list[dict[str, Any]], config: Config, *, show: bool
) -> dict[str, float]:
    """COCO's numbers; and, where an image has more objects of a class than they count, numbers that count
    as many, under keys such as "segm@300/AP". A line says so, and where the model's own limit is lower."""
    truth = ground_truth(dataset, keypoints=config.model.keypoint_head.enabled)
    chosen = {record.image_id for record in dataset.records}
    of_class, in_image = most_objects(truth, chosen)
    detections, given = config.model.box_head.detections, config.evaluate.max_dets

    def judge(kinds: Sequence[str], max_dets: int | None) -> dict[str, float]:
        return evaluate_coco(
            truth,
            results,
            kinds,
            max_dets=max_dets,
            image_ids=sorted(chosen),
            show=show,
            oks_sigmas=config.evaluate.oks_sigmas,
            engine=config.evaluate.engine,
        )

    values = judge(judged(config), given)
    if in_image > detections:
        tqdm.write(
            f"an image has {in_image} objects, but the model gives {detections} detections; raise "
            f"model.box_head.detections to find them all"
        )
    enough = min(of_class, detections)
    for kind in judged(config):
        counted = given or MAX_DETS[kind]
        if of_class <= counted:
            continue
        line = f"{kind}/AP counts the best {counted} of a class in an image, which has up to {of_class}"
        if given is None and enough > counted:
            more = judge([kind], enough)
            values |= {name.replace("/", f"@{enough}/", 1): value for name, value in more.items()}
            line += f" objects; {kind}@{enough}/AP counts {enough}"
        else:
            line += " objects; set evaluate.max_dets and model.box_head.detections to count more"
        tqdm.write(line)
    return values


def most_objects(truth: COCO, image_ids: Collection[int]) -> tuple[int, int]:
    """Most objects of one class, and of all, that an image has; crowd regions do not count."""
    entries = [e for e in truth.dataset["annotations"] if e["image_id"] in image_ids and not e["iscrowd"]]
    of_class = max(Counter((e["image_id"], e["category_id"]) for e in entries).values(), default=0)
    return of_class, max(Counter(e["image_id"] for e in entries).values(), default=0)


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
    record: ImageRecord, found: Objects, dataset: CocoDataset, threshold: float, folder: Path
) -> None:
    """Write ground truth beside the better predictions as `folder/<image id>_<stem>.png`."""
    assert found.scores is not None, "what was found has them"
    better = pasted(found.first(int((found.scores >= PICTURE_SCORE).sum())), threshold)
    skeleton = () if dataset.keypoints is None else dataset.keypoints.skeleton
    truth = annotated_objects(record, dataset)
    sheet = draw_comparison(read_image(record)[0], truth, better, dataset.class_names, skeleton)
    folder.mkdir(parents=True, exist_ok=True)
    save_picture(folder / f"{record.image_id}_{record.path.stem}.png", sheet)


def annotated_objects(record: ImageRecord, dataset: CocoDataset) -> Objects:
    """The objects of an image, crowd regions included, as they are drawn."""
    known = read_objects(record, dataset.keypoints, masks=False)
    shapes = [item.segmentation for item in record.objects]
    return Objects(
        record.height,
        record.width,
        known.boxes,
        known.classes,
        masks=whole_bitmaps(shapes, record.height, record.width),
        keypoints=known.keypoints,
        crowd=known.crowd,
    )
