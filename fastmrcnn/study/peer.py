"""torchvision's Mask R-CNN around a network of ours, and its training data, as a user of it has them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.images import read_image
from fastmrcnn.data.masks import whole_bitmaps
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.speed.torchvision_row import peer_settings, torchvision_problem
from fastmrcnn.weights.card import ModelCard

Example = tuple[Tensor, dict[str, Tensor]]


class Maps(nn.Module):
    """Backbone and pyramid of a model of ours, as torchvision takes them: p2 to p6 by name."""

    def __init__(self, backbone: nn.Module, fpn: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.fpn, self.out_channels = backbone, fpn, channels

    def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.fpn(self.backbone(pixels))
        names = [*(str(number) for number in range(len(maps) - 1)), "pool"]
        return OrderedDict(zip(names, maps, strict=True))


def build_peer(config: Config, card: ModelCard) -> nn.Module:
    """torchvision's model: backbone, pyramid, widths, anchors, sampling and thresholds are those of `config`,
    all weights random; resizing, heads, losses, RoIAlign and what it does with them are its own.

    Raises:
        UserError: torchvision is missing; the configuration has parts that it does not have.
    """
    if (problem := torchvision_problem()) is not None:
        raise UserError(f"{problem}; the race needs it: pip install torchvision==0.27.1")
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign

    model, data = config.model, config.data
    ours = build_model(model, len(card.class_names), None)
    rpn, roi, box, mask = model.rpn, model.roi, model.box_head, model.mask_head
    if ours.fpn is None or not mask.enabled or mask.kind != "fcn" or box.fcs != 2 or box.cascade:
        raise UserError(
            "torchvision's Mask R-CNN has a pyramid, two hidden layers and a mask head of convolutions"
        )
    channels, classes = model.fpn.channels, len(card.class_names) + 1
    per_cell = len(model.anchors.sizes[0]) * len(model.anchors.aspect_ratios)
    levels = ["0", "1", "2", "3"]
    return MaskRCNN(
        Maps(ours.backbone, ours.fpn, channels),
        min_size=data.short_side_test,
        max_size=data.long_side_max,
        rpn_head=RPNHead(channels, per_cell, conv_depth=rpn.convs),
        rpn_pre_nms_top_n_test=rpn.pre_nms_top_n_test,
        rpn_post_nms_top_n_test=rpn.post_nms_top_n_test,
        box_roi_pool=MultiScaleRoIAlign(levels, box.resolution, roi.sampling_ratio),
        box_head=TwoMLPHead(channels * box.resolution**2, box.hidden),
        box_predictor=FastRCNNPredictor(box.hidden, classes),
        box_score_thresh=box.score_threshold,
        mask_roi_pool=MultiScaleRoIAlign(levels, mask.resolution // 2, roi.sampling_ratio),
        mask_head=MaskRCNNHeads(channels, (mask.channels,) * mask.convs, 1),
        mask_predictor=MaskRCNNPredictor(mask.channels, mask.channels, classes),
        **peer_settings(model),
    )


class Examples:
    """A training set as torchvision's models take it, decoded once and kept: images in 0..1, boxes, labels
    from 1, masks of whole images. A flip, its references' only change, is drawn anew at each reading.

    Args:
        dataset: small enough to be kept in memory.
    """

    def __init__(self, dataset: CocoDataset, seed: int) -> None:
        self.dataset = dataset
        self.random = np.random.default_rng(seed)
        self.kept: dict[int, Example] = {}

    def batches(self, size: int) -> Any:
        """Lists of images and of targets, in a new order each epoch, without end; a last batch that is not
        full is left out, as with drop_last."""
        while True:
            order = self.random.permutation(len(self.dataset.records))
            for start in range(0, max(1, len(order) - size + 1), size):
                chosen = [self._flipped(int(index)) for index in order[start : start + size]]
                yield [image for image, _ in chosen], [target for _, target in chosen]

    def _flipped(self, index: int) -> Example:
        image, target = self.example(index)
        if self.random.random() >= 0.5:
            return image, target
        width = image.shape[-1]
        boxes = target["boxes"].clone()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return image.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}

    def example(self, index: int) -> Example:
        """Crowd regions are left out, as its references leave them out."""
        if index not in self.kept:
            record = self.dataset.records[index]
            objects = [item for item in record.objects if not item.crowd]
            shapes = [item.segmentation for item in objects]
            masks = whole_bitmaps(shapes, record.height, record.width).view(np.uint8)
            target = {
                "boxes": torch.tensor([item.box for item in objects], dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor([item.class_index + 1 for item in objects], dtype=torch.int64),
                "masks": torch.from_numpy(masks),
            }
            self.kept[index] = image_of(self.dataset, index), target
        return self.kept[index]


def image_of(dataset: CocoDataset, index: int) -> Tensor:
    """(3, H, W) float32 in 0..1."""
    pixels = read_image(dataset.records[index])[0]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


@torch.no_grad()
def peer_results(model: nn.Module, dataset: CocoDataset, threshold: float) -> list[dict[str, Any]]:
    """What it finds in all images of a set, as COCO results."""
    from pycocotools import mask as coco_mask

    results: list[dict[str, Any]] = []
    model.eval()
    for index, record in enumerate(dataset.records):
        (found,) = model([image_of(dataset, index)])
        masks = np.asfortranarray(
            (found["masks"][:, 0] > threshold).permute(1, 2, 0).numpy().astype(np.uint8)
        )
        for rle, box, score, label in zip(
            coco_mask.encode(masks),
            found["boxes"].tolist(),
            found["scores"].tolist(),
            found["labels"].tolist(),
            strict=True,
        ):
            x1, y1, x2, y2 = box
            results.append(
                {
                    "image_id": record.image_id,
                    "category_id": dataset.category_ids[label - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
            )
    model.train()
    return results
