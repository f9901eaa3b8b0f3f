"""The recipes with keypoints hold the published numbers of detectron2 and of the paper's section 5."""

from __future__ import annotations

import pytest
from test_recipes import CONFIGS, SCALES, WEIGHTS, command, header

from fastmrcnn.config.file import load_config
from fastmrcnn.training.optim import learning_rate

# Backbone and what the header says of AP: detectron2's and maskrcnn-benchmark's MODEL_ZOO.md.
BACKBONES = {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_32x8d"}
PUBLISHED = {
    "keypoint_rcnn_r50_fpn_1x": [
        "box 53.6, keypoint 64.0 (detectron2",
        "box 53.7, keypoint 64.3 (maskrcnn-benchmark",
    ],
    "keypoint_rcnn_r50_fpn_3x": ["box 55.4, keypoint 65.5 (detectron2"],
    "keypoint_rcnn_r101_fpn_1x": [],
    "keypoint_rcnn_r101_fpn_3x": ["box 56.4, keypoint 66.1 (detectron2"],
    "keypoint_rcnn_x101_fpn_1x": [],
    "keypoint_rcnn_x101_fpn_3x": ["box 57.3, keypoint 66.0 (detectron2"],
    # Tables 4 and 5 of arXiv 1703.06870v3.
    "paper_keypoint_r50_fpn": [
        "AP 62.7, AP50 87.0, AP75 68.4 on test-dev",
        "keypoint AP 64.2, box AP 50.7 on minival",
        "keypoint AP 64.7, box AP 52.0, mask AP 45.1 on minival",
    ],
}


def test_no_recipe_is_missing_or_extra() -> None:
    assert {path.stem for path in CONFIGS.glob("*keypoint*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_holds_the_published_numbers(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    model, optim, data = config.model, config.optim, config.data
    backbone = BACKBONES[name.split("_")[2]]
    assert model.backbone.name == backbone
    assert model.backbone.weights == f"https://download.pytorch.org/models/{WEIGHTS[backbone]}"
    assert (model.keypoint_head.enabled, model.mask_head.enabled) == (True, False)
    assert (model.keypoint_head.convs, model.keypoint_head.channels) == (8, 512)
    assert model.keypoint_head.resolution == 14  # for maps of 56
    assert (model.keypoint_head.loss_normalizer, model.keypoint_head.loss_weight) == ("visible", 1)
    assert (model.roi.batch_per_image, model.roi.foreground_share) == (512, 0.25)
    assert model.box_head.nms_iou == 0.5
    assert (data.short_side, data.short_side_test, data.long_side_max) == (SCALES, 800, 1333)
    assert (data.min_keypoints, data.keypoint_offset) == (1, 0.5)
    assert data.augment.flip_horizontal == 0.5
    paper, long = name.startswith("paper"), name.endswith("3x")
    assert model.roi.aligned != paper
    assert model.box_head.box_loss_beta == (1 if paper else 0.5)
    assert model.rpn.post_nms_top_n == (1000 if paper else 1500)
    assert config.train.steps == (270_000 if long else 90_000)
    assert config.train.batch == 16
    first, second = (210_000, 250_000) if long else (60_000, 80_000)
    rates = [
        learning_rate(optim, s, config.train.steps, 16) for s in (1000, first - 1, first, second - 1, second)
    ]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_gives_the_published_ap_and_invents_none(name: str) -> None:
    lines = header(CONFIGS / f"{name}.yaml")
    start = next(index for index, line in enumerate(lines) if line.startswith("AP:"))
    first, *rows = lines[start:]
    assert first.startswith(
        "AP: not measured. Published" if PUBLISHED[name] else "AP: not measured, not published."
    )
    assert len(rows) == len(PUBLISHED[name])
    for row, text in zip(rows, PUBLISHED[name], strict=True):
        assert text in row


@pytest.mark.parametrize("name", PUBLISHED)
def test_command_can_be_copied(name: str) -> None:
    words = command(CONFIGS / f"{name}.yaml")
    assert words[:5] == ["python", "-m", "fastmrcnn.train", "--config", f"configs/{name}.yaml"]
    config = load_config(CONFIGS.parent / words[4], words[5:])
    assert config.data.train.annotations == "coco/annotations/person_keypoints_train2017.json"
    assert config.data.val.annotations == "coco/annotations/person_keypoints_val2017.json"
    assert (config.data.train.images, config.data.val.images) == ("coco/train2017", "coco/val2017")
