"""Batches: what they hold, and that they depend on the seed and the step alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmrcnn.data import worker
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.collate import RasterisedObjects, power_of_two, read_objects
from fastmrcnn.data.loader import EvalLoader, LoadedBatch, TrainLoader, largest_targets, prepare_image
from fastmrcnn.data.order import TrainSampler
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.data.transforms import Augment
from fastmrcnn.errors import UserError
from fastmrcnn.structures import tree_map

EVERYTHING = Augment(0.5, 0.5, 0.5, 0.2, 0.2)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = write_shapes(tmp_path_factory.mktemp("shapes"), seed=3, train=10, val=1, size=48)
    return read_coco(paths["train_images"], paths["train_annotations"])


def mixed(folder: Path, sizes: list[tuple[int, int]]) -> CocoDataset:
    """Images of the given (height, width), each of one colour, with one object each."""
    records = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.new("RGB", (width, height), (number + 1, 0, 0)).save(path)
        x, y, side = 4.0, 6.0, min(height, width) / 2
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        item = ObjectRecord(number, 0, (x, y, x + side, y + side), False, [polygon], side * side)
        records.append(ImageRecord(100 + number, path, path.name, width, height, [item], folder / "set.json"))
    return CocoDataset(records, ["a"], [1], folder / "set.json")


def loader(dataset: CocoDataset, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {"batch": 3, "short_sides": [48], "long_side_max": 96, "steps": 9, "seed": 1}
    return TrainLoader(dataset, **(defaults | options))


def assert_equal(one: LoadedBatch, other: LoadedBatch) -> None:
    assert one.image_ids == other.image_ids
    assert one.original_sizes == other.original_sizes
    leaves: list[list[torch.Tensor]] = [[], []]
    for kept, loaded in zip(leaves, (one, other), strict=True):
        tree_map(kept.append, loaded.batch)
    assert len(leaves[0]) > 10
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_no_bitmaps_are_made_where_masks_are_not_learnt(tmp_path: Path) -> None:
    paths = write_shapes(tmp_path, seed=3, train=4, val=1, size=48)
    found = {}
    for masks in (True, False):
        dataset = read_coco(paths["train_images"], paths["train_annotations"], require_masks=masks)
        slots, mask_bytes = largest_targets(dataset, 3)
        targets = next(iter(loader(dataset, min_slots=slots, min_mask_bytes=mask_bytes))).batch.targets
        assert targets is not None
        found[masks] = targets
    assert found[True].masks.buffer.any()
    assert not found[False].masks.buffer.any()
    assert not found[False].masks.window.any()
    assert found[False].masks.buffer.shape == (4096,)
    assert torch.equal(found[True].boxes, found[False].boxes)
    assert torch.equal(found[True].valid, found[False].valid)


def test_shapes_and_dtypes(shapes: CocoDataset) -> None:
    loaded = next(iter(loader(shapes, short_sides=[40, 44], buckets=[(64, 96)], augment=EVERYTHING)))
    pixels, sizes, targets = loaded.batch[:3]
    assert pixels.shape == (3, 3, 64, 96)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert sizes.dtype == torch.int64
    assert targets is not None
    slots = targets.boxes.shape[1]
    assert slots == 8
    wanted = [
        (targets.boxes, (3, 8, 4), torch.float32),
        (targets.classes, (3, 8), torch.int64),
        (targets.valid, (3, 8), torch.bool),
        (targets.crowd, (3, 8), torch.bool),
        (targets.masks.buffer, (4096,), torch.uint8),
        (targets.masks.offset, (3, 8), torch.int64),
        (targets.masks.window, (3, 8, 4), torch.int32),
        (targets.masks.to_annotation, (3, 2, 3), torch.float32),
        (targets.masks.size, (3, 2), torch.int32),
    ]
    for tensor, shape, dtype in wanted:
        assert tensor.shape == shape
        assert tensor.dtype == dtype
    for row in range(3):
        height, width = sizes[row].tolist()
        assert (height, width) in {(40, 40), (44, 44)}
        assert pixels[row, :, :height, :width].float().mean() > 10
        assert not pixels[row, :, height:].any()
        assert not pixels[row, :, :, width:].any()
    assert loaded.real == 3
    assert loaded.original_sizes == [(48, 48)] * 3


def test_targets_are_the_objects_of_the_image(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(40, 60)])
    record = dataset.records[0]
    part = ObjectRecord(2, 0, (0, 0, 5, 5), True, {"size": [40, 60], "counts": [2400]}, 0)
    ring = np.zeros((40, 60), np.uint8)
    ring[10:20, 30:50] = 1
    ring[12:18, 35:40] = 0
    flat = np.concatenate(([0], ring.ravel(order="F"), [0])).astype(int)
    counts = np.diff([0, *np.flatnonzero(np.diff(flat)), 2400]).tolist()
    hole = ObjectRecord(3, 0, (30, 10, 50, 20), False, {"size": [40, 60], "counts": counts}, 170)
    empty = ObjectRecord(4, 0, (1, 1, 30, 30), False, [[90, 90, 99, 90, 99, 99]], 40)
    record.objects.extend([part, hole, empty])
    loaded = next(iter(loader(dataset, batch=2, short_sides=[80], long_side_max=120, steps=1)))
    targets = loaded.batch.targets
    assert targets is not None
    assert targets.valid[0].tolist() == [True, False, True, False] + [False] * 4
    assert targets.crowd[0].tolist() == [False, True, False, True] + [False] * 4
    expected = [[8, 12, 48, 52], [0, 0, 10, 10], [60, 20, 100, 40], [2, 2, 60, 60]]
    assert targets.boxes[1, :4].tolist() == expected
    masks = targets.masks
    assert masks.window[1].tolist()[:4] == [[4, 6, 20, 20], [0, 0, 0, 0], [30, 10, 20, 10], [0, 0, 0, 0]]
    for row in range(2):
        start = int(masks.offset[row, 2])
        crop = masks.buffer[start : start + 200].reshape(10, 20)
        np.testing.assert_array_equal(crop.numpy(), ring[10:20, 30:50])
        start = int(masks.offset[row, 0])
        assert masks.buffer[start : start + 400].all()
    assert int(masks.buffer.sum()) == 2 * (400 + 170)
    np.testing.assert_allclose(masks.to_annotation[0], [[0.5, 0, 0], [0, 0.5, 0]])
    assert masks.size.tolist() == [[40, 60]] * 2


def test_augmented_targets_lie_on_the_pixels(shapes: CocoDataset) -> None:
    """Each bitmap, read through `to_annotation`, covers pixels of its own object's colour."""
    for loaded in loader(shapes, batch=2, short_sides=[96], augment=Augment(0.5, 0.5, 0.5), steps=8):
        targets = loaded.batch.targets
        assert targets is not None
        masks = targets.masks
        for row in range(2):
            whole = np.asarray(Image.open(shapes.records[loaded.image_ids[row] - 1].path))
            height, width = loaded.batch.sizes[row].tolist()
            y, x = np.mgrid[:height, :width] + 0.5
            at = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
            column, line = np.floor(masks.to_annotation[row].double().numpy() @ at).astype(int)
            seen = loaded.batch.pixels[row, :, :height, :width].permute(1, 2, 0).numpy().reshape(-1, 3)
            # Pillow's smoothing and the noise of single pixels remain
            difference = np.abs(seen.astype(int) - whole[line, column].astype(int)).mean()
            assert difference < 12
            for slot in range(int(targets.valid[row].sum())):
                left, top, w, h = masks.window[row, slot].tolist()
                start = int(masks.offset[row, slot])
                bitmap = np.zeros((48, 48), bool)
                bitmap[top : top + h, left : left + w] = masks.buffer[start : start + w * h].reshape(h, w)
                inside = bitmap[line, column]
                box = targets.boxes[row, slot].numpy()
                across, down = x.ravel()[inside], y.ravel()[inside]
                found = [across.min() - 0.5, down.min() - 0.5, across.max() + 0.5, down.max() + 0.5]
                np.testing.assert_allclose(box, found, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_batches_of_an_unbroken_run(shapes: CocoDataset, workers: int) -> None:
    unbroken = list(loader(shapes, augment=EVERYTHING, short_sides=[40, 48]))
    assert len(unbroken) == len(loader(shapes)) == 9
    state = torch.get_rng_state()
    resumed = loader(shapes, augment=EVERYTHING, short_sides=[40, 48], start_step=4, workers=workers)
    assert len(resumed) == 5
    for one, other in zip(unbroken[4:], resumed, strict=True):
        assert_equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    other_seed = list(loader(shapes, augment=EVERYTHING, short_sides=[40, 48], seed=2))
    assert [b.image_ids for b in other_seed] != [b.image_ids for b in unbroken]


def test_a_second_pass_repeats_the_first(shapes: CocoDataset) -> None:
    one = loader(shapes, augment=EVERYTHING, steps=3)
    for first, second in zip(list(one), list(one), strict=True):
        assert_equal(first, second)


def test_every_batch_has_one_bucket_and_no_image_is_lost(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(30, 80)] * 7 + [(80, 30)] * 4 + [(34, 34)])
    one = loader(dataset, batch=3, short_sides=[30], long_side_max=80, steps=40)
    assert one.buckets == [(32, 96), (96, 32)]
    seen: Counter[int] = Counter()
    shapes = Counter()
    for loaded in one:
        shapes[tuple(loaded.batch.pixels.shape[2:])] += 1
        seen.update(loaded.image_ids)
        for row, image_id in enumerate(loaded.image_ids):  # the pixels are those of the image
            assert loaded.batch.pixels[row, 0, 0, 0] == image_id - 99
    assert set(shapes) == {(32, 96), (96, 32)}
    # 120 samples are 10 epochs; what still waits in queues is less than 2 batches
    assert set(seen) == {record.image_id for record in dataset.records}
    assert all(9 <= count <= 11 for count in seen.values())


def test_a_rare_bucket_carries_over_epochs(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(30, 80)] * 5 + [(80, 30)])
    one = loader(dataset, batch=4, short_sides=[30], long_side_max=80, steps=30)
    portrait = [b.image_ids for b in one if b.batch.pixels.shape[2:] == (96, 32)]
    assert portrait == [[105] * 4] * len(portrait)
    assert 4 <= len(portrait) <= 5  # 120 samples hold 20 of them


def test_turned_images_go_to_the_other_bucket(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(30, 80)] * 5)
    one = loader(
        dataset, batch=2, short_sides=[30], long_side_max=80, steps=20, augment=Augment(rotate90=0.5)
    )
    shapes = Counter(tuple(b.batch.pixels.shape[2:]) for b in one)
    assert set(shapes) == {(32, 96), (96, 32)}
    assert min(shapes.values()) >= 5
    for loaded in one:
        wide = loaded.batch.pixels.shape[3] == 96
        assert loaded.batch.sizes.tolist() == [[30, 80] if wide else [80, 30]] * 2


def test_sets_smaller_than_a_batch(tmp_path: Path) -> None:
    one = loader(mixed(tmp_path, [(30, 30), (30, 30)]), batch=5, short_sides=[32], steps=4)
    ids = [image_id for loaded in one for image_id in loaded.image_ids]
    assert Counter(ids) == {100: 10, 101: 10}


def test_batches_without_any_object(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(30, 30)])
    dataset.records[0].objects.clear()
    targets = next(iter(loader(dataset))).batch.targets
    assert targets is not None
    assert not targets.valid.any()
    assert not targets.crowd.any()
    assert targets.boxes.shape == (3, 8, 4)
    assert targets.masks.buffer.shape == (4096,)


def test_padded_sizes_are_powers_of_two(tmp_path: Path) -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 8, 9, 4097)] == [1, 1, 2, 4, 8, 16, 8192]
    dataset = mixed(tmp_path, [(100, 100)])
    dataset.records[0].objects.extend(dataset.records[0].objects * 8)
    targets = next(iter(loader(dataset, batch=1))).batch.targets
    assert targets is not None
    assert targets.boxes.shape[1] == 16
    assert targets.masks.buffer.shape == (32768,)  # 9 bitmaps of 50 x 50
    slots, size = largest_targets(dataset, 3)
    assert slots == 9
    for loaded in loader(dataset, min_slots=slots, min_mask_bytes=size, batch=3, steps=2):
        assert loaded.batch.targets is not None
        assert loaded.batch.targets.masks.buffer.shape == (power_of_two(size),)
    with pytest.raises(
        UserError, match=r"image 100 \(0\.png\) has 9 objects, more than data\.max_objects = 8"
    ):
        loader(dataset, max_objects=8)


def test_one_large_image_does_not_set_the_size_of_all_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.json"

    def record(number: int, side: float) -> ImageRecord:
        objects = [ObjectRecord(number, 0, (0, 0, side - 2, side - 2), False, None, 1)]
        return ImageRecord(number, path, "x", 1000, 1000, objects, path)

    alike = CocoDataset([record(i, 100) for i in range(1000)], ["a"], [1], path)
    assert largest_targets(alike, 16) == (8, 16 * 100**2)
    alike.records[7] = record(7, 1000)
    _, size = largest_targets(alike, 16)
    assert 16 * 100**2 < size < 16 * 1000**2 / 10


def test_no_short_side(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.short_side: expected lengths above 0, got \[\]"):
        loader(mixed(tmp_path, [(30, 30)]), short_sides=[])


def test_an_image_that_fits_no_bucket_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image 100 .* 0\.png becomes 48x80 .* data\.buckets") as caught:
        loader(mixed(tmp_path, [(60, 100)]), buckets=[(64, 64)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_worker_are_one_line(tmp_path: Path, workers: int) -> None:
    dataset = mixed(tmp_path, [(30, 30), (30, 30)])
    dataset.records[1].path.write_bytes(dataset.records[1].path.read_bytes()[:60])
    for one in (
        loader(dataset, batch=1, workers=workers),
        EvalLoader(dataset, batch=1, short_side=30, long_side_max=30, workers=workers),
    ):
        with pytest.raises(UserError, match=r"1\.png: cannot be decoded") as caught:
            list(one)
        assert "\n" not in str(caught.value)
        assert "image 101" in str(caught.value)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers do not see the patch")
def test_a_killed_worker_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def out_of_memory(record: ImageRecord, memory: Any) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(worker, "read_image", out_of_memory)
    with pytest.raises(UserError, match=r"a loader process died .* lower data\.workers"):
        list(loader(mixed(tmp_path, [(30, 30)]), workers=1))


def test_evaluation_sees_every_image_once_and_in_order(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(30, 80), (80, 30), (30, 60), (30, 80), (200, 200)])
    one = EvalLoader(dataset, batch=2, short_side=60, long_side_max=100, buckets=[(64, 128), (128, 64)])
    batches = list(one)
    assert len(one) == len(batches) == 3
    assert [b.image_ids for b in batches] == [[100, 102], [103, 104], [101]]
    shapes = [tuple(b.batch.pixels.shape[2:]) for b in batches]
    assert shapes == [(64, 128), (64, 128), (128, 64)]
    for loaded in batches:
        assert loaded.batch.targets is None
        assert loaded.batch.pixels.shape[0] == 2
        assert loaded.real == len(loaded.image_ids) == len(loaded.original_sizes)
        assert loaded.input_to_image.shape == (2, 2, 3)
        for row in range(2):
            image_id = loaded.image_ids[min(row, loaded.real - 1)]  # the last is repeated
            record = dataset.records[image_id - 100]
            assert loaded.batch.pixels[row, 0, 0, 0] == image_id - 99
            height, width = loaded.batch.sizes[row].tolist()
            corner = loaded.input_to_image[row] @ torch.tensor([width, height, 1.0])
            np.testing.assert_allclose(corner, [record.width, record.height], rtol=1e-6)


def test_images_larger_than_any_bucket_are_not_cut(tmp_path: Path) -> None:
    dataset = mixed(tmp_path, [(30, 30), (30, 200)])
    batches = list(EvalLoader(dataset, batch=1, short_side=30, long_side_max=200, buckets=[(32, 32)]))
    assert [tuple(b.batch.pixels.shape[2:]) for b in batches] == [(32, 32), (32, 224)]
    assert batches[1].batch.sizes.tolist() == [[30, 200]]


def test_one_image() -> None:
    pixels = np.full((50, 100, 3), 200, np.uint8)
    batch, affine = prepare_image(pixels, 80, 120)
    assert batch.pixels.shape == (1, 3, 64, 128)
    assert batch.sizes.tolist() == [[60, 120]]
    assert batch.targets is None
    np.testing.assert_allclose(affine @ [120, 60, 1], [100, 50], rtol=1e-6)
    assert prepare_image(pixels, 80, 120, [(96, 96), (96, 160)])[0].pixels.shape == (1, 3, 96, 160)


def test_decoded_images_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[int] = Counter()
    real = worker.read_image

    def counted(record: ImageRecord, memory: Any) -> Any:
        calls[record.image_id] += 1
        return real(record, memory)

    monkeypatch.setattr(worker, "read_image", counted)
    dataset = mixed(tmp_path, [(30, 30), (30, 30)])
    kept = list(loader(dataset, steps=4, augment=EVERYTHING))
    assert calls == {100: 1, 101: 1}
    monkeypatch.setattr(worker, "CACHE_BYTES", 100)
    calls.clear()
    for one, other in zip(kept, loader(dataset, steps=4, augment=EVERYTHING), strict=True):
        assert_equal(one, other)
    assert calls == {100: 6, 101: 6}


def test_resuming_late_is_quick(tmp_path: Path) -> None:
    """The end of a COCO schedule is found without replaying it sample by sample."""
    path = tmp_path / "x.json"
    records = [
        ImageRecord(i, path, "x", 640 if i % 5 else 480, 480 if i % 5 else 640, [], path)
        for i in range(118_000)
    ]
    sampler = TrainSampler(
        records,
        batch=16,
        short_sides=[640, 800],
        long_side_max=1333,
        buckets=[(800, 1344), (1344, 800)],
        augment=Augment(0.5),
        seed=0,
        start_step=89_999,
        steps=90_000,
    )
    start = time.process_time()
    [plan] = list(sampler)
    assert len(plan.samples) == 16
    assert time.process_time() - start < 30  # about 2 s


def test_objects_of_an_image_without_any() -> None:
    path = Path("x")
    found = read_objects(ImageRecord(1, path, "x", 4, 4, [], path))
    assert isinstance(found, RasterisedObjects)
    assert found.boxes.shape == found.windows.shape == (0, 4)
    assert found.crops.shape == (0,)
