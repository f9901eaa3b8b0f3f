"""configs/zoo/: each recipe is the published model's, and is found from the weights alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from places import CONFIGS

from fastmrcnn.config.file import load_config
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.peers.classes import COCO
from fastmrcnn.weights.peers.programs import export_state, import_state
from fastmrcnn.weights.zoo import Architecture, architecture_of, other_settings, published_recipe

ZOO = sorted((CONFIGS / "zoo").glob("*.yaml"))


class Model(NamedTuple):
    file: str  # the end of its URL
    backbone: str
    ap: str  # as its program publishes it
    parameters: int | None = None  # as its program states it


# detectron2's MODEL_ZOO.md and the metadata of torchvision's weights.
TABLE = {
    "torchvision_mask_rcnn_r50_fpn": Model(
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", "resnet50", "box 37.9, mask 34.6", 44401393
    ),
    "torchvision_mask_rcnn_r50_fpn_v2": Model(
        "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth", "resnet50", "box 47.4, mask 41.8", 46359409
    ),
    "torchvision_keypoint_rcnn_r50_fpn": Model(
        "keypointrcnn_resnet50_fpn_coco-fc266e95.pth", "resnet50", "box 54.6, keypoint 65.0", 59137258
    ),
    "detectron2_mask_rcnn_r50_c4_1x": Model(
        "mask_rcnn_R_50_C4_1x/137259246/model_final_9243eb.pkl", "resnet50", "box 36.8, mask 32.2"
    ),
    "detectron2_mask_rcnn_r50_c4_3x": Model(
        "mask_rcnn_R_50_C4_3x/137849525/model_final_4ce675.pkl", "resnet50", "box 39.8, mask 34.4"
    ),
    "detectron2_mask_rcnn_r101_c4_3x": Model(
        "mask_rcnn_R_101_C4_3x/138363239/model_final_a2914c.pkl", "resnet101", "box 42.6, mask 36.7"
    ),
    "detectron2_mask_rcnn_r50_fpn_1x": Model(
        "mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504.pkl", "resnet50", "box 38.6, mask 35.2"
    ),
    "detectron2_mask_rcnn_r50_fpn_3x": Model(
        "mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl", "resnet50", "box 41.0, mask 37.2"
    ),
    "detectron2_cascade_mask_rcnn_r50_fpn_3x": Model(
        "cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8.pkl", "resnet50", "box 44.3, mask 38.5"
    ),
    "detectron2_mask_rcnn_r101_fpn_3x": Model(
        "mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl", "resnet101", "box 42.9, mask 38.6"
    ),
    "detectron2_mask_rcnn_x101_fpn_3x": Model(
        "mask_rcnn_X_101_32x8d_FPN_3x/139653917/model_final_2d9806.pkl",
        "resnext101_32x8d",
        "box 44.3, mask 39.5",
    ),
    "detectron2_keypoint_rcnn_r50_fpn_1x": Model(
        "keypoint_rcnn_R_50_FPN_1x/137261548/model_final_04e291.pkl", "resnet50", "box 53.6, keypoint 64.0"
    ),
    "detectron2_keypoint_rcnn_r50_fpn_3x": Model(
        "keypoint_rcnn_R_50_FPN_3x/137849621/model_final_a6e10b.pkl", "resnet50", "box 55.4, keypoint 65.5"
    ),
    "detectron2_keypoint_rcnn_r101_fpn_3x": Model(
        "keypoint_rcnn_R_101_FPN_3x/138363331/model_final_997cc7.pkl", "resnet101", "box 56.4, keypoint 66.1"
    ),
    "detectron2_keypoint_rcnn_x101_fpn_3x": Model(
        "keypoint_rcnn_X_101_32x8d_FPN_3x/139686956/model_final_5ad38f.pkl",
        "resnext101_32x8d",
        "box 57.3, keypoint 66.0",
    ),
}


@cache
def model_of(name: str) -> MaskRCNN:
    """The recipe's model, of its real size but without memory."""
    config = load_config(CONFIGS / "zoo" / f"{name}.yaml").model
    with torch.device("meta"):
        return build_model(config, 1 if "keypoint" in name else 80, 17)


def test_no_recipe_is_missing_or_extra() -> None:
    assert {path.stem for path in ZOO} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_recipe_is_the_published_model(name: str) -> None:
    config, row = load_config(CONFIGS / "zoo" / f"{name}.yaml"), TABLE[name]
    model, keypoints = config.model, "keypoint" in name
    assert model.weights is not None
    assert model.weights.endswith(f"/{row.file}")
    assert model.backbone.name == row.backbone
    assert (model.architecture == "c4") == ("_c4_" in name)
    assert model.mask_head.enabled != keypoints
    assert model.keypoint_head.enabled == keypoints
    assert (model.box_head.score_threshold, model.box_head.nms_iou, model.box_head.detections) == (
        0.05,
        0.5,
        100,
    )
    assert (config.data.short_side_test, config.data.long_side_max) == (800, 1333)
    if name.startswith("torchvision"):
        assert (model.channel_order, model.backbone.stride_in_1x1) == ("rgb", False)
        assert model.backbone.norm_eps == (1e-5 if name.endswith("v2") else 0)
        assert model.pixel_mean == (123.675, 116.28, 103.53)
        assert model.pixel_std == (58.395, 57.12, 57.375)
        assert (model.roi.aligned, model.roi.sampling_ratio) == (False, 2)
        assert (model.anchors.rounding, model.anchors.stride_rule) == (True, "grid")
        assert model.rpn.loss_normalizer == "sampled"
        assert model.rpn.box_loss_beta == model.box_head.box_loss_beta == pytest.approx(1 / 9)
        assert keypoints or model.mask_head.target == "soft"
        return
    msra = row.backbone != "resnext101_32x8d"
    assert (model.channel_order, model.backbone.norm_eps) == ("bgr", 1e-5)
    assert model.backbone.stride_in_1x1 == msra
    assert model.pixel_mean == (103.53, 116.28, 123.675)
    assert model.pixel_std == ((1, 1, 1) if msra else (57.375, 57.12, 58.395))
    assert (model.roi.aligned, model.roi.sampling_ratio) == (True, 0)
    assert (model.anchors.rounding, model.anchors.stride_rule) == (False, "nominal")
    assert (model.rpn.loss_normalizer, model.rpn.box_loss_beta) == ("asked", 0)
    assert model.box_head.box_loss_beta == (0.5 if keypoints else 0)
    assert keypoints or model.mask_head.target == "polygon"
    if model.architecture == "c4":
        assert model.anchors.sizes == [[32, 64, 128, 256, 512]]
        assert (model.rpn.pre_nms_top_n, model.rpn.pre_nms_top_n_test) == (12000, 6000)
        assert (model.box_head.resolution, model.rpn.post_nms_top_n) == (14, 2000)
    else:
        cascade = "cascade" in name
        assert model.rpn.post_nms_top_n == (1500 if keypoints else 2000 if cascade else 1000)
        assert model.box_head.cascade == model.box_head.class_agnostic == cascade


@pytest.mark.parametrize("name", TABLE)
def test_header_gives_the_commands_and_the_published_ap(name: str) -> None:
    text = (CONFIGS / "zoo" / f"{name}.yaml").read_text(encoding="utf-8")
    commands = text.replace("\\\n#    ", "").splitlines()
    judge = next(line for line in commands if "fastmrcnn.evaluate" in line).removeprefix("#").split()
    assert judge[:5] == ["python", "-m", "fastmrcnn.evaluate", "--config", f"configs/zoo/{name}.yaml"]
    config = load_config(CONFIGS.parent / judge[4], judge[5:])
    assert config.data.val.annotations is not None
    assert ("person_keypoints" in config.data.val.annotations) == ("keypoint" in name)
    learn = next(line for line in commands if "fastmrcnn.train" in line).removeprefix("#").split()
    assert load_config(CONFIGS.parent / learn[4], learn[5:]).data.train.images is not None
    assert f"# AP: published {TABLE[name].ap} (" in text
    assert "With this program: not measured." in text


@pytest.mark.parametrize("name", TABLE)
def test_recipe_is_found_from_the_weights(name: str) -> None:
    program = name.partition("_")[0]
    model = model_of(name)
    state = export_state(model.state_dict(), program, "x", [1] if "keypoint" in name else COCO.ids)
    if program == "torchvision":
        labels = 2 if "keypoint" in name else 91
        assert state["roi_heads.box_predictor.cls_score.weight"].shape == (labels, 1024)
    imported = import_state(state, "x")
    config, found = published_recipe(imported, architecture_of(imported.state), Path("x"))
    assert found.replace("_3x", "") == name.replace("_1x", "").replace("_3x", "")
    own = load_config(CONFIGS / "zoo" / f"{name}.yaml")
    assert config.model.model_copy(update={"weights": None}) == own.model.model_copy(update={"weights": None})
    assert config.data == own.data


def test_torchvision_weights_with_counters_had_an_epsilon() -> None:
    name = "torchvision_mask_rcnn_r50_fpn"
    state = export_state(model_of(name).state_dict(), "torchvision", "x", COCO.ids)
    state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(3)
    imported = import_state(state, "x")
    config, _ = published_recipe(imported, architecture_of(imported.state), Path("x"))
    assert config.model.backbone.norm_eps == 1e-5


def test_settings_that_no_weight_tells() -> None:
    architecture = Architecture("fpn", "resnet50", True, False)
    published = load_config(CONFIGS / "zoo" / "detectron2_mask_rcnn_r50_fpn_3x.yaml").model
    assert other_settings(published, "detectron2", architecture) == []
    changes = ["model.roi.op=pool", "model.roi.mode=max", "model.mask_head.resolution=7"]
    own = load_config(CONFIGS / "zoo" / "detectron2_mask_rcnn_r50_fpn_3x.yaml", changes).model
    assert other_settings(own, "detectron2", architecture) == [
        "roi.op is pool, there align",
        "roi.mode is max, there avg",
        "mask_head.resolution is 7, there 14",
    ]


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.parameters])
def test_models_have_as_many_parameters_as_theirs(name: str) -> None:
    """The background and unused labels have rows of their own; frozen norms, which only v2 lacks, none."""
    ids = [1] if "keypoint" in name else COCO.ids
    state = export_state(model_of(name).state_dict(), "torchvision", "x", ids)
    trained = name.endswith("v2")
    counted = [
        value
        for key, value in state.items()
        if "running_" not in key and (trained or (".bn" not in key and "downsample.1" not in key))
    ]
    assert sum(value.numel() for value in counted) == TABLE[name].parameters
