"""Read a data set in COCO format, and check all that can be checked without decoding an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmrcnn.data.annotation_cache import AnnotationCache, ContentOptions, read_kept
from fastmrcnn.data.contents import BoxSource
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.image_check import ImageOptions, look_at_images
from fastmrcnn.data.keypoints import (
    KeypointOptions,
    KeypointSchema,
    keep_labelled,
)
from fastmrcnn.data.pixel_range import AS_IT_IS, Reading
from fastmrcnn.data.records import Finding, ImageProposals, ImageRecord, ObjectRecord, Problems, count_of
from fastmrcnn.errors import UserError

__all__ = [
    "CocoDataset",
    "ImageRecord",
    "ObjectRecord",
    "read_coco",
]


@dataclass(frozen=True)
class CocoDataset:
    records: Sequence[ImageRecord]
    """In the order of the file. From `read_coco` they are `FlatRecords`."""
    class_names: list[str]
    category_ids: list[int]
    """COCO id of each class index: ascending, unless the classes were put into another file's order."""
    annotations: Path
    skipped: Counter[str] = field(default_factory=Counter)
    """Objects left out, by reason."""
    clipped: int = 0
    """Boxes that reached over the image."""
    findings: list[Finding] = field(default_factory=list)
    """What was left out, and what else its user should know."""
    keypoints: KeypointSchema | None = None
    """What the keypoints of the objects are; None: they were not read."""
    unlabelled: int = 0
    """Images left out for want of labelled keypoints."""
    masks: bool = True
    """Whether batches are to hold the objects' masks."""
    proposals: Mapping[int, ImageProposals] | None = None
    """By image id, for a model without an RPN."""
    proposal_slots: int = 0
    """P: most proposals of an image."""
    tree: dict[str, list[Any]] | None = field(default=None, repr=False, compare=False)
    """All that the file says, for an evaluation to judge by; None: it was not kept."""

    reading: Reading = AS_IT_IS
    """How the images become pixels."""
    image_lines: list[str] = field(default_factory=list)
    """What there is to tell of the image files."""
    not_kept: str | None = None
    """Why what was read could not be kept for the next start, if so."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_keypoints(self) -> int | None:
        return None if self.keypoints is None else len(self.keypoints.names)

    def left_unlabelled(self) -> str:
        return f"left out {count_of(self.unlabelled, 'image')} with too few labelled keypoints"

    def summary(self) -> list[str]:
        """What there is and what was left out, in one line; then one for each finding."""
        records = flat_records(self.records)
        crowds = int(records.objects["crowd"].sum())
        objects = len(records.objects) - crowds
        negatives = int((records.object_counts == 0).sum())
        counts = [
            count_of(len(self.records), "image"),
            count_of(objects, "object"),
            count_of(len(self.class_names), "class", "classes"),
        ]
        if crowds:
            counts.append(count_of(crowds, "crowd region"))
        if self.keypoints is not None:
            labelled = int((records.objects["keypoints"] >= 0).sum())
            counts.append(
                f"{len(self.keypoints.names)} keypoints, labelled on {count_of(labelled, 'object')}"
            )
        parts = [", ".join(counts)]
        changes = [f"skipped {count_of(n, 'box', 'boxes')} {reason}" for reason, n in self.skipped.items()]
        if self.clipped:
            changes.append(f"clipped {count_of(self.clipped, 'box', 'boxes')} to the image")
        if self.unlabelled:
            changes.append(self.left_unlabelled())
        if changes:
            parts.append(", ".join(changes))
        if self.clipped >= 10 and 3 * self.clipped > objects:
            parts.append("is bbox [x1, y1, x2, y2] there? COCO's is [x, y, width, height]")
        if negatives:
            use = "image without objects is used as a negative"
            many = "images without objects are used as negatives"
            parts.append(count_of(negatives, use, many))
        lines = ["; ".join(parts), *(finding.line() for finding in self.findings), *self.image_lines]
        if self.not_kept is not None:
            lines.append(self.not_kept)
        return [f"{self.annotations.name}: {line}" for line in lines]


def read_coco(
    images: str | Path,
    annotations: str | Path,
    *,
    max_objects: int = 512,
    min_box_side: float = 1.0,
    require_objects: bool = True,
    require_masks: bool = True,
    keypoints: KeypointOptions | None = None,
    keep_tree: bool = False,
    boxes: BoxSource = "file",
    keep_group_classes: bool = False,
    image_options: ImageOptions | None = None,
    key: str = "data.train",
    cache: AnnotationCache | None = None,
) -> CocoDataset:
    """Read and check a data set.

    Args:
        images: folder to which each `file_name` is relative.
        annotations: COCO-format JSON file.
        max_objects: most objects, crowd regions included, that an image may have.
        min_box_side: boxes with a smaller side, in annotation pixels after clipping, are skipped.
        require_objects: refuse a set without any object.
        require_masks: refuse objects without a segmentation; else batches hold no masks.
        keypoints: read keypoints, and how; None: what the file says of them is not looked at.
        keep_tree: keep the parsed file beside the records, for a set that is to be evaluated on. Training
            has no use for it, and in a large set it is millions of lists and numbers.
        boxes: where they come from: the file's bbox, or the masks, where there are some.
        keep_group_classes: keep categories that only group others and have no object.
        image_options: how the image files are found and read; None: as `ImageOptions` has it.
        key: configuration section that gave the paths, for messages.
        cache: where what was read of a large file is kept for the next start; None: nowhere. With
            `keep_tree` it is not used.
    Raises:
        UserError: one line with all mistakes, each naming the file, the id and the remedy.
    """
    folder, file = Path(images), Path(annotations)
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {found}; set {key}.images to the folder of images")
    problems = Problems()
    options = ContentOptions(boxes, min_box_side, require_masks, keypoints, keep_tree, keep_group_classes)
    contents, not_kept = read_kept(file, folder, key, problems, options, cache)
    records, schema = contents.records, contents.schema
    for index in np.flatnonzero(records.object_counts > max_objects).tolist():
        record = records[index]
        problems.add(
            "image",
            record.image_id,
            f"{record.file_name} has {len(record.objects)} objects, more than data.max_objects = "
            f"{max_objects}; set data.max_objects={len(record.objects)} or cut the image into tiles",
        )
    problems.check(file)
    seen_images = look_at_images(records, folder, file, key, image_options or ImageOptions())
    kept = keep_labelled(seen_images.records, keypoints)
    unlabelled = len(seen_images.records) - len(kept)
    dataset = CocoDataset(
        kept,
        contents.class_names,
        contents.category_ids,
        file,
        contents.skipped,
        contents.clipped,
        problems.told(),
        keypoints=schema,
        unlabelled=unlabelled,
        masks=require_masks,
        tree=contents.tree if keep_tree else None,
        reading=seen_images.reading,
        image_lines=seen_images.lines,
        not_kept=not_kept,
    )
    if require_objects and kept.objects["crowd"].all():
        told = [f.line() for f in dataset.findings if f.severity == "left out" or not f.thing]
        if unlabelled:
            told.append(dataset.left_unlabelled())
        why = f" ({'; '.join(told)})" if told else ""
        raise UserError(
            f"{file}: no image has an object to learn{why}; give {key}.annotations a file with objects"
        )
    if require_objects and schema is not None and (kept.objects["keypoints"] < 0).all():
        raise UserError(
            f"{file}: no keypoint is labelled (visibility 1 or 2); give {key}.annotations a file with "
            "keypoints, or train without (model.keypoint_head.enabled=false)"
        )
    return dataset
