"""NMS against its definition, the greedy loop, and torchvision's results.

CPU tensors run cpu.py, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import INTEGERS
from torch import Tensor

from fastmrcnn.kernels.nms import naive, op
from fastmrcnn.kernels.nms.cpu import round_down_to_float32
from fastmrcnn.kernels.nms.op import batched_nms, nms, padded_nms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def check_padded(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    max_out: int,
    device: str = "cpu",
) -> None:
    arguments = (boxes, scores, groups, valid)
    on_device = [None if t is None else t.to(device) for t in arguments]
    found = padded_nms(*on_device, threshold, max_out)
    for ours, exact in zip(found, naive.padded_nms(*arguments, threshold, max_out), strict=True):
        assert ours.dtype == exact.dtype
        assert ours.cpu().equal(exact)


def clustered(
    slots: int, groups: int, seed: int = 0, noise: float = 5.0, images: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, scores with many ties, and groups; (N, P, ...)."""
    r = torch.Generator().manual_seed(seed)
    centres = torch.rand(7, 4, generator=r) * 100
    centres[:, 2:] += centres[:, :2]
    boxes = centres[torch.randint(0, 7, (images, slots), generator=r)]
    boxes = boxes + torch.randn(images, slots, 4, generator=r) * noise
    scores = torch.randint(-25, 25, (images, slots), generator=r).float()
    return boxes, scores, torch.randint(0, groups, (images, slots), generator=r)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [0, 1, 64, 300, 1000])
def test_golden(slots: int, device: str) -> None:
    names = ("boxes", "scores", "idxs", "thr", "keep", "keep_batched")
    boxes, scores, idxs, threshold, keep, keep_batched = load(*(f"nms/{slots}/{name}" for name in names))
    boxes, scores, idxs, threshold = boxes.to(device), scores.to(device), idxs.to(device), threshold.item()
    assert nms(boxes, scores, threshold).tolist() == keep.tolist()
    assert batched_nms(boxes, scores, idxs, threshold).tolist() == keep_batched.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("slots", "groups", "noise"), [(1, 1, 5), (5, 3, 5), (300, 1, 1), (300, 1, 20), (400, 40, 5), (700, 3, 5)]
)
def test_batched(slots: int, groups: int, noise: float, device: str) -> None:
    boxes, scores, idxs = (t[0] for t in clustered(slots, groups, seed=slots, noise=noise))
    expected = naive.batched_nms(boxes, scores, idxs, 0.5).tolist()
    kept = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), 0.5)
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_out", [1, 20, 200])
def test_padded(max_out: int, device: str) -> None:
    boxes, scores, groups = clustered(150, 3, images=3)
    scores[0, 3], boxes[0, 4, 1], boxes[1, 5, 2] = torch.nan, torch.nan, torch.inf
    scores[0, 7], scores[0, 8], scores[1, 9] = torch.inf, -torch.inf, -0.0
    valid = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)) > 0.3
    valid[2] = False
    for some_groups in (None, groups):
        for some_valid in (None, valid):
            check_padded(boxes, scores, some_groups, some_valid, 0.5, max_out, device)


@pytest.mark.parametrize("device", DEVICES)
def test_many_groups_and_slots(device: str) -> None:
    """More slots than kernel.py and cpu.py take at once."""
    boxes, scores, groups = clustered(2500, 90)
    check_padded(boxes, scores, groups, None, 0.6, 2500, device)
    check_padded(boxes, scores, groups, None, 0.6, 3, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    """Boxes are compared in float32 and scores as they are given."""
    boxes, scores, groups = clustered(100, 2, seed=3)
    check_padded(boxes.to(dtype), scores.to(dtype), groups.to(torch.uint8), None, 0.5, 100, device)
    close = 1 + torch.arange(99.0, -1, -1, dtype=torch.float64)[None] * 1e-12
    close[0, 5] = torch.nan
    check_padded(boxes, close, groups.int(), None, 0.5, 100, device)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_scores_come_first_as_in_torchvision(device: str) -> None:
    boxes, scores, groups = (t[0] for t in clustered(40, 2))
    scores[[3, 9]], scores[5], scores[7] = torch.nan, torch.inf, -torch.inf
    scores[6] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN with its sign bit set
    kept = batched_nms(boxes.to(device), scores.to(device), groups.to(device), 0.5)
    assert kept.tolist() == naive.batched_nms(boxes, scores, groups, 0.5).tolist()
    assert kept[0] == 3


@pytest.mark.parametrize("device", DEVICES)
def test_groups_that_need_64_bits(device: str) -> None:
    boxes, scores, groups = clustered(100, 4)
    check_padded(boxes, scores, groups * 2**32 - 2**33, None, 0.5, 100, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_groups_of_every_integer_type(dtype: torch.dtype, device: str) -> None:
    """Negative ones too, in more than one image, beside slots that are not valid."""
    boxes, scores, groups = clustered(47, 5, images=2)
    valid = torch.rand(2, 47, generator=torch.Generator().manual_seed(1)) > 0.2
    lowest = torch.iinfo(dtype).min
    for some in ([-2, -1, 0, 1, 2], [lowest, -1, 0, lowest + 1, torch.iinfo(dtype).max]):
        values = torch.tensor([value for value in some if value >= lowest], dtype=dtype)
        narrow = values[groups % len(values)]
        check_padded(boxes, scores, narrow, valid, 0.5, 47, device)
        kept = batched_nms(boxes[0].to(device), scores[0].to(device), narrow[0].to(device), 0.5)
        assert kept.tolist() == naive.batched_nms(boxes[0], scores[0], narrow[0], 0.5).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0, 2.0])
def test_iou_on_the_threshold(threshold: float, device: str) -> None:
    """Shifted boxes with IoU k/10 exactly, before rounding; torchvision compares in float64 on the CPU."""
    widths = torch.arange(1.0, 11)
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), widths, torch.ones(10)], -1)[None]
    for scores in (widths[None], -widths[None]):
        check_padded(boxes, scores, None, None, threshold, 10, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tenths", "kept"), [(1, [0]), (3, [0]), (6, [0]), (7, [0, 1]), (9, [0, 1])])
def test_the_threshold_is_not_rounded_as_torchvision_does_on_cuda(
    tenths: int, kept: list[int], device: str
) -> None:
    """With the threshold in float32 both boxes would survive each of these ties."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, tenths, 1]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert nms(boxes, scores, tenths / 10).tolist() == kept
    index, valid = padded_nms(boxes[None], scores[None], None, None, tenths / 10, 2)
    assert index[valid].tolist() == kept


def test_threshold_in_float32() -> None:
    for value in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 1e-46, 1e300):
        rounded = np.float32(round_down_to_float32(value))
        assert float(rounded) == round_down_to_float32(value) <= value
        assert value > 3e38 or float(np.nextafter(rounded, np.float32(np.inf))) > value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("images", "slots", "max_out"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_do(images: int, slots: int, max_out: int, device: str) -> None:
    index, valid = padded_nms(
        torch.ones(images, slots, 4, device=device),
        torch.ones(images, slots, device=device),
        None,
        None,
        0.5,
        max_out,
    )
    assert index.shape == valid.shape == (images, max_out)
    assert not index.any()
    assert not valid.any()


coordinate = st.one_of(
    st.integers(-3, 6).map(float),
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, 1e-20, 1e10, -1e10, 3e19, 3e38, -3e38, np.inf, -np.inf, np.nan]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    boxes=st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=10),
    seed=st.integers(0, 5),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_any_boxes(boxes: list[tuple[float, ...]], seed: int, threshold: float) -> None:
    """Empty, inverted, touching, huge, infinite and NaN boxes, with ties."""
    r = torch.Generator().manual_seed(seed)
    count = len(boxes)
    scores = torch.randint(0, 4, (1, count), generator=r).float()
    groups = torch.randint(0, 2, (1, count), generator=r)
    padded = torch.tensor(boxes, dtype=torch.float32)[None]
    check_padded(padded, scores, groups, None, threshold, count)
    kept = batched_nms(padded[0], scores[0], groups[0], threshold)
    assert kept.equal(naive.batched_nms(padded[0], scores[0], groups[0], threshold))
    assert nms(padded[0], scores[0], threshold).equal(naive.nms(padded[0], scores[0], threshold))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    boxes, scores, groups = (t.to(device) for t in clustered(12, 2, images=2))
    valid = scores > -10
    permuted = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    flipped = scores.t().contiguous().t()
    for args in (
        (boxes, scores, None, None, 0.5, 7),
        (permuted, flipped, groups.t().contiguous().t(), valid.t().contiguous().t(), 0.5, 20),
    ):
        torch.library.opcheck(op._padded_nms, args)
    assert padded_nms(permuted, flipped, groups, valid, 0.5, 9)[0].equal(
        padded_nms(boxes, scores, groups, valid, 0.5, 9)[0]
    )
    torch.library.opcheck(op._nms, (boxes[0], scores[0], None, 0.5))
    torch.library.opcheck(op._nms, (permuted[1], flipped[1], groups[1], 0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph(device: str) -> None:
    boxes, scores, groups = (t.to(device) for t in clustered(20, 2))
    boxes.requires_grad_()

    def both(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, valid = padded_nms(boxes, scores, groups, None, 0.5, 9)
        return index, valid, batched_nms(boxes[0], scores[0], groups[0], 0.5) + 1

    expected = both(boxes, scores, groups)
    with torch.autocast(device, torch.bfloat16):
        actual = torch.compile(both, fullgraph=True, backend="aot_eager")(boxes, scores, groups)
    for a, e in zip(actual, expected, strict=True):
        assert a.equal(e)
        assert not a.requires_grad


def test_bad_input() -> None:
    boxes, scores, groups = clustered(6, 2)
    long = scores.long()
    for args, message in (
        ((boxes[0], scores, None, None, 0.5, 3), r"boxes must be \(N, P, 4\), got \(6, 4\)"),
        ((boxes, scores[0], None, None, 0.5, 3), r"scores must be \(1, 6\) .* got \(6,\)"),
        ((boxes, scores, groups[:, :2], None, 0.5, 3), r"groups must be \(1, 6\) .* got \(1, 2\)"),
        ((boxes, scores, scores, None, 0.5, 3), "groups must be of an integer dtype, got torch.float32"),
        ((boxes, scores, None, groups, 0.5, 3), "valid must be bool, got torch.int64"),
        ((boxes.long(), scores, None, None, 0.5, 3), "boxes must be floating point, got torch.int64"),
        ((boxes, long, None, None, 0.5, 3), "scores must be floating point, got torch.int64"),
        ((boxes, scores.to("meta"), None, None, 0.5, 3), "scores must be on cpu as boxes are, got meta"),
        ((boxes, scores, None, None, -0.1, 3), "iou_threshold must be at least 0, got -0.1"),
        ((boxes, scores, None, None, float("nan"), 3), "iou_threshold must be at least 0, got nan"),
        ((boxes, scores, None, None, 0.5, -1), "max_out must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            padded_nms(*args)
    with pytest.raises(ValueError, match=r"boxes must be \(P, 4\), got \(1, 6, 4\)"):
        nms(boxes, scores, 0.5)


@pytest.mark.gpu
def test_no_sync_and_little_memory() -> None:
    """100,000 boxes of 80 classes, without a host sync, in less than 256 MB."""
    boxes, scores, groups = (t.cuda() for t in clustered(100_000, 80))
    padded_nms(boxes, scores, groups, None, 0.5, 1000)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index, valid = padded_nms(boxes, scores, groups, None, 0.5, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20
    expected = padded_nms(boxes.cpu(), scores.cpu(), groups.cpu(), None, 0.5, 1000)
    assert index.cpu().equal(expected[0])
    assert valid.cpu().equal(expected[1])


@pytest.mark.gpu
def test_one_large_group_many_times() -> None:
    """Tiles wait for each other; the result is the same each time."""
    boxes, scores, _ = clustered(20_000, 1, noise=40.0)
    expected = nms(boxes[0], scores[0], 0.7)
    for _ in range(50):
        assert nms(boxes[0].cuda(), scores[0].cuda(), 0.7).cpu().equal(expected)
