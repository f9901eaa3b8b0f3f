"""Names and rows: every parameter finds its way to the other programs and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmrcnn.config.file import parse_config
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.peers.class_rows import class_count
from fastmrcnn.weights.peers.classes import COCO, coco_with_unused, read_classes
from fastmrcnn.weights.peers.names import backbone_names, detectron2_names, torchvision_names
from fastmrcnn.weights.peers.programs import export_state, import_backbone, import_state, program_of
from fastmrcnn.weights.peers.templates import backwards, renamer
from fastmrcnn.weights.states import has_statistics

VARIANTS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "resnet50": {"backbone": {"name": "resnet50"}},
    "norms": {"backbone": {"norm": "bn"}, "fpn": {"norm": "bn"}, "rpn": {"convs": 2}},
    "convolutions in heads": {
        "box_head": {"convs": 3, "channels": 12, "norm": "frozen_bn", "fcs": 1},
        "mask_head": {"norm": "gn"},
        "fpn": {"norm": "frozen_bn"},
    },
    "c4": {"architecture": "c4"},
    "c5": {"architecture": "c5"},
    "cascade": {"box_head": {"cascade": True, "convs": 2, "norm": "gn"}},
    "boxes alone": {"mask_head": {"enabled": False}},
    "keypoints": {"mask_head": {"enabled": False}, "keypoint_head": {"enabled": True, "convs": 3}},
}


def small_model(changes: dict[str, Any], num_classes: int = 3) -> MaskRCNN:
    tree = {section: dict(entries) for section, entries in SMALL["model"].items()}
    if changes.get("architecture") == "c4":
        del tree["mask_head"]["convs"]
    for section, entries in changes.items():
        tree[section] = {**tree.get(section, {}), **entries} if isinstance(entries, dict) else entries
    config = parse_config({"model": tree}, "the test").model
    torch.manual_seed(0)
    model = build_model(config, num_classes, num_keypoints=5)
    for value in model.state_dict().values():
        value.copy_(torch.randint(1000, value.shape))  # each its own, also where it begins with zeros
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


ALONE = [("c4", "torchvision"), ("cascade", "torchvision")]  # that the program has not
PAIRS = [(name, program) for name in VARIANTS for program in ("torchvision", "detectron2")]


@pytest.mark.parametrize(("name", "program"), [pair for pair in PAIRS if pair not in ALONE])
def test_every_parameter_comes_back(name: str, program: str) -> None:
    state = small_model(VARIANTS[name]).state_dict()
    theirs = export_state(state, program, "x", [1, 2, 3])
    assert len(theirs) == len(state)
    assert program_of(theirs) == program
    found = import_state(theirs, "x")
    assert found.program == program
    assert same(found.state, state)
    assert {found.names[key] for key in state} == theirs.keys()
    # And theirs, ours, theirs.
    assert same(export_state(found.state, program, "x", [1, 2, 3], found.spare), theirs)


@pytest.mark.parametrize(("name", "part"), [("c4", "res5"), ("cascade", "box_head.stages.0")])
def test_torchvision_has_no_c4_and_no_cascade(name: str, part: str) -> None:
    state = small_model(VARIANTS[name]).state_dict()
    with pytest.raises(UserError, match=rf"torchvision has no place for \d+ of its parameters: {part}"):
        export_state(state, "torchvision", "x", [1, 2, 3])


def test_nobody_has_a_backbone_of_timm() -> None:
    state = {"backbone.timm.stem.weight": torch.zeros(1), "rpn.head.objectness.weight": torch.zeros(1)}
    for program in ("torchvision", "detectron2"):
        with pytest.raises(UserError, match=f"x: {program} has no place for a backbone of timm"):
            export_state(state, program, "x", [1])


# Keys as they stand in published files, and what they are here.
PUBLISHED_TORCHVISION = {
    "backbone.body.conv1.weight": "backbone.conv1.weight",
    "backbone.body.layer1.0.downsample.1.running_var": "backbone.layer1.0.downsample.1.running_var",
    "backbone.fpn.inner_blocks.0.weight": "fpn.lateral.0.0.weight",
    "backbone.fpn.layer_blocks.3.0.bias": "fpn.output.3.0.bias",
    "rpn.head.conv.weight": "rpn.head.convs.0.weight",
    "rpn.head.conv.1.0.bias": "rpn.head.convs.1.bias",
    "rpn.head.cls_logits.weight": "rpn.head.objectness.weight",
    "rpn.head.bbox_pred.bias": "rpn.head.deltas.bias",
    "roi_heads.box_head.fc6.weight": "box_head.fc1.weight",
    "roi_heads.box_predictor.cls_score.weight": "box_head.classes.weight",
    "roi_heads.mask_head.mask_fcn1.weight": "mask_head.convs.0.weight",
    "roi_heads.mask_head.3.0.bias": "mask_head.convs.3.bias",
    "roi_heads.mask_predictor.mask_fcn_logits.bias": "mask_head.predictor.bias",
    "roi_heads.keypoint_head.14.weight": "keypoint_head.convs.7.weight",
    "roi_heads.keypoint_predictor.kps_score_lowres.weight": "keypoint_head.deconv.weight",
    "roi_heads.keypoint_head.13.weight": None,
}
PUBLISHED_FPN = {
    "backbone.bottom_up.stem.conv1.weight": "backbone.conv1.weight",
    "backbone.bottom_up.stem.conv1.norm.running_mean": "backbone.bn1.running_mean",
    "backbone.bottom_up.res2.0.shortcut.weight": "backbone.layer1.0.downsample.0.weight",
    "backbone.bottom_up.res5.2.conv3.norm.bias": "backbone.layer4.2.bn3.bias",
    "backbone.fpn_lateral2.bias": "fpn.lateral.0.0.bias",
    "backbone.fpn_output5.norm.weight": "fpn.output.3.1.weight",
    "proposal_generator.rpn_head.conv.weight": "rpn.head.convs.0.weight",
    "proposal_generator.rpn_head.anchor_deltas.bias": "rpn.head.deltas.bias",
    "roi_heads.box_head.fc2.weight": "box_head.fc2.weight",
    "roi_heads.mask_head.mask_fcn4.weight": "mask_head.convs.3.weight",
    "roi_heads.keypoint_head.conv_fcn8.bias": "keypoint_head.convs.7.bias",
    "roi_heads.keypoint_head.score_lowres.bias": "keypoint_head.deconv.bias",
}
PUBLISHED_C4 = {
    "backbone.stem.conv1.weight": "backbone.conv1.weight",
    "backbone.res4.5.conv1.norm.weight": "backbone.layer3.5.bn1.weight",
    "roi_heads.res5.0.shortcut.norm.running_var": "res5.0.downsample.1.running_var",
    "roi_heads.res5.2.conv2.weight": "res5.2.conv2.weight",
    "roi_heads.box_predictor.bbox_pred.weight": "box_head.deltas.weight",
    "roi_heads.mask_head.deconv.weight": "mask_head.deconv.weight",
}


PUBLISHED_V2 = {
    "backbone.fpn.inner_blocks.3.1.num_batches_tracked": "fpn.lateral.3.1.num_batches_tracked",
    "rpn.head.conv.1.0.weight": "rpn.head.convs.1.weight",
    **{f"roi_heads.box_head.{i}.0.weight": f"box_head.convs.{i}.weight" for i in range(4)},
    "roi_heads.box_head.3.1.running_var": "box_head.norms.3.running_var",
    "roi_heads.box_head.5.weight": "box_head.fc1.weight",
    "roi_heads.mask_head.0.1.bias": "mask_head.norms.0.bias",
}
PUBLISHED_CASCADE = {
    "backbone.bottom_up.stem.conv1.weight": "backbone.conv1.weight",
    "roi_heads.box_head.0.fc1.weight": "box_head.stages.0.fc1.weight",
    "roi_heads.box_head.2.fc2.bias": "box_head.stages.2.fc2.bias",
    "roi_heads.box_predictor.1.cls_score.weight": "box_head.stages.1.classes.weight",
    "roi_heads.box_predictor.2.bbox_pred.bias": "box_head.stages.2.deltas.bias",
}
PUBLISHED_GN = {
    "backbone.bottom_up.stem.conv1.norm.weight": "backbone.bn1.weight",
    "roi_heads.box_head.conv1.weight": "box_head.convs.0.weight",
    "roi_heads.box_head.conv4.norm.bias": "box_head.norms.3.bias",
    "roi_heads.box_head.fc1.weight": "box_head.fc1.weight",
    "roi_heads.mask_head.mask_fcn4.norm.weight": "mask_head.norms.3.weight",
}


def test_published_names() -> None:
    assert torchvision_names(PUBLISHED_V2, to_ours=True) == PUBLISHED_V2
    assert detectron2_names(PUBLISHED_CASCADE, to_ours=True) == PUBLISHED_CASCADE
    assert detectron2_names(PUBLISHED_GN, to_ours=True) == PUBLISHED_GN
    assert torchvision_names(PUBLISHED_TORCHVISION, to_ours=True) == PUBLISHED_TORCHVISION
    assert detectron2_names(PUBLISHED_FPN, to_ours=True) == PUBLISHED_FPN
    assert detectron2_names(PUBLISHED_C4, to_ours=True) == PUBLISHED_C4
    assert detectron2_names(["proposal_generator.rpn_head.conv.conv1.weight"], to_ours=True) == {
        "proposal_generator.rpn_head.conv.conv1.weight": "rpn.head.convs.1.weight"
    }


CAFFE2 = {
    "conv1_w": "conv1.weight",
    "conv1_b": None,
    "res_conv1_bn_s": "bn1.weight",
    "res_conv1_bn_running_mean": "bn1.running_mean",
    "res2_0_branch1_w": "layer1.0.downsample.0.weight",
    "res2_0_branch1_bn_b": "layer1.0.downsample.1.bias",
    "res3_1_branch2a_bn_gamma": "layer2.1.bn1.weight",
    "res4_22_branch2b_bn_riv": "layer3.22.bn2.running_var",
    "res5_2_branch2c_bn_beta": "layer4.2.bn3.bias",
    "res5_2_branch2c_gn_s": "layer4.2.bn3.weight",
    "fc1000_w": None,
    "pred_b": None,
    "stem.conv1.norm.running_var": "bn1.running_var",
    "res3.0.shortcut.norm.weight": "layer2.0.downsample.1.weight",
    "stem.fc.weight": None,
}


def test_names_of_backbone_files() -> None:
    assert backbone_names(CAFFE2) == CAFFE2


def test_folded_norms_get_statistics() -> None:
    state = {"conv1_w": torch.ones(2, 3, 7, 7), "res_conv1_bn_s": torch.tensor([2.0, 3.0])}
    state |= {"res_conv1_bn_b": torch.ones(2), "res_conv1_bn_s_momentum": torch.ones(2), "lr": torch.ones(1)}
    found = import_backbone(state)
    assert found.keys() == {"conv1.weight", *(f"bn1.{leaf}" for leaf in ("weight", "bias"))} | {
        "bn1.running_mean",
        "bn1.running_var",
    }
    assert found["bn1.weight"].tolist() == [2.0, 3.0]
    assert found["bn1.running_mean"].tolist() == [0.0, 0.0]
    assert found["bn1.running_var"].tolist() == [1.0, 1.0]
    group = import_backbone({"conv1_w": state["conv1_w"], "conv1_gn_s": torch.ones(2)})
    assert not has_statistics(group)


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(["weight", "bias", "running_var"]))
@settings(max_examples=30, deadline=None)
def test_templates_are_their_own_inverse(i: int, j: int, leaf: str) -> None:
    rules = [("a{i}.{j+1}.{leaf}", "{2j}.x{i+2}.{leaf}"), ("rest.{rest}", "r.{rest}")]
    there, back = renamer(rules), renamer(backwards(rules))
    key = f"a{i}.{j + 1}.{leaf}"
    assert there(key) == f"{2 * j}.x{i + 2}.{leaf}"
    assert back(str(there(key))) == key
    assert back(f"{2 * j + 1}.x{i + 2}.{leaf}") is None
    assert there(f"a{i}.0.{leaf}") is None
    assert there("rest.a.b.c") == "r.a.b.c"


def labelled(labels: int) -> dict[str, Tensor]:
    """torchvision's predictors, every row saying of which label it is."""
    rows = torch.arange(labels, dtype=torch.float32)
    prefix = "roi_heads."
    return {
        "backbone.body.conv1.weight": torch.zeros(1),
        f"{prefix}box_predictor.cls_score.weight": rows[:, None].expand(-1, 2).clone(),
        f"{prefix}box_predictor.cls_score.bias": rows.clone(),
        f"{prefix}box_predictor.bbox_pred.weight": rows.repeat_interleave(4)[:, None].expand(-1, 2).clone(),
        f"{prefix}box_predictor.bbox_pred.bias": rows.repeat_interleave(4),
        f"{prefix}mask_predictor.mask_fcn_logits.weight": rows[:, None, None, None]
        .expand(-1, 2, 1, 1)
        .clone(),
        f"{prefix}mask_predictor.mask_fcn_logits.bias": rows.clone(),
    }


def test_the_80_classes_of_91_labels() -> None:
    theirs = labelled(91)
    found = import_state(theirs, "x")
    assert class_count(found.state) == 80
    assert found.state["box_head.classes.bias"].tolist() == [*COCO.ids, 0]
    assert found.state["box_head.deltas.bias"].tolist() == [i for i in COCO.ids for _ in range(4)]
    assert found.state["mask_head.predictor.weight"][:, 0, 0, 0].tolist() == COCO.ids
    unused = [label for label in range(91) if label not in COCO.ids]
    assert found.spare["box_head.classes.bias"].tolist() == unused[1:]
    assert found.spare["mask_head.predictor.bias"].tolist() == unused
    assert same(export_state(found.state, "torchvision", "x", COCO.ids, found.spare), theirs)


def test_unused_labels_without_rows_of_their_own_are_never_chosen() -> None:
    state = import_state(labelled(91), "x").state
    theirs = export_state(state, "torchvision", "x", COCO.ids)
    logits = theirs["roi_heads.box_predictor.cls_score.bias"]
    unused = [label for label in range(1, 91) if label not in COCO.ids]
    assert logits.softmax(0)[unused].tolist() == [0.0] * 10
    assert logits[0] == 0  # the background's own
    assert theirs["roi_heads.mask_predictor.mask_fcn_logits.weight"][unused].count_nonzero() == 0
    assert same(import_state(theirs, "x").state, state)


def test_91_labels_can_be_90_classes() -> None:
    theirs = labelled(91)
    found = import_state(theirs, "x", num_classes=90)
    assert found.state["box_head.classes.bias"].tolist() == [*range(1, 91), 0]
    assert same(export_state(found.state, "torchvision", "x", list(range(1, 91)), found.spare), theirs)


def test_other_numbers_of_labels_are_classes_but_for_the_background() -> None:
    found = import_state(labelled(8), "x")
    assert found.state["box_head.classes.bias"].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    # Ids with gaps that are not COCO's own make no gaps in the labels.
    theirs = export_state(found.state, "torchvision", "x", [1, 3, 7, 9, 10, 11, 40], found.spare)
    assert same(theirs, labelled(8))


def test_heads_that_torchvision_does_not_have() -> None:
    state = small_model({"mask_head": {"class_agnostic": True}}).state_dict()
    with pytest.raises(UserError, match=r"has an output for each class.*mask_head.predictor.bias"):
        export_state(state, "torchvision", "x", [1, 2, 3])
    assert program_of(export_state(state, "detectron2", "x", [1, 2, 3])) == "detectron2"


@pytest.mark.parametrize(
    ("program", "text"),
    [("torchvision", "has an output for each class"), ("detectron2", "no mask of the back")],
)
def test_a_mask_of_the_background_has_no_place_elsewhere(program: str, text: str) -> None:
    state = small_model({"mask_head": {"loss": "softmax"}}).state_dict()
    with pytest.raises(UserError, match=text):
        export_state(state, program, "x", [1, 2, 3])


FOREIGN = {
    "sem_seg_head.predictor.weight": "a head for semantic segmentation",
    "head.classification_head.cls_logits.weight": "a RetinaNet head",
    "some.thing": "parts",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_parts_without_a_counterpart_are_named(key: str) -> None:
    start = "backbone.body.conv1.weight"
    if key.startswith("sem_seg"):
        start = "backbone.bottom_up.stem.conv1.weight"
    state = {start: torch.zeros(1), key: torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        import_state(state, "file.pth")
    assert f"has {FOREIGN[key]} " in str(caught.value)
    assert key in str(caught.value)
    assert import_state(state, "file.pth", strict=False).homeless == [key]


def test_files_that_are_no_detector() -> None:
    with pytest.raises(UserError, match=r"backbone only; give it as model.backbone.weights"):
        import_state({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match=r"no detector of fastmrcnn, torchvision or detectron2.*a.b, c.d"):
        import_state({"a.b": torch.zeros(1), "c.d": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match="first keys are none"):
        import_state({}, "x")


def test_tables_of_classes() -> None:
    assert (len(COCO.names), len(set(COCO.names)), COCO.ids[-1]) == (80, 80, 90)
    table = dict(zip(COCO.ids, COCO.names, strict=True))
    # Spot checks from instances_val2017.json, either side of each gap.
    assert (table[1], table[11], table[13], table[25], table[27]) == (
        "person",
        "fire hydrant",
        "stop sign",
        "giraffe",
        "backpack",
    )
    assert (table[44], table[46], table[65], table[67], table[70]) == (
        "bottle",
        "wine glass",
        "bed",
        "dining table",
        "toilet",
    )
    assert (table[72], table[82], table[84], table[90]) == ("tv", "refrigerator", "book", "toothbrush")
    assert coco_with_unused().names[11] == "unused 12"
    assert coco_with_unused().ids == list(range(1, 91))


def test_class_files(tmp_path: Any) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cell\n\n nucleus \n", encoding="utf-8")
    assert read_classes(path) == (["cell", "nucleus"], [1, 2])
    path.write_text('{"categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}', encoding="utf-8")
    assert read_classes(path) == (["a", "b"], [3, 7])
    for content, message in {
        "": "names no class",
        "a\nb\na\n": "names a more than once",
        '{"images": []}': "neither a COCO annotation file",
        '{"categories": [1]}': "neither a COCO annotation file",
    }.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_classes(path)
    with pytest.raises(UserError, match="no such file of classes"):
        read_classes(tmp_path / "none.txt")
