"""What NMS makes of a comparison with the threshold without dividing: a division's answer, bit for bit."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastmrcnn.kernels.nms import naive
from fastmrcnn.kernels.nms.cpu import round_down_to_float32
from fastmrcnn.kernels.nms.greedy import above, above_exactly
from fastmrcnn.kernels.nms.op import nms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
THRESHOLDS = [0.0, 1e-44, 1e-38, 1e-20, 0.05, 0.3, 0.5, 0.7, 0.95, 1 - 2**-24, 1.0, 3.0, 3e38]


@triton.jit
def above_kernel(inter_ptr, union_ptr, over_ptr, undecided_ptr, exact_ptr, threshold, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inter, union = tl.load(inter_ptr + at), tl.load(union_ptr + at)
    over, undecided = above(inter, union, threshold)
    tl.store(exact_ptr + at, above_exactly(inter, union, threshold).to(tl.uint8))
    tl.store(over_ptr + at, over.to(tl.uint8))
    tl.store(undecided_ptr + at, undecided.to(tl.uint8))


def steps_from(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """As many numbers of float32 further up or down; positive ones stay positive."""
    bits = np.maximum(values.view(np.int32) + steps, 1)
    return np.minimum(bits, np.float32(3.4e38).view(np.int32)).astype(np.int32).view(np.float32)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_above_is_what_a_division_says(threshold: float) -> None:
    """Pairs whose quotient is the threshold but for a few steps of float32, and any others, of any size."""
    if not INTERPRETING and not torch.cuda.is_available():
        pytest.skip("it is a function of a kernel")
    count = 1 << 16
    r = np.random.default_rng(0)
    threshold = round_down_to_float32(threshold)
    union = np.exp2(r.uniform(-149, 127.9, count)).astype(np.float32)
    union[: count // 2] = r.uniform(1, 1e6, count // 2)
    near = np.minimum(union.astype(np.float64) * threshold, 3e38).astype(np.float32)
    inter = steps_from(near, r.integers(-40, 41, count))
    ties = slice(0, count, 7)  # quotients in the middle of two numbers, of a union of few bits
    middle = (np.float64(threshold) + np.nextafter(np.float32(threshold), np.float32(np.inf))) / 2
    inter[ties] = np.minimum(np.exp2(r.integers(-20, 20, len(inter[ties]))) * middle, 3e38)
    union[ties] = np.exp2(np.log2(np.maximum(inter[ties] / middle, 1e-38)).round())
    anywhere = r.random(count) < 0.3
    inter[anywhere] = (union * r.random(count, np.float32))[anywhere]
    inter = np.maximum(np.minimum(inter, union), np.float32(1e-45))  # as of boxes that meet
    union[:4], inter[:4] = [np.inf, np.nan, np.inf, np.nan], [1.0, 1.0, 1e-45, np.inf]
    with np.errstate(invalid="ignore", under="ignore"):
        expected = inter / union > np.float32(threshold)

    device = "cpu" if INTERPRETING else "cuda"
    given = [torch.from_numpy(t).to(device) for t in (inter, union)]
    over, undecided, exact = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(3))
    options = {} if INTERPRETING else {"enable_fp_fusion": False}
    above_kernel[(count // 4096,)](*given, over, undecided, exact, threshold, BLOCK=4096, **options)
    assert np.array_equal(exact.bool().cpu().numpy(), expected)
    decided = ~undecided.bool().cpu().numpy()
    assert np.array_equal(over.bool().cpu().numpy()[decided], expected[decided])
    if 0.05 <= threshold < 1:
        ordinary = anywhere & (np.arange(count) < count // 2)
        ordinary[:4] = False
        assert decided[ordinary].mean() > 0.999  # float64 is rarely needed
        assert expected.any()
        assert not expected.all()


def pair(seed: int, whole: bool) -> Tensor:
    r = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, generator=r) * 20
    boxes = torch.stack(
        [torch.cat([corner, corner + 30 + torch.rand(2, generator=r) * 60]) for _ in range(2)]
    )
    boxes[1] += torch.rand(4, generator=r) * 12
    return boxes.round() if whole else boxes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(2 if INTERPRETING else 20))
def test_a_threshold_at_the_overlap_itself(seed: int, whole: bool, device: str) -> None:
    """Of a pair among others: at their IoU both stay, a step of float32 below it one of them goes."""
    boxes = pair(seed, whole)
    inter = (torch.minimum(boxes[0, 2:], boxes[1, 2:]) - torch.maximum(boxes[0, :2], boxes[1, :2])).prod()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = float(inter / (areas.sum() - inter))
    assert iou > 0.1
    far = torch.tensor([[500.0, 500, 510, 510]]) + 20 * torch.arange(70)[:, None]
    boxes = torch.cat([boxes[:1], far, boxes[1:]])
    scores = torch.arange(len(boxes), 0, -1).float()
    below = float(np.nextafter(np.float32(iou), np.float32(0)))
    for threshold, kept in (
        (iou, 72),
        (below, 71),
        (float(np.nextafter(np.float32(iou), np.float32(1))), 72),
    ):
        found = nms(boxes.to(device), scores.to(device), threshold)
        assert found.tolist() == naive.nms(boxes, scores, threshold).tolist()
        assert len(found) == kept
