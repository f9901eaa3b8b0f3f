"""What only a GPU can show of the kernels: training shapes, streams, graphs, waiting programs, large memory.

The other tests of the operators run on a GPU too (`pytest -m gpu`), at small shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tolerances import assert_near
from torch import Tensor

from fastmrcnn.kernels import assign_levels, mask_loss, multilevel_roi_align, nms, padded_nms
from fastmrcnn.kernels.common.pooling import Asked, Pooling
from fastmrcnn.kernels.mask_loss import reference as mask_loss_reference
from fastmrcnn.kernels.nms import cpu as nms_cpu
from fastmrcnn.kernels.roi_align import cpu as roi_align_cpu

pytestmark = pytest.mark.gpu
SIZES = [(100, 168), (50, 84), (25, 42), (13, 21)]  # of two images at 400x672
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _plain_memory() -> None:
    """Filling fresh memory is no part of what is timed, captured or measured here."""
    torch.use_deterministic_algorithms(False)


def boxes_of(images: int, slots: int, seed: int = 0) -> Tensor:
    """(N, S, 4) on the GPU, sides log-uniform from 8 to 512 pixels."""
    r = torch.Generator().manual_seed(seed)
    side = 8 * 64 ** torch.rand(images, slots, 2, generator=r)
    centre = torch.rand(images, slots, 2, generator=r) * torch.tensor([672.0, 400.0])
    return torch.cat([centre - side / 2, centre + side / 2], dim=-1).cuda()


def pyramid(dtype: torch.dtype, layout: torch.memory_format, channels: int = 256) -> list[Tensor]:
    r = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, channels, *size, generator=r) for size in SIZES]
    return [m.to("cuda", dtype).contiguous(memory_format=layout).requires_grad_() for m in maps]


def masks_of(dtype: torch.dtype, layout: torch.memory_format, seed: int = 0) -> tuple[Tensor, ...]:
    """1024 slots of 80 classes, 28x28; every eighth does not count."""
    r = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(1024, 80, 28, 28, device="cuda", generator=r).to(dtype)
    classes = torch.randint(80, (1024,), device="cuda", generator=r)
    targets = torch.rand(1024, 28, 28, device="cuda", generator=r) < 0.5
    weight = (torch.arange(1024, device="cuda") % 8 > 0).float()
    return logits.contiguous(memory_format=layout).requires_grad_(), classes, targets, weight


def candidates_of(images: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of which many overlap, scores with ties, and five groups."""
    r = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 60, (images, slots, 1), generator=r).expand(-1, -1, 4).cuda()
    boxes = boxes_of(images, 60, seed).gather(1, index)
    boxes = boxes + 12 * torch.randn(images, slots, 4, generator=r).cuda()
    scores = torch.randint(0, slots, (images, slots), generator=r).float().cuda()
    return boxes, scores, torch.randint(0, 5, (images, slots), generator=r).cuda()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bins", "ratio", "channels"), [(7, 0, 256), (14, 2, 256), (7, 2, 200), (10, 0, 40)])
def test_roi_align(
    bins: int, ratio: int, channels: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    maps, boxes = pyramid(dtype, layout, channels), boxes_of(2, 300)
    valid = torch.rand(2, 300, device="cuda") < 0.9
    pooled = multilevel_roi_align(
        maps, boxes, bins, spatial_scales=SCALES, valid=valid, sampling_ratio=ratio, aligned=True
    )
    grad = torch.randn(pooled.shape, device="cuda").to(dtype)
    grads = torch.autograd.grad(pooled, maps, grad)
    how = Pooling((bins, bins), SCALES, ratio, True, 224.0, 4, 2)
    where = (boxes.flatten(0, 1), None, valid.flatten())
    exact = roi_align_cpu.multilevel_roi_align([m.detach().double() for m in maps], *where, how)
    assert_near(pooled.flatten(0, 1), exact, dtype, terms=200)
    exact_grads = roi_align_cpu.multilevel_roi_align_backward(
        [grad.flatten(0, 1).double()], [Asked(*where, how)], 2, SIZES
    )
    for actual, expected in zip(grads, exact_grads, strict=True):
        assert_near(actual, expected, dtype, terms=200)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mask_loss(dtype: torch.dtype, layout: torch.memory_format) -> None:
    logits, *rest = masks_of(dtype, layout)
    loss = mask_loss(logits, *rest)
    (grad,) = torch.autograd.grad(loss, logits)
    exact, divisor = mask_loss_reference.mask_loss(logits.detach().double(), *rest)
    expected = mask_loss_reference.mask_loss_backward(
        torch.ones_like(exact), divisor, logits.detach().double(), *rest
    )
    assert_near(loss, exact, torch.float32, terms=784, extent=0)
    assert_near(grad, expected, dtype, extent=10)  # exp of the GPU is good to a few units
    assert grad[expected == 0].eq(0).all()


def test_levels_and_padded_nms_are_the_cpus() -> None:
    boxes, scores, groups = candidates_of(8, 10_000)
    valid = scores > 1000
    assert assign_levels(boxes).cpu().equal(assign_levels(boxes.cpu()))
    found = padded_nms(boxes, scores, groups, valid, 0.7, 1000)
    where = (t.cpu() for t in (boxes, scores, groups, valid))
    expected = nms_cpu.padded_nms(*where, 0.7, 1000)
    assert found[0].cpu().equal(expected[0])
    assert found[1].cpu().equal(expected[1])


def pool() -> Callable[[], list[Tensor]]:
    maps, boxes = pyramid(torch.bfloat16, torch.channels_last), boxes_of(2, 300)

    def call() -> list[Tensor]:
        pooled = multilevel_roi_align(maps, boxes, 7, spatial_scales=SCALES)
        return [pooled.detach(), *torch.autograd.grad(pooled, maps, torch.ones_like(pooled))]

    return call


def mask() -> Callable[[], list[Tensor]]:
    logits, *rest = masks_of(torch.bfloat16, torch.channels_last)

    def call() -> list[Tensor]:
        loss = mask_loss(logits, *rest)
        return [loss.detach(), *torch.autograd.grad(loss, logits)]

    return call


def suppress() -> Callable[[], list[Tensor]]:
    boxes, scores, groups = candidates_of(4, 5000)
    return lambda: list(padded_nms(boxes, scores, groups, None, 0.6, 500))


def level() -> Callable[[], list[Tensor]]:
    boxes = boxes_of(8, 1000)
    return lambda: [assign_levels(boxes)]


CALLS = {"roi_align": pool, "mask_loss": mask, "padded_nms": suppress, "assign_levels": level}


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(name: str) -> None:
    call = CALLS[name]()
    call()
    with no_sync():
        call()


@pytest.mark.parametrize("name", CALLS)
def test_repeats_bit_for_bit_beside_other_work(name: str) -> None:
    call = CALLS[name]()
    expected = [t.clone() for t in call()]
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(30):
        with torch.cuda.stream(other):
            noise @ noise
        assert all(a.equal(e) for a, e in zip(call(), expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph(name: str) -> None:
    """Captured once, replayed with other numbers in the same memory."""
    call = CALLS[name]()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for step in range(3):
        with torch.no_grad():
            for tensor in inputs_of(call):
                tensor.add_(step) if tensor.is_floating_point() else tensor
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(a.equal(e) for a, e in zip(captured, call(), strict=True))


def inputs_of(call: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a call of the table has taken with it."""
    found: list[Tensor] = []
    for cell in call.__closure__ or ():
        value = cell.cell_contents
        found += [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)]
    return found


def test_tiles_of_nms_wait_without_standing_still() -> None:
    """Thousands of programs that wait for others, on four streams at once, beside work that fills the GPU."""
    inputs = [candidates_of(1, slots, seed) for seed, slots in enumerate((64, 4000, 30_000, 100_000))]
    expected = [padded_nms(b, s, None, None, 0.7, 2000) for b, s, _ in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    noise, busy = torch.randn(8192, 8192, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(busy):
            noise @ noise
        found = []
        for (boxes, scores, _), stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(padded_nms(boxes, scores, None, None, 0.7, 2000))
        ends = [stream.record_event() for stream in streams]
        deadline = time.monotonic() + 60
        while not all(end.query() for end in ends):
            assert time.monotonic() < deadline, "programs wait for each other"
            time.sleep(0.001)
        for ours, theirs in zip(found, expected, strict=True):
            assert all(a.equal(e) for a, e in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_of_the_mask_gradient_never_overtake_its_pixels(layout: torch.memory_format) -> None:
    """A program's threads write zeros, then others of its threads the pixels, on the same places."""
    for seed in range(50):
        logits, *rest = masks_of(torch.bfloat16, layout, seed)
        (grad,) = torch.autograd.grad(mask_loss(logits, *rest), logits)
        touched = (grad != 0).flatten(2).any(2)
        expected = torch.zeros_like(touched).scatter_(1, rest[0][:, None], rest[2][:, None] > 0)
        assert touched.equal(expected)
        share = (grad != 0).sum().item() / (expected.sum().item() * 784)
        assert share > 0.999  # a logit whose sigmoid meets its target is one in many


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_device_of_its_tensors(name: str) -> None:
    with torch.cuda.device(1):
        call = CALLS[name]()
        expected = [t.cpu() for t in call()]
    assert torch.cuda.current_device() == 0
    for actual, e in zip(call(), expected, strict=True):
        assert actual.device.index == 1
        assert actual.cpu().equal(e)


def test_nms_of_one_box_and_of_none() -> None:
    boxes = boxes_of(1, 1)
    assert padded_nms(boxes, boxes[..., 0], None, None, 0.5, 2)[1].tolist() == [[True, False]]
    assert nms(boxes[0], boxes[0, :, 0], 0.5).tolist() == [0]
    assert nms(boxes[0, :0], boxes[0, :0, 0], 0.5).tolist() == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roi_align_of_maps_beyond_31_bits(layout: torch.memory_format) -> None:
    shape = (17, 256, 720, 720)
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB")
    large = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    large[16] = torch.randn(shape[1:], device="cuda")
    boxes = torch.tensor([[300.0, 400, 330, 440], [600, 690, 719, 719]], device="cuda")
    last = torch.full((2,), 16, device="cuda")
    pooled = multilevel_roi_align([large], boxes, 7, spatial_scales=[1.0], batch_index=last)
    small = large[16:].clone(memory_format=layout)
    expected = multilevel_roi_align([small], boxes, 7, spatial_scales=[1.0], batch_index=last * 0)
    assert pooled.any()
    assert pooled.equal(expected)
    del large
    leaf = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    leaf.requires_grad_()
    again = multilevel_roi_align([leaf], boxes, 7, spatial_scales=[1.0], batch_index=last)
    (grad,) = torch.autograd.grad(again, leaf, expected)
    small.requires_grad_()
    again = multilevel_roi_align([small], boxes, 7, spatial_scales=[1.0], batch_index=last * 0)
    (expected_grad,) = torch.autograd.grad(again, small, expected)
    assert grad[16].equal(expected_grad[0])
    assert not grad[:16].any()
