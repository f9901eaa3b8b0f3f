"""Layers without state, whose `forward` may take the place of another library's.

Hugging Face's `kernels.kernelize` puts the `forward` of such a layer on a module that is there already, whose
members it reads; the annotations name them. By themselves these layers, which have no constructor, are of no
use: call the functions, or this package's `MultiScaleRoIAlign`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .roi_align import op


class RoIAlign(nn.Module):
    """`forward` of torchvision.ops.RoIAlign and of detectron2.layers.ROIAlign."""

    can_torch_compile: bool = True

    output_size: int | Sequence[int]
    spatial_scale: float
    sampling_ratio: int
    aligned: bool

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """(R, C, oh, ow): see `roi_align`."""
        return op.roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )


class MultiScaleRoIAlign(nn.Module):
    """`forward` of torchvision.ops.MultiScaleRoIAlign: all levels in one call."""

    can_torch_compile: bool = True

    featmap_names: Sequence[str]
    output_size: int | Sequence[int]
    sampling_ratio: int
    canonical_scale: float
    canonical_level: int

    forward = op.MultiScaleRoIAlign.forward  # reads these and no other member
