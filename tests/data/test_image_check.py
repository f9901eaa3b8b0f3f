"""What the summary tells of a data set's images, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import write_tiff
from PIL import Image

from fastmrcnn.data import image_check
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.image_check import ImageOptions, same_content, shared_line
from fastmrcnn.data.images import read_image
from fastmrcnn.data.loader import EvalLoader, TrainLoader
from fastmrcnn.data.pixel_range import clipped_line
from fastmrcnn.errors import UserError

LOOK = ImageOptions(choose_range=True)


def noise(seed: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def read(
    folder: Path, *names: str, options: ImageOptions | None = None, name: str = "set.json"
) -> CocoDataset:
    """A set of the files in `folder`, images of 30 x 20 when they are upright, each with one object."""
    tree: dict[str, Any] = {
        "images": [
            {"id": k, "file_name": name, "width": 30, "height": 20} for k, name in enumerate(names, 1)
        ],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0,
             "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]]}
            for k in range(1, len(names) + 1)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    (folder / name).write_text(json.dumps(tree))
    return read_coco(folder, folder / name, image_options=options)


def refusal(folder: Path, *names: str, options: ImageOptions | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, *names, options=options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_wide(folder: Path, most: int, count: int = 3, prefix: str = "") -> list[str]:
    """16-bit images, the brightest value of the last of which is `most`."""
    names = [f"{prefix}{k}.png" for k in range(count)]
    for k, name in enumerate(names):
        values = np.linspace(0, most - count + 1 + k, 600).reshape(20, 30).astype(np.uint16)
        Image.fromarray(values).save(folder / name)
    return names


def test_8_bit_images_are_not_spoken_of(tmp_path: Path) -> None:
    Image.fromarray(noise(0)).save(tmp_path / "a.png")
    Image.fromarray(noise(1)).convert("L").save(tmp_path / "b.jpg")
    dataset = read(tmp_path, "a.png", "b.jpg", options=LOOK)
    assert dataset.summary() == ["set.json: 2 images, 2 objects, 1 class"]
    assert dataset.reading.pixel_range is None


def test_the_range_is_chosen_told_and_used(tmp_path: Path) -> None:
    names = write_wide(tmp_path, 4000)
    dataset = read(tmp_path, *names, options=LOOK)
    assert dataset.image_lines == [
        "3 images are 16-bit, with values 0..4000; read as 0..4095 (data.pixel_range)"
    ]
    assert dataset.reading.pixel_range == (0, 4095)
    assert read_image(dataset.records[2])[0].max() == 249
    given = read(tmp_path, *names, options=ImageOptions((0, 2000)))
    assert given.image_lines == [
        "3 images are 16-bit, with values 0..4000; read as 0..2000 (data.pixel_range)",
        "0.png: 16-bit values 0..3998 reach beyond 0..2000 and are clipped (one of 3 such images)",
    ]
    assert read_image(given.records[2])[0].max() == 255
    before = read(tmp_path, *names)
    assert before.image_lines == [
        "3 images are 16-bit, with values 0..4000; read as 0..65535 (data.pixel_range)",
        "0.png: 16-bit values 0..3998 are read as 0..65535, of which they are a small, dark part (one of 3 "
        "such images)",
    ]
    assert read_image(before.records[2])[0].max() == 16


def test_sizes_that_were_rounded_otherwise_are_told(tmp_path: Path) -> None:
    for index, size in enumerate([(20, 30), (21, 30), (20, 29)]):
        Image.fromarray(noise(index, size)).save(tmp_path / f"{index}.png")
    dataset = read(tmp_path, "0.png", "1.png", "2.png")
    assert dataset.image_lines == [
        "2 images differ by a pixel in size from the annotations; the last row or column is repeated or cut "
        "off (1.png, 2.png)"
    ]
    assert [read_image(one)[0].shape for one in dataset.records] == [(20, 30, 3)] * 3
    Image.fromarray(noise(1, (22, 30))).save(tmp_path / "1.png")
    assert "1.png has width 30, height 22" in refusal(tmp_path, "0.png", "1.png", "2.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_a_loader_clips_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Also those that are not in the sample by which the range is chosen."""
    monkeypatch.setattr(image_check, "_SAMPLE", 1)
    names = write_wide(tmp_path, 1000, count=2)
    wide = write_wide(tmp_path, 9000, count=2, prefix="wide")
    dataset = read(tmp_path, *names, *wide, options=LOOK)
    assert dataset.reading.pixel_range == (0, 1023)
    common: dict[str, Any] = {"batch": 2, "short_side": 48, "long_side_max": 96, "workers": workers}
    judged = [loaded.clipped for loaded in EvalLoader(dataset, **common)]
    told = "16-bit values 0..8999 reach beyond 0..1023 and are clipped"
    assert judged == [{}, {3: f"wide0.png: {told}", 4: f"wide1.png: {told.replace('8999', '9000')}"}]
    del common["short_side"]
    batches = TrainLoader(dataset, short_sides=[48], seed=0, steps=4, **common)
    found = [image_id for loaded in batches for image_id in loaded.clipped]
    assert sorted(found) == [3, 4]
    assert clipped_line(judged[1].values()).startswith(
        f"wide0.png: {told} (one of 2 such images); data.pixel"
    )


def test_a_sample_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_check, "_SAMPLE", 4)
    names = write_wide(tmp_path, 1000, count=9)
    dataset = read(tmp_path, *names, options=LOOK)
    assert dataset.image_lines == [
        "9 images are 16-bit, with values 0..998 in the 4 looked at; read as 0..1023 (data.pixel_range)"
    ]


def test_floating_point(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)).save(tmp_path / "a.tif")
    dataset = read(tmp_path, "a.tif", options=LOOK)
    assert dataset.reading.pixel_range == (0, 1)
    assert dataset.image_lines == [
        "1 image is floating-point, with values 0..1; read as 0..1 (data.pixel_range)"
    ]
    assert set(np.unique(read_image(dataset.records[0])[0])) == set(range(256))
    assert "a.tif: its pixels are floating-point numbers" in refusal(tmp_path, "a.tif")


def test_kinds_without_a_common_range(tmp_path: Path) -> None:
    write_wide(tmp_path, 4000, count=1)
    write_tiff(tmp_path / "b.tif", np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30))
    message = refusal(tmp_path, "0.png", "b.tif", options=LOOK)
    assert "different ranges, 0..4095 (0.png), 0..1 (b.tif)" in message
    assert "data.pixel_range=[black, white]" in message
    read(tmp_path, "0.png", "b.tif", options=ImageOptions((0, 4095)))


def test_pages(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(k)) for k in range(6)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:3])
    pages[3].save(tmp_path / "b.gif", save_all=True, append_images=pages[4:])
    pages[5].save(tmp_path / "c.tif")
    lines = read(tmp_path, "a.tif", "b.gif", "c.tif").image_lines
    assert lines == ["2 images have several pages; the first is used (a.tif, b.gif)"]
    assert read(tmp_path, "a.tif", "c.tif").image_lines == [
        "1 image has several pages; the first is used (a.tif)"
    ]


def test_channels(tmp_path: Path) -> None:
    Image.fromarray(noise(0)).convert("RGBA").save(tmp_path / "a.png")
    Image.fromarray(noise(1)).convert("CMYK").save(tmp_path / "b.jpg")
    five = np.concatenate([noise(2), noise(3)[:, :, :2]], axis=2)
    write_tiff(tmp_path / "c.tif", five, extra=[0, 0])
    write_tiff(tmp_path / "d.tif", five[:, :, :4], extra=[0])
    dataset = read(tmp_path, "a.png", "b.jpg", "c.tif", "d.tif")
    assert dataset.image_lines == [
        "1 image has transparency and is laid on white (a.png)",
        "2 images have more channels than colour and alpha, which are not read (c.tif, d.tif)",
    ]
    np.testing.assert_array_equal(read_image(dataset.records[2])[0], noise(2))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation_is_told_also_where_the_sizes_agree(tmp_path: Path, suffix: str) -> None:
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = (30, 20) if orientation == 6 else (20, 30)
        Image.fromarray(noise(orientation, size)).save(tmp_path / f"{orientation}.{suffix}", exif=exif)
    dataset = read(tmp_path, *(f"{orientation}.{suffix}" for orientation in (1, 3, 6)))
    assert dataset.image_lines == [
        "2 images are turned by their EXIF orientation; their annotations are taken as upright "
        f"(3.{suffix}, 6.{suffix})"
    ]
    if suffix != "jpg":
        np.testing.assert_array_equal(read_image(dataset.records[1])[0], noise(3)[::-1, ::-1])
        np.testing.assert_array_equal(read_image(dataset.records[2])[0], np.rot90(noise(6, (30, 20)), -1))
    Image.fromarray(noise(9)).save(tmp_path / f"9.{suffix}", exif=exif)  # annotated before it was turned
    assert "turned by its EXIF orientation to width 20, height 30" in refusal(tmp_path, f"9.{suffix}")


def test_one_file_under_two_ids_and_one_content_under_two_names(tmp_path: Path) -> None:
    Image.fromarray(noise(0)).save(tmp_path / "a.png")
    Image.fromarray(noise(1)).save(tmp_path / "c.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert read(tmp_path, "a.png", "b.png", "c.png").image_lines == [
        "1 image repeats the content of another: b.png that of a.png"
    ]
    lines = read(tmp_path, "c.png", "a.png", "./c.png").image_lines
    assert lines == ["2 images share a file with another: c.png has the ids 1 and 3"]
    assert read(tmp_path, "c.png", "a.png", "c.png").image_lines == lines


def test_files_that_differ_in_one_byte_are_not_the_same(tmp_path: Path) -> None:
    content = bytearray(np.random.default_rng(0).bytes(50_000))
    paths = [tmp_path / name for name in "abcde"]
    for path, place in zip(paths, (0, 0, 20_000, 49_999, None), strict=True):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
    empty = [tmp_path / name for name in ("x", "y")]
    for path in empty:
        path.touch()
    files = [str(path) for path in (*paths, *empty, tmp_path / "nowhere")]
    assert same_content(files) == [files[:2]]


def test_images_of_the_other_set(tmp_path: Path) -> None:
    for k in range(3):
        Image.fromarray(noise(k)).save(tmp_path / f"{k}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    train = read(tmp_path, "0.png", "1.png", name="train.json")
    for names, line in (
        (["2.png"], None),
        (["1.png", "2.png"], "1 image is in train.json too: 1.png"),
        (["2.png", "copy.png"], "1 image is in train.json too: copy.png as 1.png"),
        (["copy.png", "0.png"], "2 images are in train.json too: 0.png"),
    ):
        assert shared_line(read(tmp_path, *names).records, train.records) == line


def test_missing_files_can_be_left_out(tmp_path: Path) -> None:
    Image.fromarray(noise(0)).save(tmp_path / "a.png")
    skip = ImageOptions(skip_missing=True)
    dataset = read(tmp_path, "x.png", "a.png", "y.png", "z.png", "w.png", options=skip)
    assert [record.image_id for record in dataset.records] == [2]
    assert dataset.summary() == [
        "set.json: 1 image, 1 object, 1 class",
        "set.json: left out 4 images with 4 objects, whose file is not there (data.missing=skip): x.png, "
        "y.png, z.png and 1 more",
    ]
    assert "none of its images is in" in refusal(tmp_path, "x.png", "y.png", options=skip)
    assert "2 of 3 images not found" in refusal(tmp_path, "x.png", "a.png", "y.png")


def test_large_images(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.fromarray(noise(0)).save(tmp_path / "a.png")
    small = ImageOptions(max_pixels=599)
    message = refusal(tmp_path, "a.png", options=small)
    assert (
        "image 1: a.png has 30 x 20 = 600 pixels, more than data.max_pixels = 599; cut it into tiles, or set "
        "data.max_pixels=600"
    ) in message
    assert read(tmp_path, "a.png", options=ImageOptions(max_pixels=600)).image_lines == []
    Image.new("1", (14000, 13000)).save(tmp_path / "large.png")
    message = refusal(tmp_path, "large.png")
    assert "data.max_pixels=182000000" in message
    assert "DOS" not in message
    recwarn.clear()
    message = refusal(tmp_path, "large.png", options=ImageOptions(max_pixels=182_000_000))
    assert "large.png has width 14000, height 13000, but the annotations say" in message
    assert not recwarn.list  # Pillow warns from half its limit on
