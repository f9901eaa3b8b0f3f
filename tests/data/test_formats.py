"""Files that are not COCO's, or nearly: what they are is said, and how to go on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.errors import UserError

SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]
ENTRY = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 8, 8], "area": 64, "segmentation": SQUARE}
PICTURE = {"id": 1, "file_name": "1.png", "width": 30, "height": 20}


def tree(**changes: Any) -> dict[str, Any]:
    return {"images": [PICTURE], "annotations": [ENTRY], "categories": [{"id": 1, "name": "cell"}]} | changes


def read(folder: Path, content: Any, name: str = "set.json") -> CocoDataset:
    for place in (folder, folder / "val2017"):
        place.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20)).save(place / "1.png")
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(folder, folder / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tree(annotations=[{"image_id": 1, "file_name": "1.png", "segments_info": []}]), "panoptic"),
        (tree(annotations=[{"id": 1, "image_id": 1, "caption": "a cell"}]), "captions"),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "VGG Image Annotator"),
        ({"1.png123": {"filename": "1.png", "regions": []}}, "VGG Image Annotator"),
        ({"version": "5", "shapes": [], "imagePath": "1.png"}, "labelme"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"images": [PICTURE], "categories": []}, "test sets"),
        (ENTRY, "one annotation"),
        ([{**ENTRY, "score": 0.5}], "results"),
        ([ENTRY], "annotations alone"),
        ([{"image": "1.png", "annotations": []}], "Create ML"),
        ([{"imagefilename": "1.png", "annotation": []}], "Create ML"),
        ([{"filename": "1.png", "regions": []}], "VGG Image Annotator"),
        ([{"id": 1, "data": {"image": "1.png"}, "annotations": []}], "Label Studio"),
        ([{"ID": "x", "Label": {}}], "Labelbox"),
        ([{"data_row": {}, "projects": {}}], "Labelbox"),
        ([{"name": "1.png", "labels": []}], "BDD100K"),
        ({"imgHeight": 20, "imgWidth": 30, "objects": []}, "Cityscapes"),
        ({"size": {"height": 20, "width": 30}, "objects": []}, "Supervisely"),
        ({"categories": {"label": {}}, "items": []}, "Datumaro"),
        ({"videos": [], "annotations": [], "categories": []}, "a set of videos"),
        ({"results": [{**ENTRY, "score": 0.5}]}, "results"),
        ({"version": 1, "dataset": tree()}, "has its lists within 'dataset'"),
        (tree(images=PICTURE), "one entry where a list of images is expected; write [ ] around it"),
        (tree(annotations=ENTRY), "one entry where a list of annotations is expected"),
        (tree(categories={"id": 1, "name": "cell"}), "one entry where a list of categories is expected"),
    ],
)
def test_what_a_file_is_is_said(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{tmp_path / 'set.json'}: not COCO format: it ")
    assert message.endswith("; data.train.annotations must hold images, annotations, categories")


@pytest.mark.parametrize(
    ("name", "words"),
    [("1.txt", "YOLO labels"), ("data.yaml", "YOLO set"), ("1.xml", "Pascal VOC"), ("set.csv", "a table")],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=r"not a JSON file: it .*; export the set as COCO JSON") as caught:
        read(tmp_path, "0 0.5 0.5 0.1 0.1", name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; export or download the set anew"),
        (gzip.compress(b"{}", mtime=0), "is compressed with gzip; unpack it"),
        (b"PK\x03\x04....", "is a ZIP archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (json.dumps(tree()).encode("utf-16"), "is text in UTF-16; save it in UTF-8"),
        (b"\xfe\xff" + json.dumps(tree()).encode("utf-16-be"), "is text in UTF-16"),
        (b"<!DOCTYPE html>", "is XML or HTML"),
    ],
)
def test_files_that_are_known_by_their_beginning(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"set\.json: not a JSON file: it .* set data\.train\.annotations"
    ) as caught:
        read_coco(tmp_path, tmp_path / "set.json")
    assert words in str(caught.value)


def test_a_folder_of_annotations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder, as where there is a file for each image; export"):
        read_coco(tmp_path, tmp_path)


def test_a_number_of_thousands_of_digits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid JSON"):
        read(tmp_path, '{"images": ' + "9" * 5000 + "}")


def test_entries_by_id_are_taken_as_a_list(tmp_path: Path) -> None:
    dataset = read(tmp_path, tree(annotations={"1": ENTRY}, images={"7": PICTURE}))
    assert len(dataset.records[0].objects) == 1
    assert dataset.summary()[1:] == [
        "set.json: its images stand in an object, by id, as in LIVECell; taken as a list of them",
        "set.json: its annotations stand in an object, by id, as in LIVECell; taken as a list of them",
    ]


def test_file_names_of_lvis(tmp_path: Path) -> None:
    picture = {key: value for key, value in PICTURE.items() if key != "file_name"}
    for address, path in (("val2017/1.png", "val2017/1.png"), ("train2017/1.png", "1.png")):
        dataset = read(tmp_path, tree(images=[{**picture, "coco_url": f"http://x.example/{address}"}]))
        assert dataset.records[0].path == tmp_path / path
        assert "1 image without file_name, as in LVIS (1); taken from coco_url" in dataset.summary()[1]
    with pytest.raises(UserError, match="image 1: no file_name"):
        read(tmp_path, tree(images=[{**picture, "coco_url": 5}]))


def test_names_that_are_numbers(tmp_path: Path) -> None:
    dataset = read(tmp_path, tree(categories=[{"id": 1, "name": 5}]))
    assert dataset.class_names == ["5"]
    assert dataset.summary()[1] == "set.json: 1 category with a number as name (1); taken as text"
