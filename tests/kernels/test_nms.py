"""NMS against the textbook loop, torchvision's results and itself compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmrcnn.kernels.nms.op import batched_nms, nms, padded_nms

DATA = Path(__file__).parents[1] / "data" / "region_ops.npz"
if not DATA.exists():
    DATA = Path(__file__).parents[3] / "shared" / "golden" / "region_ops.npz"


def textbook(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """Greedy NMS in float32 numpy, one box at a time."""
    order = np.argsort(-scores.double().numpy(), kind="stable")
    x1, y1, x2, y2 = boxes.float().numpy().T
    area = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    dropped = np.zeros(len(order), dtype=bool)
    for i in order:
        if dropped[i]:
            continue
        kept.append(int(i))
        width = np.maximum(np.minimum(x2[i], x2) - np.maximum(x1[i], x1), np.float32(0))
        height = np.maximum(np.minimum(y2[i], y2) - np.maximum(y1[i], y1), np.float32(0))
        inter = width * height
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = inter / (area[i] + area - inter)
        dropped |= (iou.astype(np.float64) > threshold) & (groups.numpy() == int(groups[i]))
    return kept


def clustered(
    slots: int, groups: int, seed: int, clusters: int = 7, noise: float = 5.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, scores with many ties, and groups."""
    r = torch.Generator().manual_seed(seed)
    centres = torch.rand(clusters, 4, generator=r) * 100
    centres[:, 2:] += centres[:, :2]
    boxes = centres[torch.randint(0, clusters, (slots,), generator=r)]
    boxes = boxes + torch.randn(slots, 4, generator=r) * noise
    scores = torch.randint(0, 50, (slots,), generator=r).float()
    return boxes, scores, torch.randint(0, groups, (slots,), generator=r)


@pytest.mark.parametrize("slots", [0, 1, 64, 300, 1000])
def test_golden(slots: int) -> None:
    with np.load(DATA) as data:
        case = {k: torch.from_numpy(data[f"nms/{slots}/{k}"]) for k in ("boxes", "scores", "idxs")}
        keep, keep_batched = data[f"nms/{slots}/keep"], data[f"nms/{slots}/keep_batched"]
        threshold = float(data[f"nms/{slots}/thr"])
    assert nms(case["boxes"], case["scores"], threshold).tolist() == keep.tolist()
    assert (
        batched_nms(case["boxes"], case["scores"], case["idxs"], threshold).tolist() == keep_batched.tolist()
    )


@pytest.mark.parametrize(("slots", "groups"), [(1, 1), (5, 3), (300, 1), (700, 40), (1500, 3)])
@pytest.mark.parametrize("noise", [1.0, 5.0, 20.0])
def test_textbook(slots: int, groups: int, noise: float) -> None:
    boxes, scores, idxs = clustered(slots, groups, seed=slots, noise=noise)
    expected = textbook(boxes, scores, idxs, 0.5)
    assert batched_nms(boxes, scores, idxs, 0.5).tolist() == expected
    for max_out in (1, 10, 2000):
        index, valid = padded_nms(boxes[None], scores[None], idxs[None], None, 0.5, max_out)
        count = min(max_out, len(expected))
        assert index[0].tolist() == expected[:count] + [0] * (max_out - count)
        assert valid[0].tolist() == [True] * count + [False] * (max_out - count)
