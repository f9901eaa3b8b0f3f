"""Proposals of a data set, and their recall, whatever the class: what an RPN is judged by."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocotools.coco import COCO
from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.pixel_range import clipped_line
from fastmrcnn.data.records import ImageProposals
from fastmrcnn.data.worker import LoadedBatch
from fastmrcnn.detection.fetch import Fetched
from fastmrcnn.detection.objects import Objects, coco_boxes
from fastmrcnn.detection.pipeline import in_turn
from fastmrcnn.evaluation.coco import ground_truth, mean_known
from fastmrcnn.evaluation.detections import detect, of_all
from fastmrcnn.evaluation.engines import new_judge
from fastmrcnn.group import ALONE, Group
from fastmrcnn.model.mask_rcnn import MaskRCNN, as_detections
from fastmrcnn.structures import Batch, Detections

LIMITS = (100, 300, 1000)


def collect_proposals(
    model: MaskRCNN,
    dataset: CocoDataset,
    config: Config,
    *,
    progress: bool = True,
    group: Group = ALONE,
) -> dict[int, ImageProposals]:
    """Proposals of every image, in its own pixels, by image id.

    Args:
        model: in eval mode, with an RPN.
        config: its sections data, evaluate and runtime are used.
        group: the processes that share out the images; the first one gets the proposals of all, the others
            none.
    """

    def propose(batch: Batch) -> Detections:
        return as_detections(model.propose(model.features(batch), batch))

    def finish(begun: tuple[LoadedBatch, Fetched]) -> tuple[LoadedBatch, list[Objects]]:
        loaded, fetched = begun
        return loaded, fetched.objects()

    def own() -> list[tuple[dict[int, ImageProposals], dict[int, str]]]:
        """By batch: proposals, and notes on values that were clipped."""
        batches = []
        silent = not progress or not group.leads
        bar = tqdm(total=len(dataset), unit="img", desc="propose", disable=silent)
        detections = detect(model, dataset, config, propose, group)
        with bar, contextlib.closing(in_turn(detections, finish, 1)) as finished:
            for loaded, each in finished:
                found = {}
                for image_id, one in zip(loaded.image_ids, each, strict=True):
                    assert one.scores is not None, "what was found has them"
                    found[image_id] = ImageProposals(one.boxes, one.scores)
                batches.append((found, loaded.clipped))
                bar.update(min(loaded.real * group.size, len(dataset) - bar.n))
        return batches

    batches = of_all(group.each(own), group)
    clipped = {image_id: note for _, notes in batches for image_id, note in notes.items()}
    if clipped:
        tqdm.write(clipped_line(clipped.values()))
    return {image_id: one for found, _ in batches for image_id, one in found.items()}


def proposal_recall(
    annotations: str | Path | CocoDataset | COCO,
    proposals: Mapping[int, ImageProposals],
    limits: Sequence[int] = LIMITS,
    show: bool = True,
) -> dict[str, float]:
    """Average recall over IoU 0.50:0.95 of the best proposals of each image, by pycocotools.

    Args:
        annotations: what `ground_truth` takes.
        proposals: by image id, for the images that are judged.
        limits: numbers of proposals, ascending.
        show: print it.
    Returns:
        "box_proposals/AR@100", ... in 0..100; NaN where there is no object to find.
    """
    truth = ground_truth(annotations)
    category = truth.getCatIds()[0]  # any that there is; pycocotools drops those it does not know
    entries = []
    for image_id, one in proposals.items():
        for box, score in zip(coco_boxes(one.boxes), one.scores.tolist(), strict=True):
            entries.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    judge = new_judge(truth, entries, "bbox")
    judge.params.useCats = 0
    judge.params.maxDets = list(limits)
    judge.params.imgIds = sorted(proposals)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        judge.accumulate()
    recall = judge.eval["recall"][:, 0, 0]  # of IoU threshold, class, area range (0 is all), limit
    values = {f"box_proposals/AR@{limit}": mean_known(recall[:, k]) for k, limit in enumerate(limits)}
    if show:
        print("Proposals: " + ", ".join(f"{name[14:]} {value:.1f}" for name, value in values.items()))
    return values
