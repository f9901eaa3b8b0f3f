"""What the device makes of images that were only decoded is what the loader makes of them itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.loader import EvalLoader, LoadedBatch, TrainLoader
from fastmrcnn.data.raw_images import Room, device_resizes
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.data.transforms import Augment, Plan
from fastmrcnn.kernels import resize_pad
from fastmrcnn.structures import Batch, tree_map

MOVES = Augment(flip_horizontal=0.5, flip_vertical=0.5, rotate90=0.5)
COLOURS = Augment(0.5, 0.5, 0.5, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.1)
CROPS = Augment(0.5, 0.5, 0.0, crop=(64, 96), scale=(0.5, 2.0))
SIZES = [(40, 60), (60, 40), (33, 47), (64, 64), (90, 130), (50, 70)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """JPEGs and PNGs; the last one's annotations give another size than the file has."""
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for number, (height, width) in enumerate(SIZES):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / f"{number}.{'png' if number % 3 == 1 else 'jpg'}"
        image.save(path)
        if number == len(SIZES) - 1:
            height, width = height + 1, width - 1
        x, y, side = 4.0, 6.0, min(height, width) / 2
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        item = ObjectRecord(number, 0, (x, y, x + side, y + side), False, [polygon], side * side)
        records.append(ImageRecord(100 + number, path, path.name, width, height, [item], folder / "set.json"))
    return CocoDataset(records, ["a"], [1], folder / "set.json")


def loader(dataset: CocoDataset, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {
        "batch": 3,
        "short_sides": [40, 64],
        "long_side_max": 96,
        "steps": 12,
        "seed": 1,
    }
    return TrainLoader(dataset, **(defaults | options))


def pixels_of(batch: Batch, shape: tuple[int, int]) -> Tensor:
    assert batch.raw is not None
    buffer, offset, source, resized, turns, flips, origin, colour = batch.raw
    more = {"turns": turns, "flips": flips, "origin": origin, "colour": colour}
    return resize_pad(buffer, offset, source, resized, batch.sizes, *shape, **more)


def compare(worker: LoadedBatch, raw: LoadedBatch) -> int:
    """Everything but the pixels is equal; returns the largest difference of those."""
    assert raw.batch.pixels.shape == (0, *worker.batch.pixels.shape[1:])
    found = pixels_of(raw.batch, (worker.batch.pixels.shape[2], worker.batch.pixels.shape[3]))
    assert found.stride() == worker.batch.pixels.stride()
    rest: list[list[Tensor]] = [[], []]
    for leaves, loaded in zip(rest, (worker, raw), strict=True):
        tree_map(leaves.append, loaded.batch._replace(pixels=loaded.input_to_image, raw=None))
        assert loaded.left_out == loaded.clipped == {}
    for a, b in zip(*rest, strict=True):
        assert torch.equal(a, b)
    assert worker.image_ids == raw.image_ids
    return int((found.int() - worker.batch.pixels.int()).abs().max())


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "resized alone": ({}, 0),
    "moved": ({"augment": MOVES}, 0),
    "coloured": ({"augment": COLOURS}, 1),
    "cropped": ({"augment": CROPS}, 2),  # Pillow rounds where a part begins, and after each of two passes
    "buckets": ({"augment": MOVES, "buckets": [(96, 96), (64, 128), (128, 64)]}, 0),
    "large images": ({"augment": MOVES, "short_sides": [16], "long_side_max": 24}, 0),
    "rotated": ({"augment": Augment(rotate=20)}, 0),
    "composed": ({"augment": Augment(0.5, copy_paste=0.4, mosaic=0.4)}, 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_are_those_of_the_loader(pictures: CocoDataset, name: str, workers: int) -> None:
    options, most = CASES[name]
    raw = loader(pictures, raw=True, workers=workers, **options)
    worst = 0
    for one, other in zip(loader(pictures, **options), raw, strict=True):
        worst = max(worst, compare(one, other))
    assert worst <= most
    assert (other.batch.raw.colour is None) == (name != "coloured")
    if workers:
        assert raw.loader.by_slot == 12


def test_of_evaluation_too(pictures: CocoDataset) -> None:
    options: dict[str, Any] = {"batch": 2, "short_side": 60, "long_side_max": 100}
    for workers in (0, 1):
        raw = EvalLoader(pictures, raw=True, workers=workers, **options)
        for one, other in zip(EvalLoader(pictures, **options), raw, strict=True):
            assert compare(one, other) == 0
            assert one.real == other.real


def test_broken_images_leave_no_gap(pictures: CocoDataset, tmp_path: Path) -> None:
    broken = tmp_path / "0.jpg"
    broken.write_bytes(pictures.records[0].path.read_bytes()[:-200])
    records = [
        ImageRecord(
            r.image_id, broken if i == 0 else r.path, r.file_name, r.width, r.height, r.objects, tmp_path
        )
        for i, r in enumerate(pictures.records)
    ]
    dataset = CocoDataset(records, ["a"], [1], tmp_path)
    options: dict[str, Any] = {"max_broken": 0.5, "short_sides": [64]}
    for one, other in zip(loader(dataset, **options), loader(dataset, raw=True, **options), strict=True):
        clean = [loaded._replace(left_out={}) for loaded in (one, other)]
        assert one.left_out.keys() == other.left_out.keys()
        assert compare(*clean) == 0


def test_images_that_are_not_kept(pictures: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are decoded where they will be read."""
    monkeypatch.setattr("fastmrcnn.data.worker.CACHE_BYTES", 100)
    memory = np.zeros(2**20, np.uint8)
    raw = loader(pictures, raw=True, short_sides=[64])
    plan = next(iter(raw.sampler))
    loaded = raw.loader.samples.load(plan, memory)
    assert isinstance(loaded, LoadedBatch)
    assert loaded.batch.raw is not None
    assert loaded.batch.raw.buffer.data_ptr() == memory.ctypes.data
    assert compare(next(iter(loader(pictures, short_sides=[64]))), loaded) == 0


def test_a_room() -> None:
    first, second = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.full((1, 2, 3), 7, np.uint8)
    room = Room(np.zeros(2**16 + 5, np.uint8))
    images = [room.place(image) for image in (first, second)]
    assert all(np.shares_memory(image, room.memory) for image in images)
    buffer, starts = room.gathered(images[::-1] + images[1:])
    assert starts == [12, 0, 12]
    assert buffer.size == 2**16
    assert np.shares_memory(buffer, room.memory)
    assert buffer[:18].tolist() == [*range(12), *[7] * 6]
    for small in (Room(np.zeros(13, np.uint8)), Room(np.zeros(40, np.uint8)), Room(None)):
        images = [small.place(image) for image in (first, second)]
        other, starts = small.gathered(images)
        assert starts == [0, 12]
        assert not np.shares_memory(other, small.memory)
        np.testing.assert_array_equal(other, buffer)


def test_what_the_device_resizes() -> None:
    assert device_resizes((100, 100), Plan((50, 50)), (50, 100))
    assert not device_resizes((100, 101), Plan((50, 50)), (50, 100))
    assert not device_resizes((10, 10), Plan((50, 50), rotation=1), (50, 100))
    assert device_resizes((1, 2**19), Plan((1, 1023)), (512, 1024))
    assert not device_resizes((1, 2**19), Plan((1, 1024)), (512, 1024))
