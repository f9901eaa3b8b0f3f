"""Convolutions together with what follows them: norm, sum with a residual, ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.model.conv_relu import conv_relu, is_product
from fastmrcnn.model.norms import FrozenBatchNorm2d, Norm


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, same parameters, whose `forward` takes the layers that follow.

    A frozen batch norm is folded into weights and bias, so that it costs no pass over the map.
    """

    fused = False  # bias, residual and ReLU within cuDNN's convolution: see `fuse_epilogues`
    products = (
        True  # bias and ReLU within cuBLASLt's product, on CUDA; off for a graph of torch's own operators
    )

    def forward(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """relu(norm(conv(x)) + residual), each where given."""
        weight, bias, norm = self.folded(norm)
        stride = self.stride
        if self.kernel_size == (1, 1) and self.in_channels < 16 and x.device.type == "cpu":
            # With fewer channels than a vector holds, oneDNN's gradient of strided 1x1 weights writes beyond
            # its buffer (uxlfoundation/oneDNN issue 6035).
            x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
        fused = self.fused or (residual is None and self._is_product(x))
        if fused and relu and norm is None and bias is not None:
            return conv_relu(x, weight, bias, residual, stride, self.padding)  # type: ignore[arg-type]
        x = F.conv2d(x, weight, bias, stride, self.padding, self.dilation, self.groups)
        if norm is not None:
            x = norm(x)
        if residual is not None:
            x = x.add_(residual)  # neither a convolution's nor a norm's backward looks at its result
        return F.relu(x, inplace=True) if relu else x

    def _is_product(self, x: Tensor) -> bool:
        """Whether cuBLASLt computes it, with bias and ReLU, as cheaply as cuDNN without: on CUDA, in 16 bits.

        In float32 a product would be exact where a convolution rounds its inputs to TF32, and much slower.
        """
        if x.device.type != "cuda" or not self.products:
            return False
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return (
            dtype in (torch.bfloat16, torch.float16)
            and self.groups == 1
            and is_product(self.weight, self.stride, self.padding)  # type: ignore[arg-type]
        )

    def folded(self, norm: nn.Module | None) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """Weight and bias with a frozen norm in them, and the norm that is then left to do."""
        weight, bias = self.weight, self.bias
        if not (isinstance(norm, FrozenBatchNorm2d) and norm.folded):
            return weight, bias, norm
        scale, shift = norm.affine()
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        return weight * scale[:, None, None, None], bias, None

    def pooled(self, x: Tensor, norm: nn.Module) -> Tensor:
        """max_pool(relu(norm(conv(x)))), as a ResNet begins: 3x3 windows at every second pixel.

        To add one number to a channel and to cut off what is negative keep the order of its values. So where
        the norm is folded both come after the pooling, on a map a quarter as large: the same values, without
        a pass over the large map.
        """
        weight, bias, rest = self.folded(norm)
        if rest is not None or bias is None:
            return F.max_pool2d(self(x, norm, relu=True), 3, stride=2, padding=1)
        x = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return F.relu(x.add_(bias.to(x.dtype)[:, None, None]), inplace=True)


def fuse_epilogues(model: nn.Module, fused: bool = True) -> int:
    """Let cuDNN add bias and residual and apply the ReLU within the convolution, where it can.

    Returns:
        how many convolutions were told.
    """
    count = 0
    for module in model.modules():
        # cuDNN's fused 7x7 convolutions on channels_last are slow (pytorch/pytorch issue 68506), and it has
        # few fused kernels for groups.
        if isinstance(module, Conv2d) and max(module.kernel_size) <= 3 and module.groups == 1:
            module.fused = fused
            count += 1
    return count


def make_convs(
    inputs: int, channels: int, count: int, norm: Norm | None = None
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """`count` 3x3 convolutions, and a norm for each, with which they have no bias; no norms if there is
    none."""
    convs = nn.ModuleList(
        Conv2d(inputs if index == 0 else channels, channels, 3, padding=1, bias=norm is None)
        for index in range(count)
    )
    return convs, nn.ModuleList([] if norm is None else [norm(channels) for _ in convs])


def init_convs(convs: nn.ModuleList) -> None:
    for conv in convs:
        assert isinstance(conv, nn.Conv2d)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def run_convs(x: Tensor, convs: nn.ModuleList, norms: nn.ModuleList | None = None) -> Tensor:
    """(F, C, h, w) -> (F, channels, h, w), a norm, if there are any, and a ReLU after each."""
    for index, conv in enumerate(convs):
        x = conv(x, norm=norms[index] if norms else None, relu=True)
    return x
