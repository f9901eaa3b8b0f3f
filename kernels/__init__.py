"""Triton kernels for detectors, each beside plain PyTorch that says what it computes.

CUDA tensors run Triton, CPU tensors run PyTorch, and with TRITON_INTERPRET=1 CPU tensors run
Triton too. Needs torch and, where Triton runs, triton; importing needs torch alone.
"""

from . import layers
from .box_decode.op import decode_boxes
from .common.library import by_reference
from .level_assign.op import assign_levels
from .mask_loss.op import mask_loss
from .mask_paste.op import paste_masks
from .mask_predictor.op import class_mask_logits, class_mask_loss, class_mask_loss_from_bitmaps
from .mask_rle.op import mask_rle
from .mask_targets.op import mask_targets
from .matcher.op import BoxMatches, match_boxes
from .nms.op import batched_nms, nms, padded_nms
from .patch import patch, unpatch
from .polygon_targets.op import polygon_mask_targets
from .resize_pad.op import resize_pad
from .roi_align.op import MultiScaleRoIAlign, multilevel_roi_align, roi_align
from .roi_align.sets import RoiSet, multilevel_roi_align_sets
from .roi_max.op import multilevel_roi_align_max, multilevel_roi_pool, multilevel_roi_warp, roi_pool

__all__ = [
    "BoxMatches",
    "MultiScaleRoIAlign",
    "RoiSet",
    "assign_levels",
    "batched_nms",
    "by_reference",
    "class_mask_logits",
    "class_mask_loss",
    "class_mask_loss_from_bitmaps",
    "decode_boxes",
    "layers",
    "mask_loss",
    "mask_rle",
    "mask_targets",
    "match_boxes",
    "multilevel_roi_align",
    "multilevel_roi_align_max",
    "multilevel_roi_align_sets",
    "multilevel_roi_pool",
    "multilevel_roi_warp",
    "nms",
    "padded_nms",
    "paste_masks",
    "patch",
    "polygon_mask_targets",
    "resize_pad",
    "roi_align",
    "roi_pool",
    "unpatch",
]
