"""Kernels and bytes of compiled graphs, against a graph whose kernels are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmrcnn.kernels import assign_levels
from fastmrcnn.speed.graph_count import GraphCounts, counting_graphs


def work(a: Tensor, b: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (a @ b).relu() * 2 + 1, assign_levels(boxes)


def test_a_known_graph_is_counted() -> None:
    a, b, boxes = torch.randn(64, 32), torch.randn(32, 128), torch.rand(10, 4)
    product, outcome = 4 * (64 * 32 + 32 * 128 + 64 * 128), 4 * 2 * 64 * 128
    levels = 4 * 40 + assign_levels(boxes).nbytes
    for _ in range(2):  # the second time too, when the graph lies in Inductor's cache
        torch._dynamo.reset()
        with counting_graphs() as counter:
            torch.compile(work, fullgraph=True)(a, b, boxes)
        counts = counter.counts
        assert counts[:3] == GraphCounts(generated=1, library=1, ours=1)[:3]
        assert counts.launches == 3
        assert counts.gigabytes == pytest.approx((product + outcome + levels) / 1e9)
    scheduled = counter.counts
    torch.compile(lambda x: x.sin() + 1)(a)
    assert counter.counts == scheduled  # nothing is counted after the block
