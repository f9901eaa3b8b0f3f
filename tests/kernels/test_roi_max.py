"""RoIPool, RoIWarp and max-mode RoIAlign against their definitions, bin by bin, and torchvision's RoIPool.

CPU tensors run cpu.py, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pyramids
import pytest
import torch
import torch.nn.functional as F
from golden import load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nosync import NoSync
from pyramids import LEVELS, SCALES, SIZES, on_cpu, permuted, pyramid
from tolerances import assert_near
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastmrcnn import kernels
from fastmrcnn.kernels import multilevel_roi_align_max, multilevel_roi_pool, multilevel_roi_warp, roi_pool
from fastmrcnn.kernels.common.pooling import Pooling
from fastmrcnn.kernels.roi_max import cpu, naive, registration

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
some_boxes = partial(pyramids.some_boxes, longest=70)

# Operator, samples per bin and axis, aligned.
CASES: list[tuple[str, int, bool]] = [
    ("pool", 0, False),
    ("warp max", 0, True),
    ("warp max", 2, True),
    ("warp avg", 0, True),
    ("warp avg", 2, True),
    ("align max", 0, False),
    ("align max", 0, True),
    ("align max", 2, False),
    ("align max", 2, True),
]
FEW = [("pool", 0, False), ("warp max", 2, True), ("align max", 0, True)]
PER_IMAGE = 2  # boxes
LAYOUTS = [(dtype, form) for dtype in DTYPES for form in FORMATS]
if INTERPRETING:  # it takes 10 ms and more a program
    PER_IMAGE = 1
    LAYOUTS = [(torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)]
    CASES = [("pool", 0, False), ("warp max", 0, True), ("align max", 0, False), ("align max", 2, True)]
    FEW = [FEW[0], FEW[2]]


def pool_by(
    case: tuple[str, int, bool],
    maps: list[Tensor],
    boxes: Tensor,
    size: Any,
    *,
    of: Any = kernels,
    **where: Any,
) -> Tensor:
    """By the operator, or by its definition if `of` is `naive`."""
    kind, ratio, aligned = case
    where = {**LEVELS, **where}
    if kind == "pool":
        return of.multilevel_roi_pool(maps, boxes, size, **where)
    if kind == "align max":
        return of.multilevel_roi_align_max(maps, boxes, size, sampling_ratio=ratio, aligned=aligned, **where)
    return of.multilevel_roi_warp(maps, boxes, size, sampling_ratio=ratio, mode=kind.split()[1], **where)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(3, 5)] if INTERPRETING else [(3, 5), (7, 7)])
def test_golden(size: tuple[int, int], device: str) -> None:
    features, rois, scale = load("roi/features", "roi/rois", "roi/spatial_scale")
    name = f"roi_pool/{size[0]}x{size[1]}"
    out, grad_out, grad = load(*(f"{name}/{k}" for k in ("out", "grad_out", "grad_features")))
    some = slice(None, None, 3 if INTERPRETING else 1)
    features = features.to(device).requires_grad_()
    pooled = roi_pool(features, rois[some].to(device), size, float(scale))
    assert torch.equal(pooled.detach().cpu(), out[some])
    if INTERPRETING:  # backward takes 20 seconds
        return
    pooled.backward(grad_out.to(device))
    assert_near(features.grad, grad.double(), torch.float32, terms=100)
    split = [rois[rois[:, 0] == image, 1:].to(device) for image in range(2)]
    order = torch.cat([torch.arange(len(rois))[rois[:, 0] == image] for image in range(2)])
    assert torch.equal(roi_pool(features.detach(), split, size, float(scale)).cpu(), out[order])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(7, 7), (3, 10)])
def test_pool_of_the_whole_map_is_adaptive_max_pooling(size: tuple[int, int], device: str) -> None:
    feature = torch.randn(2, 3, 10, 13, device=device)
    rois = torch.tensor([[0.0, 0, 0, 12, 9], [1, 0, 0, 12, 9]], device=device)
    expected = F.adaptive_max_pool2d(feature, size)
    assert torch.equal(roi_pool(feature, rois, size), expected)
    assert torch.equal(naive.roi_pool(feature.cpu(), rois.cpu(), size), expected.cpu().double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(2, 3)] if INTERPRETING else [(7, 7), (3, 10), (1, 1)])
@pytest.mark.parametrize("case", CASES)
def test_definition(case: tuple[str, int, bool], size: tuple[int, int], device: str) -> None:
    """Forward and backward, boxes by image and packed."""
    maps = pyramid(device=device)
    boxes, valid = some_boxes(2 if INTERPRETING else 4, device)
    pooled = pool_by(case, maps, boxes, size, valid=valid)
    same = on_cpu(maps)
    exact = pool_by(case, same, boxes.cpu(), size, of=naive, valid=valid.cpu())
    assert_near(pooled, exact, torch.float64)
    assert not pooled[0, 1].any()
    grad = torch.randn(exact.shape, dtype=torch.float64)
    grad[0, 1] = torch.nan  # what a slot that is not valid sends back is nothing
    exact.backward(grad)
    pooled.backward(grad.to(device))
    for m, s in zip(maps, same, strict=True):
        assert_near(m.grad, s.grad, torch.float64)
    if not INTERPRETING:
        images = torch.arange(2, device=device).repeat_interleave(boxes.shape[1])
        where = {"valid": valid.flatten(), "batch_index": images}
        assert torch.equal(pool_by(case, maps, boxes.flatten(0, 1), size, **where), pooled.flatten(0, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FEW)
def test_first_of_equals_gets_the_gradient(case: tuple[str, int, bool], device: str) -> None:
    """Flat maps, as behind a ReLU; one box reaches off the map, where samples are zero."""
    maps = [m.detach().floor().clamp(0, 1).requires_grad_() for m in pyramid(2, device=device)]
    boxes = torch.tensor([[[4.0, 6, 30, 33]], [[-14, -9, 20, 25]]], device=device)
    same = on_cpu(maps)
    exact = pool_by(case, same, boxes.cpu(), (3, 3), of=naive)
    pooled = pool_by(case, maps, boxes, 3)
    assert_near(pooled, exact, torch.float64)
    grad = torch.randn(exact.shape, dtype=torch.float64)
    exact.backward(grad)
    pooled.backward(grad.to(device))
    for m, s in zip(maps, same, strict=True):
        assert_near(m.grad, s.grad, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "form"), LAYOUTS)
@pytest.mark.parametrize("case", FEW)
def test_dtypes_and_layouts(
    case: tuple[str, int, bool], dtype: torch.dtype, form: torch.memory_format, device: str
) -> None:
    maps = pyramid(20, dtype, device, form)
    kind = case[0].split()[0]
    boxes, valid = some_boxes(PER_IMAGE, device)
    grad = torch.randn(2, PER_IMAGE, 20, 1, 9, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    pooled = pool_by(case, maps, boxes, (1, 9), valid=valid)
    pooled.backward(grad)
    exact = pool_by(case, on_cpu(maps), boxes.cpu(), (1, 9), of=naive, valid=valid.cpu())
    assert_near(pooled, exact, dtype)
    how = Pooling((1, 9), SCALES, case[1], case[2], 30.0, 3, 2)
    where = (boxes.flatten(0, 1), None)
    # Of samples that are about equal, float32 may choose another.
    _, winner = registration._roi_max(maps, *where, valid.flatten(), kind, [1, 9], *how[1:])
    exact_grads = cpu.multilevel_roi_max_backward(
        grad.flatten(0, 1).double(), winner, *where, 2, SIZES, kind, how
    )
    for m, exact_grad in zip(maps, exact_grads, strict=True):
        assert m.grad.dtype == dtype
        assert_near(m.grad, exact_grad, dtype, terms=50)
        assert m.grad.is_contiguous(memory_format=form)
    assert pooled.dtype == dtype
    assert pooled.flatten(0, 1).is_contiguous(memory_format=form)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FEW if INTERPRETING else [*FEW, ("warp avg", 0, True)])
def test_gradcheck(case: tuple[str, int, bool], device: str) -> None:
    maps = [torch.randn(1, 1, 3, 4, dtype=torch.float64, device=device, requires_grad=True)]
    boxes = torch.tensor([[[-1.0, 2.0, 11.0, 9.5]]], device=device)

    def pool(*features: Tensor) -> Tensor:
        return pool_by(case, list(features), boxes, 2, spatial_scales=[1 / 4])

    assert torch.autograd.gradcheck(pool, maps, fast_mode=INTERPRETING)


OPCHECKS = [("pool", "nchw"), ("pool", "channels_last"), ("align", "permuted")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "layout"), OPCHECKS[2:] if INTERPRETING else OPCHECKS)
def test_opcheck(kind: str, layout: str, device: str) -> None:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    levels = slice(1 if INTERPRETING else 0, None)
    maps, sizes = pyramid(2, torch.float32, device, form)[levels], SIZES[levels]
    if layout == "permuted":
        maps = [permuted(m).requires_grad_() for m in maps]
    boxes, valid = (t.flatten(0, 1) for t in some_boxes(PER_IMAGE, device))
    how = (kind, [1, 2], SCALES[levels], 2, True, 30.0, 3, 2)
    opcheck(registration._roi_max, (maps, boxes, None, valid, *how))
    out, winner = registration._roi_max(maps, boxes, None, valid, *how)
    grad = torch.randn(out.shape, device=device)
    if layout == "permuted":
        grad, winner = permuted(grad), permuted(winner)
    heights, widths = zip(*sizes, strict=True)
    shape = (2, list(heights), list(widths), layout == "channels_last")
    opcheck(registration._roi_max_backward, (grad, winner, boxes, None, valid, *shape, *how))
    expected, _ = registration._roi_max([m.detach().contiguous() for m in maps], boxes, None, valid, *how)
    torch.testing.assert_close(out.contiguous(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FEW[:1] if INTERPRETING else [*FEW, ("warp avg", 2, True)])
def test_one_graph(case: tuple[str, int, bool], device: str) -> None:
    def loss(maps: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        return pool_by(case, maps, boxes, 2, valid=valid).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed in range(2):
        maps, (boxes, valid) = pyramid(2, torch.float32, device), some_boxes(PER_IMAGE, device)
        boxes = boxes + seed
        value = compiled(maps, boxes, valid)
        value.backward()
        gradients = [m.grad for m in maps]
        again = pyramid(2, torch.float32, device)
        expected = loss(again, boxes, valid)
        expected.backward()
        torch.testing.assert_close(value, expected)
        assert all(torch.equal(g, m.grad) for g, m in zip(gradients, again, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_back(case: tuple[str, int, bool], device: str) -> None:
    if INTERPRETING:
        pytest.skip("the interpreter reads what a kernel loads")
    maps, (boxes, valid) = pyramid(device=device), some_boxes(device=device)
    with NoSync():
        pooled = pool_by(case, maps, boxes, 7, valid=valid)
        torch.autograd.grad(pooled, maps, torch.ones_like(pooled))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FEW[:1] if INTERPRETING else FEW)
def test_backward_repeats_bit_for_bit(case: tuple[str, int, bool], device: str) -> None:
    maps = pyramid(16, torch.float32, device)
    boxes, valid = some_boxes(1 if INTERPRETING else 40, device)
    pooled = pool_by(case, maps, boxes, 3 if INTERPRETING else 7, valid=valid)
    grad = torch.randn_like(pooled)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = [torch.autograd.grad(pooled, maps, grad, retain_graph=True) for _ in range(2)]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", FEW[:1] if INTERPRETING else FEW)
@pytest.mark.parametrize("case", ["no box", "one box", "none valid", "no channel", "no image"])
def test_edges(case: str, kind: tuple[str, int, bool], device: str) -> None:
    maps, (boxes, valid) = pyramid(2, torch.float32, device), some_boxes(2, device)
    if case == "no box":
        boxes, valid = boxes[:, :0], valid[:, :0]
    elif case == "one box":
        boxes, valid = boxes[:, :1], valid[:, :1]
    elif case == "none valid":
        valid = torch.zeros_like(valid)
    elif case == "no channel":
        maps = [m.detach()[:, :0].requires_grad_() for m in maps]
    elif case == "no image":
        maps = [m.detach()[:0].requires_grad_() for m in maps]
        boxes, valid = boxes[:0], valid[:0]
    pooled = pool_by(kind, maps, boxes, (2, 3), valid=valid)
    assert pooled.shape == (*boxes.shape[:2], maps[0].shape[1], 2, 3)
    grads = torch.autograd.grad(pooled, maps, torch.ones_like(pooled))
    assert [g.shape for g in grads] == [m.shape for m in maps]
    moved = any(bool(g.any()) for g in grads)
    assert moved == (case == "one box")
    assert bool(pooled.any()) == moved


NICE = st.floats(-30, 80, width=32)
ANY = st.one_of(
    NICE, st.sampled_from([0.0, -4.0, 52.0, 56.0, 1e3, -1e9, 1e9, 3e38, math.inf, -math.inf, math.nan])
)


@pytest.mark.parametrize("device", DEVICES)
@example(boxes=[[0.0, 0.0, 0.0, -math.inf]], case=("warp avg", 0, True), size=(1, 1))
@settings(max_examples=3 if INTERPRETING else 60, deadline=None)
@given(
    boxes=st.lists(st.lists(ANY, min_size=4, max_size=4), min_size=1, max_size=1 if INTERPRETING else 3),
    case=st.sampled_from(CASES),
    size=st.tuples(st.integers(1, 2), st.integers(1, 3 if INTERPRETING else 9)),
)
def test_any_boxes(
    device: str, boxes: list[list[float]], case: tuple[str, int, bool], size: tuple[int, int]
) -> None:
    """Never out of range, zeros for what is not finite, and the definition where it can be computed."""
    maps = pyramid(2, device=device)
    tensor = torch.tensor(boxes, dtype=torch.float64, device=device)
    images = torch.arange(len(boxes)) % 2
    pooled = pool_by(case, maps, tensor, size, batch_index=images.to(device))
    largest = max(float(m.detach().abs().max()) for m in maps)
    assert float(pooled.detach().abs().max()) <= largest * (1 + 1e-9)
    sane = (tensor.abs() <= 100).all(dim=1).cpu()
    same = on_cpu(maps)
    exact = pool_by(case, same, tensor.cpu(), size, of=naive, valid=sane, batch_index=images)
    assert_near(pooled[sane], exact[sane], torch.float64)
    assert not pooled[~tensor.isfinite().all(dim=1)].any()
    if bool(sane.any()):
        grad = torch.where(sane[:, None, None, None], torch.ones(exact.shape), 0).to(device)
        grads = torch.autograd.grad(pooled, maps, grad, retain_graph=True)
        expected = torch.autograd.grad(exact, same, grad.cpu(), allow_unused=True, materialize_grads=True)
        for g, e in zip(grads, expected, strict=True):
            assert_near(g, e, torch.float64, terms=100)
    if not bool(sane.all()):
        grads = torch.autograd.grad(pooled, maps, torch.ones_like(pooled))
        assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FEW)
def test_nan_in_the_map_is_not_hidden(case: tuple[str, int, bool], device: str) -> None:
    feature = torch.zeros(1, 1, 8, 8, device=device)
    feature[0, 0, 2, 2] = torch.nan
    boxes = torch.tensor([[[0.0, 0, 7, 7], [5, 5, 7, 7]]], device=device)
    pooled = pool_by(case, [feature], boxes, 1, spatial_scales=[1.0])
    assert pooled.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_warp_rounds_the_box_first(mode: str, device: str) -> None:
    """Boxes that round alike give the same, and their pixels with one sample a bin are what RoIPool sees."""
    feature = torch.randn(1, 2, 9, 9, device=device)
    boxes = torch.tensor([[[4.0, 8, 15, 19], [5.9, 6, 16.9, 18.5]]], device=device)
    both = multilevel_roi_warp([feature], boxes, 4, spatial_scales=[0.25], mode=mode, sampling_ratio=1)
    assert torch.equal(both[:, 0], both[:, 1])
    assert torch.equal(both[0, 0], feature[0, :, 2:6, 1:5])
    assert torch.equal(both, multilevel_roi_pool([feature], boxes, 4, spatial_scales=[0.25]))


@pytest.mark.parametrize("device", DEVICES)
def test_image_out_of_range(device: str) -> None:
    """An error where it costs no wait; elsewhere zeros, and no access out of range."""
    maps = pyramid(2, torch.float32, device)
    rois = torch.tensor([[0, 4.0, 4, 30, 30], [2, 4, 4, 30, 30], [-1, 4, 4, 30, 30]], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"image indices of boxes must be in 0\.\.1"):
            roi_pool(maps[0], rois, 2, 1 / 4)
    compiled = torch.compile(roi_pool, fullgraph=True, backend="aot_eager")
    pooled = compiled(maps[0], rois, 2, 1 / 4)
    assert pooled[0].any()
    assert not pooled[1:].any()
    pooled.sum().backward()
    assert not maps[0].grad[1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_dtypes_alone(device: str) -> None:
    boxes = [torch.rand(2, 4, device=device) * 20] * 2
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert roi_pool(pyramid(2, dtype, device)[0], boxes, 2).dtype == dtype


def test_beyond_31_bits() -> None:
    """Channels of a gradient more than 2**31 elements apart; 4 GiB of address space, hardly any used."""
    torch.use_deterministic_algorithms(False)  # it would touch all of it
    near = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided(near.shape, (4, 2**30 + 16, 2, 1))
    far.copy_(near)
    boxes, maps = torch.tensor([[1.0, 1, 6, 7]]), torch.randn(1, 3, 8, 8).half()
    how = ("align", [2, 2], [1.0], 1, True, 224.0, 4, 0)
    _, winner = registration._roi_max([maps], boxes, None, None, *how)
    found = [
        registration._roi_max_backward(grad, winner, boxes, None, None, 1, [8], [8], False, *how)[0]
        for grad in (far, near)
    ]
    assert torch.equal(*found)
    assert found[0].any()


BOX, MAP = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, 4)
ONE: dict[str, Any] = {"spatial_scales": [1.0]}
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: roi_pool(torch.zeros(2, 3, 4), torch.zeros(1, 5), 7), r"input must be \(N, C, H, W\)"),
    (lambda: roi_pool(MAP, torch.zeros(1, 4), 7), r"boxes must be \(R, 5\)"),
    (lambda: roi_pool(MAP, torch.zeros(1, 5).int(), 7), "boxes must be floating"),
    (lambda: roi_pool(MAP, torch.zeros(1, 5), (7, 0)), "output_size must be a positive"),
    (lambda: roi_pool(torch.zeros(1, 1, 1, 40_000), torch.zeros(1, 5), 7), "at most 32767 pixels wide"),
    (lambda: multilevel_roi_pool([MAP], BOX, 7, **LEVELS), "one number per level, got 2 for 1"),
    (lambda: multilevel_roi_pool([MAP], BOX[0], 7, **ONE), r"must be \(1, S, 4\)"),
    (
        lambda: multilevel_roi_pool([MAP], torch.zeros(3, 1, 4), 7, **ONE),
        r"must be \(1, S, 4\) .* got \(3, 1, 4\)",
    ),
    (
        lambda: multilevel_roi_align_max([MAP], BOX, 7, valid=torch.ones(1, 2, dtype=torch.bool), **ONE),
        r"valid must be \(1, 1\)",
    ),
    (lambda: multilevel_roi_align_max([MAP], BOX, 7, valid=torch.ones(1, 1), **ONE), "valid must be bool"),
    (lambda: multilevel_roi_align_max([MAP], BOX, 7, sampling_ratio=40_000, **ONE), "at most 32767, got"),
    (lambda: multilevel_roi_warp([MAP], BOX, 7, mode="sum", **ONE), "mode must be 'avg' or 'max'"),
    (lambda: multilevel_roi_warp([MAP], BOX, 7, spatial_scales=[-1.0]), "scales must be positive"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
