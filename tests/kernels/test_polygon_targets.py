"""Mask targets from polygons, bit for bit those of detectron2, which asks pycocotools for them.

CPU tensors run cpu.py, or Triton's kernel if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import INTEGERS
from nosync import NoSync
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastmrcnn.kernels.common.library import interpreting
from fastmrcnn.kernels.polygon_targets import naive
from fastmrcnn.kernels.polygon_targets.op import _polygon_mask_targets, polygon_mask_targets

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])
Points = NDArray[np.float64]  # (n, 2)
Object = list[Points]


def by_pycocotools(objects: list[Object], boxes: NDArray[np.float32], resolution: int) -> NDArray[np.bool_]:
    """detectron2's: shift by the box, scale to the grid, let pycocotools do the rest."""
    masks = np.zeros((len(objects), resolution, resolution), np.bool_)
    for mask, parts, box in zip(masks, objects, boxes, strict=True):
        if not parts or not np.isfinite(box).all():
            continue
        side = box[2:] - box[:2]
        ratio = np.float32(resolution) / np.maximum(side, np.float32(0.1))
        polygons = [((part - box[:2]) * ratio).ravel() for part in parts]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, resolution, resolution))
        mask[:] = coco_mask.decode(rle)
    return masks


def tables(objects: list[Object], affine: Points = IDENTITY, spare: int = 3) -> dict[str, torch.Tensor]:
    """Objects of one image; some vertices and parts at the end belong to none."""
    parts = [part for item in objects for part in item]
    count = np.array([len(item) for item in objects], np.int32)
    lengths = np.array([0, *map(len, parts), *[0] * spare])
    vertices = np.concatenate([*parts, np.full((spare, 2), 7.0)])
    most = max((sum(map(len, item)) for item in objects), default=0)
    return {
        "vertices": torch.from_numpy(vertices),
        "part_start": torch.from_numpy(np.cumsum(lengths).astype(np.int32)),
        "first_part": torch.from_numpy((np.cumsum(count) - count).astype(np.int32))[None],
        "parts": torch.from_numpy(count)[None],
        "to_input": torch.from_numpy(np.array(affine, np.float64))[None],
        "step": torch.arange(most + spare),
    }


def rasterise(
    objects: list[Object],
    boxes: NDArray[np.float32],
    resolution: int,
    affine: Points = IDENTITY,
    device: str = "cpu",
    by: Callable[..., torch.Tensor] = polygon_mask_targets,
) -> NDArray[np.bool_]:
    """Each object on the grid of the box beside it."""
    matched = torch.arange(len(objects), device=device)
    found = by(
        torch.from_numpy(boxes).to(device),
        torch.zeros_like(matched),
        matched,
        **{name: table.to(device) for name, table in tables(objects, affine).items()},
        resolution=resolution,
    )
    assert found.dtype == torch.bool
    return found.cpu().numpy()


def random_objects(seed: int, count: int) -> tuple[list[Object], NDArray[np.float32]]:
    """Scribbles and stars of any size; coordinates on lattices, so that roundings tie, and off them."""
    r = np.random.default_rng(seed)
    objects, boxes = [], []
    for number in range(count):
        side = 10 ** r.uniform(-1.5, 2.8)
        centre = r.uniform(0, 1000, 2)
        parts = []
        for _ in range(r.integers(1, 4)):
            corners = int(r.integers(3, 12))
            points = r.uniform(-0.7, 0.7, (corners, 2)) * side * 10 ** r.uniform(-1.5, 0.7) + centre
            kind = number % 6
            if kind == 1:
                points = np.round(points * 8) / 8
            elif kind == 2:
                points = np.round(points, 1)
            elif kind == 3:
                points = np.repeat(points, 2, axis=0)  # edges without length
            elif kind == 4:
                points[:, r.integers(2)] = points[0, 0]  # without area
            elif kind == 5:
                angle = np.sort(r.uniform(0, 2 * np.pi, corners))
                points = centre + side * np.stack([np.cos(angle), np.sin(angle)], 1) / 2
            parts.append(points)
        objects.append(parts)
        box = np.concatenate([centre - side * r.uniform(0.2, 0.8, 2), centre + side * r.uniform(0.2, 0.8, 2)])
        boxes.append(np.round(box * 4) / 4 if number % 6 in (1, 2) else box)
    return objects, np.array(boxes, np.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    expected, match, boxes = load("mask/target_polygon", "mask/match", "mask/proposals")
    some = slice(0, 1 if interpreting() else None)
    polygons = load(*(f"mask/polygon{index}" for index in range(6)))
    objects = [[polygons[index].numpy().reshape(-1, 2)] for index in match[some].tolist()]
    found = rasterise(objects, boxes[some].numpy(), 28, device=device)
    assert (found == np.unpackbits(expected[some].numpy(), axis=-1)[..., :28]).all()


@pytest.mark.skipif(interpreting(), reason="no kernel has a part in it")
@pytest.mark.parametrize(("resolution", "count"), [(28, 30), (9, 90), (1, 30)])
def test_the_definition_is_pycocotools(resolution: int, count: int) -> None:
    objects, boxes = random_objects(resolution + 100, count)
    found = rasterise(objects, boxes, resolution, by=naive.polygon_mask_targets)
    assert found.any()
    np.testing.assert_array_equal(found, by_pycocotools(objects, boxes, resolution))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("resolution", "count"),
    [(28, 900), (14, 600), (33, 60), (1, 30), (70, 30)] if not interpreting() else [(9, 12)],
)
def test_random_polygons(resolution: int, count: int, device: str) -> None:
    objects, boxes = random_objects(resolution, count)
    found = rasterise(objects, boxes, resolution, device=device)
    assert found.any()
    np.testing.assert_array_equal(found, by_pycocotools(objects, boxes, resolution))


# Quarters, tenths and halves of a fine pixel are where roundings tie.
coordinate = st.one_of(
    st.integers(-40, 90).map(lambda n: n / 10),
    st.integers(-40, 90).map(lambda n: n / 8),
    st.floats(-10, 20, width=32),
    st.sampled_from([-3000.0, 4000.5, 1e-9, -1e-9]),
)
polygon = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=9).map(
    lambda points: np.array(points, np.float64)
)


@settings(max_examples=10 if interpreting() else 80, deadline=None)
@given(
    parts=st.lists(polygon, max_size=3),
    corner=st.tuples(coordinate, coordinate),
    side=st.tuples(*[st.sampled_from([7.0, 3.5, 1.0, 0.1, 0.05, 0.0, -2.0, 10.3])] * 2),
)
def test_any_polygon(parts: Object, corner: tuple[float, float], side: tuple[float, float]) -> None:
    box = np.array([[*corner, corner[0] + side[0], corner[1] + side[1]]], np.float32)
    found = rasterise([parts], box, 7)
    np.testing.assert_array_equal(found, by_pycocotools([parts], box, 7))
    if all(np.abs(part).max() < 100 for part in parts):  # farther, a chain of points is long
        np.testing.assert_array_equal(found, rasterise([parts], box, 7, by=naive.polygon_mask_targets))


@pytest.mark.parametrize("device", DEVICES)
def test_resized_and_flipped_as_detectron2_does(device: str) -> None:
    """It scales the coordinates by new / old, then takes them from the width; so does the affine map."""
    objects, _ = random_objects(1, 4)
    width, scale = 517.0, (517 / 640, 411 / 480)
    affine = np.array([[-scale[0], 0, width], [0, scale[1], 0]])
    moved = [[part * np.array(scale) for part in item] for item in objects]
    for item in moved:
        for part in item:
            part[:, 0] = width - part[:, 0]
    spans = [np.concatenate(item) for item in moved]
    boxes = np.array([[*span.min(0), *span.max(0)] for span in spans], np.float32)
    found = rasterise(objects, boxes, 8, affine, device)
    np.testing.assert_array_equal(found, by_pycocotools(moved, boxes, 8))


@pytest.mark.parametrize("device", DEVICES)
def test_a_quarter_turn(device: str) -> None:
    """x and y change places in the map."""
    part = np.array([[1.0, 2], [9, 2], [9, 4], [1, 4]])
    turned = rasterise(
        [[part]], np.array([[0, 0, 8, 10]], np.float32), 8, np.array([[0, 1.0, 0], [-1, 0, 10]]), device
    )
    straight = np.array([[2.0, 9], [2, 1], [4, 1], [4, 9]])
    expected = by_pycocotools([[straight]], np.array([[0, 0, 8, 10]], np.float32), 8)
    assert expected.any()
    np.testing.assert_array_equal(turned, expected)


def two_images() -> dict[str, Any]:
    """Boxes in any order about objects of two images: squares, the last of two parts, one of none."""

    def square(x: float, y: float, side: float) -> Points:
        return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])

    objects = [[square(0, 0, 4)], [], [square(4, 4, 4)], [square(0, 0, 2), square(6, 6, 2)]]
    table = tables(objects)
    return {
        "boxes": torch.tensor([[0.0, 0, 8, 8]]).repeat(4, 1),
        "image": torch.tensor([1, 0, 0, 1]),
        "matched": torch.tensor([1, 1, 0, 0]),
        **table,
        "first_part": table["first_part"].reshape(2, 2),
        "parts": table["parts"].reshape(2, 2),
        "to_input": table["to_input"].repeat(2, 1, 1),
        "resolution": 8,
    }


@pytest.mark.parametrize("device", DEVICES)
def test_boxes_find_their_objects(device: str) -> None:
    arguments = two_images()
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    found = polygon_mask_targets(**on_device).cpu()
    expected = torch.zeros(4, 8, 8, dtype=torch.bool)
    expected[0, :2, :2] = expected[0, 6:, 6:] = True
    expected[2, :4, :4] = True
    expected[3, 4:, 4:] = True
    assert found.equal(expected)
    assert naive.polygon_mask_targets(**arguments).equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_each_object_may_have_its_own_map(device: str) -> None:
    arguments = two_images()
    maps = arguments["to_input"][:, None].repeat(1, 2, 1, 1)
    maps[1, 0] = torch.tensor([[0.0, 2, -8], [1, 0, 0]], dtype=torch.float64)  # turned, wider, and moved
    arguments["to_input"] = maps
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    found = polygon_mask_targets(**on_device).cpu()
    expected = torch.zeros(4, 8, 8, dtype=torch.bool)
    expected[0, :2, :2] = expected[0, 6:, 6:] = True
    expected[2, :4, :4] = True
    expected[3, 4:, :8] = True
    assert found.equal(expected)
    assert naive.polygon_mask_targets(**arguments).equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices_of_every_integer_type(dtype: torch.dtype, device: str) -> None:
    """Also where there are more images and slots than it counts."""
    arguments = two_images()
    for name in ("first_part", "parts", "to_input"):
        arguments[name] = torch.cat([arguments[name]] * 128)
    for name in ("first_part", "parts"):
        arguments[name] = torch.cat([arguments[name]] * 128, dim=1)
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    expected = polygon_mask_targets(**arguments)
    assert expected.any()
    narrow = {name: arguments[name].to(dtype) for name in ("image", "matched", "step")}
    assert polygon_mask_targets(**{**arguments, **narrow}).equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_boxes_that_are_not_finite_give_zeros(device: str) -> None:
    part = np.array([[0.0, 0], [8, 0], [8, 8], [0, 8]])
    boxes = np.array([[0, 0, 8, 8], [np.nan, 0, 8, 8], [0, 0, np.inf, 8], [0, -np.inf, 8, 8]], np.float32)
    found = rasterise([[part]] * 4, boxes, 4, device=device)
    assert found[0].all()
    assert not found[1:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_no_box(device: str) -> None:
    assert rasterise([], np.zeros((0, 4), np.float32), 5, device=device).shape == (0, 5, 5)


def test_never_reads_the_device() -> None:
    inputs = two_images()
    with NoSync():
        found = polygon_mask_targets(**inputs)
    assert found.any()


def test_opcheck() -> None:
    *tensors, resolution = two_images().values()
    torch.library.opcheck(_polygon_mask_targets, (*tensors, resolution))
    tensors[0] = tensors[0].t().contiguous().t()  # columns first
    torch.library.opcheck(_polygon_mask_targets, (*tensors, resolution))
    torch.testing.assert_close(
        _polygon_mask_targets(*tensors, resolution), polygon_mask_targets(**two_images())
    )


def test_one_graph() -> None:
    def scaled(boxes: torch.Tensor, rest: dict[str, Any]) -> torch.Tensor:
        return polygon_mask_targets(boxes * 2, **rest).float().mean((1, 2))

    rest = two_images()
    boxes = rest.pop("boxes")
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(boxes, rest), scaled(boxes, rest))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("boxes", torch.zeros(4, 5), r"boxes must be \(T, 4\), got \(4, 5\)"),
        ("boxes", torch.zeros(4, 4, dtype=torch.int64), "boxes must be floating point, got torch.int64"),
        ("image", torch.zeros(3, dtype=torch.int64), r"image must be \(4,\) .* got \(3,\)"),
        ("image", torch.full((4,), 2), r"image must be in 0\.\.1, got \[2, 2"),
        ("matched", torch.full((4,), -1), r"matched must be in 0\.\.1, got \[-1"),
        ("matched", torch.zeros(4), "matched must be of an integer dtype, got torch.float32"),
        ("vertices", torch.zeros(9, 2), "vertices must be float64, got torch.float32"),
        ("vertices", torch.zeros(0, 2, dtype=torch.float64), "at least 1"),
        ("first_part", torch.zeros(2, dtype=torch.int32), r"first_part must be \(N, G\)"),
        ("parts", torch.zeros(2, 3, dtype=torch.int32), r"parts must be \(2, 2\) .* got \(2, 3\)"),
        ("to_input", torch.zeros(1, 2, 3, dtype=torch.float64), r"to_input must be \(2, 2, 3\)"),
        ("step", torch.zeros(2, 2, dtype=torch.int64), r"step must be \(E,\)"),
        ("part_start", torch.zeros(9, dtype=torch.int32, device="meta"), "part_start must be on cpu"),
        ("resolution", 0, "resolution must be at least 1"),
    ],
)
def test_refuses(name: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        polygon_mask_targets(**{**two_images(), name: value})


def test_compiled_boxes_out_of_range_give_zeros() -> None:
    arguments = {**two_images(), "image": torch.tensor([1, 0, 7, -1]), "matched": torch.tensor([1, 5, 0, 0])}
    found = torch.compile(polygon_mask_targets, backend="eager", fullgraph=True)(**arguments)
    assert found.equal(naive.polygon_mask_targets(**arguments))
    assert found[0].any()
    assert not found[1:].any()
