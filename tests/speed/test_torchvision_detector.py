"""torchvision's model, beside which exported files are timed, works on the same images and finds the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_models import fill_from
from places import CONFIGS

from fastmrcnn.config.file import load_config
from fastmrcnn.model.build import build_model
from fastmrcnn.speed.torchvision_row import torchvision_detector
from fastmrcnn.structures import Batch
from fastmrcnn.weights.card import ModelCard


@pytest.mark.torchvision
def test_it_finds_what_ours_finds() -> None:
    config = load_config(CONFIGS / "zoo" / "torchvision_mask_rcnn_r50_fpn.yaml")
    model = build_model(config.model, 7)
    fill_from(model, "torchvision")
    model.eval()
    card = ModelCard(config, [str(number) for number in range(7)], list(range(1, 8)))
    # As large as its padding: of a smaller one either program computes other values at the border.
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 192, 256), generator=random, dtype=torch.uint8)
    sizes = torch.tensor([[192, 256]])
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    (theirs,) = torchvision_detector(card, model.state_dict(), images, sizes.numpy().astype(np.int32))()
    with torch.no_grad():
        ours = model(Batch(pixels, sizes))
    count = int(ours.valid.sum())
    assert len(theirs["boxes"]) == count >= 20
    torch.testing.assert_close(theirs["scores"], ours.scores[0, :count], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(theirs["boxes"][:5], ours.boxes[0, :5], rtol=0, atol=0.05)
