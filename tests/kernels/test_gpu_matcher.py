"""What only a GPU can show of matching and decoding: real shapes, streams, graphs, and memory.

The other tests of these operators run on a GPU too (`pytest -m gpu`), at small shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import assert_near
from torch import Tensor

from fastmrcnn.config.model import AnchorConfig
from fastmrcnn.kernels import decode_boxes, match_boxes
from fastmrcnn.kernels.box_decode import reference as decode_reference
from fastmrcnn.kernels.matcher import cpu as matcher_cpu
from fastmrcnn.model.anchors import AnchorGenerator

pytestmark = pytest.mark.gpu
IMAGES, HEIGHT, WIDTH = 8, 800, 1344
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.fixture(autouse=True)
def _plain_memory() -> None:
    """Filling fresh memory is no part of what is captured or measured here."""
    torch.use_deterministic_algorithms(False)


def anchors() -> Tensor:
    """(1, 268569, 4) of five levels."""
    strides = [4, 8, 16, 32, 64]
    make = AnchorGenerator(strides, **AnchorConfig(sizes=[[8 * s] for s in strides]).values())
    maps = [torch.empty(1, 1, -(-HEIGHT // s), -(-WIDTH // s)) for s in strides]
    return torch.cat(make(maps, (HEIGHT, WIDTH)))[None].cuda()


def boxes_of(count: int, seed: int = 0, images: int = IMAGES) -> Tensor:
    """(N, count, 4), sides log-uniform from 8 to 512 pixels; whole pixels, so that ties are many."""
    r = torch.Generator().manual_seed(seed)
    side = 8 * 64 ** torch.rand(images, count, 2, generator=r)
    centre = torch.rand(images, count, 2, generator=r) * torch.tensor([WIDTH, HEIGHT])
    return torch.cat([centre - side / 2, centre + side / 2], -1).round().cuda()


def objects_of(slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three quarters valid, in places, and every ninth a crowd region; the first image has none."""
    index = torch.arange(slots, device="cuda").expand(IMAGES, slots)
    valid, crowd = index % 4 < 3, index % 9 == 8
    valid = valid & ~crowd & (torch.arange(IMAGES, device="cuda") > 0)[:, None]
    return boxes_of(slots, 1), valid.contiguous(), crowd.contiguous()


def call_matcher(boxes: Tensor, slots: int) -> Callable[[], list[Tensor]]:
    gt_boxes, valid, crowd = objects_of(slots)

    def call() -> list[Tensor]:
        return list(match_boxes(boxes, gt_boxes, valid, low_quality=True, gt_crowd=crowd, crowd_overlap=0.7))

    return call


def call_decode() -> Callable[[], list[Tensor]]:
    references = boxes_of(10_000)
    r = torch.Generator("cuda").manual_seed(2)
    deltas = torch.randn(references.shape, device="cuda", generator=r).bfloat16()
    scores = torch.randn(references.shape[:2], device="cuda", generator=r)
    sizes = torch.tensor([[HEIGHT, WIDTH]], device="cuda").repeat(IMAGES, 1)

    def call() -> list[Tensor]:
        options = {"scores": scores, "weights": WEIGHTS, "min_side": 4.0, "score_threshold": 0.1}
        return list(decode_boxes(deltas, references, sizes, **options))

    return call


CALLS = {
    "anchors": lambda: call_matcher(anchors(), 64),
    "proposals": lambda: call_matcher(boxes_of(2064), 64),
    "many objects": lambda: call_matcher(anchors()[:, ::7], 3000),
    "decode": call_decode,
}


@pytest.mark.parametrize("slots", [1, 64, 1000])
@pytest.mark.parametrize("shared", [False, True])
def test_the_bits_of_the_cpu(shared: bool, slots: int) -> None:
    boxes = anchors() if shared else boxes_of(2000 + slots)
    found = call_matcher(boxes, slots)()
    objects = (t.cpu() for t in objects_of(slots))
    expected = matcher_cpu.match_boxes(boxes.cpu(), *objects, True, 0.7)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.cpu().equal(exact)
    assert slots == 1 or found[3].any()


def test_decode_is_near_float64() -> None:
    references = boxes_of(10_000)
    deltas = torch.randn(references.shape, device="cuda")
    sizes = torch.tensor([[HEIGHT, WIDTH]], device="cuda").repeat(IMAGES, 1)
    boxes, valid = decode_boxes(deltas, references, sizes, weights=WEIGHTS)
    exact, also_valid = decode_reference.decode_boxes(
        deltas.double(), references, sizes, None, WEIGHTS, decode_reference.MAX_LOG_SCALE, None, None
    )
    assert valid.equal(also_valid)
    assert_near(boxes, exact, torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(name: str) -> None:
    call = CALLS[name]()
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_repeats_bit_for_bit_beside_other_work(name: str) -> None:
    call = CALLS[name]()
    expected = [t.clone() for t in call()]
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            noise @ noise
        assert all(a.equal(e) for a, e in zip(call(), expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph(name: str) -> None:
    """Captured once; replayed, it writes everything anew."""
    call = CALLS[name]()
    expected = [t.clone() for t in call()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        for tensor in captured:
            tensor.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert all(a.equal(e) for a, e in zip(captured, expected, strict=True))


def test_memory_of_many_objects_is_that_of_the_result() -> None:
    """8 images x 268,569 anchors x 1000 objects would be 8.6 GB of overlaps."""
    call = call_matcher(anchors(), 1000)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = sum(t.nbytes for t in call())
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - returned < 2**20
