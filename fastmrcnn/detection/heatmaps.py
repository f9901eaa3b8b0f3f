"""From heatmaps to keypoints, as detectron2 and torchvision read them.

Both enlarge a heatmap to the size of its box, in whole pixels, and take the highest pixel. How much work that
is depends on the boxes, so it happens after the model, whose shapes are fixed: as for masks, the model gives
the maps. Anything of a fixed shape would have to be as large as the image for each keypoint of each box, or
give other coordinates than the peers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmrcnn.structures import pinned, to_device


@torch.no_grad()
def decode_heatmaps(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """The best place of each keypoint in its box.

    Args:
        heatmaps: (n, J, M, M) logits over the area of the box.
        boxes: (n, 4) xyxy, on any device; a side under 1 counts as 1.
    Returns:
        (n, J, 4) float32, on the device of the heatmaps: x and y in the pixels of the boxes, at the centre
        of one of the pixels that the box was divided into; the logit there, which is torchvision's score;
        and its exponential over the sum of those of the M x M positions, which is detectron2's.
    """
    heatmaps, boxes = heatmaps.float(), boxes.float()
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sides.ceil()
    found = heatmaps.new_zeros(*heatmaps.shape[:2], 4)
    for index, (columns, rows) in enumerate(pixels.long().tolist()):
        large = F.interpolate(heatmaps[index, None], (rows, columns), mode="bicubic", align_corners=False)
        flat = large[0].flatten(1)
        place = flat.argmax(1)
        found[index, :, 0] = place % columns
        found[index, :, 1] = place.div(columns, rounding_mode="floor")
        found[index, :, 2] = flat.gather(1, place[:, None])[:, 0]
    places = torch.cat((sides / pixels, boxes[:, :2]), 1)
    step, corner = to_device(pinned(places, found.device), found.device).split(2, 1)
    found[..., :2] = (found[..., :2] + 0.5) * step[:, None] + corner[:, None]
    found[..., 3] = (found[..., 2] - heatmaps.flatten(2).logsumexp(2)).exp()
    return found
