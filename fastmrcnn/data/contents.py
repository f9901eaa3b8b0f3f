"""What a COCO file holds, checked: for training and for evaluation alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fastmrcnn.data.annotation import (
    annotation_fault,
    box_area,
    corners,
    count_keypoints,
    is_empty,
    number_anew,
    spell_out,
    tidy,
)
from fastmrcnn.data.checks import (
    Table,
    boxes_beside_masks,
    classes_without_objects,
    covers_no_pixel,
    crowd_regions,
    keypoints_beside_objects,
    repeated_objects,
    sensible_areas,
    unusable_boxes,
)
from fastmrcnn.data.coco_json import (
    drop_groups,
    no_garbage_collection,
    read_categories,
    read_images,
    read_json,
)
from fastmrcnn.data.extents import clip_boxes, mask_extents
from fastmrcnn.data.flat import ObjectColumns, flatten
from fastmrcnn.data.flat_records import FlatRecords
from fastmrcnn.data.keypoints import (
    KeypointOptions,
    KeypointSchema,
    keypoint_fault,
    pack_keypoints,
    read_schema,
)
from fastmrcnn.data.masks import pack_polygons
from fastmrcnn.data.plain import CHUNK, pack_plain
from fastmrcnn.data.records import ImageRecord, Problems

BoxSource = Literal["file", "masks"]

NO_MASK = "no segmentation; add one, or train without masks (model.mask_head.enabled=false)"


class Contents(NamedTuple):
    tree: dict[str, list[Any]]
    """The file, its numbers as COCO has them, without what cannot be found. Without annotations, unless they
    were to be kept."""
    records: FlatRecords
    """In the order of the file."""
    class_names: list[str]
    category_ids: list[int]
    schema: KeypointSchema | None
    skipped: Counter[str]
    """Objects whose box is left out, by reason."""
    clipped: int
    """Boxes that reached over the image."""
    names_from_addresses: bool = False
    """Whether there are images whose name is that of their coco_url, which depends on the folder."""


class Entry(NamedTuple):
    """A valid annotation, on its way to the arrays."""

    label: Any
    source: dict[str, Any] | None
    """Its place in the tree, if that is kept."""
    annotation_id: int
    record: ImageRecord
    class_index: int
    box: tuple[float, ...]
    crowd: bool
    shape: Any
    area: Any
    points: Any


@no_garbage_collection()
def read_contents(
    file: Path,
    folder: Path,
    key: str,
    problems: Problems,
    *,
    boxes: BoxSource = "file",
    min_box_side: float = 0.0,
    require_masks: bool = False,
    keypoints: KeypointOptions | None = None,
    keep_tree: bool = False,
    keep_group_classes: bool = False,
) -> Contents:
    """Read a COCO file and check all that can be checked without its images.

    Args:
        folder: to which each `file_name` is relative.
        key: configuration section that gave the paths, for messages.
        problems: takes what is found. Errors in it are still to be raised.
        boxes, min_box_side, require_masks, keypoints, keep_tree, keep_group_classes: as in `read_coco`.
    Raises:
        UserError: the file cannot be read, or is not COCO format.
    """
    tree = read_json(file, key, problems)
    if not keep_group_classes:
        drop_groups(tree, problems)
    names, ids = read_categories(tree["categories"], problems)
    schema = None
    if keypoints is not None:
        schema = read_schema(tree["categories"], keypoints.flip_pairs, file, problems)
    records, from_addresses = read_images(tree["images"], folder, file, problems)
    index_of = {category: index for index, category in enumerate(ids)}
    entries, ignored = _valid_entries(
        tree["annotations"], records, index_of, problems, boxes, require_masks, keypoints, schema, keep_tree
    )
    offset = 0.0 if keypoints is None else keypoints.offset
    skipped, clipped, kept, columns = _place(entries, records, problems, min_box_side, offset)
    tree["annotations"] = kept + ignored
    classes_without_objects(names, sorted(set(columns.classes)), problems)
    entries.clear()
    arrays = flatten(
        list(records),
        [(record.height, record.width) for record in records.values()],
        (record.file_name for record in records.values()),
        columns,
    )
    found = FlatRecords(arrays, folder, file)
    return Contents(tree, found, names, ids, schema, skipped, clipped, from_addresses)


def _valid_entries(
    annotations: list[Any],
    records: dict[int, ImageRecord],
    index_of: dict[int, int],
    problems: Problems,
    boxes: BoxSource,
    require_masks: bool,
    keypoints: KeypointOptions | None,
    schema: KeypointSchema | None,
    keep_tree: bool,
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """The annotations that are sound one by one; the list itself is emptied as they are packed, which lets go
    of millions of numbers. And, with `keep_tree`, what an evaluation is to ignore: objects without the mask
    that they would be judged by."""

    labels = number_anew(annotations, problems)
    found: list[Entry] = []
    bare: list[Any] = []
    ignored: list[dict[str, Any]] = []
    empty: list[Any] = []
    masks = 0
    for label, entry, packed in _sound(
        annotations, labels, records, index_of, problems, boxes == "file", schema
    ):
        if is_empty(entry):
            empty.append(label)
            continue
        crowd = entry.get("iscrowd", 0) == 1
        masks += packed is not None
        if keypoints is not None:
            count_keypoints(entry, label, problems)
        if require_masks and packed is None and not crowd:
            bare.append(label)
            if keep_tree:
                ignored.append(entry | {"iscrowd": 1, "area": box_area(entry["bbox"])})
            continue
        points = None if keypoints is None or crowd else pack_keypoints(entry, keypoints.offset)
        box = (np.nan,) * 4 if boxes == "masks" and packed else corners(entry["bbox"])
        found.append(
            Entry(
                label,
                entry if keep_tree else None,
                entry["id"],
                records[entry["image_id"]],
                index_of[entry["category_id"]],
                box,
                crowd,
                packed,
                entry.get("area"),
                points,
            )
        )
    if empty:
        problems.say(
            "left out", "object", "with neither box nor mask", "their images count as they are", empty
        )
    if bare:
        if len(bare) >= masks:
            for label in bare:
                problems.add("annotation", label, NO_MASK)
        remedy = "it counts as background; add masks, or train without (model.mask_head.enabled=false)"
        problems.say("left out", "object", "without a mask", remedy, bare)
    annotations.clear()
    return found, ignored


def _sound(
    annotations: list[Any],
    labels: list[Any],
    records: dict[int, ImageRecord],
    index_of: dict[int, int],
    problems: Problems,
    needs_box: bool,
    schema: KeypointSchema | None,
) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """Label, entry and packed segmentation (None: it has none) of the annotations that have no fault."""

    def fault_of(entry: dict[str, Any]) -> str | None:
        fault = annotation_fault(entry, records, index_of, needs_box)
        return keypoint_fault(entry, schema) if fault is None and schema is not None else fault

    def is_sound(entry: Any, label: Any) -> bool:
        if not isinstance(entry, dict):
            problems.add("annotation", label, f"is a {type(entry).__name__}, not an object")
            return False
        tidy(entry, label, problems)
        if (fault := fault_of(entry)) is not None:
            spell_out(entry, label, problems)
            fault = fault_of(entry)
        if fault is not None:
            problems.add("annotation", label, fault)
        return fault is None

    for start in range(0, len(annotations), CHUNK):
        entries = annotations[start : start + CHUNK]
        annotations[start : start + CHUNK] = [None] * len(entries)
        shapes = pack_plain(entries, records, index_of)
        for offset, label in enumerate(labels[start : start + CHUNK]):
            entry, entries[offset] = entries[offset], None
            plain = shapes is not None and (schema is None or keypoint_fault(entry, schema) is None)
            if plain or is_sound(entry, label):
                yield (
                    label,
                    entry,
                    shapes[offset] if shapes else pack_polygons(entry.get("segmentation") or None),
                )


def _place(
    entries: list[Entry],
    images: dict[int, ImageRecord],
    problems: Problems,
    min_box_side: float,
    offset: float,
) -> tuple[Counter[str], int, list[dict[str, Any]], ObjectColumns]:
    """Choose the objects that can be learnt.

    Args:
        images: by id, in the order of the file.
        offset: what was added to the x and y of keypoints.
    Returns:
        Objects whose box is left out, by reason; how many boxes were clipped; the entries to judge by, if the
        tree is kept: all but those that nothing could be found of; and the objects.
    """
    if not entries:
        return (
            Counter(),
            0,
            [],
            ObjectColumns(np.zeros(0, np.int64), [], [], np.zeros((0, 4)), [], [], np.zeros((0, 4)), [], []),
        )
    records = [entry.record for entry in entries]
    shapes = [entry.shape for entry in entries]
    sizes = np.array([(record.width, record.height) for record in records], np.float64)
    given = np.array([entry.box for entry in entries], np.float64)
    crowd = np.array([entry.crowd for entry in entries])
    extents, covered = mask_extents(shapes, [r.height for r in records], [r.width for r in records])
    table = Table([entry.label for entry in entries], records, shapes, given, extents, covered, sizes, crowd)

    from_mask = np.isnan(given[:, 0])
    box = np.where(np.isnan(given), clip_boxes(extents, sizes), given)
    inside = clip_boxes(box, sizes)
    sides = inside[:, 2:] - inside[:, :2]
    flat = (box[:, 2:] <= box[:, :2]).any(1) & ~from_mask
    outside = (sides <= 0).any(1) & ~from_mask & ~flat
    small = (sides.min(1) < min_box_side) & ~flat & ~outside
    empty = covers_no_pixel(table, ~(flat | outside | (small & ~from_mask)), problems)
    small &= ~empty
    by_reason = {
        "without area": flat,
        "outside the image": outside,
        f"with a side under {min_box_side:g} px": small,
        "whose mask covers no pixel": empty,
    }
    unusable_boxes(table, dict(list(by_reason.items())[:3]), problems)
    skipped = Counter({reason: int(which.sum()) for reason, which in by_reason.items() if which.any()})
    used = ~(flat | outside | small | empty)
    boxes_beside_masks(table, used, problems)
    keypoints_beside_objects(table, [entry.points for entry in entries], offset, inside, problems)
    repeated_objects(table, [entry.class_index for entry in entries], used & ~crowd, problems)
    crowd_regions(table, problems)
    areas = sensible_areas(table, [entry.area for entry in entries], inside, problems)
    clipped = int((abs(box - inside).max(1) > 0.01)[used].sum())
    # Too small to learn from, an object can still be found: it is judged.
    judged = used | small
    kept = []
    for index in np.flatnonzero(judged).tolist():
        source = entries[index].source
        if source is None:
            continue
        source["area"] = float(areas[index])
        source.setdefault("iscrowd", 0)
        if from_mask[index]:
            x1, y1, x2, y2 = inside[index].tolist()
            source["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        kept.append(source)
    place_of = {image_id: place for place, image_id in enumerate(images)}
    learnt = [entries[index] for index in np.flatnonzero(used).tolist()]
    columns = ObjectColumns(
        np.array([place_of[entry.record.image_id] for entry in learnt], np.int64),
        [entry.annotation_id for entry in learnt],
        [entry.class_index for entry in learnt],
        inside[used],
        [entry.crowd for entry in learnt],
        areas[used].tolist(),
        extents[used],
        [entry.shape for entry in learnt],
        [entry.points for entry in learnt],
    )
    return skipped, clipped, kept, columns
