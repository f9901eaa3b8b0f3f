"""What only a GPU can show of mask paste and mask RLE: real shapes, graphs, and the host that does not wait.

The other tests of the two run on a GPU too (`pytest -m gpu`), at small shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pasted import random_boxes, random_masks
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn.kernels import mask_rle, paste_masks
from fastmrcnn.kernels.mask_paste import cpu

pytestmark = pytest.mark.gpu
HEIGHT, WIDTH = 800, 1344


@pytest.fixture(autouse=True)
def _plain_memory() -> None:
    """Filling fresh memory is no part of what is captured or measured here."""
    torch.use_deterministic_algorithms(False)


def detections(count: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """On the GPU; the first covers the image."""
    boxes = random_boxes(count, HEIGHT, WIDTH, seed)
    boxes[0] = torch.tensor([-30.0, -20.0, WIDTH + 30.0, HEIGHT + 20.0])
    return random_masks(count, 28, seed).cuda(), boxes.cuda()


@pytest.mark.parametrize("width", [WIDTH, 1333])
def test_paste_has_the_references_bits(width: int) -> None:
    masks, boxes = detections()
    found = paste_masks(masks, boxes, HEIGHT, width).cpu()
    expected = cpu.paste_masks(masks.cpu(), boxes.cpu(), None, HEIGHT, width, 0.5, False)
    assert torch.equal(found, expected)
    packed = paste_masks(masks, boxes, HEIGHT, width, packed=True).cpu()
    assert torch.equal(packed, cpu.pack(expected))


def test_runs_are_pycocotools() -> None:
    masks, boxes = detections()
    runs, count = mask_rle(masks, boxes, HEIGHT, WIDTH, max_runs=1 << 16)
    bitmaps = paste_masks(masks, boxes, HEIGHT, WIDTH).cpu()
    columns = np.asfortranarray(bitmaps.permute(1, 2, 0).numpy().astype(np.uint8))
    assert count.max() > 1000
    for row, number, expected in zip(runs.tolist(), count.tolist(), coco_mask.encode(columns), strict=True):
        rle = {"size": [HEIGHT, WIDTH], "counts": row[:number]}
        assert coco_mask.frPyObjects(rle, HEIGHT, WIDTH)["counts"] == expected["counts"]


def test_bitmaps_beyond_two_gigabytes() -> None:
    """2.2 GB of bools; the last objects are those of a small call."""
    masks, boxes = detections(2048)
    found = paste_masks(masks, boxes, HEIGHT, WIDTH)
    assert found.numel() > 2**31
    for start in (0, 2040):
        own = slice(start, start + 8)
        assert torch.equal(found[own], paste_masks(masks[own], boxes[own], HEIGHT, WIDTH))


def paste() -> Callable[[], list[Tensor]]:
    masks, boxes = detections()
    return lambda: [
        paste_masks(masks, boxes, HEIGHT, WIDTH), paste_masks(masks, boxes, HEIGHT, WIDTH, packed=True)
    ]  # fmt: skip


def encode() -> Callable[[], list[Tensor]]:
    masks, boxes = detections()
    return lambda: list(mask_rle(masks, boxes, HEIGHT, WIDTH))


CALLS = [paste, encode]


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", CALLS)
def test_the_host_does_not_wait(make: Callable[[], Callable[[], list[Tensor]]]) -> None:
    call = make()
    call()
    with no_sync():
        call()


@pytest.mark.parametrize("make", CALLS)
def test_cuda_graph(make: Callable[[], Callable[[], list[Tensor]]]) -> None:
    call = make()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(a.equal(b) for a, b in zip(captured, expected, strict=True))


def test_paste_keeps_nothing_beside_its_output() -> None:
    masks, boxes = detections()
    paste_masks(masks, boxes, HEIGHT, WIDTH)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = paste_masks(masks, boxes, HEIGHT, WIDTH)
    assert torch.cuda.max_memory_allocated() - before <= found.numel() + (1 << 20)


def test_runs_take_no_memory_of_the_bitmaps_size() -> None:
    masks, boxes = detections()
    mask_rle(masks, boxes, HEIGHT, WIDTH)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mask_rle(masks, boxes, HEIGHT, WIDTH)
    assert torch.cuda.max_memory_allocated() - before < 100 * HEIGHT * WIDTH / 20
