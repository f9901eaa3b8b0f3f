"""RoIAlign against its definition, sample by sample, and torchvision's results.

CPU tensors run cpu.py, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import load, names
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync
from pyramids import LEVELS, SCALES, SIZES, on_cpu, permuted, pyramid, some_boxes
from tolerances import assert_near
from torch import Tensor
from torch.library import opcheck

from fastmrcnn.kernels import MultiScaleRoIAlign, multilevel_roi_align, roi_align
from fastmrcnn.kernels.roi_align import naive, op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
EXTENT = 80.0  # of the coordinates of `some_boxes`
GOLDEN = names("roi_align/")
EXACT = [
    (size, ratio, aligned)
    for size in [(7, 7), (3, 10), (1, 1)]
    for ratio in (0, 2)
    for aligned in (False, True)
]
if INTERPRETING:  # it takes 40 ms a program
    GOLDEN = ["roi_align/3x5/sr-1/aligned0"]
    EXACT = [((7, 7), 0, False), ((3, 10), 2, True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, device: str) -> None:
    _, size, ratio, aligned = name.split("/")
    features, rois, scale = load("roi/features", "roi/rois", "roi/spatial_scale")
    out, grad_out, grad = load(f"{name}/out", f"{name}/grad_out", f"{name}/grad_features")
    features = features.to(device).requires_grad_()
    output_size = [int(side) for side in size.split("x")]
    pooled = roi_align(
        features, rois.to(device), output_size, float(scale), int(ratio[2:]), aligned == "aligned1"
    )
    pooled.backward(grad_out.to(device))
    assert_near(pooled, out.double(), torch.float32, extent=300)
    assert_near(features.grad, grad.double(), torch.float32, terms=100, extent=300)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_module(device: str) -> None:
    maps = {str(i): load(f"multiscale/f{i}")[0].to(device) for i in range(4)}
    boxes = [part.to(device) for part in load("multiscale/boxes0", "multiscale/boxes1")]
    (expected,) = load("multiscale/out_aligned0_sr2")
    module = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    assert_near(module(maps, boxes, [(256, 320), (256, 320)]), expected.double(), torch.float32, extent=320)
    assert repr(module).startswith("MultiScaleRoIAlign(featmap_names=['0'")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "ratio", "aligned"), EXACT)
def test_definition(size: tuple[int, int], ratio: int, aligned: bool, device: str) -> None:
    """Forward and backward, boxes by image and packed."""
    maps = pyramid(device=device)
    boxes, valid = some_boxes(device=device, longest=70)  # of both levels
    how = {"sampling_ratio": ratio, "aligned": aligned, **LEVELS}
    pooled = multilevel_roi_align(maps, boxes, size, valid=valid, **how)
    same = on_cpu(maps)
    exact = naive.multilevel_roi_align(same, boxes.cpu(), size, valid=valid.cpu(), **how)
    assert_near(pooled, exact, torch.float64, extent=EXTENT)
    assert not pooled[0, 1].any()
    grad = torch.randn(exact.shape, dtype=torch.float64)
    grad[0, 1] = torch.nan  # what a slot that is not valid sends back is nothing
    pooled.backward(grad.to(device))
    for m, g in zip(maps, torch.autograd.grad(exact, same, grad), strict=True):
        assert_near(m.grad, g, torch.float64, terms=100, extent=EXTENT)
    if aligned:
        return
    images = torch.arange(2, device=device).repeat_interleave(boxes.shape[1])
    where = {"valid": valid.flatten(), "batch_index": images}
    packed = multilevel_roi_align(maps, boxes.flatten(0, 1), size, **where, **how)
    assert torch.equal(packed, pooled.flatten(0, 1))
    rois = torch.cat([images[:, None], boxes.flatten(0, 1)], dim=1)[[0, 2, 5]]
    single = roi_align(maps[1], rois, size, SCALES[1], ratio, aligned)
    one = {"sampling_ratio": ratio, "aligned": aligned}
    assert_near(
        single, naive.roi_align(same[1], rois.cpu(), size, SCALES[1], **one), torch.float64, extent=EXTENT
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts(dtype: torch.dtype, form: torch.memory_format, device: str) -> None:
    maps = pyramid(20, dtype, device, form)
    boxes, valid = some_boxes(3, device)
    grad = torch.randn(2, 3, 20, 7, 7, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    pooled = multilevel_roi_align(maps, boxes, 7, valid=valid, aligned=True, **LEVELS)
    pooled.backward(grad)
    same = on_cpu(maps)
    exact = naive.multilevel_roi_align(same, boxes.cpu(), (7, 7), valid=valid.cpu(), aligned=True, **LEVELS)
    grads = torch.autograd.grad(exact, same, grad.cpu().double(), materialize_grads=True)
    assert_near(pooled, exact, dtype, terms=50, extent=EXTENT)
    for m, g in zip(maps, grads, strict=True):
        assert m.grad.dtype == dtype
        assert_near(m.grad, g, dtype, terms=50, extent=EXTENT)
    assert pooled.dtype == dtype
    assert pooled.flatten(0, 1).is_contiguous(memory_format=form)
    assert all(m.grad.is_contiguous(memory_format=form) for m in maps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0, 2])
def test_gradcheck(ratio: int, device: str) -> None:
    maps = [torch.randn(1, 1, 3, 4, dtype=torch.float64, device=device, requires_grad=True)]
    boxes = torch.tensor([[[-1.0, 2.0, 11.0, 9.5]]], device=device)

    def pool(*features: Tensor) -> Tensor:
        return multilevel_roi_align(
            features, boxes, 2, spatial_scales=[1 / 4], sampling_ratio=ratio, aligned=True
        )

    assert torch.autograd.gradcheck(pool, maps, fast_mode=INTERPRETING)
    assert torch.autograd.gradgradcheck(pool, maps, fast_mode=INTERPRETING)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["permuted"] if INTERPRETING else ["nchw", "channels_last", "permuted"])
def test_opcheck(layout: str, device: str) -> None:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    maps = pyramid(2, torch.float32, device, form)
    if layout == "permuted":
        maps = [permuted(m).requires_grad_() for m in maps]
    boxes, valid = (t.flatten(0, 1) for t in some_boxes(2, device))
    how = ([2, 3], SCALES, 2, True, 30.0, 3, 2)
    opcheck(op._roi_align, (maps, boxes, None, valid, *how))
    grad = torch.randn(4, 2, 2, 3, device=device)
    grad = (permuted(grad) if layout == "permuted" else grad.contiguous(memory_format=form)).requires_grad_()
    heights, widths = zip(*SIZES, strict=True)
    channels_last = layout == "channels_last"
    arguments = (grad, boxes, None, valid, 2, list(heights), list(widths), channels_last, *how)
    opcheck(op._roi_align_backward, arguments)
    expected = op._roi_align([m.detach().contiguous() for m in maps], boxes, None, valid, *how)
    torch.testing.assert_close(op._roi_align(maps, boxes, None, valid, *how).contiguous(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph(device: str) -> None:
    def loss(maps: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        return multilevel_roi_align(maps, boxes, 2, valid=valid, **LEVELS).square().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed in range(2):
        maps, (boxes, valid) = pyramid(2, torch.float32, device), some_boxes(2, device)
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
@pytest.mark.parametrize("ratio", [0, 2])
def test_nothing_is_read_back(ratio: int, device: str) -> None:
    if INTERPRETING:
        pytest.skip("the interpreter reads what a kernel loads")
    maps, (boxes, valid) = pyramid(device=device), some_boxes(device=device)
    with NoSync():
        pooled = multilevel_roi_align(maps, boxes, 7, valid=valid, sampling_ratio=ratio, **LEVELS)
        torch.autograd.grad(pooled, maps, torch.ones_like(pooled))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0, 2])
def test_backward_repeats_bit_for_bit(ratio: int, device: str) -> None:
    maps = pyramid(16, torch.float32, device)
    boxes, valid = some_boxes(8 if INTERPRETING else 100, device)
    pooled = multilevel_roi_align(maps, boxes, 7, valid=valid, sampling_ratio=ratio, **LEVELS)
    grad = torch.randn_like(pooled)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = [
        torch.autograd.grad(pooled, maps, grad, retain_graph=True) for _ in range(2 if INTERPRETING else 4)
    ]
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["no box", "one box", "none valid", "no channel", "no image"])
def test_edges(case: str, device: str) -> None:
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
    pooled = multilevel_roi_align(maps, boxes, (2, 3), valid=valid, **LEVELS)
    assert pooled.shape == (*boxes.shape[:2], maps[0].shape[1], 2, 3)
    grads = torch.autograd.grad(pooled, maps, torch.ones_like(pooled))
    assert [g.shape for g in grads] == [m.shape for m in maps]
    moved = any(bool(g.any()) for g in grads)
    assert moved == (case == "one box")
    assert bool(pooled.any()) == moved


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_of_many_boxes_and_of_none(device: str) -> None:
    """Backward keeps lists of who touches which 8 x 8 pixels, made from 256 boxes at a time."""
    feature = torch.randn(1, 2, 8, 24, dtype=torch.float64, requires_grad=True)
    r = torch.Generator().manual_seed(4)
    corner = torch.rand(300, 2, generator=r) * 3
    boxes = torch.cat([corner, corner + 1 + torch.rand(300, 2, generator=r) * 3], dim=1)
    boxes[20:280, 0::2] += 8  # of the second 8 columns, the others of the first
    valid = torch.rand(1, 300, generator=r) < 0.3
    how: dict[str, Any] = {"spatial_scales": [1.0], "sampling_ratio": 1}
    pooled = naive.multilevel_roi_align([feature], boxes[None], (1, 1), valid=valid, **how)
    grad = torch.randn(300, 2, 1, 1, dtype=torch.float64, generator=r)
    (exact,) = torch.autograd.grad(pooled, feature, grad.view_as(pooled))
    given = [t.to(device) for t in (grad, boxes.double(), valid.flatten())]
    maps, how_pooled = (1, [8], [24], False), ([1, 1], [1.0], 1, False, 224.0, 4, 0)
    (found,) = op._roi_align_backward(given[0], given[1], None, given[2], *maps, *how_pooled)
    assert_near(found, exact, torch.float64, terms=300, extent=16)
    assert found[..., :8].any()
    assert found[..., 8:16].any()
    assert not found[..., 16:].any()


NICE = st.floats(-30, 80, width=32)
ANY = st.one_of(
    NICE, st.sampled_from([0.0, -4.0, 52.0, 56.0, 1e4, -1e9, 1e9, 3e38, math.inf, -math.inf, math.nan])
)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=5 if INTERPRETING else 60, deadline=None)
@given(
    boxes=st.lists(st.lists(ANY, min_size=4, max_size=4), min_size=1, max_size=3),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_any_boxes(
    device: str, boxes: list[list[float]], ratio: int, aligned: bool, size: tuple[int, int]
) -> None:
    """Never out of range, zeros for what is not finite, and the definition where it can be computed."""
    maps = pyramid(2, device=device)
    tensor = torch.tensor(boxes, dtype=torch.float64, device=device)
    how = {"sampling_ratio": ratio, "aligned": aligned, **LEVELS}
    images = torch.arange(len(boxes)) % 2
    pooled = multilevel_roi_align(maps, tensor, size, batch_index=images.to(device), **how)
    largest = max(float(m.detach().abs().max()) for m in maps)
    assert float(pooled.detach().abs().max()) <= largest * (1 + 1e-9)
    sane = (tensor.abs() <= 1e4).all(dim=1).cpu()
    exact = naive.multilevel_roi_align(
        on_cpu(maps), tensor.cpu(), size, valid=sane, batch_index=images, **how
    )
    # Boxes of 10,000 pixels average many entries that cancel.
    assert_near(pooled[sane], exact[sane], torch.float64, extent=1e4, largest_term=largest)
    assert not pooled[~tensor.isfinite().all(dim=1)].any()
    grads = torch.autograd.grad(pooled, maps, torch.ones_like(pooled))
    assert all(bool(g.isfinite().all()) for g in grads)
    inner = sum(float((g * m.detach()).sum()) for g, m in zip(grads, maps, strict=True))
    assert inner == pytest.approx(float(pooled.detach().sum()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_image_out_of_range(device: str) -> None:
    """An error where it costs no wait; elsewhere zeros, and no access out of range."""
    maps = pyramid(2, torch.float32, device)
    rois = torch.tensor([[0, 4.0, 4, 30, 30], [2, 4, 4, 30, 30], [-1, 4, 4, 30, 30]], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"image indices of boxes must be in 0\.\.1"):
            roi_align(maps[0], rois, 2, 1 / 4)
    compiled = torch.compile(roi_align, fullgraph=True, backend="aot_eager")
    pooled = compiled(maps[0], rois, 2, 1 / 4)
    assert_near(pooled, naive.roi_align(on_cpu(maps)[0], rois.cpu(), (2, 2), 1 / 4), torch.float32)
    assert pooled[0].any()
    assert not pooled[1:].any()
    pooled.sum().backward()
    assert not maps[0].grad[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_width_name_images(dtype: torch.dtype, device: str) -> None:
    """Of more images than int8 can count; what names none gives zeros, and no gradient."""
    feature = torch.rand(130, 1, 2, 2, dtype=torch.float64) + 1
    info = torch.iinfo(dtype)
    images = torch.tensor([1, 127, info.max, info.min, -1 if info.min < 0 else 129], dtype=dtype)
    if info.max > 2**32:
        images = torch.cat([images, torch.tensor([2**32 + 1])])
    boxes = torch.tensor([0.0, 0, 2, 2], dtype=torch.float64).repeat(len(images), 1)
    same = on_cpu([feature])
    exact = naive.multilevel_roi_align(same, boxes, (1, 1), spatial_scales=[1.0], batch_index=images)
    (expected,) = torch.autograd.grad(exact.sum(), same)
    feature = feature.to(device).requires_grad_()
    where = (boxes.to(device), images.to(device), None)
    pooled = op._roi_align([feature], *where, [1, 1], [1.0], 0, False, 224.0, 4, 0)
    assert_near(pooled, exact, torch.float64)
    pooled.sum().backward()
    assert_near(feature.grad, expected, torch.float64)
    assert pooled[:2].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("rotten", [math.nan, math.inf])
def test_what_is_not_pooled_is_zero_whatever_the_maps_hold(rotten: float, ratio: int, device: str) -> None:
    maps = [torch.full_like(m, rotten).requires_grad_() for m in pyramid(2, torch.float32, device)]
    boxes = torch.tensor([4.0, 4, 30, 30], device=device).repeat(6, 1)
    boxes[2, 1], boxes[3, 2] = math.nan, math.inf
    valid = torch.tensor([True, False, True, True, True, True], device=device)
    images = torch.tensor([1, 0, 0, 0, -1, 2], device=device, dtype=torch.float32)
    compiled = torch.compile(multilevel_roi_align, fullgraph=True, backend="aot_eager")  # no check of images
    pooled = compiled(
        maps, boxes, 3, valid=valid, batch_index=images, sampling_ratio=ratio, aligned=True, **LEVELS
    )
    assert not pooled[0].isfinite().any()
    assert (pooled[1:] == 0).all()
    grad = torch.full_like(pooled, rotten)
    grad[0] = 1
    for m in torch.autograd.grad(pooled, maps, grad):
        assert m.isfinite().all()
        assert (m[0] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_dtypes_alone(device: str) -> None:
    boxes = [torch.rand(2, 4, device=device) * 20] * 2
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert roi_align(pyramid(2, dtype, device)[0], boxes, 2).dtype == dtype


def test_beyond_31_bits() -> None:
    """The second image begins 2**31 elements after the first (4 GiB of address space, hardly any memory)."""
    torch.use_deterministic_algorithms(False)  # it would touch all of it
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 1, 8, 8), (2**31, 64, 8, 1))
    near = torch.randn(2, 1, 8, 8).half()
    far.copy_(near)
    boxes = torch.tensor([[[1.0, 1, 6, 7]], [[0, 0, 5, 8]]])
    pooled = [multilevel_roi_align([m], boxes, 2, spatial_scales=[1.0]) for m in (far, near)]
    assert torch.equal(*pooled)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: roi_align(torch.zeros(2, 3, 4), torch.zeros(1, 5), 7), r"input must be \(N, C, H, W\)"),
    (lambda: roi_align(torch.zeros(2, 3, 4, 0), torch.zeros(1, 5), 7), "input must have pixels"),
    (lambda: roi_align(torch.zeros(1, 1, 4, 4).int(), torch.zeros(1, 5), 7), r"got torch\.int32"),
    (lambda: roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4), 7), r"boxes must be \(R, 5\)"),
    (lambda: roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5).int(), 7), "boxes must be floating"),
    (lambda: roi_align(torch.zeros(2, 1, 4, 4), [torch.zeros(1, 4)], 7), "one .* per image, got 1 of 2"),
    (lambda: roi_align(torch.zeros(1, 1, 4, 4), [torch.zeros(1, 5)], 7), r"got \(1, 5\) in it"),
    (lambda: roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (7, 0)), "output_size must be a positive"),
    (lambda: roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 7, -1.0), "scales must be positive"),
    (lambda: multilevel_roi_align([], torch.zeros(1, 1, 4), 7, **LEVELS), "features must not be empty"),
    (
        lambda: multilevel_roi_align([torch.zeros(1, 1, 4, 4)], torch.zeros(1, 1, 4), 7, **LEVELS),
        "one number per level, got 2 for 1",
    ),
    (lambda: multilevel_roi_align(pyramid(), torch.zeros(3, 4), 7, **LEVELS), r"must be \(2, S, 4\)"),
    (
        lambda: multilevel_roi_align(pyramid(), torch.zeros(3, 1, 4), 7, **LEVELS),
        r"must be \(2, S, 4\) .* got \(3, 1, 4\)",
    ),
    (
        lambda: multilevel_roi_align(
            pyramid(), torch.zeros(2, 3, 4), 7, valid=torch.ones(2, 2, dtype=torch.bool), **LEVELS
        ),
        r"valid must be \(2, 3\)",
    ),
    (
        lambda: multilevel_roi_align(
            pyramid(), torch.zeros(2, 3, 4), 7, valid=torch.ones(2, 3, dtype=torch.int32), **LEVELS
        ),
        "valid must be bool",
    ),
    (
        lambda: multilevel_roi_align([pyramid()[0], pyramid()[1].float()], torch.zeros(2, 3, 4), 7, **LEVELS),
        "one dtype and device",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
