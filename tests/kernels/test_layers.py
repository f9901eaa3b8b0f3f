"""The layers that stand in for another library's: without state, and the same numbers as the functions."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmrcnn.kernels import MultiScaleRoIAlign, layers, roi_align

LAYERS = [layers.RoIAlign, layers.MultiScaleRoIAlign]


class Theirs(nn.Module):
    """A layer of another library, with its members and a `forward` that is to be replaced."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        self.__dict__.update(members)


def adopted(layer: type[nn.Module], **members: Any) -> nn.Module:
    module = Theirs(**members)
    module.forward = MethodType(layer.forward, module)
    return module


@pytest.fixture
def maps() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, 3, side, side, generator=random, requires_grad=True)
        for name, side in (("0", 16), ("1", 8), ("pool", 4))
    }


BOXES = [
    torch.tensor([[2.0, 3.0, 40.0, 50.0], [1.0, 1.0, 9.0, 12.0]]),
    torch.tensor([[0.0, 5.0, 60.0, 64.0]]),
]
SIZES = [(64, 64), (60, 64)]


def of_one_map(maps: dict[str, Tensor]) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    """The layer, what it is called with, and what it is to return."""
    how = {"output_size": (3, 2), "spatial_scale": 1 / 4, "sampling_ratio": 2, "aligned": True}
    return adopted(layers.RoIAlign, **how), (maps["0"], BOXES), roi_align(maps["0"], BOXES, **how)


def of_a_pyramid(maps: dict[str, Tensor]) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    members = {
        "featmap_names": ["0", "1"],
        "output_size": (3, 3),
        "sampling_ratio": 2,
        "canonical_scale": 32,
        "canonical_level": 3,
    }
    same = MultiScaleRoIAlign(["0", "1"], 3, 2, canonical_scale=32, canonical_level=3)
    return adopted(layers.MultiScaleRoIAlign, **members), (maps, BOXES, SIZES), same(maps, BOXES, SIZES)


@pytest.mark.parametrize("case", [of_one_map, of_a_pyramid])
@pytest.mark.parametrize("compiled", [False, True])
def test_adopted_it_computes_what_the_functions_do(
    case: Any, compiled: bool, maps: dict[str, Tensor]
) -> None:
    module, arguments, expected = case(maps)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    pooled = run(*arguments)
    assert pooled.shape[0] == 3
    assert torch.equal(pooled, expected)
    gradient = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (of_layer,) = torch.autograd.grad(pooled, maps["0"], gradient)
    (of_function,) = torch.autograd.grad(expected, maps["0"], gradient)
    assert of_layer.any()
    assert torch.equal(of_layer, of_function)


@pytest.mark.parametrize("layer", LAYERS)
def test_it_has_nothing_of_its_own(layer: type[nn.Module]) -> None:
    """As `kernels.kernelize` asks of a layer: no constructor, no members but these two."""
    assert layer.__init__ is nn.Module.__init__
    own = {name for name, _ in inspect.getmembers(layer)} - {
        name for name, _ in inspect.getmembers(nn.Module)
    }
    assert own <= {"can_torch_compile", "has_backward"}


@pytest.mark.torchvision
@pytest.mark.parametrize("layer", LAYERS)
def test_torchvision_has_the_members_that_are_read(layer: type[nn.Module]) -> None:
    from torchvision import ops

    theirs = {
        "RoIAlign": ops.RoIAlign((3, 2), 1 / 4, 2),
        "MultiScaleRoIAlign": ops.MultiScaleRoIAlign(["0", "1"], 3, 2),
    }[layer.__name__]
    assert all(
        hasattr(theirs, name) for name in inspect.get_annotations(layer) if name != "can_torch_compile"
    )
    ours, reference = (inspect.signature(kind.forward).parameters for kind in (layer, type(theirs)))
    assert list(ours) == list(reference)
    assert [p.kind for p in ours.values()] == [p.kind for p in reference.values()]


@pytest.mark.torchvision
def test_it_takes_the_place_of_torchvisions(maps: dict[str, Tensor]) -> None:
    from torchvision import ops

    for theirs, layer, arguments in (
        (ops.RoIAlign((3, 2), 1 / 4, 2), layers.RoIAlign, (maps["0"], BOXES)),
        (ops.MultiScaleRoIAlign(["0", "1"], 3, 2), layers.MultiScaleRoIAlign, (maps, BOXES, SIZES)),
    ):
        expected = theirs(*arguments)
        theirs.forward = MethodType(layer.forward, theirs)
        torch.testing.assert_close(theirs(*arguments), expected, rtol=1e-5, atol=1e-5)
