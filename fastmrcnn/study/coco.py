"""The paper's comparisons with its own recipes, for a machine that has COCO."""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmrcnn.config.model import ModelConfig
from fastmrcnn.config.schema import Config
from fastmrcnn.model.build import build_model
from fastmrcnn.structures import Batch, Proposals
from fastmrcnn.study.paper import COMPARISONS
from fastmrcnn.study.suite import Cell, Suite

CLASSES, KEYPOINTS = 80, 17
SHAPE = (800, 1344)  # that a landscape image of COCO is padded to
FORWARD_AND_BACKWARD = 3  # times the operations of the way forward
RATE = 311e12
"""Operations a second of an H100 in training, on which the plan's hours rest: what NVIDIA's entry to MLPerf
training 3.0 comes to at 195 images a second (docs/speed.md)."""

_KEYPOINTS = "paper_keypoint_r50_fpn"
_NO_MASK, _NO_KEYPOINTS = "model.mask_head.enabled=false", "model.keypoint_head.enabled=false"


def _coco(name: str, recipe: str, *settings: str, proposals_of: str | None = None) -> Cell:
    return Cell(name, "coco", recipe, settings, proposals_of)


def _person(name: str, recipe: str, *settings: str) -> Cell:
    return Cell(name, "coco_person", recipe, settings)


_CELLS = (
    _coco("r50_c4", "paper_r50_c4"),
    _coco("r101_c4", "paper_r101_c4"),
    _coco("r50_fpn", "paper_r50_fpn"),
    _coco("r101_fpn", "paper_r101_fpn"),
    _coco("x101_fpn", "paper_x101_fpn"),
    _coco("c4_softmax", "ablations/table2b_softmax_r50_c4"),
    _coco("c4_pool", "ablations/table2c_roipool_max_r50_c4"),
    _coco("c4_warp_max", "ablations/table2c_roiwarp_max_r50_c4"),
    _coco("c4_warp", "ablations/table2c_roiwarp_avg_r50_c4"),
    _coco("c4_align_max", "ablations/table2c_roialign_max_r50_c4"),
    _coco("c4_agnostic", "ablations/class_agnostic_r50_c4"),
    _coco("c5", "ablations/table2d_roialign_r50_c5"),
    _coco("c5_pool", "ablations/table2d_roipool_r50_c5"),
    _coco("fpn_mlp2", "ablations/table2e_mlp2_r50_fpn"),
    _coco("fpn_mlp3", "ablations/table2e_mlp3_r50_fpn"),
    _coco("rpn", "paper_r50_fpn", "model.box_head.enabled=false", _NO_MASK),
    _coco("fpn_separate", "paper_r50_fpn", "model.rpn.enabled=false", proposals_of="rpn"),
    _person("figures_box", _KEYPOINTS, _NO_KEYPOINTS),
    _person("figures_mask", _KEYPOINTS, _NO_KEYPOINTS, "model.mask_head.enabled=true"),
    _person("figures_keypoint", _KEYPOINTS),
    _person("figures_both", _KEYPOINTS, "model.mask_head.enabled=true"),
    _person("figures_keypoint_pool", "ablations/table6_roipool_keypoint_r50_fpn"),
)

_BY_NAME = {cell.name: cell for cell in _CELLS}
# Here the network that is changed is one of those that are compared.
_BY_NAME |= {"c4": _BY_NAME["r50_c4"], "fpn": _BY_NAME["r50_fpn"]}
COCO = Suite("coco", _BY_NAME, COMPARISONS, seeds=1)


def expected_seconds(config: Config) -> float:
    """Of a training run on one GPU: its images, times the operations of one, by RATE."""
    images = config.train.steps * config.train.images
    return images * FORWARD_AND_BACKWARD * operations(config.model.model_dump_json()) / RATE


@functools.cache
def operations(model: str) -> int:
    """Of one image through the network as in testing, counted without computing anything.

    Args:
        model: the configuration's section, as JSON.
    """
    section = ModelConfig.model_validate_json(model)
    joints = KEYPOINTS if section.keypoint_head.enabled else None
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = build_model(section, CLASSES, joints).eval()
        count = section.rpn.post_nms_top_n_test
        given = Proposals(torch.zeros(1, count, 4), torch.zeros(1, count), torch.ones(1, count).bool())
        pixels, sizes = torch.zeros(1, 3, *SHAPE, dtype=torch.uint8), torch.tensor([SHAPE])
        network(Batch(pixels, sizes, proposals=None if section.rpn.enabled else given))
    return counter.get_total_flops()
