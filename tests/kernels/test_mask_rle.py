"""Run lengths against pycocotools' encoding of the pasted bitmaps.

CPU tensors run the reference, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import INTEGERS
from pasted import BOXES, NOTHING, SIZE, corners, random_boxes, random_masks
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn.kernels import mask_rle, paste_masks
from fastmrcnn.kernels.common.library import interpreting
from fastmrcnn.kernels.mask_rle import op, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
interpreted = pytest.mark.skipif(not interpreting(), reason="the kernel does not run on the CPU")


def encoded(runs: Tensor, count: Tensor, height: int, width: int) -> list[bytes]:
    """As COCO compresses it. What stands behind the last run must be zeros."""
    assert runs.dtype == count.dtype == torch.int32
    found = []
    for row, number in zip(runs.tolist(), count.tolist(), strict=True):
        assert not any(row[number:])
        assert sum(row) == height * width
        rle = {"size": [height, width], "counts": row[:number]}
        found.append(coco_mask.frPyObjects(rle, height, width)["counts"])
    return found


def encoded_by_pycocotools(bitmaps: Tensor) -> list[bytes]:
    columns = np.asfortranarray(bitmaps.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return [rle["counts"] for rle in coco_mask.encode(columns)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.05] if interpreting() else [0.05, 0.5, 1.0])
def test_runs_are_pycocotools(threshold: float, device: str) -> None:
    """Also where runs go on from the foot of a column to the head of the next."""
    masks, boxes = random_masks(len(BOXES), 7).to(device), torch.tensor(BOXES).to(device)
    masks[3:5, 5:], masks[3:5, :2], masks[1, 4:] = 1, 1, 1
    runs, count = mask_rle(masks, boxes, *SIZE, threshold, max_runs=500)
    bitmaps = paste_masks(masks, boxes, *SIZE, threshold)
    if threshold < 1:
        assert (bitmaps[:, -1, :-1] & bitmaps[:, 0, 1:]).any()
        assert (bitmaps[:, -1, :-1] & ~bitmaps[:, 0, 1:]).any()
        assert bitmaps[:, -1, -1].any()
    assert encoded(runs, count, *SIZE) == encoded_by_pycocotools(bitmaps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (140, 3), (64, 64)])
def test_sizes_of_images(height: int, width: int, device: str) -> None:
    count = 3 if interpreting() else 20
    masks, boxes = random_masks(count, 7).to(device), random_boxes(count, height, width).to(device)
    found = mask_rle(masks, boxes, height, width, max_runs=height * width + 2)
    assert encoded(*found, height, width) == encoded_by_pycocotools(paste_masks(masks, boxes, height, width))


@pytest.mark.parametrize("device", DEVICES)
def test_too_many_runs_are_counted_and_the_first_kept(device: str) -> None:
    masks, boxes = random_masks(2, 7).to(device), torch.tensor(BOXES[2:4]).to(device)
    all_runs, count = mask_rle(masks, boxes, *SIZE, max_runs=500)
    assert count.min() > 20
    for room in (1, 20, int(count.max()) - 1):
        runs, same = mask_rle(masks, boxes, *SIZE, max_runs=room)
        assert runs.shape == (2, room)
        assert torch.equal(same, count)
        assert torch.equal(runs, all_runs[:, :room])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreted), DEVICES[1]])
def test_nothing_is_written_behind_the_room(device: str) -> None:
    from fastmrcnn.kernels.mask_rle import kernel

    masks, boxes = random_masks(1, 7).to(device), torch.tensor(BOXES[3:4]).to(device)
    _, count, launches = kernel._launches(masks, boxes, None, None, *SIZE, 0.5, 3)
    around = torch.full((500,), -7, dtype=torch.int32, device=device)
    for launch in launches:
        if "ends_ptr" in launch.arguments:
            launch.arguments["ends_ptr"] = around[:3]
        launch.run()
    assert count > 20
    assert (around[:3] >= 0).all()
    assert (around[3:] == -7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_objects_of_images_of_several_sizes(device: str) -> None:
    masks, boxes = random_masks(4, 7).to(device), torch.tensor(BOXES[1:5]).to(device)
    sizes = torch.tensor([[37, 43], [20, 43], [37, 15], [1, 1]], device=device)
    runs, count = mask_rle(masks, boxes, *SIZE, sizes=sizes, max_runs=300)
    for index, (height, width) in enumerate(sizes.tolist()):
        own = slice(index, index + 1)
        alone, number = mask_rle(masks[own], boxes[own], height, width, max_runs=300)
        assert torch.equal(alone, runs[own])
        assert torch.equal(number, count[own])
        assert alone.sum() == height * width


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_sizes_of_every_integer_type(dtype: torch.dtype, device: str) -> None:
    """Also where that of the largest image is too large for it."""
    masks, boxes = torch.ones(1, 5, 5, device=device), torch.tensor([[2.0, 1, 8, 9]], device=device)
    sizes = torch.tensor([[6, 7]], dtype=dtype, device=device)
    found = mask_rle(masks, boxes, 256, 300, sizes=sizes, max_runs=20)
    alone = mask_rle(masks, boxes, 6, 7, max_runs=20)
    assert alone[1] > 2
    assert all(a.equal(b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_out_of_range_are_clamped_where_they_are_not_read(device: str) -> None:
    """Eager CPU tensors raise, see below."""
    masks, boxes = random_masks(3, 7).to(device), torch.tensor(BOXES[3:4] * 3).to(device)
    sizes = torch.tensor([[99, 1 << 40], [-5, 9], [37, 43]], device=device)
    compiled = torch.compile(mask_rle, fullgraph=True, backend="aot_eager")
    runs, count = compiled(masks[[0, 1, 0]], boxes, *SIZE, sizes=sizes, max_runs=300)
    assert torch.equal(runs[0], runs[2])
    assert count[0] == count[2] > 1
    assert count[1] == 1
    assert not runs[1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_there_is_one_run_of_zeros(device: str) -> None:
    boxes = torch.tensor([BOXES[0], *NOTHING, BOXES[0], BOXES[0], [1e9, 1e9, 2e9, 2e9]]).to(device)
    masks = torch.ones(len(boxes), 5, 5, device=device)
    valid = torch.ones(len(boxes), dtype=torch.bool, device=device)
    valid[-2] = False
    masks[-2] = torch.nan
    runs, count = mask_rle(masks, boxes, *SIZE, valid=valid, max_runs=60)
    assert count[0] > 1
    assert torch.equal(runs[0], runs[-3])
    empty = torch.cat((runs[1:-3], runs[-2:])).cpu()
    assert (empty[:, 0] == SIZE[0] * SIZE[1]).all()
    assert not empty[:, 1:].any()
    assert (torch.cat((count[1:-3], count[-2:])) == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_full_image_is_an_empty_run_and_a_full_one(device: str) -> None:
    boxes = torch.tensor([[-1e6, -1e6, 1e6, 1e6]], device=device)
    runs, count = mask_rle(torch.ones(1, 28, 28, device=device), boxes, *SIZE, max_runs=4)
    assert runs.tolist() == [[0, SIZE[0] * SIZE[1], 0, 0]]
    assert count.tolist() == [2]


@settings(max_examples=6 if interpreting() else 50, deadline=None, derandomize=True)
@given(corners=corners, size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_any_box(corners: list[float], size: tuple[int, int]) -> None:
    masks, boxes = random_masks(2, 6), torch.tensor(corners).view(2, 4)
    found = mask_rle(masks, boxes, *size, max_runs=900)
    assert encoded(*found, *size) == encoded_by_pycocotools(paste_masks(masks, boxes, *size))
    for ours, theirs in zip(
        found, reference.mask_rle(masks, boxes, None, None, *size, 0.5, 900), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    """opcheck, one graph, strides and dtypes of any kind, and the same runs every time."""
    masks = random_masks(3, 5).to(device).mT.contiguous().mT
    boxes = torch.tensor([BOXES[0], BOXES[6], BOXES[5]]).to(device).T.contiguous().T
    valid = torch.tensor([True, False, True]).to(device)
    sizes = torch.tensor([[37, 43], [30, 30], [20, 43]]).to(device)
    torch.library.opcheck(op._mask_rle, (masks, boxes, sizes, valid, *SIZE, 0.5, 90))
    options: dict[str, Any] = {"sizes": sizes, "valid": valid, "max_runs": 90}
    eager = mask_rle(masks, boxes, *SIZE, **options)
    compiled = torch.compile(mask_rle, fullgraph=True, backend="aot_eager")(masks, boxes, *SIZE, **options)
    plain = mask_rle(masks.contiguous(), boxes.contiguous(), *SIZE, **options)
    double = mask_rle(masks.double(), boxes, *SIZE, **options)
    for other in (compiled, plain, double):
        assert all(a.equal(b) for a, b in zip(eager, other, strict=True))
    half = masks.half()
    rounded = mask_rle(half, boxes, *SIZE, max_runs=90)
    widened = mask_rle(half.float(), boxes, *SIZE, max_runs=90)
    assert all(a.equal(b) for a, b in zip(rounded, widened, strict=True))


def test_nothing_to_encode() -> None:
    runs, count = mask_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), 5, 6, max_runs=7)
    assert runs.shape == (0, 7)
    assert count.shape == (0,)


def test_bad_input() -> None:
    arguments: dict[str, Any] = {
        "masks": torch.zeros(2, 5, 5),
        "boxes": torch.zeros(2, 4),
        "height": 8,
        "width": 9,
    }
    for change, message in (
        ({"masks": torch.zeros(2, 5)}, r"masks must be \(D, M, M\) .* got \(2, 5\)"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        ({"max_runs": 0}, "max_runs must be at least 1, got 0"),
        ({"height": 1 << 16, "width": 1 << 15}, r"fewer than 2\^31 pixels, got 65536 x 32768"),
        ({"sizes": torch.zeros(2, 3).long()}, r"sizes must be \(2, 2\) .* got \(2, 3\)"),
        ({"sizes": torch.zeros(2, 2)}, "sizes must be of an integer dtype, got torch.float32"),
        ({"sizes": torch.tensor([[8, 9], [9, 9]])}, r"heights in sizes must be in 0..8, got \[9\]"),
        ({"sizes": torch.tensor([[8, -1], [8, 9]])}, r"widths in sizes must be in 0..9, got \[-1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_rle(**{**arguments, **change})
