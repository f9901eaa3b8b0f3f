"""Features of boxes, cut from the maps that the RoI heads read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastmrcnn.kernels import (
    RoiSet,
    multilevel_roi_align,
    multilevel_roi_align_max,
    multilevel_roi_align_sets,
    multilevel_roi_pool,
    multilevel_roi_warp,
)


class WantedRois(NamedTuple):
    """Boxes whose features a head reads."""

    boxes: Tensor  # (N, S, 4), or (T, 4) with their image
    valid: Tensor  # (N, S) or (T,) bool
    resolution: int  # side of their features
    image: Tensor | None = None  # (T,)


@dataclass(eq=False)
class RoiPooler:
    """RoIAlign, RoIPool or RoIWarp of one map or of a pyramid, the level of a box by FPN eq. 1."""

    strides: Sequence[int]  # of the maps, finest first; coarser maps that come with them are not read
    _: KW_ONLY
    op: str  # align | pool | warp (arXiv 1703.06870, table 2c); pool rounds boxes and bins, warp only boxes
    mode: str  # avg | max, of the samples of a bin; pool has max only
    canonical_size: float  # side of a box, in pixels, whose features come from the map of stride 16
    sampling_ratio: int  # samples per bin and axis; 0 or less: adaptive. pool has none
    aligned: bool  # half-pixel correct (detectron2's RoIAlignV2), for align only

    def __post_init__(self) -> None:
        op, mode = self.op, self.mode
        if op not in ("align", "pool", "warp") or mode not in ("avg", "max"):
            raise ValueError(f"op must be align, pool or warp and mode avg or max, got {op} and {mode}")
        if op == "pool" and mode != "max":
            raise ValueError(f"pool takes the largest value of a bin: mode must be max, got {mode}")
        self.scales = [1 / stride for stride in self.strides]

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
        features = features[: len(self.scales)]
        where: dict[str, Any] = {"valid": valid, "batch_index": image, **self.levels}
        if self.op == "pool":
            return multilevel_roi_pool(features, boxes, resolution, **where)
        where["sampling_ratio"] = self.sampling_ratio
        if self.op == "warp":
            return multilevel_roi_warp(features, boxes, resolution, mode=self.mode, **where)
        align = multilevel_roi_align if self.mode == "avg" else multilevel_roi_align_max
        return align(features, boxes, resolution, aligned=self.aligned, **where)

    def together(self, features: Sequence[Tensor], wanted: Sequence[WantedRois]) -> list[Tensor]:
        """What a call for each gives. RoIAlign makes the gradients of the maps of all of them as one."""
        if len(wanted) == 1 or self.op != "align" or self.mode != "avg":
            return [self(features, *one) for one in wanted]
        sets = [
            RoiSet(one.boxes, one.resolution, one.valid, one.image, self.sampling_ratio) for one in wanted
        ]
        features = features[: len(self.scales)]
        return multilevel_roi_align_sets(features, sets, aligned=self.aligned, **self.levels)

    @property
    def levels(self) -> dict[str, Any]:
        return {"spatial_scales": self.scales, "canonical_size": self.canonical_size}
