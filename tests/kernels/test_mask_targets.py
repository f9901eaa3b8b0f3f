"""Mask targets against a computation pixel by pixel, and against torchvision's on the same bitmaps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import golden_models as peers
import numpy as np
import pytest
import torch
from torch import Tensor

from fastmrcnn.kernels.mask_targets import mask_targets

Matrix = list[list[float]]
HEIGHT, WIDTH = 37, 53  # of the annotated image


class Case(NamedTuple):
    """An annotated image, and how its input came from it."""

    affine: Matrix  # input -> annotation
    size: tuple[int, int]  # height, width of the input


IDENTITY = Case([[1, 0, 0], [0, 1, 0]], (HEIGHT, WIDTH))
CASES = {
    "identity": IDENTITY,
    "enlarged": Case([[0.5, 0, 0], [0, 0.5, 0]], (2 * HEIGHT, 2 * WIDTH)),
    "shrunk": Case([[WIDTH / 31, 0, 0], [0, HEIGHT / 23, 0]], (23, 31)),
    "flipped": Case([[-1, 0, WIDTH], [0, 1, 0]], (HEIGHT, WIDTH)),
    "upside-down": Case([[1, 0, 0], [0, -1, HEIGHT]], (HEIGHT, WIDTH)),
    "turned": Case([[0, 1, 0], [-1, 0, HEIGHT]], (WIDTH, HEIGHT)),
    "turned-enlarged": Case([[0, -0.5, WIDTH], [0.5, 0, 0]], (2 * WIDTH, 2 * HEIGHT)),
    "cropped": Case([[1, 0, 11], [0, 1, 5]], (20, 30)),
}


class Tables(NamedTuple):
    """Objects of two images: three, of which the last has no window, and one."""

    bitmaps: np.ndarray  # (2, 3, HEIGHT, WIDTH)
    arguments: dict[str, Any]


def tables(case: Case, seed: int = 0) -> Tables:
    r = np.random.default_rng(seed)
    windows = np.array([[[3, 4, 20, 17], [30, 11, 23, 26], [0, 0, 0, 0]], [[0, 0, 53, 37], [0] * 4, [0] * 4]])
    bitmaps = np.zeros((2, 3, HEIGHT, WIDTH), np.uint8)
    offset = np.zeros((2, 3), np.int64)
    chunks = [np.ones(5, np.uint8)]  # what stands before the first crop belongs to none
    for image, slot in ((0, 0), (0, 1), (1, 0)):
        x, y, w, h = windows[image, slot]
        crop = (r.random((h, w)) < 0.5).astype(np.uint8)
        bitmaps[image, slot, y : y + h, x : x + w] = crop
        offset[image, slot] = sum(map(len, chunks))
        chunks.append(crop.ravel())
    chunks.append(np.ones(7, np.uint8))
    height, width = case.size
    return Tables(
        bitmaps,
        {
            "buffer": torch.from_numpy(np.concatenate(chunks)),
            "offset": torch.from_numpy(offset),
            "window": torch.from_numpy(windows.astype(np.int32)),
            "to_annotation": torch.tensor([case.affine, case.affine], dtype=torch.float32),
            "size": torch.tensor([[HEIGHT, WIDTH]] * 2, dtype=torch.int32),
            "image_sizes": torch.tensor([case.size, case.size]),
            "image_shape": (height + 9, width + 6),
        },
    )


def boxes_of(case: Case) -> Tensor:
    """In the middle, the whole image, at its borders, thin, and of no area."""
    height, width = case.size
    shares = [
        [0.21, 0.13, 0.72, 0.81],
        [0, 0, 1, 1],
        [0, 0, 0.3, 0.2],
        [0.66, 0.71, 1, 1],
        [0.4, 0.1, 0.42, 0.9],
        [0.5, 0.5, 0.5, 0.5],
    ]
    return torch.tensor(shares) * torch.tensor([width, height, width, height])


def bilinear(bitmap: np.ndarray, u: float, v: float) -> float:
    """RoIAlign's read: zero beyond a pixel outside, clamped to the border within it."""
    height, width = bitmap.shape
    if not (-1 <= u <= width and -1 <= v <= height):
        return 0.0
    u, v = min(max(u, 0.0), width - 1), min(max(v, 0.0), height - 1)
    u0, v0 = math.floor(u), math.floor(v)
    u1, v1 = min(u0 + 1, width - 1), min(v0 + 1, height - 1)
    du, dv = u - u0, v - v0
    top = bitmap[v0, u0] * (1 - du) + bitmap[v0, u1] * du
    return top * (1 - dv) + (bitmap[v1, u0] * (1 - du) + bitmap[v1, u1] * du) * dv


def by_pixel(
    bitmap: np.ndarray, box: list[float], affine: Matrix, resolution: int, ratio: int, aligned: bool
) -> np.ndarray:
    """Every sample by itself, in double precision."""
    x0, y0, x1, y1 = box
    shift = 0.0 if aligned else 0.5
    width, height = x1 - x0, y1 - y0
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    out = np.zeros((resolution, resolution))
    for i in range(resolution):
        for j in range(resolution):
            for a in range(ratio):
                for b in range(ratio):
                    y = y0 + shift + (i + (a + 0.5) / ratio) * height / resolution
                    x = x0 + shift + (j + (b + 0.5) / ratio) * width / resolution
                    u, v = (row[0] * x + row[1] * y + row[2] - 0.5 for row in affine)
                    out[i, j] += bilinear(bitmap, u, v) / ratio**2
    return out


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_each_pixel(name: str, aligned: bool) -> None:
    case = CASES[name]
    boxes = boxes_of(case)
    bitmaps, arguments = tables(case)
    for image, matched in ((0, 0), (0, 1), (0, 2), (1, 0)):
        count = len(boxes)
        found = mask_targets(
            boxes,
            torch.full((count,), image),
            torch.full((count,), matched),
            **arguments,
            resolution=5,
            sampling_ratio=2,
            aligned=aligned,
        )
        assert found.dtype == torch.float32
        for box, target in zip(boxes.tolist(), found.numpy(), strict=True):
            expected = by_pixel(bitmaps[image, matched], box, case.affine, 5, 2, aligned)
            np.testing.assert_allclose(target, expected, atol=2e-4)
        if matched == 2:
            assert not found.any()  # an object without a window


@pytest.mark.parametrize("ratio", [1, 2, 3, 0])
def test_rois_of_both_images_in_any_order(ratio: int) -> None:
    case = CASES["enlarged"]
    boxes = boxes_of(case)[[3, 0, 1, 2, 0]]
    image, matched = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([0, 1, 0, 0, 2])
    arguments = tables(case).arguments
    together = mask_targets(boxes, image, matched, **arguments, resolution=7, sampling_ratio=ratio)
    for row in range(5):
        one = slice(row, row + 1)
        alone = mask_targets(
            boxes[one], image[one], matched[one], **arguments, resolution=7, sampling_ratio=ratio
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize(
    ("name", "flip"),
    [
        ("flipped", lambda mask: mask.flip(-1)),
        ("upside-down", lambda mask: mask.flip(-2)),
        ("turned", lambda mask: mask.mT.flip(-1)),
    ],
)
def test_a_flipped_input_has_the_flipped_target(name: str, flip: Any, ratio: int) -> None:
    """Boxes at multiples of a mask pixel's quarter, so that not even rounding differs."""
    boxes = torch.tensor([[4.0, 8.0, 18.0, 36.0], [0.0, 0.0, 28.0, 28.0], [32.0, 8.0, 53.0, 29.0]])
    x0, y0, x1, y1 = boxes.unbind(1)
    moved = {
        "flipped": torch.stack([WIDTH - x1, y0, WIDTH - x0, y1], 1),
        "upside-down": torch.stack([x0, HEIGHT - y1, x1, HEIGHT - y0], 1),
        "turned": torch.stack([HEIGHT - y1, x0, HEIGHT - y0, x1], 1),
    }[name]
    image, matched = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
    options = {"resolution": 14, "sampling_ratio": ratio}
    straight = mask_targets(boxes, image, matched, **tables(IDENTITY).arguments, **options)
    turned = mask_targets(moved, image, matched, **tables(CASES[name]).arguments, **options)
    assert straight.std() > 0.1
    torch.testing.assert_close(turned, flip(straight), rtol=0, atol=0)


def test_a_crop_stands_for_the_whole_bitmap() -> None:
    """What lies outside the window is zero, whichever window was chosen."""
    case = CASES["shrunk"]
    bitmaps, arguments = tables(case)
    whole = {
        **arguments,
        "buffer": torch.from_numpy(bitmaps.reshape(-1).copy()),
        "offset": (torch.arange(6) * HEIGHT * WIDTH).reshape(2, 3),
        "window": torch.tensor([0, 0, WIDTH, HEIGHT], dtype=torch.int32).expand(2, 3, 4),
    }
    boxes = boxes_of(case)
    image, matched = torch.tensor([0, 0, 1, 0, 1, 0]), torch.tensor([0, 1, 0, 2, 0, 1])
    for ratio in (2, 0):
        a, b = (
            mask_targets(boxes, image, matched, **table, resolution=6, sampling_ratio=ratio)
            for table in (arguments, whole)
        )
        assert torch.equal(a, b)


def golden_case() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    data = peers.golden("region_ops.npz")
    height, width = int(data["mask/height"]), int(data["mask/width"])
    bitmaps = np.unpackbits(data["mask/bitmaps"], axis=-1)[..., :width]
    count = len(bitmaps)
    arguments = {
        "boxes": torch.from_numpy(data["mask/proposals"]),
        "image": torch.zeros(len(data["mask/match"]), dtype=torch.int64),
        "matched": torch.from_numpy(data["mask/match"]),
        "buffer": torch.from_numpy(bitmaps.reshape(-1).copy()),
        "offset": (torch.arange(count) * height * width)[None],
        "window": torch.tensor([0, 0, width, height], dtype=torch.int32).expand(1, count, 4),
        "to_annotation": torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]),
        "size": torch.tensor([[height, width]], dtype=torch.int32),
        "image_sizes": torch.tensor([[height, width]]),
        "image_shape": (height, width),
        "resolution": 28,
        "sampling_ratio": 0,
    }
    return data, arguments


def test_torchvisions_targets() -> None:
    data, arguments = golden_case()
    found = mask_targets(**arguments, aligned=False)
    np.testing.assert_allclose(found.numpy(), data["mask/target_bitmap_roialign"], atol=2e-5)


def test_the_two_peers_differ_and_so_do_ours() -> None:
    """detectron2 shifts by half a pixel and then asks for a half: another target, at the borders only."""
    data, arguments = golden_case()
    soft = torch.from_numpy(data["mask/target_bitmap_roialign"])
    hard = mask_targets(**arguments, aligned=True) >= 0.5
    share = ((soft >= 0.5) != hard).float().mean()
    assert 0 < share < 0.05


def test_no_roi() -> None:
    arguments = tables(IDENTITY).arguments
    empty = torch.zeros(0, dtype=torch.int64)
    for ratio in (2, 0):
        found = mask_targets(torch.zeros(0, 4), empty, empty, **arguments, resolution=4, sampling_ratio=ratio)
        assert found.shape == (0, 4, 4)
