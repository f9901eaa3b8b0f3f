"""The pyramid's upsampling: interpolate's numbers, in the maps' own dtype and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop

from fastmrcnn.model.fpn import FeaturePyramid, add_doubled

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def maps(*sizes: tuple[int, int], layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
    r = torch.Generator().manual_seed(0)
    made = (torch.randn(2, 8, *size, generator=r) for size in sizes)
    return [x.contiguous(memory_format=layout).requires_grad_() for x in made]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 4)])
def test_it_adds_what_interpolate_gives(size: tuple[int, int], layout: torch.memory_format) -> None:
    fine, coarse = maps((2 * size[0], 2 * size[1]), size, layout=layout)
    own = add_doubled(fine, coarse)
    exact = fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
    assert own.equal(exact)
    assert own.is_contiguous(memory_format=layout)
    grad = torch.randn_like(own)
    ours, theirs = (torch.autograd.grad(sum_, (fine, coarse), grad) for sum_ in (own, exact))
    assert ours[0].equal(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)  # a sum of four
    assert all(g.is_contiguous(memory_format=layout) for g in ours)


def test_its_gradient_is_right_and_has_a_gradient() -> None:
    fine, coarse = (x.detach().double()[:1, :2].requires_grad_() for x in maps((4, 6), (2, 3)))
    assert torch.autograd.gradcheck(add_doubled, (fine, coarse))
    assert torch.autograd.gradgradcheck(add_doubled, (fine, coarse))


@pytest.mark.parametrize("fine", [(5, 8), (6, 8), (2, 8), (8, 2)])
def test_a_map_that_is_not_twice_as_large_is_refused(fine: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError):
        add_doubled(*maps(fine, (4, 4)))


def test_compiled_it_neither_widens_nor_scatters() -> None:
    """Under bf16 autocast, forward and backward: no upsampling, no scatter, no map in float32."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return nop(graph, example)

    pyramid = FeaturePyramid([8, 8, 8], channels=8, norm=None).to(memory_format=torch.channels_last)
    features = [x.detach().bfloat16().requires_grad_() for x in maps((8, 16), (4, 8), (2, 4))]
    torch._dynamo.reset()
    run = torch.compile(pyramid, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = run(features)
    torch.stack([level.float().sum() for level in levels]).sum().backward()
    forward, backward = graphs
    nodes = [*forward.graph.nodes, *backward.graph.nodes]
    called = {str(node.target) for node in nodes if node.op == "call_function"}
    assert not [name for name in called if "upsample" in name or "index_put" in name]
    sums = ("aten.add.", "aten.avg_pool2d.")
    added = [node.meta["val"] for node in nodes if str(node.target).startswith(sums)]
    assert {value.dtype for value in added if value.ndim >= 4} == {torch.bfloat16}
    assert all(x.grad.is_contiguous(memory_format=torch.channels_last) for x in features)
