"""Resizing, flips and turns: pixels, boxes and the map to the annotation tell one story."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastmrcnn.data.affine import transform_boxes
from fastmrcnn.data.buckets import choose_buckets, resolve_buckets, smallest_bucket
from fastmrcnn.data.transforms import (
    DRAWS,
    Augment,
    Plan,
    apply_plan,
    draws,
    image_to_input,
    input_to_image,
    plan_image,
    resize,
    resized_size,
)
from fastmrcnn.errors import UserError

plans = st.builds(
    lambda turns, h, v: {"turns": turns, "flip_horizontal": h, "flip_vertical": v},
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def test_draws_belong_to_the_sample_alone() -> None:
    many = draws(5, 100, 50)
    assert many.shape == (50, DRAWS)
    for index in (0, 1, 17, 49):
        np.testing.assert_array_equal(draws(5, 100 + index)[0], many[index])
    assert not np.array_equal(draws(6, 100)[0], many[0])
    numbers = draws(0, 0, 4000)
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_allclose(numbers.mean(axis=0), 0.5, atol=0.02)  # 4 standard deviations
    np.testing.assert_allclose(numbers.var(axis=0), 1 / 12, atol=0.006)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((128, 128), 256, 256, (256, 256)),
        ((1000, 2), 800, 1333, (1333, 3)),
        ((1000, 1), 10, 10, (10, 1)),
    ],
)
def test_resize_rule(size: tuple[int, int], short: int, longest: int, expected: tuple[int, int]) -> None:
    assert resized_size(*size, short, longest) == expected


@settings(max_examples=200, deadline=None)
@given(sizes, plans, st.integers(0, 10_000))
def test_flips_and_turns_move_masks_and_boxes_alike(
    size: tuple[int, int], changes: dict[str, int], seed: int
) -> None:
    """The mask read through the affine at each pixel's centre is the mask that was turned itself."""
    rng = np.random.default_rng(seed)
    mask = (rng.random(size) < 0.3).astype(np.uint8)
    mask[rng.integers(size[0]), rng.integers(size[1])] = 1
    plan = Plan(resized=size, **changes)
    turned = apply_plan(np.repeat(mask[:, :, None], 3, axis=2), plan)[:, :, 0]
    assert turned.shape == plan.size
    back = input_to_image(plan, *size)
    np.testing.assert_array_equal(read_through(back, mask, plan.size), turned)
    box = transform_boxes(extent(mask)[None], image_to_input(plan, *size))
    np.testing.assert_array_equal(box[0], extent(turned))


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 60), st.integers(30, 80), plans)
def test_the_affines_undo_each_other(
    size: tuple[int, int], short: int, longest: int, changes: dict[str, int]
) -> None:
    plan = Plan(resized=resized_size(*size, short, longest), **changes)
    forward, back = image_to_input(plan, *size), input_to_image(plan, *size)
    corners = np.array([[0.0, 0, size[1], size[0]], [0, 0, 1, 1]])
    moved = transform_boxes(corners, forward)
    height, width = plan.size
    np.testing.assert_allclose(moved[0], [0, 0, width, height], atol=1e-9)  # the image covers the image
    np.testing.assert_allclose(transform_boxes(moved, back), corners, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"turns": 1}, {"turns": 3, "flip_vertical": True}])
def test_scaled_masks_agree_with_scaled_pictures(changes: dict[str, int]) -> None:
    y, x = np.mgrid[:60, :90]
    mask = (((x - 40) / 30) ** 2 + ((y - 33) / 20) ** 2 < 1).astype(np.uint8)
    plan = Plan(resized=resized_size(60, 90, 148, 400), **changes)
    assert plan.resized == (148, 222)
    picture = apply_plan(resize(np.repeat(mask[:, :, None] * 255, 3, axis=2), plan.resized), plan)[:, :, 0]
    mapped = read_through(input_to_image(plan, 60, 90), mask, plan.size).astype(bool)
    scaled = picture >= 128
    iou = (mapped & scaled).sum() / (mapped | scaled).sum()
    assert iou > 0.98  # the border differs by less than one pixel of the original
    box = transform_boxes(extent(mask)[None], image_to_input(plan, 60, 90))[0]
    np.testing.assert_allclose(box, extent(scaled), atol=1.3)


def test_brightness_and_contrast() -> None:
    pixels = np.array([[[0, 100, 200]], [[50, 100, 150]]], np.uint8)  # mean 100
    same = (2, 1)
    assert apply_plan(pixels, Plan(same, brightness=0.5)).ravel().tolist() == [0, 50, 100, 25, 50, 75]
    assert apply_plan(pixels, Plan(same, contrast=0.5)).ravel().tolist() == [50, 100, 150, 75, 100, 125]
    assert apply_plan(pixels, Plan(same, contrast=0)).ravel().tolist() == [100] * 6
    assert apply_plan(pixels, Plan(same, brightness=2)).ravel().tolist() == [0, 200, 255, 100, 200, 255]
    assert pixels[0, 0, 2] == 200  # left as it was


def test_plans_follow_the_probabilities() -> None:
    augment = Augment(flip_horizontal=0.5, rotate90=0.25, brightness=0.2, contrast=0.4)
    made = [plan_image(20, 30, row, [16, 32, 48], 99, augment) for row in draws(1, 0, 4000)]
    share = {
        "flip": np.mean([p.flip_horizontal for p in made]),
        "vertical": np.mean([p.flip_vertical for p in made]),
        "left": np.mean([p.turns == 1 for p in made]),
        "right": np.mean([p.turns == 3 for p in made]),
        "half": np.mean([p.turns == 2 for p in made]),
    }
    expected = {"flip": 0.5, "vertical": 0, "left": 0.125, "right": 0.125, "half": 0}
    assert share == pytest.approx(expected, abs=0.032)  # 4 standard deviations
    assert {p.resized for p in made} == {(16, 24), (32, 48), (48, 72)}
    assert {p.size for p in made if p.turns} == {(24, 16), (48, 32), (72, 48)}
    brightness, contrast = np.array([(p.brightness, p.contrast) for p in made]).T
    assert (brightness.min(), brightness.max()) == pytest.approx((0.8, 1.2), abs=0.001)
    assert (contrast.min(), contrast.max()) == pytest.approx((0.6, 1.4), abs=0.002)
    still = plan_image(20, 30, draws(1, 0)[0], [16], 99, Augment())
    assert still == Plan((16, 24))


def test_buckets() -> None:
    assert choose_buckets([(480, 640), (427, 640), (640, 480)], [800], 1333) == [(800, 1216), (1088, 800)]
    assert choose_buckets([(480, 640), (300, 900), (900, 300)], [800], 1333) == [(800, 1344), (1344, 448)]
    assert choose_buckets([(128, 128)], [256], 256) == [(256, 256)]
    assert choose_buckets([(128, 128), (256, 256)], [100], 256) == [(128, 128)]
    assert choose_buckets([(100, 200)], [64], 256) == [(64, 128)]
    assert choose_buckets([(100, 200)], [64], 256, turns=True) == [(64, 128), (128, 64)]
    assert smallest_bucket((30, 60), [(64, 128), (64, 64)]) == (64, 64)
    assert smallest_bucket((65, 60), [(64, 128), (64, 64)]) is None


def test_a_large_set_gets_a_second_bucket_where_that_saves_padding() -> None:
    # 4:3 mostly, as COCO is: 800 x 1067 in 800 x 1088, and few that are wider.
    common, wide = [(480, 640)] * 900, [(400, 700)] * 60 + [(300, 640)] * 40
    portrait = [(640, 480)] * 99
    buckets = choose_buckets(common + wide + portrait, [800], 1333)
    assert buckets == [(800, 1344), (800, 1088), (1088, 800)]
    assert smallest_bucket((800, 1067), buckets) == (800, 1088)
    # No second one where next to nothing would be saved.
    assert choose_buckets([(480, 640)] * 500 + [(478, 640)] * 500, [800], 1333) == [(800, 1088)]
    assert choose_buckets([(480, 640)] * 20 + [(300, 640)] * 20, [800], 1333) == [(800, 1344)]


def test_second_bucket_is_the_best_of_all() -> None:
    r = np.random.RandomState(0)
    sizes = [
        (int(h), int(w)) for h, w in zip(r.randint(200, 500, 300), r.randint(500, 900, 300), strict=True)
    ]
    full, small = choose_buckets(sizes, [256], 512)

    def cost(bucket: tuple[int, int]) -> int:
        resized = [resized_size(h, w, 256, 512) for h, w in sizes]
        chosen = [smallest_bucket(size, [full, bucket]) for size in resized]
        return sum(b[0] * b[1] for b in chosen if b is not None)

    every = [(h, w) for h in range(32, full[0] + 1, 32) for w in range(32, full[1] + 1, 32)]
    assert cost(small) == min(cost(bucket) for bucket in every) < cost(full)


def test_buckets_of_the_user() -> None:
    assert resolve_buckets([(64, 96)], [], [64], 96) == [(64, 96)]
    with pytest.raises(UserError, match=r"data\.buckets: \[60, 96\] .* multiples of 32; use \[64, 96\]"):
        resolve_buckets([(60, 96)], [], [64], 96)
    with pytest.raises(UserError, match="the list is empty"):
        resolve_buckets([], [], [64], 96)


def read_through(affine: NDArray, mask: NDArray, size: tuple[int, int]) -> NDArray:
    """The mask at the centres of the pixels of an image of `size`."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    at = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    column, row = np.floor(affine @ at).astype(int)
    return mask[row.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)].reshape(size)


def extent(mask: NDArray) -> NDArray[np.float64]:
    """xyxy of the pixels that are set."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float64)
