"""The operators of the paper's tables 2c, 2d and 6: each trains in one graph without syncs, and detects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import SMALL, random_batch
from nosync import NoSync
from torch._dynamo.testing import CompileCounter

from fastmrcnn.config.file import load_config, parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.kernels import (
    multilevel_roi_align,
    multilevel_roi_align_max,
    multilevel_roi_pool,
    multilevel_roi_warp,
)
from fastmrcnn.model.build import build_model
from fastmrcnn.model.roi_pooler import RoiPooler

VARIANTS = [
    ("pool", "max", "fpn"),
    ("warp", "avg", "fpn"),
    pytest.param("warp", "max", "fpn", marks=pytest.mark.slow),  # an operator with pool
    pytest.param("align", "max", "fpn", marks=pytest.mark.slow),
    pytest.param("pool", "max", "c4", marks=pytest.mark.slow),
    pytest.param("warp", "avg", "c4", marks=pytest.mark.slow),
]


def config_of(op: str, mode: str, architecture: str = "fpn") -> Config:
    tree: dict[str, Any] = {section: dict(entries) for section, entries in SMALL["model"].items()}
    tree["roi"] = {**tree.get("roi", {}), "op": op, "mode": mode, "sampling_ratio": 2}
    if architecture == "c4":  # fewer hidden layers come with it
        del tree["mask_head"]["convs"]
        tree["mask_head"]["slots_per_image"] = 4
    return parse_config({"model": {**tree, "architecture": architecture}}, "the test")


@pytest.mark.parametrize(("op", "mode", "architecture"), VARIANTS)
def test_one_graph_without_syncs(op: str, mode: str, architecture: str) -> None:
    torch.manual_seed(0)
    model = build_model(config_of(op, mode, architecture).model, 3).train()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for seed, counts in ((1, (3, 0)), (2, (0, 5))):
        batch = random_batch(seed, counts)
        keys = model.draw_keys(batch, torch.Generator().manual_seed(seed))
        with NoSync():
            losses = model(batch, keys)
            losses.total().backward()
        for loss, value in losses.present().items():
            assert value.isfinite(), loss
            torch.testing.assert_close(getattr(compiled(batch, keys), loss), value, rtol=1e-4, atol=1e-5)
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
    assert counter.frame_count == 1
    torch._dynamo.reset()

    model.eval()
    batch = random_batch(3, (3, 2))._replace(targets=None)
    with NoSync():
        found = model(batch)
    assert found.boxes.isfinite().all()
    assert found.masks.shape[:2] == found.valid.shape
    assert ((found.masks >= 0) & (found.masks <= 1)).all()


def test_pooler_calls_what_the_configuration_names() -> None:
    r = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 2, side, side, generator=r) for side in (16, 8, 4)]  # the last is not read
    boxes = torch.tensor([[[3.0, 5, 40, 50], [10, 10, 17, 22]]])
    valid = torch.tensor([[True, True]])
    where: dict[str, Any] = {"spatial_scales": [1 / 4, 1 / 8], "canonical_size": 60.0, "valid": valid}
    ratio: dict[str, Any] = {"sampling_ratio": 2, **where}
    maps = features[:2]
    expected = {
        ("align", "avg"): multilevel_roi_align(maps, boxes, 3, aligned=False, **ratio),
        ("align", "max"): multilevel_roi_align_max(maps, boxes, 3, aligned=False, **ratio),
        ("pool", "max"): multilevel_roi_pool(maps, boxes, 3, **where),
        ("warp", "avg"): multilevel_roi_warp(maps, boxes, 3, mode="avg", **ratio),
        ("warp", "max"): multilevel_roi_warp(maps, boxes, 3, mode="max", **ratio),
    }
    for (op, mode), want in expected.items():
        pooler = RoiPooler([4, 8], op=op, mode=mode, canonical_size=60.0, sampling_ratio=2, aligned=False)
        assert torch.equal(pooler(features, boxes, valid, 3), want)
        image = torch.zeros(2, dtype=torch.long)
        assert torch.equal(pooler(features, boxes[0], valid[0], 3, image), want[0])
    results = list(expected.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_pool_has_no_average() -> None:
    with pytest.raises(UserError, match=r"model\.roi\.op=pool .* needs model\.roi\.mode=max"):
        load_config(overrides=["model.roi.op=pool"])
    with pytest.raises(ValueError, match="mode must be max, got avg"):
        RoiPooler([16], op="pool", mode="avg")
    with pytest.raises(ValueError, match="got crop and avg"):
        RoiPooler([16], op="crop")
