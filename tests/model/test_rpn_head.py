"""The RPN's two predictors as one product, and logits in float32 from maps in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.model.convs import run_convs
from fastmrcnn.model.rpn import RpnHead
from fastmrcnn.model.wide_product import wide_product

CHANNELS = 24
BF16 = torch.bfloat16


def head(anchors: int = 3) -> RpnHead:
    torch.manual_seed(0)
    made = RpnHead(CHANNELS, anchors, 1)
    for conv in (made.objectness, made.deltas):
        nn.init.normal_(conv.bias)
    return made


def maps(layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
    sizes = ((8, 12), (4, 6), (1, 1))
    return [torch.randn(2, CHANNELS, *size).contiguous(memory_format=layout) for size in sizes]


def apart(head: RpnHead, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each predictor by itself, as it stands in the paper."""
    features = [run_convs(x, head.convs) for x in features]
    objectness = [head.objectness(x).permute(0, 2, 3, 1).flatten(1) for x in features]
    deltas = [head.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in features]
    return objectness, deltas


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("anchors", [3, 8, 15])
def test_one_product_is_both_predictors(anchors: int, layout: torch.memory_format) -> None:
    model, features = head(anchors).double(), [x.double() for x in maps(layout)]
    ours, theirs = model(features), apart(model, features)
    torch.testing.assert_close(ours, theirs)
    grads = []
    for objectness, deltas in (ours, theirs):
        total = sum((x * x).sum() for x in (*objectness, *deltas))
        grads.append(torch.autograd.grad(total, list(model.parameters())))
    torch.testing.assert_close(grads[0], grads[1])


def test_checkpoints_keep_both_names() -> None:
    shapes = {key: tuple(value.shape) for key, value in head().state_dict().items()}
    assert shapes == {
        "convs.0.weight": (CHANNELS, CHANNELS, 3, 3),
        "convs.0.bias": (CHANNELS,),
        "objectness.weight": (3, CHANNELS, 1, 1),
        "objectness.bias": (3,),
        "deltas.weight": (12, CHANNELS, 1, 1),
        "deltas.bias": (12,),
    }


def test_under_autocast_logits_are_not_rounded() -> None:
    """They are the product of the rounded features and weights, to float32's precision."""
    model, (x, *_) = head(), maps()
    with torch.autocast("cpu", dtype=BF16):
        (objectness,), (deltas,) = model([x])
        rounded = run_convs(x, model.convs).detach()
    assert rounded.dtype == BF16
    assert objectness.dtype == deltas.dtype == torch.float32
    for conv, found in ((model.objectness, objectness), (model.deltas, deltas)):
        weight, bias = conv.weight.detach().to(BF16).double(), conv.bias.detach().double()
        exact = torch.nn.functional.conv2d(rounded.double(), weight, bias).permute(0, 2, 3, 1)
        torch.testing.assert_close(found.flatten().double(), exact.flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gradients_of_a_wide_product(device: str) -> None:
    """Of bf16 numbers: that of x rounded once more, that of the weight not."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 24).to(device, BF16).requires_grad_()
    weight = torch.randn(16, 24).to(device, BF16).float().requires_grad_()
    grad = torch.randn(2, 4, 16).to(device, BF16).float()
    with torch.autocast(device, dtype=BF16):
        y = wide_product(x, weight)
    grads = torch.autograd.grad(y, (x, weight), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = wide[0] @ wide[1].T
    expected = torch.autograd.grad(exact, wide, grad.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0], expected[0].to(BF16), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(grads[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    assert grads[1].dtype == torch.float32


def called(model: RpnHead, features: list[Tensor]) -> list[str]:
    """Products and convolutions of the head's graph, forward and backward."""

    def run(features: list[Tensor]) -> list[Tensor]:
        objectness, deltas = model(features)
        total = sum(x.float().sum() for x in (*objectness, *deltas))
        return list(torch.autograd.grad(total, [*features, *model.parameters()]))

    graph = make_fx(run)(features).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name for name in names if "conv" in name or "mm" in name]


def test_a_map_is_read_by_one_convolution_and_one_predictor() -> None:
    features = [x.requires_grad_() for x in maps()]
    each = 2 * len(features)
    names = called(head(), features)
    assert names.count("aten.convolution.default") == names.count("aten.convolution_backward.default") == each
    assert len(names) == 2 * each


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_the_product_itself_is_written_in_float32() -> None:
    """On tensors of a GPU that need not be there: no map is cast for it."""
    with FakeTensorMode(), torch.no_grad(), Products() as products:
        x = torch.empty(2, 6, 8, CHANNELS, dtype=BF16, device="cuda")
        y = wide_product(x, torch.empty(16, CHANNELS, device="cuda"))
    assert (y.dtype, y.shape) == (torch.float32, (2, 6, 8, 16))
    assert products.seen == ["aten::mm.dtype"]


def gradients(model: RpnHead, features: list[Tensor], index: Tensor, dense: bool) -> list[Tensor]:
    """Of a loss of some anchors' logits and deltas, and of all maps, for weights and maps."""
    features = [x.detach().requires_grad_() for x in features]
    given = features
    if dense:
        objectness, deltas = model(features)
        logits = torch.cat(objectness, 1).gather(1, index)
        moves = torch.cat(deltas, 1).gather(1, index[..., None].expand(-1, -1, 4))
    else:
        given, logits, moves = model.at_anchors(features, index)  # type: ignore[assignment]
    total = (logits.sin() + moves.cos().sum(-1)).sum() + sum((x * x).sum() for x in given)
    return [logits, moves, *torch.autograd.grad(total, [*features, *model.parameters()])]


@pytest.mark.parametrize("convs", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_at_some_anchors_it_is_what_it_is_everywhere(layout: torch.memory_format, convs: int) -> None:
    """Values and gradients, at the borders of maps too, and where one anchor is taken twice."""
    torch.manual_seed(0)
    model = RpnHead(CHANNELS, 3, convs).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    features = [x.double() for x in maps(layout)]
    every = sum(3 * x.shape[2] * x.shape[3] for x in features)
    index = torch.stack([torch.randperm(every), torch.randint(every, (every,))])  # corners, and doubles
    found = gradients(model, features, index, dense=False)
    torch.testing.assert_close(found, gradients(model, features, index, dense=True))


def test_at_some_anchors_no_map_is_convolved() -> None:
    features = [x.requires_grad_() for x in maps()]
    index = torch.randint(60, (2, 5))

    def run(features: list[Tensor]) -> list[Tensor]:
        _, logits, moves = model.at_anchors(features, index)
        return list(torch.autograd.grad(logits.sum() + moves.sum(), list(model.parameters())))

    model = head()
    graph = make_fx(run)(features).graph
    read = [node.args[0].meta["val"].shape[2:] for node in graph.nodes if "convolution" in str(node.target)]
    assert read
    assert all(max(sides) <= 3 for sides in read)
