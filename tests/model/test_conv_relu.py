"""Convolutions with what follows them: the fused operator and the folded norm against the plain layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import random_batch, small_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.config.file import parse_config
from fastmrcnn.model.conv_relu import _poison, _product_relu, conv_relu, epilogue_problem, is_product
from fastmrcnn.model.convs import Conv2d, fuse_epilogues
from fastmrcnn.model.norms import FrozenBatchNorm2d, make_norm
from fastmrcnn.structures import Losses, present

CASES = [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1)]  # kernel, stride, padding


def tensors(
    kernel: int, dtype: torch.dtype, device: str = "cpu", side: int = 9, channels: int = 6
) -> list[Tensor]:
    """x, weight and bias of a convolution."""
    generator = torch.Generator().manual_seed(kernel)
    shapes = [(2, channels, side, side + 2), (8, channels, kernel, kernel), (8,)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values[1] /= kernel * channels**0.5
    values[0] = values[0].contiguous(memory_format=torch.channels_last)
    return [value.to(device, dtype).requires_grad_() for value in values]


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, padding: int
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding)
    return F.relu(y if residual is None else y + residual)


def residual_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), CASES)
def test_values_and_gradients(kernel: int, stride: int, padding: int, with_residual: bool) -> None:
    own, other = tensors(kernel, torch.float64), tensors(kernel, torch.float64)
    extra: list[Tensor | None] = [None, None]
    if with_residual:
        y = residual_like(F.conv2d(*own, stride, padding))
        extra = [y.clone().requires_grad_(), y.clone().requires_grad_()]
    found = conv_relu(*own, extra[0], (stride, stride), (padding, padding))
    expected = plain(*other, extra[1], stride, padding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    assert (found == 0).any()
    assert (found > 0).any()
    upstream = residual_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    for a, b in zip([*own, extra[0]], [*other, extra[1]], strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_gradients_by_finite_differences() -> None:
    x, weight, bias = tensors(3, torch.float64, side=4, channels=2)
    residual = residual_like(F.conv2d(x, weight, bias, 1, 1)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *args: conv_relu(*args, (1, 1), (1, 1)), (x, weight, bias, residual)
    )


@pytest.mark.parametrize("with_residual", [False, True])
def test_operator_is_registered_whole(with_residual: bool) -> None:
    x, weight, bias = tensors(3, torch.float32)
    residual = residual_like(F.conv2d(x, weight, bias, 2, 1)).requires_grad_() if with_residual else None
    torch.library.opcheck(torch.ops.fastmrcnn.conv_relu.default, (x, weight, bias, residual, [2, 2], [1, 1]))


def test_gradients_that_nobody_asks_for_are_not_made() -> None:
    x, weight, bias = tensors(1, torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    conv_relu(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_autocast_casts_as_for_a_convolution() -> None:
    x, weight, bias = tensors(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv_relu(x, weight, bias, None, (1, 1), (1, 1))
        expected = F.relu(F.conv2d(x, weight, bias, 1, 1))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    found.float().sum().backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in (x, weight, bias))


def fitted_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels, eps=1e-5)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in norm.named_buffers():
        low = 0.5 if name == "running_var" else -1.0
        buffer.copy_(low + 1.5 * torch.rand(channels, generator=generator))
    return norm


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_norm_is_folded(with_bias: bool, fused: bool) -> None:
    torch.manual_seed(0)
    conv = Conv2d(4, 6, 3, padding=1, bias=with_bias)
    norm = fitted_norm(6)
    x = torch.randn(2, 4, 7, 5)
    residual = torch.randn(2, 6, 7, 5)
    expected = F.relu(norm(nn.Conv2d.forward(conv, x)) + residual)
    wanted = torch.autograd.grad(expected.square().sum(), list(conv.parameters()))
    conv.fused = fused
    seen: list[object] = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    found = conv(x, norm, residual=residual, relu=True)
    assert not seen  # no pass over the map
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), list(conv.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bn", "gn"])
def test_other_norms_run(name: str) -> None:
    torch.manual_seed(0)
    conv, norm = Conv2d(4, 8, 1, bias=False), make_norm(name)(8)
    conv.fused = True
    x, residual = torch.randn(3, 4, 6, 6), torch.randn(3, 8, 6, 6)
    expected = F.relu(norm(F.conv2d(x, conv.weight)) + residual)
    torch.testing.assert_close(conv(x, norm, residual=residual, relu=True), expected)


def gradients_of(fused: bool, folded: bool) -> tuple[Losses, dict[str, Tensor]]:
    config = parse_config(
        {
            "model": {
                "backbone": {"name": "resnet50", "width": 8, "norm": "frozen_bn", "frozen_stages": 0},
                "fpn": {"channels": 16},
                "box_head": {"hidden": 32},
                "mask_head": {"channels": 16, "convs": 2},
            }
        },
        "a test",
    )
    model = small_model(config=config).train()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.folded = folded
    if fused:
        assert fuse_epilogues(model) > 50
    batch = random_batch()
    keys = model.draw_keys(batch, torch.Generator().manual_seed(0))
    losses, _ = model(batch, keys)
    losses.total().backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_has_the_same_losses_and_gradients() -> None:
    losses, gradients = gradients_of(fused=False, folded=False)
    for fused in (False, True):
        own, found = gradients_of(fused=fused, folded=True)
        torch.testing.assert_close(present(own), present(losses), rtol=1e-4, atol=1e-5)
        assert found.keys() == gradients.keys()
        for name, value in gradients.items():
            # A pixel that falls on the other side of a ReLU by rounding moves single entries further.
            assert float((found[name] - value).norm()) <= 2e-3 * float(value.norm()), name


def test_a_fused_convolution_compiles_as_one_graph() -> None:
    conv, norm = Conv2d(4, 6, 3, padding=1, bias=False), fitted_norm(6)
    conv.fused = True
    x = torch.randn(2, 4, 8, 8)
    run = torch.compile(lambda x: conv(x, norm, relu=True).sum(), fullgraph=True, backend="aot_eager")
    run(x).backward()
    found, conv.weight.grad = conv.weight.grad, None
    conv(x, norm, relu=True).sum().backward()
    torch.testing.assert_close(found, conv.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_bias_and_relu(dtype: torch.dtype) -> None:
    """What CUDA calls, on the CPU."""
    x, weight, bias = (value.detach() for value in tensors(1, dtype))
    assert is_product(weight, (1, 1), (0, 0))
    x = x.contiguous(memory_format=torch.channels_last)
    found = _product_relu(x, weight, bias.to(dtype))
    expected = F.conv2d(x.double(), weight.double(), bias.double()).relu()
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=3e-2)


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernel", "stride", "dtype", "with_residual", "fused"),
    [
        (1, 1, torch.bfloat16, False, True),
        (1, 1, torch.float32, False, False),
        (1, 1, torch.bfloat16, True, False),
        (1, 2, torch.bfloat16, False, False),
        (3, 1, torch.bfloat16, False, False),
    ],
)
def test_which_convolutions_are_products(
    kernel: int, stride: int, dtype: torch.dtype, with_residual: bool, fused: bool
) -> None:
    """On tensors of a GPU that need not be there."""
    with FakeTensorMode(), torch.no_grad(), Called() as called:
        conv = Conv2d(8, 16, kernel, stride, padding=kernel // 2)
        for name, value in list(conv.named_parameters()):
            setattr(conv, name, nn.Parameter(torch.empty(value.shape, dtype=dtype, device="cuda:0")))
        x = torch.empty(2, 8, 6, 10, dtype=dtype, device="cuda:0")
        residual = torch.empty(2, 16, 6, 10, dtype=dtype, device="cuda:0") if with_residual else None
        is_fused = conv._is_product(x) and residual is None
        if is_fused:
            conv(x, residual=residual, relu=True)
    assert is_fused == fused
    assert ("fastmrcnn::conv_relu" in called.names) == fused


def test_a_sound_convolution_has_no_problem() -> None:
    assert epilogue_problem(torch.device("cpu")) is None


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_convolution_that_reads_what_it_is_to_write_is_found(with_residual: bool) -> None:
    """A stand-in, whose result starts from what its memory held, times zero."""
    held: list[float] = []

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *how: Any) -> Tensor:
        y = conv_relu(x, weight, bias, residual, *how)
        reads = (residual is not None) == with_residual
        held.append(float("nan") if len(held) % 2 == 0 else float("inf"))
        return y + 0 * torch.full_like(y, held[-1]) if reads else y

    problem = epilogue_problem(torch.device("cpu"), convolve=convolve)
    assert problem is not None
    assert "memory that held nan" in problem
    assert ("residual" in problem) == with_residual


def test_a_convolution_without_its_bias_is_found() -> None:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *how: Any) -> Tensor:
        return conv_relu(x, weight, torch.zeros_like(bias), residual, *how)

    assert "wrong values" in (epilogue_problem(torch.device("cpu"), convolve=convolve) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_poisoned_memory(dtype: torch.dtype) -> None:
    """If this fails, train.fuse_epilogues stays off on this GPU, which is as it should be: note it."""
    assert epilogue_problem(torch.device("cuda"), dtype) is None


@pytest.mark.gpu
def test_memory_is_poisoned() -> None:
    """The check looks at memory that held NaN, or it would show nothing."""
    like = torch.zeros(2, 256, 12, 20, device="cuda", dtype=torch.bfloat16)
    _poison(like, float("nan"))
    assert torch.empty_like(like).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "stride", "padding"), CASES)
def test_on_a_gpu(kernel: int, stride: int, padding: int, dtype: torch.dtype) -> None:
    own = tensors(kernel, dtype, "cuda", side=50, channels=64)
    exact = [value.detach().double().requires_grad_() for value in own]
    residual = residual_like(F.conv2d(*own, stride, padding)).contiguous(memory_format=torch.channels_last)
    for extra in (None, residual):
        found = conv_relu(*own, extra, (stride, stride), (padding, padding))
        expected = plain(*exact, None if extra is None else extra.double(), stride, padding)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=3e-2)
        upstream = residual_like(found)
        gradients = torch.autograd.grad(found, own, upstream)
        wanted = torch.autograd.grad(expected, exact, upstream.double())
        for a, b in zip(gradients, wanted, strict=True):
            assert float((a.double() - b).norm()) <= 2e-2 * float(b.norm())
