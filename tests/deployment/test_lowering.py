"""Our operators in PyTorch's own: the same results, and nothing of ours is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyramids import LEVELS, pyramid, some_boxes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn import kernels
from fastmrcnn.deployment.loop_nms import BLOCK, REPEATS, loop_nms
from fastmrcnn.deployment.lowering import NAMESPACES, PlainPyTorch, foreign_operators
from fastmrcnn.kernels.nms import naive
from fastmrcnn.model.conv_relu import conv_relu

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Called(TorchDispatchMode):
    """The namespaces of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def check(function: Callable[[], Any]) -> None:
    """The same bits with our operators and without."""
    with Called() as called:
        expected = function()
    assert called.namespaces & set(NAMESPACES), "the function calls none of our operators"
    with Called() as called, PlainPyTorch():
        found = function()
    assert not called.namespaces & set(NAMESPACES)
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == exact.dtype
        assert ours.stride() == exact.stride()
        assert ours.equal(exact)


def crowd(slots: int, images: int = 2, seed: int = 0, noise: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, scores with many ties, and groups; (N, P, ...)."""
    r = torch.Generator().manual_seed(seed)
    centres = torch.rand(7, 4, generator=r) * 100
    centres[:, 2:] += centres[:, :2]
    boxes = centres[torch.randint(0, 7, (images, slots), generator=r)]
    boxes = boxes + torch.randn(images, slots, 4, generator=r) * noise
    scores = torch.randint(-25, 25, (images, slots), generator=r).float()
    return boxes, scores, torch.randint(0, 3, (images, slots), generator=r)


def check_nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, valid: Tensor | None, *how: Any) -> None:
    found = loop_nms(boxes, scores, groups, valid, *how)
    for ours, exact in zip(found, naive.padded_nms(boxes, scores, groups, valid, *how), strict=True):
        assert ours.dtype == exact.dtype
        assert ours.equal(exact)


@pytest.mark.parametrize("slots", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("grouped", [False, True])
def test_nms_over_many_blocks(slots: int, grouped: bool) -> None:
    boxes, scores, groups = crowd(slots)
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    for noise in (0.0, 5.0, 60.0):
        boxes = crowd(slots, noise=noise)[0]
        check_nms(boxes, scores, groups if grouped else None, valid, 0.5, min(slots, 40))


@given(
    slots=st.integers(1, 30),
    seed=st.integers(0, 2**20),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 0.999, 1.0, 2.0]),
    max_out=st.integers(0, 12),
    noise=st.sampled_from([0.0, 5.0, 60.0]),
)
@settings(deadline=None, max_examples=40)
def test_nms_of_anything(slots: int, seed: int, threshold: float, max_out: int, noise: float) -> None:
    boxes, scores, groups = crowd(slots, seed=seed, noise=noise)
    scores[0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])[seed % 3]
    boxes[1, -1, 2] = torch.tensor([torch.nan, torch.inf, boxes[1, -1, 0]])[seed % 3]
    check_nms(boxes, scores, groups, scores > -20 if seed % 2 else None, threshold, max_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nms_takes_what_the_operator_takes(dtype: torch.dtype) -> None:
    boxes, scores, groups = crowd(300)
    check_nms(boxes.to(dtype), scores.to(dtype), groups.to(torch.int16), None, 0.4, 50)


def test_nms_settles_chains_longer_than_its_repeats() -> None:
    """Each box overlaps the next alone, so that whether one survives hangs on all before it."""
    slots = 4 * BLOCK
    at = torch.arange(slots, dtype=torch.float32)
    boxes = torch.stack([at * 6, at * 0, at * 6 + 10, at * 0 + 10], 1)[None]
    assert slots > REPEATS * 10
    _, kept = loop_nms(boxes, -at[None], None, None, 0.2, slots)
    assert kept.sum() == slots // 2
    check_nms(boxes, -at[None], None, None, 0.2, slots)


def test_nms_of_nothing() -> None:
    boxes, scores, groups = crowd(5)
    check_nms(boxes, scores, groups, torch.zeros_like(groups, dtype=torch.bool), 0.5, 3)
    check_nms(boxes[:, :0], scores[:, :0], groups[:, :0], None, 0.5, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling(dtype: torch.dtype, form: torch.memory_format, sampling_ratio: int) -> None:
    maps = [m.detach() for m in pyramid(dtype=dtype, form=form)]
    boxes, valid = some_boxes()
    boxes = boxes.to(dtype if dtype == torch.float64 else torch.float32)
    where: dict[str, Any] = {"valid": valid, **LEVELS}
    how = {"sampling_ratio": sampling_ratio, **where}
    check(lambda: kernels.multilevel_roi_align(maps, boxes, (3, 2), aligned=True, **how))
    check(lambda: kernels.multilevel_roi_align(maps, boxes, 3, aligned=False, **how))
    check(lambda: kernels.multilevel_roi_align_max(maps, boxes, 3, **how))
    check(lambda: kernels.multilevel_roi_warp(maps, boxes, 3, mode="avg", **how))
    check(lambda: kernels.multilevel_roi_warp(maps, boxes, 3, mode="max", **how))
    check(lambda: kernels.multilevel_roi_pool(maps, boxes, 3, **where))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_operators(dtype: torch.dtype) -> None:
    r = torch.Generator().manual_seed(4)
    boxes, _ = some_boxes(6)
    deltas = torch.randn(2, 6, 4, generator=r).to(dtype)
    sizes = torch.tensor([[40, 30], [20, 50]], dtype=torch.int32)
    scores = torch.rand(2, 6, generator=r).to(dtype)
    filters = {"scores": scores, "min_side": 1.0, "score_threshold": 0.2, "weights": (10.0, 10.0, 5.0, 5.0)}
    check(lambda: kernels.decode_boxes(deltas, boxes, sizes, **filters))
    check(lambda: kernels.decode_boxes(deltas, boxes[:1], sizes))
    check(lambda: kernels.assign_levels(boxes.to(dtype), canonical_size=30.0))
    features = torch.randn(5, 4, 6, 6, generator=r).to(dtype)
    weight, bias = torch.randn(3, 4, generator=r), torch.randn(3, generator=r)
    classes = torch.tensor([0, 2, 1, 2, 0])
    check(lambda: kernels.class_mask_logits(features, weight.to(dtype), bias.to(dtype), classes))
    with torch.autocast("cpu", torch.bfloat16):
        check(lambda: kernels.class_mask_logits(features, weight, bias, classes))


def test_fused_convolutions() -> None:
    r = torch.Generator().manual_seed(5)
    x, weight, bias = (torch.randn(size, generator=r) for size in [(2, 3, 9, 9), (4, 3, 3, 3), (4,)])
    residual = torch.randn(2, 4, 5, 5, generator=r)
    with torch.no_grad():
        check(lambda: conv_relu(x, weight, bias, residual, (2, 2), (1, 1)))
        check(lambda: conv_relu(x, weight, bias))


def test_operators_of_training_are_refused() -> None:
    boxes = some_boxes()[0][0]
    with PlainPyTorch(), pytest.raises(NotImplementedError, match=r"match_boxes\S* has no form in plain"):
        kernels.match_boxes(boxes[None], boxes[None], torch.ones(1, len(boxes), dtype=torch.bool))


def test_what_is_not_pytorchs_is_found_in_a_graph() -> None:
    class Nms(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.padded_nms(boxes, scores, None, None, 0.5, 3)

    boxes, scores, _ = crowd(5)
    program = torch.export.export(Nms(), (boxes, scores), strict=False)
    assert foreign_operators(program.graph_module) == {f"{NAMESPACES[0]}.padded_nms.default"}
    with PlainPyTorch():
        program = torch.export.export(Nms(), (boxes, scores), strict=False)
    assert not foreign_operators(program.graph_module)
