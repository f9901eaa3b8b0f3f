"""RoIAlign of several sets of RoIs at once against its definition, and against one call for each set.

CPU tensors run cpu.py, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from nosync import NoSync
from pyramids import LEVELS, on_cpu, pyramid, some_boxes
from tolerances import assert_near
from torch import Tensor
from torch.library import opcheck

from fastmrcnn.kernels import RoiSet, multilevel_roi_align, multilevel_roi_align_sets
from fastmrcnn.kernels.common.launch import Target
from fastmrcnn.kernels.common.pooling import Asked, Pooling
from fastmrcnn.kernels.roi_align import naive, sets

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EXTENT = 80.0  # of the coordinates of `some_boxes`


def box_and_mask_rois(device: str, per_image: int = 3) -> list[RoiSet]:
    """Boxes by image, and others packed that name their image, with other bins and samples."""
    boxes, valid = some_boxes(per_image, device, longest=70)  # of both levels
    other, other_valid = some_boxes(per_image + 1, device, longest=30)
    image = torch.tensor([1, 0], device=device).repeat(per_image + 1)
    other, other_valid = other.flip(1).flatten(0, 1), other_valid.flip(1).flatten()
    return [RoiSet(boxes, (3, 3), valid), RoiSet(other, (9, 2), other_valid, image, 2)]


def gradients_of(pooled: list[Tensor]) -> list[Tensor]:
    r = torch.Generator().manual_seed(5)
    return [torch.randn(out.shape, generator=r, dtype=torch.float64).to(out) for out in pooled]


FORMS = [
    (torch.float64, torch.contiguous_format),
    (torch.float32, torch.channels_last),
    (torch.bfloat16, torch.channels_last),
    (torch.bfloat16, torch.contiguous_format),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "form"), FORMS[:3:2] if INTERPRETING else FORMS)
def test_definition(dtype: torch.dtype, form: torch.memory_format, device: str) -> None:
    maps, rois = pyramid(20, dtype, device, form), box_and_mask_rois(device)
    pooled = multilevel_roi_align_sets(maps, rois, aligned=True, **LEVELS)
    same = on_cpu(maps)
    on_host = [RoiSet(*(v.cpu() if isinstance(v, Tensor) else v for v in one)) for one in rois]
    exact = naive.multilevel_roi_align_sets(same, on_host, aligned=True, **LEVELS)
    grads = gradients_of(pooled)
    expected = torch.autograd.grad(exact, same, [g.cpu().double() for g in grads])
    grads[0][0, 1] = torch.nan  # what a slot that is not valid sends back is nothing
    found = torch.autograd.grad(pooled, maps, grads)
    for out, truth in zip(pooled, exact, strict=True):
        assert out.dtype == dtype
        assert_near(out, truth, dtype, terms=50, extent=EXTENT)
    for out, truth in zip(found, expected, strict=True):
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=form)
        assert_near(out, truth, dtype, terms=100, extent=EXTENT)


@pytest.mark.parametrize("device", DEVICES)
def test_as_one_call_for_each_set(device: str) -> None:
    """Forward bit for bit; backward too on a CPU, where a set is summed by itself."""
    maps, rois = pyramid(4, torch.float32, device), box_and_mask_rois(device)
    pooled = multilevel_roi_align_sets(maps, rois, **LEVELS)
    grads = gradients_of(pooled)
    found = torch.autograd.grad(pooled, maps, grads)
    apart = []
    for one, out, grad in zip(rois, pooled, grads, strict=True):
        boxes, output_size, *where = one
        how: dict[str, Any] = dict(zip(("valid", "batch_index", "sampling_ratio"), where, strict=True))
        alone = multilevel_roi_align(maps, boxes, output_size, **how, **LEVELS)
        assert torch.equal(alone, out)
        apart.append(torch.autograd.grad(alone, maps, grad))
    for both, first, second in zip(found, *apart, strict=True):
        if device == "cpu" and not INTERPRETING:
            assert torch.equal(both, first + second)
        torch.testing.assert_close(both, first + second)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bit_for_bit_and_reads_nothing_back(device: str) -> None:
    maps, rois = pyramid(16, torch.float32, device), box_and_mask_rois(device, 2 if INTERPRETING else 40)
    pooled = multilevel_roi_align_sets(maps, rois, **LEVELS)
    grads = gradients_of(pooled)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, maps, grads, retain_graph=True)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    if not INTERPRETING:  # which reads what a kernel loads
        with NoSync():
            run()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", [0, 1, (0, 1)])
def test_a_set_without_boxes_adds_nothing(empty: int | tuple[int, ...], device: str) -> None:
    empty = (empty,) if isinstance(empty, int) else empty
    maps, rois = pyramid(2, torch.float32, device), box_and_mask_rois(device)
    boxes, output_size, valid, *_ = rois[0]
    assert isinstance(valid, Tensor)
    rois = [
        RoiSet(boxes[:, :0] if i in empty else boxes, output_size, valid[:, :0] if i in empty else valid)
        for i in range(2)
    ]
    pooled = multilevel_roi_align_sets(maps, rois, **LEVELS)
    assert [len(out[0]) for out in pooled] == [0 if i in empty else 3 for i in range(2)]
    found = torch.autograd.grad(pooled, maps, [torch.ones_like(out) for out in pooled])
    alone = multilevel_roi_align(maps, boxes, output_size, valid=valid, **LEVELS)
    expected = torch.autograd.grad(alone, maps, torch.ones_like(alone))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, torch.zeros_like(one) if len(empty) == 2 else other)


@pytest.mark.parametrize("device", DEVICES)
def test_a_set_that_nothing_is_made_of(device: str) -> None:
    """Its gradient is zero, not missing."""
    maps, rois = pyramid(2, torch.float32, device), box_and_mask_rois(device)
    first, _ = multilevel_roi_align_sets(maps, rois, **LEVELS)
    found = torch.autograd.grad(first.sum(), maps)
    boxes, output_size, valid, *_ = rois[0]
    alone = multilevel_roi_align(maps, boxes, output_size, valid=valid, **LEVELS)
    for one, other in zip(found, torch.autograd.grad(alone.sum(), maps), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device: str) -> None:
    maps = [torch.randn(1, 1, 3, 4, dtype=torch.float64, device=device, requires_grad=True)]
    box = torch.tensor([[[-1.0, 2.0, 11.0, 9.5]]], device=device)
    rois = [RoiSet(box, 2), RoiSet(box[0] + 1, (1, 2), None, torch.zeros(1, device=device), 2)]

    def pool(*features: Tensor) -> tuple[Tensor, ...]:
        return tuple(multilevel_roi_align_sets(features, rois, spatial_scales=[1 / 4], aligned=True))

    assert torch.autograd.gradcheck(pool, maps, fast_mode=INTERPRETING)
    assert torch.autograd.gradgradcheck(pool, maps, fast_mode=INTERPRETING)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(INTERPRETING, reason="the registration is the same, and this runs the kernels many times")
def test_opcheck(device: str) -> None:
    maps = pyramid(2, torch.float32, device)
    first, second = box_and_mask_rois(device, 2)
    assert first.valid is not None
    rois = [first.boxes.flatten(0, 1), second.boxes, first.valid.flatten(), second.batch_index]
    given = [False, True, True, False]
    how = ([2, 3, 1, 2], [0, 2], [1 / 4, 1 / 8], True, 30.0, 3, 2)
    opcheck(sets._roi_align_sets, (maps, rois, given, *how))
    grads = [torch.randn(4, 2, 2, 3), torch.randn(6, 2, 1, 2)]
    grads = [g.to(device).requires_grad_() for g in grads]
    heights, widths = ([m.shape[axis] for m in maps] for axis in (2, 3))
    opcheck(sets._roi_align_sets_backward, (grads, 2, heights, widths, False, rois, given, *how))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(INTERPRETING, reason="the registration is the same, and this runs the kernels many times")
def test_one_graph(device: str) -> None:
    def loss(maps: list[Tensor], rois: list[RoiSet]) -> Tensor:
        first, second = multilevel_roi_align_sets(maps, rois, **LEVELS)
        return first.square().sum() + second.sin().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    maps, rois = pyramid(2, torch.float32, device), box_and_mask_rois(device)
    value, expected = compiled(maps, rois), loss(maps, rois)
    found = torch.autograd.grad(value, maps)
    torch.testing.assert_close(value, expected)
    for one, other in zip(found, torch.autograd.grad(expected, maps), strict=True):
        torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="sets must not be empty"):
        multilevel_roi_align_sets(pyramid(), [], **LEVELS)
    with pytest.raises(ValueError, match="output_size must be a positive"):
        multilevel_roi_align_sets(pyramid(), [RoiSet(torch.zeros(2, 1, 4), 0)], **LEVELS)


@pytest.mark.parametrize("per_image", [1, 18])
def test_lists_have_room_for_boxes_that_cover_a_map(per_image: int) -> None:
    """Every box touches every tile of its map, by a corner that is inside out too: all places are taken."""
    pytest.importorskip("triton")
    from fastmrcnn.kernels.roi_align import backward

    size, images = (16, 24), 2
    boxes = torch.tensor([0.0, 0.0, 24.0, 16.0]).repeat(images * per_image, 1)
    boxes[1::3] = torch.tensor([24.0, 0.0, 0.0, 16.0])
    image = torch.arange(images).repeat(per_image)
    how = Pooling((1, 1), [1.0], 0, True, 224.0, 4, 0)
    grad = torch.ones(len(boxes), 1, 1, 1)
    target = Target("cuda", 227 * 1024)
    _, launches = backward.launches([grad], [Asked(boxes, image, None, how)], images, [size], False, target)
    places = launches[-1].arguments["lists"][0]
    assert places.numel() == len(boxes) * 2 * 3
    if INTERPRETING:
        for launch in launches:
            launch.run()
        (ranges,) = launches[-1].arguments["ranges"]
        assert int(ranges[:, 1].sum()) <= places.numel()
        whole = boxes[:, 0] < boxes[:, 2]
        for tile, (begin, count) in enumerate(ranges.tolist()):
            found = places[begin : begin + count]
            of_image = image == tile // 6
            assert set(found.tolist()) >= set((whole & of_image).nonzero().flatten().tolist())
            assert found.tolist() == sorted(found.tolist())
    assert math.prod(launches[-1].grid) == images * 6
