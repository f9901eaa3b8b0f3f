"""Every recipe loads, says what it is, and holds the published numbers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from places import CONFIGS

from fastmrcnn.config.file import load_config
from fastmrcnn.training.optim import learning_rate

# Those in zoo/, which judge published weights, have a test of their own.
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "zoo")
COCO_RECIPES = [
    path
    for path in CONFIGS.glob("*.yaml")
    if path.name.startswith(("mask_rcnn_", "paper_")) and "keypoint" not in path.name
]
# Stronger ones, each with what it changes, and what its header says of AP.
STRONGER = {
    "cascade_mask_rcnn_r50_fpn_3x": "box 44.3, mask 38.5 (detectron2",
    "mask_rcnn_convnext_tiny_fpn_lsj": "box 46.2, mask 41.7 (mmdetection",
    "mask_rcnn_r50_fpn_lsj": "box 44.6, mask 40.3 (detectron2",
    "mask_rcnn_r50_fpn_v2_lsj": "box 47.4, mask 41.8 (torchvision",
}
ABLATIONS = sorted((CONFIGS / "ablations").glob("*.yaml"))

WEIGHTS = {
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnext50_32x4d": "resnext50_32x4d-7cdf4587.pth",
    "resnext101_32x8d": "resnext101_32x8d-8ba56ff5.pth",
}
SCALES = [640, 672, 704, 736, 768, 800]


class Recipe(NamedTuple):
    backbone: str
    steps: int
    drops: list[int]  # steps at which the rate is divided by ten
    batch: int
    lr: float
    short_side: list[int]
    published: list[str]  # what the header says of AP
    architecture: str = "fpn"


# detectron2's MODEL_ZOO.md, the README of mmdetection's configs/mask_rcnn, maskrcnn-benchmark's
# MODEL_ZOO.md (which has the only R101 at 1x), and tables 1 to 3 of arXiv 1703.06870v3.
ONE, THREE = (90_000, [60_000, 80_000], 16, 0.02, SCALES), (270_000, [210_000, 250_000], 16, 0.02, SCALES)
PAPER, PAPER_X = (160_000, [120_000], 16, 0.02, [800]), (160_000, [120_000], 8, 0.01, [800])
TABLE = {
    "mask_rcnn_r50_fpn_1x": Recipe("resnet50", *ONE, ["box 38.6, mask 35.2 (detectron2"]),
    "mask_rcnn_r50_fpn_3x": Recipe("resnet50", *THREE, ["box 41.0, mask 37.2 (detectron2"]),
    "mask_rcnn_r101_fpn_1x": Recipe("resnet101", *ONE, ["box 40.1, mask 36.1 (maskrcnn-benchmark"]),
    "mask_rcnn_r101_fpn_3x": Recipe("resnet101", *THREE, ["box 42.9, mask 38.6 (detectron2"]),
    "mask_rcnn_x50_fpn_1x": Recipe("resnext50_32x4d", *ONE, []),
    "mask_rcnn_x50_fpn_3x": Recipe("resnext50_32x4d", *THREE, []),
    "mask_rcnn_x101_fpn_1x": Recipe(
        "resnext101_32x8d",
        *ONE,
        ["box 42.8, mask 38.3 (mmdetection", "box 42.2, mask 37.8 (maskrcnn-benchmark"],
    ),
    "mask_rcnn_x101_fpn_3x": Recipe("resnext101_32x8d", *THREE, ["box 44.3, mask 39.5 (detectron2"]),
    "mask_rcnn_r50_c4_1x": Recipe("resnet50", *ONE, ["box 36.8, mask 32.2 (detectron2"], "c4"),
    "mask_rcnn_r50_c4_3x": Recipe("resnet50", *THREE, ["box 39.8, mask 34.4 (detectron2"], "c4"),
    "mask_rcnn_r101_c4_3x": Recipe("resnet101", *THREE, ["box 42.6, mask 36.7 (detectron2"], "c4"),
    "paper_r50_c4": Recipe("resnet50", *PAPER, ["AP 30.3, AP50 51.2, AP75 31.5 on minival"], "c4"),
    "paper_r101_c4": Recipe(
        "resnet101",
        *PAPER,
        [
            "mask AP 32.7, AP50 54.2, AP75 34.3 on minival",
            "mask AP 33.1, AP50 54.9, AP75 34.8 on test-dev",
        ],
        "c4",
    ),
    "paper_r50_fpn": Recipe("resnet50", *PAPER, ["AP 33.6, AP50 55.2, AP75 35.3 on minival"]),
    "paper_r101_fpn": Recipe(
        "resnet101",
        *PAPER,
        [
            "mask AP 35.4, AP50 57.3, AP75 37.5 on minival",
            "mask AP 35.7, AP50 58.0, AP75 37.8 on test-dev",
            "box AP 38.2, AP50 60.3, AP75 41.7 on test-dev",
        ],
    ),
    "paper_x50_fpn": Recipe("resnext50_32x4d", *PAPER_X, []),
    "paper_x101_fpn": Recipe(
        "resnext101_32x8d",
        *PAPER_X,
        [
            "mask AP 36.7, AP50 59.5, AP75 38.9 on minival",
            "mask AP 37.1, AP50 60.0, AP75 39.4 on test-dev",
            "box AP 39.8, AP50 62.3, AP75 43.4 on test-dev",
        ],
    ),
}


def header(path: Path) -> list[str]:
    """The comment at the top, without its hashes."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def command(path: Path) -> list[str]:
    """The words of the command that the header gives."""
    lines = header(path)
    start = next(i for i, line in enumerate(lines) if line.startswith("python -m fastmrcnn.train"))
    words: list[str] = []
    for line in lines[start:]:
        words += line.removesuffix("\\").split()
        if not line.endswith("\\"):
            break
    return words


def test_no_recipe_is_missing_or_extra() -> None:
    assert {path.stem for path in COCO_RECIPES} - set(STRONGER) == set(TABLE)


@pytest.mark.parametrize("name", STRONGER)
def test_stronger_recipe_cites_what_others_published(name: str) -> None:
    lines = header(CONFIGS / f"{name}.yaml")
    start = next(i for i, line in enumerate(lines) if line.startswith("AP:"))
    assert lines[start].startswith("AP: not measured. Published")
    assert STRONGER[name] in lines[start + 1]
    assert len(lines) == start + 2


def test_cascade_is_the_3x_recipe_with_three_heads() -> None:
    one = load_config(CONFIGS / "cascade_mask_rcnn_r50_fpn_3x.yaml").model_dump()
    other = load_config(CONFIGS / "mask_rcnn_r50_fpn_3x.yaml").model_dump()
    assert differences(one, other) == {
        "model.rpn.post_nms_top_n": (1000, 2000),
        "model.box_head.class_agnostic": (False, True),
        "model.box_head.cascade": (False, True),
    }


def test_convnext_holds_the_published_numbers() -> None:
    config = load_config(CONFIGS / "mask_rcnn_convnext_tiny_fpn_lsj.yaml")
    backbone, optim = config.model.backbone, config.optim
    assert (backbone.timm_name, backbone.weights) == ("convnext_tiny.fb_in1k", "pretrained")
    assert (backbone.frozen_stages, backbone.drop_path) == (0, 0.4)
    assert (optim.name, optim.weight_decay, optim.layer_decay) == ("adamw", 0.05, 0.95)
    rates = [learning_rate(optim, step, 270_000, 16) for step in (1000, 202_499, 202_500, 247_500)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6])
    assert config.data.short_side == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert "without large-scale jitter" in "\n".join(header(CONFIGS / "mask_rcnn_convnext_tiny_fpn_lsj.yaml"))


@pytest.mark.parametrize(
    ("name", "epochs", "images", "drops", "warmup"),
    [
        ("mask_rcnn_r50_fpn_lsj", 100, 118_000, [163_889, 177_546], (500, 0.067)),
        ("mask_rcnn_r50_fpn_v2_lsj", 400, 117_266, [644_963, 703_596], (1000, 0.001)),
    ],
)
def test_recipes_of_large_scale_jitter_hold_the_published_numbers(
    name: str, epochs: int, images: int, drops: list[int], warmup: tuple[int, float]
) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    augment, optim = config.data.augment, config.optim
    assert (augment.scale, augment.crop, augment.flip_horizontal) == ((0.1, 2.0), (1024, 1024), 0.5)
    assert config.train.batch == 64
    assert config.train.steps == round(epochs * images / 64)
    assert optim.milestones == drops
    assert (optim.warmup_steps, optim.warmup_factor) == warmup
    assert (optim.weight_decay, optim.momentum) == (4e-5, 0.9)
    assert learning_rate(optim, drops[0] - 1, config.train.steps, 64) == pytest.approx(0.1)
    assert (config.model.backbone.norm, config.model.fpn.norm) == ("sync_bn", "sync_bn")
    if name.endswith("v2_lsj"):
        zoo = load_config(CONFIGS / "zoo" / "torchvision_mask_rcnn_r50_fpn_v2.yaml")
        changed = differences(config.model.model_dump(), zoo.model.model_dump())
        norms = {f"{part}.norm" for part in ("backbone", "fpn", "box_head", "mask_head")}
        assert changed.keys() == norms | {"weights", "backbone.frozen_stages", "mask_head.slots_per_image"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_header_tells_how_to_use_it(path: Path) -> None:
    load_config(path)
    text = "\n".join(header(path))
    for needed in ("python -m fastmrcnn.train", "Time:", "AP:"):
        assert needed in text, f"{path.name}: the header lacks '{needed}'"
    if "--config" in command(path):
        named = command(path)[command(path).index("--config") + 1]
        assert CONFIGS.parent / named == path


@pytest.mark.parametrize("name", TABLE)
def test_recipe_holds_the_published_numbers(name: str) -> None:
    want, path = TABLE[name], CONFIGS / f"{name}.yaml"
    config = load_config(path)
    model, optim = config.model, config.optim
    assert model.backbone.name == want.backbone
    assert model.backbone.weights == f"https://download.pytorch.org/models/{WEIGHTS[want.backbone]}"
    assert (model.backbone.norm, model.backbone.frozen_stages) == ("frozen_bn", 2)
    assert (model.backbone.stride_in_1x1, model.channel_order) == (False, "rgb")  # of those weights

    assert config.train.steps == want.steps
    assert config.train.batch == want.batch
    assert (optim.name, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 1e-4)

    def rate(step: int) -> float:
        return learning_rate(optim, step, want.steps, want.batch)

    assert rate(0) == pytest.approx(0.001 * want.lr)
    assert rate(1000) == pytest.approx(want.lr)
    expected = want.lr
    for drop in want.drops:
        assert rate(drop - 1) == pytest.approx(expected)
        expected /= 10
        assert rate(drop) == pytest.approx(expected)
    assert rate(want.steps - 1) == pytest.approx(expected)

    assert config.data.short_side == want.short_side
    assert (config.data.short_side_test, config.data.long_side_max) == (800, 1333)
    # The paper samples 64 RoIs and tests 300 proposals with C4, detectron2 512 and 1000 with both.
    paper_c4 = want.architecture == "c4" and name.startswith("paper")
    assert model.architecture == want.architecture
    assert (model.roi.batch_per_image, model.roi.foreground_share) == (64 if paper_c4 else 512, 0.25)
    assert model.rpn.post_nms_top_n_test == (300 if paper_c4 else 1000)
    assert model.box_head.resolution == (14 if want.architecture == "c4" else 7)
    assert model.mask_head.resolution == 14
    assert model.box_head.detections == 100
    # The paper's own keep room for every RoI that may be foreground.
    assert model.mask_head.slots_per_image == (None if name.startswith("paper") else 48)
    if name.startswith("paper"):
        assert (model.roi.aligned, model.roi.sampling_ratio) == (False, 2)
        assert model.rpn.box_loss_beta == pytest.approx(1 / 9)
        assert model.box_head.box_loss_beta == 1
    else:
        assert (model.roi.aligned, model.roi.sampling_ratio) == (True, 0)
        assert model.rpn.box_loss_beta == model.box_head.box_loss_beta == 0


@pytest.mark.parametrize("name", TABLE)
def test_header_gives_the_published_ap_and_invents_none(name: str) -> None:
    lines = header(CONFIGS / f"{name}.yaml")
    start = next(i for i, line in enumerate(lines) if line.startswith("AP:"))
    first, *rows = lines[start:]
    published = TABLE[name].published
    if not published:
        assert (first, rows) == ("AP: not measured, not published.", [])
        return
    assert first.startswith("AP: not measured. Published")
    assert len(rows) == len(published)
    for row, text in zip(rows, published, strict=True):
        assert text in row


def differences(one: dict, other: dict, place: str = "") -> dict[str, tuple]:
    """Dotted keys whose values differ."""
    found: dict[str, tuple] = {}
    for key, value in one.items():
        if isinstance(value, dict):
            found |= differences(value, other[key], f"{place}{key}.")
        elif value != other[key]:
            found[place + key] = (other[key], value)
    return found


ONE_CHANGE = {
    "table2c_roipool_max_r50_c4": (
        "paper_r50_c4",
        {"roi.op": ("align", "pool"), "roi.mode": ("avg", "max")},
    ),
    "table2c_roiwarp_max_r50_c4": (
        "paper_r50_c4",
        {"roi.op": ("align", "warp"), "roi.mode": ("avg", "max")},
    ),
    "table2c_roiwarp_avg_r50_c4": ("paper_r50_c4", {"roi.op": ("align", "warp")}),
    "table2c_roialign_max_r50_c4": ("paper_r50_c4", {"roi.mode": ("avg", "max")}),
    "table2d_roipool_r50_c5": (
        "ablations/table2d_roialign_r50_c5",
        {"roi.op": ("align", "pool"), "roi.mode": ("avg", "max")},
    ),
    "table2b_softmax_r50_c4": ("paper_r50_c4", {"mask_head.loss": ("sigmoid", "softmax")}),
    "class_agnostic_r50_c4": ("paper_r50_c4", {"mask_head.class_agnostic": (False, True)}),
    "table6_roipool_keypoint_r50_fpn": (
        "paper_keypoint_r50_fpn",
        {"roi.op": ("align", "pool"), "roi.mode": ("avg", "max")},
    ),
    "table2e_mlp2_r50_fpn": ("paper_r50_fpn", {"mask_head.kind": ("fcn", "mlp")}),
    "table2e_mlp3_r50_fpn": (
        "paper_r50_fpn",
        {"mask_head.kind": ("fcn", "mlp"), "mask_head.fcs": (2, 3)},
    ),
}


@pytest.mark.parametrize("name", ONE_CHANGE)
def test_ablation_differs_from_its_base_in_what_is_studied_alone(name: str) -> None:
    base, changes = ONE_CHANGE[name]
    one = load_config(CONFIGS / "ablations" / f"{name}.yaml").model_dump()
    other = load_config(CONFIGS / f"{base}.yaml").model_dump()
    assert differences(one, other) == {f"model.{key}": values for key, values in changes.items()}


COPIED = [*COCO_RECIPES, *ABLATIONS, CONFIGS / "cascade_mask_rcnn_r50_fpn_3x.yaml"]


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.stem)
def test_command_can_be_copied(path: Path) -> None:
    words = command(path)
    assert words[:4] == ["python", "-m", "fastmrcnn.train", "--config"]
    config = load_config(CONFIGS.parent / words[4], words[5:])
    for split in (config.data.train, config.data.val):
        assert split.images is not None
        assert split.annotations is not None
