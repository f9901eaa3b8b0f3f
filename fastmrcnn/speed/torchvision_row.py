"""torchvision's Mask R-CNN on the same weights, images and objects, as its users train it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmrcnn.config.schema import ModelConfig
from fastmrcnn.data.synthetic import full_masks
from fastmrcnn.device import choose_precision
from fastmrcnn.speed.step_workload import Workload
from fastmrcnn.speed.training_rows import WARM_UP, Row
from fastmrcnn.structures import Batch
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.peers.programs import export_state

COMPILED_TAKES = 5  # times as many steps: what is compiled for one shape is compiled again when others come


class NotComparableError(Exception):
    """Why there is no such row: torchvision is missing, or has no such model."""


class TorchvisionRunner:
    """Its images and targets lie on the device; its resizing is off, since they have the right size.

    Compiled, it is `torch.compile` of the whole model, with the graph breaks and the shapes that change.
    Its learning rate, sampled numbers and thresholds are the recipe's; RoIAlign is its own (2 samples per
    bin and axis, not aligned), and so are the mask targets (an average of the bitmap).
    """

    def __init__(self, row: Row, workload: Workload) -> None:
        self.workload = workload
        self.device = workload.device
        self.precision = choose_precision(row.precision, self.device)
        model = build(workload.config.model, workload.num_classes)
        ids = list(range(1, workload.num_classes + 1))
        model.load_state_dict(export_state(workload.start, "torchvision", "the benchmark's weights", ids))
        layout = torch.channels_last if row.layout == "channels_last" else torch.contiguous_format
        self.model = model.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.run: Callable[..., dict[str, Tensor]] = self.model
        self.warm_up_steps = WARM_UP
        if row.execution.compiled:
            self.run = torch.compile(self.model)
            self.warm_up_steps *= COMPILED_TAKES
        self.cudnn_trials = row.cudnn_trials
        optim = workload.config.optim
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.start = [p.detach().cpu().clone() for p in self.parameters]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
        self.inputs = [self._inputs(batch) for batch in workload.batches]
        self.first_losses: dict[str, float] = {}
        self.foreground: list[int] = []  # RoIs that the mask head was given, step by step
        model.roi_heads.mask_head.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, inputs: self.foreground.append(len(inputs[0]))
        )

    def _inputs(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        assert batch.targets is not None
        images, targets = [], []
        for index, masks in enumerate(full_masks(batch)):
            height, width = batch.sizes[index].tolist()
            real = batch.targets.valid[index]
            image = batch.pixels[index, :, :height, :width].float() / 255
            images.append(image.contiguous().to(self.device))
            target = {
                "boxes": batch.targets.boxes[index][real],
                "labels": batch.targets.classes[index][real] + 1,
                "masks": masks,
            }
            targets.append({name: value.to(self.device) for name, value in target.items()})
        return images, targets

    def warm_up(self) -> None:
        for number in range(self.warm_up_steps):
            losses = self._run(number, 0.0)
            if number == 0:
                self.first_losses = {name: float(value) for name, value in losses.items()}
        self.first_losses["num_fg"] = float(self.foreground[0])
        self.optimizer.state.clear()  # a rate of 0 keeps the weights, but momentum has gathered

    def step(self, number: int) -> list[Tensor]:
        config = self.workload.config
        rate = learning_rate(config.optim, number, config.train.steps, self.workload.images)
        return list(self._run(number, rate).values())

    def _run(self, number: int, rate: float) -> dict[str, Tensor]:
        images, targets = self.inputs[number % len(self.inputs)]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kind, dtype = self.device.type, self.precision.dtype
        with self._with_or_without_trials():
            with torch.autocast(kind, dtype=dtype, enabled=self.precision.autocast):
                losses = self.run(images, targets)
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    @contextlib.contextmanager
    def _with_or_without_trials(self) -> Iterator[None]:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.cudnn_trials
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def moved(self) -> float:
        moves = [
            (p.detach() - start.to(p.device)).norm()
            for p, start in zip(self.parameters, self.start, strict=True)
        ]
        return float(torch.stack(moves).norm())


def torchvision_detector(
    card: ModelCard, state: Mapping[str, Tensor], pixels: NDArray[np.uint8], sizes: NDArray[np.int32]
) -> Callable[[], Any]:
    """A call of torchvision's model in eval mode, with the same weights and images, on the CPU.

    Args:
        pixels: (N, H, W, 3), of which `sizes` (N, 2) tells the height and width of each image.
    Raises:
        NotComparableError: torchvision is missing, or has no such model.
    """
    model = build(card.config.model, len(card.class_names))
    ids = list(range(1, len(card.class_names) + 1))
    model.load_state_dict(export_state(state, "torchvision", "the model", ids))
    images = [
        torch.from_numpy(image[:height, :width]).permute(2, 0, 1).float().contiguous() / 255
        for image, (height, width) in zip(pixels, sizes.tolist(), strict=True)
    ]
    model.eval()
    # `_skip_resize` holds in training alone; here it would work on larger images than ours.
    transform: Any = model.transform
    transform.resize = lambda image, target=None: (image, target)

    def detect() -> Any:
        with torch.no_grad():
            return model(images)

    return detect


def not_comparable(config: ModelConfig) -> str | None:
    """What of the model torchvision's Mask R-CNN does not have; None: it has all."""
    backbone, box, mask = config.backbone, config.box_head, config.mask_head
    needs = {
        "a ResNet of torchvision": backbone.timm_name is None,
        "model.box_head.cascade=false": not box.cascade,
        "model.architecture=fpn": config.architecture == "fpn",
        "model.backbone.norm=frozen_bn": backbone.norm == "frozen_bn",
        "model.backbone.width=64": backbone.width == 64,
        "model.backbone.stride_in_1x1=false": not backbone.stride_in_1x1,
        "model.fpn.norm=none": config.fpn.norm == "none",
        "model.fpn.channels=256": config.fpn.channels == 256,
        "model.rpn.convs=1": config.rpn.convs == 1,
        "model.box_head.fcs=2": box.fcs == 2 and box.hidden == 1024 and not box.class_agnostic,
        "model.mask_head.kind=fcn": mask.enabled and mask.kind == "fcn" and not mask.class_agnostic,
        "model.mask_head.convs=4": mask.convs == 4 and mask.channels == 256,
        "model.mask_head.loss=sigmoid": mask.loss == "sigmoid",
    }
    missing = [setting for setting, fulfilled in needs.items() if not fulfilled]
    return f"torchvision's Mask R-CNN has {', '.join(missing)}" if missing else None


def build(config: ModelConfig, num_classes: int) -> nn.Module:
    """Raises NotComparableError where torchvision is missing, or has no such model."""
    reason = not_comparable(config)
    if reason is not None:
        raise NotComparableError(reason)
    if (problem := torchvision_problem()) is not None:
        raise NotComparableError(problem)
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(
        backbone_name=config.backbone.name,
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=5 - config.backbone.frozen_stages,
    )
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = config.backbone.norm_eps
    return MaskRCNN(backbone, num_classes + 1, _skip_resize=True, **peer_settings(config))


def torchvision_problem() -> str | None:
    """Why torchvision cannot be used; None: it can."""
    try:
        from torchvision.models import detection  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        return f"torchvision does not import ({str(error).splitlines()[0]})"
    return None


def peer_settings(config: ModelConfig) -> dict[str, Any]:
    """What torchvision's Mask R-CNN takes from a recipe, whatever its network: pixels, anchors, numbers of
    samples and thresholds."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    rpn, roi, box = config.rpn, config.roi, config.box_head
    ratios = tuple(config.anchors.aspect_ratios)
    return {
        "image_mean": [value / 255 for value in config.pixel_mean],
        "image_std": [value / 255 for value in config.pixel_std],
        "rpn_anchor_generator": AnchorGenerator(
            tuple(tuple(sizes) for sizes in config.anchors.sizes), (ratios,) * len(config.anchors.sizes)
        ),
        "rpn_pre_nms_top_n_train": rpn.pre_nms_top_n,
        "rpn_post_nms_top_n_train": rpn.post_nms_top_n,
        "rpn_nms_thresh": rpn.nms_iou,
        "rpn_fg_iou_thresh": rpn.foreground_iou,
        "rpn_bg_iou_thresh": rpn.background_iou,
        "rpn_batch_size_per_image": rpn.batch_per_image,
        "rpn_positive_fraction": rpn.foreground_share,
        "box_fg_iou_thresh": roi.foreground_iou,
        "box_bg_iou_thresh": roi.foreground_iou,
        "box_batch_size_per_image": roi.batch_per_image,
        "box_positive_fraction": roi.foreground_share,
        "box_nms_thresh": box.nms_iou,
        "box_detections_per_img": box.detections,
    }
