"""With torchvision itself: its models' weights come here and give its detections, and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from places import CONFIGS
from torch import Tensor
from with_torchvision import detection

from fastmrcnn import convert
from fastmrcnn.structures import Batch, Detections
from fastmrcnn.weights.peers.programs import import_state
from fastmrcnn.weights.trained import load_trained
from fastmrcnn.weights.zoo import architecture_of

pytestmark = [pytest.mark.torchvision, pytest.mark.slow]  # a model of full size each

RECIPES = CONFIGS / "zoo"
SIZES = {"min_size": 128, "max_size": 192}
SHAPE = (128, 160)
# Only these numbers differ from the published models.
FEWER = {"rpn_post_nms_top_n_test": 100, "box_score_thresh": 0.01}


def theirs(name: str, labels: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=labels, **SIZES, **FEWER
    ).eval()
    for key, value in model.state_dict().items():
        if value.dim() > 1:  # scaled so that scores are neither saturated nor tied
            predictor = any(part in key for part in ("cls_logits", "bbox_pred", "cls_score"))
            value.normal_(std=(0.15 if predictor else 1.0) * (1.5 / value[0].numel()) ** 0.5)
        elif key.endswith("bn3.weight"):
            value.fill_(0.25)
    return model


def judge(source: Path, folder: Path, recipe: str, image: Tensor, *options: str) -> Detections:
    """Our detections with the file's weights, at torchvision's sizes and numbers."""
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    text = text.replace("norm_eps: 0.0", "norm_eps: 1.0e-5").replace(
        "rpn:", "rpn:\n    post_nms_top_n_test: 100"
    )
    (folder / "recipe.yaml").write_text(text.replace("score_threshold: 0.05", "score_threshold: 0.01"))
    target = folder / "ours.pt"
    convert.main([str(source), str(target), "--config", str(folder / "recipe.yaml"), *options])
    model = load_trained(target, "cpu").model
    with torch.no_grad():
        found = model(Batch(image[None] * 255, torch.tensor([image.shape[-2:]])))
    assert isinstance(found, Detections)
    return found


def assert_same_detections(found: Detections, expected: dict[str, Tensor]) -> None:
    """The same set: near ties in score may stand in another order."""
    count = len(expected["boxes"])
    assert count > 5
    assert int(found.valid.sum()) == count
    boxes, scores = found.boxes[0, :count], found.scores[0, :count]
    distance = (boxes[:, None] - expected["boxes"]).abs().amax(-1)
    distance += (scores[:, None] - expected["scores"]).abs() * 0.05 / 1e-4
    distance += (found.classes[0, :count, None] != expected["labels"] - 1) * 1e3
    assert distance.amin(1).max() < 0.1
    assert distance.amin(0).max() < 0.1


@pytest.mark.parametrize(("version", "labels"), [("", 6), ("", 91), ("_v2", 6)])
def test_mask_rcnn_there_and_back(tmp_path: Path, version: str, labels: int) -> None:
    model = theirs(f"maskrcnn_resnet50_fpn{version}", labels)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    image = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model([image])[0]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {i}" for i in range(1, labels)), encoding="utf-8")
    found = judge(
        tmp_path / "theirs.pth",
        tmp_path,
        f"torchvision_mask_rcnn_r50_fpn{version}",
        image,
        *(["--all-labels"] if labels == 91 else ["--classes", str(names)]),
    )
    assert_same_detections(found, expected)

    # Back, into a model of other weights: strictly, and it detects the same.
    convert.main([str(tmp_path / "ours.pt"), str(tmp_path / "back.pth"), "--to", "torchvision"])
    other = theirs(f"maskrcnn_resnet50_fpn{version}", labels, seed=1)
    other.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    with torch.no_grad():
        again = other([image])[0]
    for key in ("boxes", "labels", "scores", "masks"):
        assert torch.equal(again[key], expected[key]), key


def test_keypoint_rcnn(tmp_path: Path) -> None:
    model = theirs("keypointrcnn_resnet50_fpn", 2)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    image = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model([image])[0]
    found = judge(tmp_path / "theirs.pth", tmp_path, "torchvision_keypoint_rcnn_r50_fpn", image)
    assert_same_detections(found, expected)
    convert.main([str(tmp_path / "ours.pt"), str(tmp_path / "back.pth"), "--to", "torchvision"])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    theirs("keypointrcnn_resnet50_fpn", 2, seed=1).load_state_dict(back, strict=True)
    for key, value in back.items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_published_names_of_2019_are_read() -> None:
    """torchvision renames them on loading; here they are read as they are."""
    state = theirs("maskrcnn_resnet50_fpn", 91).state_dict()
    old = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for block in range(4):
            key = key.replace(f"inner_blocks.{block}.0.", f"inner_blocks.{block}.")
            key = key.replace(f"layer_blocks.{block}.0.", f"layer_blocks.{block}.")
            key = key.replace(f"mask_head.{block}.0.", f"mask_head.mask_fcn{block + 1}.")
        old[key] = value
    theirs("maskrcnn_resnet50_fpn", 91).load_state_dict(old, strict=True)
    new, read = import_state(state, "new").state, import_state(old, "old").state
    assert all(torch.equal(value, new[key]) for key, value in read.items())
    assert str(architecture_of(read)) == "Mask R-CNN resnet50-FPN"
