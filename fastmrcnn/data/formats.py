"""What an annotation file is that is not COCO's, and how to go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PARTS = ("images", "annotations", "categories")
SUFFIXES = {
    ".txt": "looks like YOLO labels, a text file for each image; export the set as COCO JSON",
    ".yaml": "looks like the description of a YOLO set; export the set as COCO JSON",
    ".yml": "looks like the description of a YOLO set; export the set as COCO JSON",
    ".xml": "looks like Pascal VOC or CVAT XML; export the set as COCO JSON",
    ".csv": "is a table; export the set as COCO JSON",
}
# What files that are not JSON begin with.
BEGINNINGS = {
    b"\x1f\x8b": "is compressed with gzip; unpack it",
    b"PK\x03\x04": "is a ZIP archive; unpack it",
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"\xff\xfe": "is text in UTF-16; save it in UTF-8",
    b"\xfe\xff": "is text in UTF-16; save it in UTF-8",
    b"<": "is XML or HTML; export the set as COCO JSON",
}
RESULTS = "looks like results, which a model found; give the annotations that they are to be compared with"


def other_file(file: Path) -> str | None:
    """What a file is by its name and its first bytes, and the way out; None if it may be JSON."""
    if file.is_dir():
        return "is a folder, as where there is a file for each image; export the set as COCO JSON"
    if (known := SUFFIXES.get(file.suffix.lower())) is not None:
        return known
    try:
        with file.open("rb") as stream:
            start = stream.read(32)
    except OSError:
        return None  # is told when it is read
    if not start:
        return "is empty; export or download the set anew"
    return next((what for first, what in BEGINNINGS.items() if start.startswith(first)), None)


def other_format(tree: Any) -> str | None:
    """What a parsed file is, and the way out; None for what may be COCO's instances."""
    if isinstance(tree, list):
        return _other_list(tree)
    if not isinstance(tree, dict):
        return None
    annotations = tree.get("annotations")
    entries = list(annotations.values()) if isinstance(annotations, dict) else annotations
    first = (
        next((entry for entry in entries if isinstance(entry, dict)), {}) if isinstance(entries, list) else {}
    )
    if "segments_info" in first:
        return (
            "looks like panoptic annotations, with masks in PNG files; take the instances file of the set, "
            "or convert it with panopticapi's panoptic2detection_coco_format.py"
        )
    if "caption" in first and "bbox" not in first:
        return "looks like captions, which have no boxes and masks; take the instances file of the set"
    if all(part in tree for part in PARTS):
        return None
    if "_via_img_metadata" in tree or any(isinstance(v, dict) and "regions" in v for v in tree.values()):
        return "looks like a project of the VGG Image Annotator (VIA); export it as COCO JSON there"
    if "shapes" in tree and "imagePath" in tree:
        return "looks like a file of labelme, one for each image; convert them with labelme2coco"
    if tree.get("type") == "FeatureCollection":
        return "looks like GeoJSON; convert its shapes to pixels, as COCO JSON"
    if "imgHeight" in tree and "objects" in tree:
        return "looks like a file of Cityscapes, one for each image; convert the set to COCO JSON"
    if "objects" in tree and "size" in tree:
        return "looks like a file of Supervisely, one for each image; export the set as COCO JSON there"
    if "items" in tree and "categories" in tree:
        return "looks like a file of Datumaro; export the set as COCO JSON with it"
    if "videos" in tree and "images" not in tree:
        return "looks like a set of videos, as YouTube-VIS has it; export its frames as COCO JSON"
    for key, inner in tree.items():
        if isinstance(inner, dict) and all(part in inner for part in PARTS):
            return f"has its lists within '{key}'; write what is in it into a file of its own"
        if isinstance(inner, list) and (known := _other_list(inner)) == RESULTS:
            return known
    if "images" in tree and "annotations" not in tree:
        return (
            "has images but no annotations, like the files of COCO's test sets; take a file with annotations"
        )
    if "bbox" in tree and "image_id" in tree:
        return "looks like one annotation; put it into a list, beside lists of images and categories"
    return None


def one_entry(part: Any) -> bool:
    """Whether there is a single entry where a list of entries is expected."""
    return isinstance(part, dict) and ("id" in part or "file_name" in part or "name" in part)


def by_id(part: Any) -> bool:
    """Whether entries stand in an object, by id, as LIVECell's annotations do."""
    return isinstance(part, dict) and bool(part) and all(isinstance(entry, dict) for entry in part.values())


def _other_list(tree: list[Any]) -> str | None:
    first = tree[0] if tree and isinstance(tree[0], dict) else {}
    if "image_id" in first and "score" in first:
        return RESULTS
    if "image_id" in first and "bbox" in first:
        return "looks like annotations alone; put them into an object, beside lists of images and categories"
    if ("image" in first and "annotations" in first) or "imagefilename" in first:
        return "looks like Create ML's format; export the set as COCO JSON"
    if "regions" in first:
        return "looks like a project of the VGG Image Annotator (VIA); export it as COCO JSON there"
    if "data" in first and "annotations" in first:
        return "looks like an export of Label Studio; export the set as COCO there"
    if "Label" in first or "data_row" in first:
        return "looks like an export of Labelbox; convert it to COCO JSON"
    if "labels" in first and "name" in first:
        return "looks like annotations of BDD100K or Scalabel; convert them to COCO JSON"
    return None
