"""The graph that is exported gives what the model gives, in tensors that need nothing to be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving import images, trained
from torch import nn

from fastmrcnn.deployment.graph import (
    FINER,
    ServingGraph,
    check_shape,
    fold_batch_norms,
    highest_places,
    paste_bits,
)
from fastmrcnn.deployment.parity import FULL, compare
from fastmrcnn.detection.heatmaps import decode_heatmaps
from fastmrcnn.errors import UserError
from fastmrcnn.kernels import paste_masks
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.norms import FrozenBatchNorm2d


@pytest.mark.parametrize("norm", ["gn", "bn", "frozen_bn"])
def test_it_is_the_models_own_detect(norm: str) -> None:
    model = trained(backbone={"norm": norm}, fpn={"norm": norm})
    pixels, sizes = images()
    graph = ServingGraph(model, paste=True)
    found = dict(zip(graph.outputs, graph(pixels, sizes), strict=True))
    arrays = {name: value.numpy() for name, value in found.items()}
    assert isinstance(model.model, MaskRCNN)
    inputs = [(pixels.numpy(), sizes.numpy())]
    parity = compare(model.model, lambda pixels, sizes: arrays, inputs, FULL, 0.5)
    assert parity.faults() == []
    assert parity.matched > 10
    for name in ("boxes", "scores", "classes", "masks", "bits"):
        assert not found[name][~found["valid"]].any()
    assert all(not isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d) for m in graph.modules())
    assert [value.dtype for value in found.values()] == [
        torch.float32,
        torch.float32,
        torch.int64,
        torch.bool,
        torch.float32,
        torch.uint8,
    ]


def test_the_model_itself_stays_as_it_is() -> None:
    model = trained(backbone={"norm": "bn"})
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    ServingGraph(model, half=True)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before
    )


def test_norms_are_folded_wherever_they_stand() -> None:
    model = trained(
        backbone={"norm": "frozen_bn"},
        fpn={"norm": "bn"},
        box_head={"convs": 1, "channels": 8, "norm": "frozen_bn"},
        mask_head={"norm": "frozen_bn"},
    ).model
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert fold_batch_norms(model) == len(norms) > 20
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]


def test_half_has_half_weights_and_whole_boxes() -> None:
    model = trained()
    pixels, sizes = images()
    graph = ServingGraph(model, half=True)
    kinds = {p.dtype for name, p in graph.named_parameters() if ".bn" not in name and "norm" not in name}
    assert torch.float16 in kinds
    whole = ServingGraph(model)(pixels, sizes)
    found = graph(pixels, sizes)
    assert [a.dtype for a in found] == [a.dtype for a in whole]
    assert abs(float(found[1].mean() - whole[1].mean())) < 0.01
    assert not all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_pasted_bits_are_those_of_the_kernel() -> None:
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(1, 4, 28, 28, generator=random)
    boxes = torch.tensor([[[3.2, 4.1, 50.7, 61.3], [0, 0, 96, 64], [-5, 10, 30, 80.5], [7, 7, 7, 20]]])
    bits = paste_bits(masks, boxes, 64, 96, 0.5)
    found = torch.from_numpy(np.unpackbits(bits[0].numpy(), axis=-1)).bool()
    wanted = paste_masks(masks[0], boxes[0], 64, 96, 0.5)
    assert wanted[:3].flatten(1).any(1).all()
    assert int((found != wanted).sum()) <= 3  # where a probability is 0.5 but for its last bit


@pytest.mark.parametrize("side", [30.0, 70.0, 300.0])
def test_keypoints_are_where_evaluation_reads_them(side: float) -> None:
    """Of smooth heatmaps: within half a pixel and half a place, and a quarter of a cell of the truth."""
    random = torch.Generator().manual_seed(2)
    centre = 8 + 40 * torch.rand(3, 5, 2, generator=random)
    cell = torch.arange(56) + 0.5
    y = (cell - centre[..., 1:]) ** 2
    x = (cell - centre[..., :1]) ** 2
    heatmaps = 6 * torch.exp(-(y[..., :, None] + x[..., None, :]) / 40)
    boxes = torch.tensor([10.5, 20.25, 10.5 + side, 20.25 + 1.5 * side]).repeat(3, 1)
    found = highest_places(heatmaps[None], boxes[None])[0]
    wanted = decode_heatmaps(heatmaps, boxes)
    allowed = 0.5 * (1 + 1.5 * side / 56 / FINER) + 0.01
    assert float((found[..., :2] - wanted[..., :2]).abs().max()) <= allowed
    truth = centre / 56 * torch.tensor([side, 1.5 * side]) + boxes[0, :2]
    assert float((found[..., :2] - truth).abs().max()) <= 1.5 * side / 56 / 4
    ratio = found[..., 2] / wanted[..., 3]  # a small box has few pixels, which miss the summit
    assert float(ratio.min()) > 0.97
    assert float(ratio.max()) < (1.1 if side >= 56 else 2)


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.rpn\.enabled=false"):
        ServingGraph(trained(rpn={"enabled": False}))
    with pytest.raises(UserError, match="no mask head"):
        ServingGraph(trained(mask_head={"enabled": False}), paste=True)
    check_shape(64, 96)
    with pytest.raises(UserError, match=r"the nearest is 800 1344$"):
        check_shape(800, 1333)
    with pytest.raises(UserError, match=r"the nearest is 480 640 or 512 640"):
        check_shape(481, 640)
