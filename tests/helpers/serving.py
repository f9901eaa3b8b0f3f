"""Models to be exported, and images for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from batches import SMALL, small_config
from torch import Tensor, nn

from fastmrcnn.data.keypoints import COCO_PERSON
from fastmrcnn.model.build import build_model
from fastmrcnn.model.norms import FrozenBatchNorm2d
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.trained import TrainedModel


def trained(seed: int = 0, **model: Any) -> TrainedModel:
    """A small model of random weights that finds something in noise."""
    tree: dict[str, Any] = copy.deepcopy(SMALL["model"])
    tree["box_head"]["score_threshold"] = 0.0
    for section, values in model.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    config = small_config(model=tree)
    keypoints = COCO_PERSON if config.model.keypoint_head.enabled else None
    card = ModelCard(config, ["a", "b", "c"], [1, 2, 3], keypoints)
    torch.manual_seed(seed)
    built = build_model(config.model, 3, card.num_keypoints).eval()
    for layer in built.modules():
        if isinstance(layer, nn.BatchNorm2d | FrozenBatchNorm2d):
            for value in (layer.running_mean, layer.bias):
                nn.init.normal_(value, std=0.1)
            for value in (layer.running_var, layer.weight):
                nn.init.uniform_(value, 0.5, 1.5)
    return TrainedModel(built, card)


def images(count: int = 2) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 128, 96, 3), generator=random, dtype=torch.uint8)
    return pixels, torch.tensor([[128, 96], [100, 70]][:count], dtype=torch.int32)
