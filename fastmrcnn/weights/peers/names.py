"""What each program calls the parameters: ours on the left, theirs on the right, first fit first.

Read off the state dicts that torchvision 0.27 and detectron2 0.6 give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastmrcnn.weights.peers.templates import Rule, backwards, renamer

TORCHVISION: list[Rule] = [
    ("backbone.{rest}", "backbone.body.{rest}"),
    ("fpn.lateral.{rest}", "backbone.fpn.inner_blocks.{rest}"),
    ("fpn.output.{rest}", "backbone.fpn.layer_blocks.{rest}"),
    ("rpn.head.convs.{i}.{leaf}", "rpn.head.conv.{i}.0.{leaf}"),
    ("rpn.head.objectness.{leaf}", "rpn.head.cls_logits.{leaf}"),
    ("rpn.head.deltas.{leaf}", "rpn.head.bbox_pred.{leaf}"),
    ("box_head.classes.{leaf}", "roi_heads.box_predictor.cls_score.{leaf}"),
    ("box_head.deltas.{leaf}", "roi_heads.box_predictor.bbox_pred.{leaf}"),
    ("mask_head.convs.{i}.{leaf}", "roi_heads.mask_head.{i}.0.{leaf}"),
    ("mask_head.norms.{i}.{leaf}", "roi_heads.mask_head.{i}.1.{leaf}"),
    ("mask_head.deconv.{leaf}", "roi_heads.mask_predictor.conv5_mask.{leaf}"),
    ("mask_head.predictor.{leaf}", "roi_heads.mask_predictor.mask_fcn_logits.{leaf}"),
    # A plain sequence of convolutions and activations, hence every second number.
    ("keypoint_head.convs.{i}.{leaf}", "roi_heads.keypoint_head.{2i}.{leaf}"),
    ("keypoint_head.deconv.{leaf}", "roi_heads.keypoint_predictor.kps_score_lowres.{leaf}"),
]

_TORCHVISION_FCS: list[Rule] = [
    ("box_head.fc1.{leaf}", "roi_heads.box_head.fc6.{leaf}"),
    ("box_head.fc2.{leaf}", "roi_heads.box_head.fc7.{leaf}"),
]

# Names before torchvision 0.13, which its published files of 2019 still have: old, new.
TORCHVISION_OLD: list[Rule] = [
    ("backbone.fpn.inner_blocks.{i}.{leaf}", "backbone.fpn.inner_blocks.{i}.0.{leaf}"),
    ("backbone.fpn.layer_blocks.{i}.{leaf}", "backbone.fpn.layer_blocks.{i}.0.{leaf}"),
    ("rpn.head.conv.{leaf}", "rpn.head.conv.0.0.{leaf}"),
    ("roi_heads.mask_head.mask_fcn{i+1}.{leaf}", "roi_heads.mask_head.{i}.0.{leaf}"),
]

_DETECTRON2_STEM: list[Rule] = [
    ("conv{i}.{leaf}", "stem.conv{i}.{leaf}"),
    ("bn{i}.{leaf}", "stem.conv{i}.norm.{leaf}"),
]
_DETECTRON2_BLOCK: list[Rule] = [
    ("{i}.conv{j}.{leaf}", "{i}.conv{j}.{leaf}"),
    ("{i}.bn{j}.{leaf}", "{i}.conv{j}.norm.{leaf}"),
    ("{i}.downsample.0.{leaf}", "{i}.shortcut.{leaf}"),
    ("{i}.downsample.1.{leaf}", "{i}.shortcut.norm.{leaf}"),
]
_DETECTRON2_HEADS: list[Rule] = [
    ("fpn.lateral.{i}.0.{leaf}", "backbone.fpn_lateral{i+2}.{leaf}"),
    ("fpn.lateral.{i}.1.{leaf}", "backbone.fpn_lateral{i+2}.norm.{leaf}"),
    ("fpn.output.{i}.0.{leaf}", "backbone.fpn_output{i+2}.{leaf}"),
    ("fpn.output.{i}.1.{leaf}", "backbone.fpn_output{i+2}.norm.{leaf}"),
    ("rpn.head.objectness.{leaf}", "proposal_generator.rpn_head.objectness_logits.{leaf}"),
    ("rpn.head.deltas.{leaf}", "proposal_generator.rpn_head.anchor_deltas.{leaf}"),
    ("box_head.convs.{i}.{leaf}", "roi_heads.box_head.conv{i+1}.{leaf}"),
    ("box_head.norms.{i}.{leaf}", "roi_heads.box_head.conv{i+1}.norm.{leaf}"),
    ("box_head.fc{i}.{leaf}", "roi_heads.box_head.fc{i}.{leaf}"),
    ("box_head.classes.{leaf}", "roi_heads.box_predictor.cls_score.{leaf}"),
    ("box_head.deltas.{leaf}", "roi_heads.box_predictor.bbox_pred.{leaf}"),
    # Of a cascade, head k.
    ("box_head.stages.{k}.convs.{i}.{leaf}", "roi_heads.box_head.{k}.conv{i+1}.{leaf}"),
    ("box_head.stages.{k}.norms.{i}.{leaf}", "roi_heads.box_head.{k}.conv{i+1}.norm.{leaf}"),
    ("box_head.stages.{k}.fc{i}.{leaf}", "roi_heads.box_head.{k}.fc{i}.{leaf}"),
    ("box_head.stages.{k}.classes.{leaf}", "roi_heads.box_predictor.{k}.cls_score.{leaf}"),
    ("box_head.stages.{k}.deltas.{leaf}", "roi_heads.box_predictor.{k}.bbox_pred.{leaf}"),
    ("mask_head.convs.{i}.{leaf}", "roi_heads.mask_head.mask_fcn{i+1}.{leaf}"),
    ("mask_head.norms.{i}.{leaf}", "roi_heads.mask_head.mask_fcn{i+1}.norm.{leaf}"),
    ("mask_head.deconv.{leaf}", "roi_heads.mask_head.deconv.{leaf}"),
    ("mask_head.predictor.{leaf}", "roi_heads.mask_head.predictor.{leaf}"),
    ("keypoint_head.convs.{i}.{leaf}", "roi_heads.keypoint_head.conv_fcn{i+1}.{leaf}"),
    ("keypoint_head.deconv.{leaf}", "roi_heads.keypoint_head.score_lowres.{leaf}"),
]
_DETECTRON2_ONE_CONV: list[Rule] = [
    ("rpn.head.convs.0.{leaf}", "proposal_generator.rpn_head.conv.{leaf}"),
]
_DETECTRON2_CONVS: list[Rule] = [
    ("rpn.head.convs.{i}.{leaf}", "proposal_generator.rpn_head.conv.conv{i}.{leaf}"),
]

# Caffe2's endings of a normalisation, in the files that detectron2 and Detectron publish.
_CAFFE2_NORM = {
    "s": "weight",
    "gamma": "weight",
    "b": "bias",
    "beta": "bias",
    "rm": "running_mean",
    "running_mean": "running_mean",
    "riv": "running_var",  # read as a variance by detectron2 too
    "running_var": "running_var",
}
_CAFFE2_BRANCHES = {"2a": "1", "2b": "2", "2c": "3"}
_CAFFE2 = re.compile(
    r"(?P<stem>conv1|res_conv1)|res(?P<stage>[2-5])_(?P<block>\d+)_branch(?P<branch>1|2a|2b|2c)"
)


def torchvision_names(keys: Iterable[str], *, to_ours: bool) -> dict[str, str | None]:
    """New name of each key; None for one that has no place on the other side."""
    keys = list(keys)
    conv = re.compile(r"roi_heads\.box_head\.\d+\.0\.weight" if to_ours else r"box_head\.convs\.\d+\.weight")
    rules = torchvision_rules(sum(conv.fullmatch(key) is not None for key in keys))
    if not to_ours:
        rename = renamer(rules)
        return {key: rename(key) for key in keys}
    update, rename = renamer(TORCHVISION_OLD), renamer(backwards(rules))
    return {key: rename(update(key) or key) for key in keys}


def torchvision_rules(box_convs: int) -> list[Rule]:
    """Our names and torchvision's.

    Args:
        box_convs: convolutions of the box head. With any, it is a plain sequence: the convolutions, a
            Flatten, and the hidden layers, each with a ReLU after it.
    """
    if not box_convs:
        return TORCHVISION + _TORCHVISION_FCS
    return [
        *TORCHVISION,
        ("box_head.convs.{i}.{leaf}", "roi_heads.box_head.{i}.0.{leaf}"),
        ("box_head.norms.{i}.{leaf}", "roi_heads.box_head.{i}.1.{leaf}"),
        ("box_head.fc1.{leaf}", f"roi_heads.box_head.{box_convs + 1}.{{leaf}}"),
        ("box_head.fc2.{leaf}", f"roi_heads.box_head.{box_convs + 3}.{{leaf}}"),
    ]


def detectron2_names(keys: Iterable[str], *, to_ours: bool) -> dict[str, str | None]:
    """New name of each key; None for one that has no place on the other side."""
    keys = list(keys)
    if to_ours:
        pyramid = any(key.startswith("backbone.bottom_up.") for key in keys)
        several = any(key.startswith("proposal_generator.rpn_head.conv.conv") for key in keys)
        rename = renamer(backwards(detectron2_rules(pyramid, several)))
    else:
        pyramid = any(key.startswith("fpn.") for key in keys)
        several = any(key.startswith("rpn.head.convs.1.") for key in keys)
        rename = renamer(detectron2_rules(pyramid, several))
    return {key: rename(key) for key in keys}


def detectron2_rules(pyramid: bool, several_convs: bool) -> list[Rule]:
    """
    Args:
        pyramid: the backbone is one with FPN, and its bottom-up part has a name of its own.
        several_convs: the RPN has more than one.
    """
    bottom_up = "backbone.bottom_up." if pyramid else "backbone."
    rules = [("backbone." + ours, bottom_up + theirs) for ours, theirs in _DETECTRON2_STEM]
    for ours, theirs in _DETECTRON2_BLOCK:
        rules.append((f"backbone.layer{{s+1}}.{ours}", f"{bottom_up}res{{s+2}}.{theirs}"))
        rules.append((f"res5.{ours}", f"roi_heads.res5.{theirs}"))
    return rules + (_DETECTRON2_CONVS if several_convs else _DETECTRON2_ONE_CONV) + _DETECTRON2_HEADS


def backbone_names(keys: Iterable[str]) -> dict[str, str | None]:
    """Names of a backbone file (stem.conv1.weight or res2_0_branch2a_w) in a backbone of ours.

    None for the classifier and for what Caffe2 keeps beside the weights.
    """
    rules = [(f"layer{{s+1}}.{ours}", f"res{{s+2}}.{theirs}") for ours, theirs in _DETECTRON2_BLOCK]
    rename = renamer(backwards(_DETECTRON2_STEM + rules))
    return {key: rename(key) or _from_caffe2(key) for key in keys}


def _from_caffe2(key: str) -> str | None:
    place = _CAFFE2.match(key)
    if place is None:
        return None
    ending = key[place.end() :]
    if place["stem"]:
        owner, number = "", "1"
    else:
        owner = f"layer{int(place['stage']) - 1}.{place['block']}."
        number = _CAFFE2_BRANCHES.get(place["branch"], "")
    # The bias before a normalisation (conv1_b in MSRA's files) has no place; detectron2 leaves it out too.
    if ending == "_w":
        return f"{owner}conv{number}.weight" if number else f"{owner}downsample.0.weight"
    norm = re.fullmatch(r"_[bg]n_(\w+)", ending)
    leaf = _CAFFE2_NORM.get(norm[1]) if norm else None
    if leaf is None:
        return None
    return f"{owner}bn{number}.{leaf}" if number else f"{owner}downsample.1.{leaf}"
