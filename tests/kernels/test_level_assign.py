"""FPN level assignment against its formula in float64 and torchvision's levels."""

from __future__ import annotations

import math

import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmrcnn.kernels import assign_levels
from fastmrcnn.kernels.level_assign import op, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COORDINATE = st.one_of(
    st.floats(-100, 2000, width=32),
    st.sampled_from([0.0, 112.0, 224.0, 448.0, 896.0, 1e9, -1e9, math.inf, -math.inf, math.nan]),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["levels", "multiscale"])
def test_golden(case: str, device: str) -> None:
    if case == "levels":
        boxes, expected = load("levels/boxes", "levels/level_minus_2")
    else:
        first, second, expected = load("multiscale/boxes0", "multiscale/boxes1", "multiscale/level_minus_2")
        boxes = torch.cat([first, second])
    levels = assign_levels(boxes.to(device))
    assert levels.dtype == torch.int32
    assert levels.tolist() == expected.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_borders(dtype: torch.dtype, device: str) -> None:
    """A box on a border belongs to the upper level, one clearly below it to the lower."""
    sides = torch.tensor([112.0, 224.0, 448.0], dtype=dtype, device=device)
    for factor, expected in ((1.0, [1, 2, 3]), (1 - 1e-5, [0, 1, 2])):
        boxes = torch.stack([sides * 0, sides * 0, sides * factor, sides], dim=1)
        assert assign_levels(boxes).tolist() == expected


def by_formula(box: list[float], k_min: int, k_max: int) -> set[int]:
    """The levels that the formula allows in float64, two of them within rounding of a border."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    if not area > 0:
        return {0}
    if math.isinf(area):
        return {k_max - k_min}
    exact = 4 + math.log2(math.sqrt(area) / 224)
    return {min(max(math.floor(exact + e), k_min), k_max) - k_min for e in (0.0, 2e-6)}


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(boxes=st.lists(st.lists(COORDINATE, min_size=4, max_size=4), max_size=20), k_min=st.integers(0, 4))
def test_any_boxes(device: str, boxes: list[list[float]], k_min: int) -> None:
    tensor = torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4)
    levels = assign_levels(tensor, k_min=k_min, k_max=5)
    assert torch.equal(levels, reference.assign_levels(tensor, k_min, 5, 224.0, 4))
    for box, level in zip(tensor.tolist(), levels.tolist(), strict=True):
        assert level in by_formula(box, k_min, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4), (300, 4)])
def test_shapes_and_strides(shape: tuple[int, ...], device: str) -> None:
    boxes = torch.rand(*shape, device=device) * 900
    expected = reference.assign_levels(boxes, 2, 5, 224.0, 4)
    permuted = torch.stack(boxes.unbind(-1)).movedim(0, -1)
    for given_boxes in (boxes, permuted, boxes.half()):
        levels = assign_levels(given_boxes)
        assert levels.shape == shape[:-1]
        if given_boxes.dtype == torch.float32:
            assert torch.equal(levels, expected)


def test_beyond_31_bits() -> None:
    """The last coordinate lies more than 2**31 elements after the first; untouched memory costs nothing."""
    torch.use_deterministic_algorithms(False)  # it would touch all of it
    stride = 2**31 // 3 + 1
    near = torch.tensor([[0.0, 0, 100, 100], [10, 20, 240, 250]], dtype=torch.float16)
    far = torch.empty(3 * stride + 2, dtype=torch.float16).as_strided((2, 4), (1, stride))
    far.copy_(near)
    assert assign_levels(far).tolist() == assign_levels(near).tolist() == [0, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    boxes = torch.rand(2, 3, 4, device=device) * 900
    for given_boxes in (boxes, boxes.permute(1, 0, 2)):
        torch.library.opcheck(op._assign_levels, (given_boxes, 2, 5, 224.0, 4))
    compiled = torch.compile(assign_levels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes), assign_levels(boxes))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"boxes must be \(\.\.\., 4\), got \(12, 5\)"):
        assign_levels(torch.zeros(12, 5))
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        assign_levels(torch.zeros(12, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="k_max must be at least k_min, got 2 and 3"):
        assign_levels(torch.zeros(12, 4), k_min=3, k_max=2)
    with pytest.raises(ValueError, match="canonical_size must be positive"):
        assign_levels(torch.zeros(12, 4), canonical_size=0)
