"""Losses, gradients and detections of torchvision and detectron2, from the same weights and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import golden_models as peers
import numpy as np
import pytest
import torch
from golden import arrays
from torch import Tensor

from fastmrcnn import convert
from fastmrcnn.config.file import parse_config
from fastmrcnn.detection.paste import paste_masks
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.structures import Batch
from fastmrcnn.weights.peers.names import detectron2_names, torchvision_names
from fastmrcnn.weights.trained import load_trained

ALL = 10**6  # sample everything, so that nothing is random
ROIS = 4000  # more than there are proposals
SHARE = 0.02  # 80 slots for the foreground, of which fewer are used: the test checks it

TORCHVISION: dict[str, Any] = {
    "backbone": {"name": "resnet50", "frozen_stages": 0},
    "anchors": {"rounding": True, "stride_rule": "grid"},
    "rpn": {
        "batch_per_image": ALL,
        "box_loss_beta": 1 / 9,
        "loss_normalizer": "sampled",
        "post_nms_top_n": 2000,
        "min_box_side": 1e-3,
    },
    "roi": {"batch_per_image": ROIS, "foreground_share": SHARE, "aligned": False, "sampling_ratio": 2},
    "box_head": {"box_loss_beta": 1 / 9},
    "mask_head": {"target": "soft", "target_sampling_ratio": 0},
}
DETECTRON2: dict[str, Any] = {
    "backbone": {"name": "resnet50", "frozen_stages": 0, "stride_in_1x1": True},
    "pixel_mean": [103.53, 116.28, 123.675],
    "pixel_std": [57.375, 57.12, 58.395],
    "rpn": {"batch_per_image": 30000},
    "roi": {"batch_per_image": ROIS, "foreground_share": SHARE},
    "mask_head": {"target": "bitmap", "target_sampling_ratio": 0},
}


def build(peer: str, norm: str = "frozen_bn") -> tuple[MaskRCNN, Batch, dict[str, np.ndarray]]:
    data = arrays(f"{peer}_mask_rcnn_r50_fpn.npz")
    settings = TORCHVISION if peer == "torchvision" else DETECTRON2
    tree = {"model": {**settings, "backbone": {**settings["backbone"], "norm": norm}}}
    model = build_model(parse_config(tree, "the test").model, 7)
    peers.fill_from(model, peer)
    if peer == "torchvision":
        batch = peers.golden_batch(data, "labels", "masks", background=1, scale=255.0)
    else:
        batch = peers.golden_batch(data, "classes", "bitmaps", background=0, scale=255.0)
    return model, batch, data


def close(ours: Tensor, theirs: np.ndarray, tolerance: float = 1e-4) -> bool:
    """Relative error in the Euclidean norm."""
    expected = torch.from_numpy(np.asarray(theirs)).double()
    return bool((ours.double() - expected).norm() <= tolerance * expected.norm())


def foreground_fits(model: MaskRCNN, batch: Batch, keys: SamplingKeys) -> bool:
    """Whether no foreground RoI was left out for want of slots."""
    assert batch.targets is not None
    with torch.no_grad():
        features = model.features(batch)
        objectness, deltas = model.rpn.head(features)
        anchors = model.rpn.anchors(features, batch.pixels.shape[-2:])
        rois = model.sampler(
            model.rpn.propose(objectness, deltas, anchors, batch.sizes), batch.targets, keys.rois
        )
    return int(rois.is_foreground.sum(1).max()) < model.sampler.foreground_slots


LOSSES = {
    "torchvision": {
        "loss_rpn_cls": "loss_objectness",
        "loss_rpn_loc": "loss_rpn_box_reg",
        "loss_cls": "loss_classifier",
        "loss_box_reg": "loss_box_reg",
        "loss_mask": "loss_mask",
    },
    "detectron2": {
        name: name for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    },
}
TRAINED = ("torchvision", "bn", "")
CASES = [("torchvision", "frozen_bn", "frozen."), ("detectron2", "frozen_bn", "")]


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[MaskRCNN], Any]]:
    """The model as it is, and compiled as one graph."""
    torch._dynamo.reset()
    if request.param == "eager":
        yield lambda model: model
    else:
        yield lambda model: torch.compile(model, fullgraph=True, dynamic=False)
    torch._dynamo.reset()


def test_losses_and_gradients_with_batch_statistics() -> None:
    check_losses_and_gradients(*TRAINED, lambda model: model)


@pytest.mark.parametrize(("peer", "norm", "prefix"), CASES)
def test_losses_and_gradients(peer: str, norm: str, prefix: str, run: Callable[[MaskRCNN], Any]) -> None:
    check_losses_and_gradients(peer, norm, prefix, run)


def check_losses_and_gradients(peer: str, norm: str, prefix: str, run: Callable[[MaskRCNN], Any]) -> None:
    model, batch, data = build(peer, norm)
    model.train()
    keys = model.draw_keys(batch, torch.Generator().manual_seed(0))
    losses, _ = run(model)(batch, keys)
    assert foreground_fits(model, batch, keys)
    for name, key in LOSSES[peer].items():
        expected = float(data[f"{prefix}loss.{key}"])
        assert getattr(losses, name).item() == pytest.approx(expected, rel=1e-4), name
    losses.total().backward()
    rename = torchvision_names if peer == "torchvision" else detectron2_names
    theirs = rename([name for name, _ in model.named_parameters()], to_ours=False)
    wrong = []
    compared = 0
    for name, parameter in model.named_parameters():
        key = f"{prefix}gradnorm.{theirs[name]}"
        if key not in data:
            continue
        compared += 1
        expected = float(data[key])
        assert parameter.grad is not None, name
        if parameter.grad.norm().item() != pytest.approx(expected, rel=1e-3, abs=1e-7):
            wrong.append((name, parameter.grad.norm().item(), expected))
    assert compared > 50
    assert not wrong


@pytest.mark.slow
def test_a_file_of_torchvision_needs_no_words(tmp_path: Path) -> None:
    """Converted by command, with the recipe that is found from the weights."""
    model, batch, data = build("torchvision")
    state = peers.peer_state(model, "torchvision")
    state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(0)  # as torchvision's model has it
    torch.save(state, tmp_path / "theirs.pth")
    convert.main([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pt")])
    converted = load_trained(tmp_path / "ours.pt", "cpu").model
    with torch.no_grad():
        found = converted(batch)
    for image in range(2):
        boxes, scores = data[f"det{image}.boxes"], data[f"det{image}.scores"]
        assert int(found.valid[image].sum()) == len(boxes)
        distance = np.abs(found.boxes[image, : len(boxes)].numpy()[:, None] - boxes[None]).max(-1)
        distance += 1e3 * np.abs(found.scores[image, : len(boxes)].numpy()[:, None] - scores[None])
        assert distance.min(1).max() < 0.15
        assert distance.min(0).max() < 0.15


@pytest.mark.parametrize("peer", ["torchvision", "detectron2"])
def test_features_proposals_and_detections(peer: str, run: Callable[[MaskRCNN], Any]) -> None:
    model, batch, data = build(peer)
    model.eval()
    with torch.no_grad():
        features = model.features(batch)
        objectness, deltas = model.rpn.head(features)
        anchors = model.rpn.anchors(features, (256, 288))
        proposals = model.rpn.propose(objectness, deltas, anchors, batch.sizes)
        found = run(model)(batch)
    for level in range(5):
        name = f"fpn.{level if level < 4 else 'pool'}" if peer == "torchvision" else f"features.p{level + 2}"
        assert close(features[level][:, ::64], data[name]), name
        height, width = features[level].shape[-2:]
        expected = data[f"rpn.objectness.{level}"]
        ours = objectness[level].reshape(2, height, width, 3).permute(0, 3, 1, 2)
        assert close(ours.reshape(expected.shape), expected)
        expected = data[f"rpn.deltas.{level}"]
        every = 2 if level == 0 else 1  # second row and column: the largest level was thinned out
        ours = deltas[level].reshape(2, height, width, 12).permute(0, 3, 1, 2)[..., ::every, ::every]
        assert close(ours.reshape(expected.shape), expected)
    for image in range(2):
        expected = data[f"proposals.{image}"]
        ours = proposals.boxes[image][proposals.valid[image]].numpy()
        assert ours.shape == expected.shape
        # The same set, and the same order: only those of nearly one score may have changed places.
        distance = np.abs(ours[:, None] - expected[None]).max(-1)
        assert distance.min(1).max() < 1e-2
        assert distance.min(0).max() < 1e-2
        scores = proposals.scores[image][proposals.valid[image]].numpy()
        moved = distance.argmin(0)  # our place of each of theirs
        assert np.all(np.diff(scores[moved]) < 1e-4 * np.abs(scores).max())
        count = len(data[f"det{image}.boxes"])
        assert int(found.valid[image].sum()) == count
        boxes = found.boxes[image, :count].numpy()
        scores = found.scores[image, :count].numpy()
        off = np.abs(boxes[:, None] - data[f"det{image}.boxes"][None]).max(-1)
        apart = np.abs(scores[:, None] - data[f"det{image}.scores"][None])
        nearest = (off / 0.05 + apart / 1e-4).argmin(1)
        assert sorted(nearest) == list(range(count))  # each of theirs once
        assert np.take_along_axis(off, nearest[:, None], 1).max() < 0.05
        assert np.take_along_axis(apart, nearest[:, None], 1).max() < 1e-4
        labels = data[f"det{image}.labels"] - 1 if peer == "torchvision" else data[f"det{image}.classes"]
        assert np.array_equal(found.classes[image, :count].numpy(), labels[nearest])
        assert found.masks is not None
        height, width = batch.sizes[image].tolist()
        method: Literal["resize", "sample"] = "resize" if peer == "torchvision" else "sample"
        bitmaps = paste_masks(
            found.masks[image, :count], found.boxes[image, :count], height, width, method=method
        )
        area, expected = bitmaps.sum((1, 2)).numpy(), data[f"det{image}.mask_area"][nearest]
        assert np.all(np.abs(area - expected) <= 0.01 * expected)
