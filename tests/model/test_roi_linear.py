"""Fully connected layers over channels_last RoI features: the same numbers, the gradient as it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import random_batch, small_config, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.roi_linear import RoiLinear


@pytest.mark.parametrize("rois", [(5,), (2, 3)])
@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 1, 1), (1, 3, 3)])
def test_the_order_of_the_columns_is_that_of_a_plain_layer(
    rois: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    channels, height, width = shape
    own = RoiLinear(channels * height * width, 6, dtype=torch.float64)
    plain = nn.Linear(channels * height * width, 6, dtype=torch.float64)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(*rois, height, width, channels, dtype=torch.float64).movedim(-1, -3).requires_grad_()
    found, expected = own(x), plain(x.flatten(-3))
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    ours = torch.autograd.grad(found, (x, *own.parameters()), grad)
    theirs = torch.autograd.grad(expected, (x, *plain.parameters()), grad)
    torch.testing.assert_close(ours, theirs)
    assert ours[1].shape == own.weight.shape
    assert ours[0].flatten(0, -4).is_contiguous(memory_format=torch.channels_last)


class Layouts(TorchDispatchMode):
    """Whether each gradient that reaches RoIAlign is channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().endswith("roi_align_sets_backward"):  # of all heads at once
            self.seen += [grad.is_contiguous(memory_format=torch.channels_last) for grad in args[0]]
        return func(*args, **(kwargs or {}))


def gradients(model: MaskRCNN, layout: torch.memory_format) -> tuple[list[bool], dict[str, Tensor]]:
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    batch = random_batch(1)
    batch = batch._replace(pixels=batch.pixels.contiguous(memory_format=layout))
    losses, _ = model(batch, model.draw_keys(batch, torch.Generator().manual_seed(1)))
    layouts = Layouts()
    with layouts:
        losses.total().backward()
    return layouts.seen, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "heads",
    [{}, {"box_head": {"convs": 1, "channels": 8, "fcs": 1}}, {"mask_head": {"kind": "mlp"}}],
    ids=["fc", "conv and fc", "mlp mask head"],
)
def test_roi_align_gets_its_gradient_as_its_result_lies(heads: dict[str, Any]) -> None:
    tree = small_config().model.model_dump()
    for name, changes in heads.items():
        tree[name] |= changes
    config = small_config(model=tree)
    seen, ours = gradients(small_model(config=config).train(), torch.channels_last)
    assert seen == [True, True]  # of the box head's features, and of the mask head's
    _, plain = gradients(small_model(config=config).train(), torch.contiguous_format)
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5, msg=name)
