"""Read a data set in COCO format, and check all that can be checked without decoding an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastmrcnn.data.annotation import annotated_area, annotation_fault, clip, corners, reason_to_skip
from fastmrcnn.data.coco_json import identifier, read_categories, read_images, read_json
from fastmrcnn.data.image_check import ImageOptions, look_at_images
from fastmrcnn.data.keypoints import (
    KeypointOptions,
    KeypointSchema,
    check_same_keypoints,
    keep_labelled,
    keypoint_fault,
    labelled_keypoints,
    pack_keypoints,
    read_schema,
)
from fastmrcnn.data.masks import pack_polygons
from fastmrcnn.data.pixel_range import AS_IT_IS, Reading
from fastmrcnn.data.records import ImageProposals, ImageRecord, ObjectRecord, Problems
from fastmrcnn.errors import UserError

__all__ = [
    "CocoDataset",
    "ImageRecord",
    "ObjectRecord",
    "align_classes",
    "check_same_classes",
    "read_coco",
]


@dataclass(frozen=True)
class CocoDataset:
    records: list[ImageRecord]
    """In the order of the file."""
    class_names: list[str]
    category_ids: list[int]
    """COCO id of each class index, ascending."""
    annotations: Path
    skipped: Counter[str] = field(default_factory=Counter)
    """Objects left out, by reason."""
    clipped: int = 0
    """Boxes that reached over the image."""
    keypoints: KeypointSchema | None = None
    """What the keypoints of the objects are; none: they were not read."""
    unlabelled: int = 0
    """Images left out for want of labelled keypoints."""
    masks: bool = True
    """Whether batches are to hold the objects' masks."""
    proposals: Mapping[int, ImageProposals] | None = None
    """By image id, for a model without an RPN."""
    proposal_slots: int = 0
    """P: most proposals of an image."""
    tree: dict[str, list[Any]] | None = field(default=None, repr=False, compare=False)
    """All that the file says, for an evaluation to judge by; none: it was not kept."""

    reading: Reading = AS_IT_IS
    """How the images become pixels."""
    image_lines: list[str] = field(default_factory=list)
    """What there is to tell of the image files."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_keypoints(self) -> int | None:
        return None if self.keypoints is None else len(self.keypoints.names)

    def summary(self) -> list[str]:
        """A line on what there is and what was left out, and some on the image files if need be."""
        objects = sum(not item.crowd for record in self.records for item in record.objects)
        crowds = sum(item.crowd for record in self.records for item in record.objects)
        negatives = sum(not record.objects for record in self.records)
        counts = [
            _count(len(self.records), "image"),
            _count(objects, "object"),
            _count(len(self.class_names), "class", "classes"),
        ]
        if crowds:
            counts.append(_count(crowds, "crowd region"))
        if self.keypoints is not None:
            labelled = sum(o.keypoints is not None for record in self.records for o in record.objects)
            counts.append(f"{len(self.keypoints.names)} keypoints, labelled on {_count(labelled, 'object')}")
        parts = [", ".join(counts)]
        changes = [f"skipped {_count(n, 'box', 'boxes')} {reason}" for reason, n in self.skipped.items()]
        if self.clipped:
            changes.append(f"clipped {_count(self.clipped, 'box', 'boxes')} to the image")
        if self.unlabelled:
            changes.append(f"left out {_count(self.unlabelled, 'image')} with too few labelled keypoints")
        if changes:
            parts.append(", ".join(changes))
        if self.clipped >= 10 and 3 * self.clipped > objects:
            parts.append("is bbox [x1, y1, x2, y2] there? COCO's is [x, y, width, height]")
        if negatives:
            use = "image without objects is used as a negative"
            many = "images without objects are used as negatives"
            parts.append(_count(negatives, use, many))
        return [f"{self.annotations.name}: {line}" for line in ("; ".join(parts), *self.image_lines)]


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
    image_options: ImageOptions | None = None,
    key: str = "data.train",
) -> CocoDataset:
    """Read and check a data set.

    Args:
        images: folder to which each `file_name` is relative.
        annotations: COCO-format JSON file.
        max_objects: most objects, crowd regions included, that an image may have.
        min_box_side: boxes with a smaller side, in annotation pixels after clipping, are skipped.
        require_objects: refuse a set without any object.
        require_masks: refuse objects without a segmentation; else batches hold no masks.
        keypoints: read keypoints, and how; none: what the file says of them is not looked at.
        keep_tree: keep the parsed file beside the records, for a set that is to be evaluated on. Training
            has no use for it, and in a large set it is millions of lists and numbers.
        image_options: how the image files are found and read; none: as `ImageOptions` has it.
        key: configuration section that gave the paths, for messages.
    Raises:
        UserError: one line with all mistakes, each naming the file, the id and the remedy.
    """
    folder, file = Path(images), Path(annotations)
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {found}; set {key}.images to the folder of images")
    tree = read_json(file, key)
    problems = Problems()
    class_names, category_ids = read_categories(tree["categories"], problems)
    schema = None
    if keypoints is not None:
        schema = read_schema(tree["categories"], keypoints.flip_pairs, file, problems)
    records = read_images(tree["images"], folder, file, problems)
    skipped: Counter[str] = Counter()
    clipped = 0
    index_of = {category: index for index, category in enumerate(category_ids)}
    seen: set[int] = set()
    entries = tree["annotations"]
    for position, entry in enumerate(entries):
        if not keep_tree:
            entries[position] = None  # lets go of millions of numbers as they are packed
        annotation_id = identifier(entry, "annotation", position, seen, problems)
        if annotation_id is None:
            continue
        fault = annotation_fault(entry, records, index_of, require_masks)
        if not fault and schema is not None:
            fault = keypoint_fault(entry, schema)
        if fault:
            problems.add("annotation", annotation_id, fault)
            continue
        record, class_index = records[entry["image_id"]], index_of[entry["category_id"]]
        box, crowd = corners(entry["bbox"]), entry.get("iscrowd", 0) == 1
        shape = entry.get("segmentation") or None
        inside = clip(box, record.width, record.height)
        area = annotated_area(entry.get("area"), shape, inside, record)
        reason = reason_to_skip(box, inside, area, shape, record, min_box_side, crowd)
        if reason:
            skipped[reason] += 1
            continue
        clipped += max(abs(a - b) for a, b in zip(box, inside, strict=True)) > 0.01
        points = None
        if keypoints is not None and not crowd:
            points = pack_keypoints(entry, keypoints.offset)
        record.objects.append(
            ObjectRecord(annotation_id, class_index, inside, crowd, pack_polygons(shape), area, points)
        )
    for record in records.values():
        if len(record.objects) > max_objects:
            problems.add(
                "image",
                record.image_id,
                f"{record.file_name} has {len(record.objects)} objects, more than data.max_objects = "
                f"{max_objects}; set data.max_objects={len(record.objects)} or cut the image into tiles",
            )
    problems.check(file)
    seen_images = look_at_images(list(records.values()), folder, file, key, image_options or ImageOptions())
    kept = keep_labelled(seen_images.records, keypoints)
    unlabelled = len(seen_images.records) - len(kept)
    dataset = CocoDataset(
        kept,
        class_names,
        category_ids,
        file,
        skipped,
        clipped,
        keypoints=schema,
        unlabelled=unlabelled,
        masks=require_masks,
        tree=tree if keep_tree else None,
        reading=seen_images.reading,
        image_lines=seen_images.lines,
    )
    if require_objects and not any(not o.crowd for record in dataset.records for o in record.objects):
        why = f" ({dataset.summary()[0].split('; ', 1)[-1]})" if skipped or unlabelled else ""
        raise UserError(
            f"{file}: no image has an object to learn{why}; give {key}.annotations a file with objects"
        )
    if require_objects and schema is not None and not any(map(labelled_keypoints, kept)):
        raise UserError(
            f"{file}: no keypoint is labelled (visibility 1 or 2); give {key}.annotations a file with "
            "keypoints, or train without (model.keypoint_head.enabled=false)"
        )
    return dataset


def check_same_classes(train: CocoDataset, val: CocoDataset) -> CocoDataset:
    """The validation set, its class indices those of the training set. It may lack some classes.

    Raises:
        UserError: it has a category that the training set does not have, or has under another name; or
            other keypoints.
    """
    check_same_keypoints(val.keypoints, train.keypoints, val.annotations, str(train.annotations))
    return align_classes(val, train.class_names, train.category_ids, str(train.annotations))


def align_classes(
    dataset: CocoDataset, class_names: Sequence[str], category_ids: Sequence[int], source: str
) -> CocoDataset:
    """The data set with the class indices of `source`, a training set or a checkpoint.

    Raises:
        UserError: it has a category that `source` does not have, or has under another name.
    """
    known = dict(zip(category_ids, class_names, strict=True))
    ids_by_name = {name: category for category, name in known.items()}
    faults = []
    for category, name in zip(dataset.category_ids, dataset.class_names, strict=True):
        if known.get(category) == name:
            continue
        if category in known:
            faults.append(f"category {category} is '{name}' here, but '{known[category]}' there")
        elif name in ids_by_name:
            faults.append(f"category '{name}' has id {category} here, but {ids_by_name[name]} there")
        else:
            faults.append(f"category {category} '{name}' is not there")
    if faults:
        raise UserError(
            f"{dataset.annotations}: its categories do not match {source}: {'; '.join(faults)}; "
            "give both files the same ids and names"
        )
    if dataset.category_ids == list(category_ids):
        return dataset
    index_of = {category: index for index, category in enumerate(category_ids)}
    moved = [index_of[category] for category in dataset.category_ids]
    records = [
        replace(r, objects=[replace(o, class_index=moved[o.class_index]) for o in r.objects])
        for r in dataset.records
    ]
    return replace(dataset, records=records, class_names=list(class_names), category_ids=list(category_ids))


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
