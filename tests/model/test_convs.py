"""Convolutions with what follows them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from torch import nn

from fastmrcnn.model.convs import Conv2d
from fastmrcnn.model.norms import FrozenBatchNorm2d

FEW_CHANNELS = """
import torch
from fastmrcnn.model.convs import Conv2d
torch.manual_seed(0)
for inputs in (2, 4, 8, 12):
    conv = Conv2d(inputs, 8, 1, stride=2, bias=False)
    x = torch.randn(3, inputs, 64, 64).to(memory_format=torch.channels_last)
    conv(x).square().sum().backward()
    exact = Conv2d(inputs, 8, 1, stride=2, bias=False).double()
    exact.load_state_dict(conv.state_dict())
    exact(x.double()).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-3)
"""


@pytest.mark.parametrize(("inputs", "kernel", "stride"), [(8, 1, 2), (8, 1, 1), (8, 3, 2), (16, 1, 2)])
def test_is_a_convolution(inputs: int, kernel: int, stride: int) -> None:
    conv = Conv2d(inputs, 5, kernel, stride, padding=kernel // 2)
    plain = nn.Conv2d(inputs, 5, kernel, stride, padding=kernel // 2)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, inputs, 11, 8)
    torch.testing.assert_close(conv(x), plain(x))


def test_strided_convolutions_of_few_channels_stay_within_their_memory() -> None:
    """In a process of its own, which glibc ends if something was written beyond its block."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_CHANNELS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_CHECK_": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_before_bias_and_relu_changes_nothing(dtype: torch.dtype, folded: bool) -> None:
    torch.manual_seed(0)
    conv, norm = Conv2d(3, 8, 7, stride=2, padding=3, bias=False), FrozenBatchNorm2d(8, 1e-5)
    norm.folded = folded
    for buffer in norm.buffers():
        nn.init.normal_(buffer)  # scales of both signs: where they are not folded, order is not kept
    norm.running_var.abs_()
    x = torch.randn(2, 3, 33, 46).to(memory_format=torch.channels_last)
    grads, values = [], []
    for pooled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if pooled:
                y = conv.pooled(x, norm)
            else:
                y = F.max_pool2d(conv(x, norm, relu=True), 3, stride=2, padding=1)
        values.append(y.detach())
        grads += torch.autograd.grad(y.float().square().sum(), conv.weight)
    # In bf16 an eager convolution adds its bias before it rounds.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(*values, **tolerance)  # type: ignore[call-overload]
    assert (grads[0] - grads[1]).norm() <= tolerance["rtol"] * grads[1].norm()


@pytest.mark.gpu
def test_a_gpus_tests_have_no_tf32() -> None:
    torch.manual_seed(0)
    x, conv = torch.randn(2, 64, 40, 40, device="cuda"), nn.Conv2d(64, 64, 3, device="cuda")
    found = conv(x).double()
    torch.testing.assert_close(found, conv.double()(x.double()), rtol=1e-5, atol=1e-5)
