from __future__ import annotations

import pytest
import torch
from batches import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmrcnn.config.model import AnchorConfig, RoiConfig
from fastmrcnn.kernels import decode_boxes
from fastmrcnn.kernels.box_decode.reference import MAX_LOG_SCALE
from fastmrcnn.model.anchors import AnchorGenerator
from fastmrcnn.model.boxes import encode
from fastmrcnn.model.matcher import match
from fastmrcnn.model.rois import RoiSampler
from fastmrcnn.model.subsample import sample
from fastmrcnn.structures import Proposals


@given(
    st.lists(st.floats(0, 500), min_size=4, max_size=4), st.lists(st.floats(1, 200), min_size=4, max_size=4)
)
@settings(max_examples=50, deadline=None)
def test_decode_inverts_encode(corners: list[float], sides: list[float]) -> None:
    box = torch.tensor([corners[0], corners[1], corners[0] + sides[0], corners[1] + sides[1]])
    reference = torch.tensor([corners[2], corners[3], corners[2] + sides[2], corners[3] + sides[3]])
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = encode(box, reference, weights)
    if (deltas[2:] / 5 < MAX_LOG_SCALE).all():
        sizes = torch.tensor([[1000, 1000]])
        decoded, valid = decode_boxes(deltas[None, None], reference[None, None], sizes, weights=weights)
        assert valid.item()
        torch.testing.assert_close(decoded[0, 0], box, rtol=1e-3, atol=0.05)


def test_anchors_stand_at_every_stride_in_row_major_order() -> None:
    anchors = AnchorGenerator([4, 8, 16, 32, 64], **AnchorConfig().values())
    shapes = [(32, 24), (16, 12), (8, 6), (4, 3), (2, 2)]
    levels = anchors([torch.zeros(1, 1, *shape) for shape in shapes], (128, 96))
    assert [len(level) for level in levels] == [3 * h * w for h, w in shapes]
    square = levels[0].reshape(32, 24, 3, 4)[2, 5, 1]
    torch.testing.assert_close(square, torch.tensor([20.0 - 16, 8 - 16, 20 + 16, 8 + 16]))
    wide, tall = levels[0][0], levels[0][2]
    assert (wide[2] - wide[0]) / (wide[3] - wide[1]) == pytest.approx(2.0)
    assert (tall[2] - tall[0]) / (tall[3] - tall[1]) == pytest.approx(0.5)


def test_match_of_images_with_and_without_objects() -> None:
    batch = random_batch(0, (2, 0))
    assert batch.targets is not None
    boxes = torch.cat([batch.targets.boxes[0, :2], torch.tensor([[0.0, 0, 1, 1]])])[None]
    found = match(boxes, batch.targets, foreground_iou=0.7, background_iou=0.3)
    assert found.is_foreground.tolist() == [[True, True, False], [False, False, False]]
    assert found.is_background[1].all()
    assert found.matched[0, :2].tolist() == [0, 1]


def test_low_quality_match_needs_some_overlap() -> None:
    batch = random_batch(0, (1, 0))
    assert batch.targets is not None
    x1, y1, x2, y2 = batch.targets.boxes[0, 0].tolist()
    touching = [x1, y1, x1 + (x2 - x1) * 0.4, y2]
    away = [x2 + 1, y2 + 1, x2 + 9, y2 + 9]
    boxes = torch.tensor([[touching, away]])
    kept = match(boxes, batch.targets, foreground_iou=0.7, background_iou=0.3, low_quality=True)
    assert kept.is_foreground[0].tolist() == [True, False]
    none = match(boxes[:, 1:], batch.targets, foreground_iou=0.7, background_iou=0.3, low_quality=True)
    assert not none.is_foreground.any()


def test_background_in_a_crowd_is_ignored() -> None:
    batch = random_batch(0, (1, 0))
    assert batch.targets is not None
    targets = batch.targets
    targets.boxes[1, 0] = torch.tensor([0.0, 0, 50, 50])
    targets.crowd[1, 0] = True
    boxes = torch.tensor([[10.0, 10, 20, 20], [60, 60, 70, 70]])[None]
    found = match(boxes, targets, foreground_iou=0.5, background_iou=0.5, crowd_overlap=0.7)
    assert found.is_background[1].tolist() == [False, True]
    assert not found.is_foreground[1].any()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 64), st.floats(0.1, 1.0), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_sample_counts(fg: int, bg: int, asked: int, share: float, seed: int) -> None:
    total = 80
    kinds = torch.zeros(1, total, dtype=torch.int64)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    kinds[0, order[:fg]] = 1
    kinds[0, order[fg : fg + bg]] = 2
    keys = torch.rand(1, total + 5, generator=torch.Generator().manual_seed(seed))
    chosen = sample(kinds == 1, kinds == 2, keys, asked=asked, foreground_share=share)
    want_fg = min(fg, int(asked * share))
    want_bg = min(bg, min(asked, total) - want_fg)
    assert int(chosen.is_foreground.sum()) == want_fg
    assert int(chosen.valid.sum()) == want_fg + want_bg
    assert chosen.is_foreground[0, :want_fg].all()
    index = chosen.picked[chosen.valid]
    assert len(set(index.tolist())) == len(index)
    picked = kinds.gather(1, chosen.picked)
    assert (picked[chosen.is_foreground] == 1).all()
    assert (picked[chosen.valid & ~chosen.is_foreground] == 2).all()


def test_every_candidate_is_as_likely() -> None:
    is_bg = torch.ones(1, 20, dtype=torch.bool)
    counts = torch.zeros(20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        keys = torch.rand(1, 20, generator=generator)
        chosen = sample(~is_bg, is_bg, keys, asked=5, foreground_share=0.5)
        counts[chosen.picked[0]] += 1
    assert counts.min() > 60
    assert counts.max() < 140


def test_roi_sampler_appends_ground_truth_and_labels_background() -> None:
    batch = random_batch(0, (3, 0))
    assert batch.targets is not None
    proposals = Proposals(
        torch.tensor([[[0.0, 0, 4, 4]]]).repeat(2, 6, 1),
        torch.zeros(2, 6),
        torch.ones(2, 6, dtype=torch.bool),
    )
    values = RoiConfig(batch_per_image=8).values(
        "batch_per_image", "foreground_share", "foreground_iou", "append_ground_truth"
    )
    sampler = RoiSampler(3, crowd_overlap=None, **values)
    rois = sampler(proposals, batch.targets, torch.rand(2, 14))
    assert rois.is_foreground.sum(1).tolist() == [2, 0]
    assert rois.valid.sum(1).tolist() == [8, 6]
    assert (rois.classes[~rois.is_foreground] == 3).all()
    torch.testing.assert_close(rois.boxes[0, 0], batch.targets.boxes[0, rois.matched[0, 0]])
