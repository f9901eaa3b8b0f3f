"""Features of boxes, cut from the maps that the RoI heads read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmrcnn.kernels import multilevel_roi_align


class RoiPooler:
    """RoIAlign from one map or from the levels of a pyramid, the level of a box by FPN eq. 1.

    Args:
        strides: of the maps, finest first. Coarser maps that come with them are not read.
        canonical_size: side of a box, in pixels, whose features come from the map of stride 16.
        sampling_ratio: samples per bin and axis; 0 or less: adaptive.
        aligned: half-pixel correct (detectron2's RoIAlignV2).
    """

    def __init__(
        self,
        strides: Sequence[int],
        *,
        canonical_size: float = 224.0,
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> None:
        self.scales = [1 / stride for stride in strides]
        self.canonical_size = canonical_size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def __call__(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        valid: Tensor,
        resolution: int,
        image: Tensor | None = None,
    ) -> Tensor:
        """
        (N, S, C, resolution, resolution) of (N, S, 4) boxes; (T, C, ...) of (T, 4) boxes with their image.
        Slots that are not valid give zeros.
        """
        return multilevel_roi_align(
            features[: len(self.scales)],
            boxes,
            resolution,
            valid=valid,
            batch_index=image,
            spatial_scales=self.scales,
            canonical_size=self.canonical_size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )
