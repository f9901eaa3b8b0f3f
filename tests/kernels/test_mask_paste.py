"""Pasted masks against their definition, pixel by pixel, and against detectron2's bitmaps.

CPU tensors run cpu.py, or Triton's kernel if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import arrays
from hypothesis import given, settings
from nosync import NoSync
from pasted import BOXES, NOTHING, SIZE, corners, random_boxes, random_masks

from fastmrcnn.kernels import paste_masks
from fastmrcnn.kernels.common.library import interpreting
from fastmrcnn.kernels.mask_paste import cpu, naive, op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [1, 5] if interpreting() else [1, 2, 5, 28])
def test_definition(side: int, device: str) -> None:
    masks, boxes = random_masks(len(BOXES), side), torch.tensor(BOXES)
    shares = [naive.probabilities(m, b, *SIZE) for m, b in zip(masks, boxes.tolist(), strict=True)]
    exact = torch.stack(shares)
    for threshold in (0.5,) if interpreting() else (0.05, 0.5, 0.9):
        want = exact >= threshold
        double = paste_masks(masks.double().to(device), boxes.double().to(device), *SIZE, threshold)
        sure = (exact - threshold).abs() > 1e-12
        assert torch.equal(double.cpu()[sure], want[sure])
        found = paste_masks(masks.to(device), boxes.to(device), *SIZE, threshold)
        assert found.dtype == torch.bool
        sure = (exact - threshold).abs() > 1e-5
        assert torch.equal(found.cpu()[sure], want[sure])
        assert (found.cpu() != want).sum() <= want.numel() / 10_000
        assert found.any()


@pytest.mark.parametrize("device", DEVICES)
def test_detectron2s_bitmaps(device: str) -> None:
    golden = arrays("region_ops.npz", "paste/")
    masks, boxes = (torch.from_numpy(golden[name]).to(device) for name in ("prob", "boxes"))
    want = golden["d2"]
    found = paste_masks(masks, boxes, int(golden["height"]), int(golden["width"]), packed=True)
    assert want.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(found.cpu().numpy(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(70, 150), (1, 1), (3, 128), (9, 16)])
def test_float32_has_the_references_bits(height: int, width: int, device: str) -> None:
    """Of several tiles, and of sizes that end within one; packed as NumPy packs."""
    count = 3 if interpreting() else 20
    masks, boxes = random_masks(count, 7), random_boxes(count, height, width)
    found = paste_masks(masks.to(device), boxes.to(device), height, width).cpu()
    assert torch.equal(found, cpu.paste_masks(masks, boxes, None, height, width, 0.5, False))
    packed = paste_masks(masks.to(device), boxes.to(device), height, width, packed=True).cpu()
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(found.numpy(), axis=-1))


def test_objects_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, boxes = random_masks(8, 7), torch.tensor(BOXES)
    whole = cpu.paste_masks(masks, boxes, None, *SIZE, 0.5, False)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 3 * 4 * SIZE[0] * SIZE[1])
    assert torch.equal(cpu.paste_masks(masks, boxes, None, *SIZE, 0.5, False), whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_masks_are_widened(dtype: torch.dtype, device: str) -> None:
    masks, boxes = random_masks(3, 5).to(device, dtype), torch.tensor(BOXES[:3]).to(device)
    found = paste_masks(masks, boxes, *SIZE)
    assert found.any()
    assert torch.equal(found, paste_masks(masks.float(), boxes, *SIZE))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_there_gives_zeros(packed: bool, device: str) -> None:
    """And does not disturb its neighbours."""
    boxes = torch.tensor([BOXES[0], *NOTHING, BOXES[0], BOXES[0], [1e9, 1e9, 2e9, 2e9]]).to(device)
    masks = torch.ones(len(boxes), 5, 5, device=device)
    valid = torch.ones(len(boxes), dtype=torch.bool, device=device)
    valid[-2] = False
    masks[-2] = torch.nan
    found = paste_masks(masks, boxes, *SIZE, packed=packed, valid=valid).cpu()
    if not packed:
        assert torch.equal(found, naive.paste_masks(masks.cpu(), boxes.cpu(), *SIZE, valid=valid.cpu()))
    assert found[0].any()
    assert torch.equal(found[0], found[-3])
    assert not found[1:-3].any()
    assert not found[-2:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_full_mask_fills_its_box(device: str) -> None:
    boxes = torch.tensor([[2.0, 3.0, 9.0, 5.0], [-4.0, -4.0, 3.0, 100.0], [-1e6, -1e6, 1e6, 1e6]])
    want = torch.zeros((3, 12, 10), dtype=torch.bool)
    want[0, 3:5, 2:9] = True
    want[1, :, :3] = True
    want[2] = True
    found = paste_masks(torch.ones(3, 28, 28, device=device), boxes.to(device), 12, 10)
    assert torch.equal(found.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_on_the_threshold_is_a_pixel(device: str) -> None:
    """Wherever between its neighbours: what is interpolated of equal values is that value."""
    masks = torch.full((1, 5, 5), 0.3, device=device)
    found = paste_masks(masks, torch.tensor([[3.2, 4.1, 40.7, 35.3]], device=device), *SIZE, 0.3).cpu()[0]
    assert found[8:31, 7:36].all()


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_that_see_only_half_a_cell_beyond_the_box(device: str) -> None:
    """A mask of one cell, whose values fall to zero over as much as its box measures."""
    masks, boxes = torch.ones(2, 1, 1), torch.tensor([[-20.0, -10, 118, 60], [140.0, 70, 400, 300]])
    found = paste_masks(masks.to(device), boxes.to(device), 70, 150, 0.15).cpu()
    assert found[0, 64:, 128:].any()
    assert found[1, :64, :128].any()
    assert torch.equal(found, cpu.paste_masks(masks, boxes, None, 70, 150, 0.15, False))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_no_pixel(device: str) -> None:
    """Nor are those that it is interpolated with; the others are as they were."""
    masks = torch.ones(1, 4, 4)
    masks[0, 1, 1] = torch.nan
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    found = paste_masks(masks.to(device), boxes.to(device), 4, 4).cpu()[0]
    assert not found[1, 1]
    assert found[3, 3]
    assert torch.equal(found, cpu.paste_masks(masks, boxes, None, 4, 4, 0.5, False)[0])


@settings(max_examples=12 if interpreting() else 60, deadline=None, derandomize=True)
@given(corners=corners)
def test_any_box(corners: list[float]) -> None:
    masks, boxes = random_masks(2, 6), torch.tensor(corners).view(2, 4)
    found = paste_masks(masks, boxes, *SIZE)
    assert torch.equal(found, cpu.paste_masks(masks, boxes, None, *SIZE, 0.5, False))
    # float64 has the definition's bits where no probability lies on the threshold.
    double = paste_masks(masks.double(), boxes.double(), *SIZE, 0.4321)
    assert torch.equal(double, naive.paste_masks(masks, boxes.double(), *SIZE, 0.4321))
    # Half a cell of the mask beyond the box there is nothing left.
    rim = (boxes[:, 2:] - boxes[:, :2]) / 12 * 1.001 + 1
    x, y = torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0])[:, None] + 0.5
    low, high = boxes[:, :2] - rim, boxes[:, 2:] + rim
    outside = (x < low[:, 0, None, None]) | (x > high[:, 0, None, None])
    outside = outside | (y < low[:, 1, None, None]) | (y > high[:, 1, None, None])
    assert not (found & outside).any()


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    """opcheck, one graph, strides of any kind, and the same bits in every run."""
    masks = random_masks(4, 5).to(device).mT.contiguous().mT
    boxes = torch.tensor(BOXES[:4]).to(device).T.contiguous().T
    valid = torch.tensor([True, False, True, True]).to(device)
    for packed in (False, True):
        torch.library.opcheck(op._paste_masks, (masks, boxes, valid, *SIZE, 0.5, packed))
        eager = paste_masks(masks, boxes, *SIZE, packed=packed, valid=valid)
        compiled = torch.compile(paste_masks, fullgraph=True, backend="aot_eager")
        assert compiled(masks, boxes, *SIZE, packed=packed, valid=valid).equal(eager)
        plain = paste_masks(masks.contiguous(), boxes.contiguous(), *SIZE, packed=packed, valid=valid)
        assert plain.equal(eager)


@pytest.mark.skipif(interpreting(), reason="the interpreter reads everything on the host")
def test_the_host_reads_nothing() -> None:
    masks, boxes = random_masks(4, 5), torch.tensor(BOXES[:4])
    with NoSync():
        paste_masks(masks, boxes, *SIZE, packed=True)


def test_nothing_to_paste() -> None:
    none = torch.zeros(0, 28, 28), torch.zeros(0, 4)
    assert paste_masks(*none, 5, 6).shape == (0, 5, 6)
    assert paste_masks(*none, 5, 9, packed=True).shape == (0, 5, 2)


def test_bad_input() -> None:
    arguments: dict[str, Any] = {
        "masks": torch.zeros(2, 5, 5),
        "boxes": torch.zeros(2, 4),
        "height": 8,
        "width": 9,
    }
    for change, message in (
        ({"masks": torch.zeros(2, 5, 4)}, r"masks must be \(D, M, M\) with M at least 1, got \(2, 5, 4\)"),
        ({"masks": torch.zeros(2, 0, 0)}, r"masks must be \(D, M, M\) with M at least 1, got \(2, 0, 0\)"),
        ({"masks": torch.zeros(2, 5, 5).bool()}, "masks must be floating point, got torch.bool"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes must be \(2, 4\) for masks \(2, 5, 5\), got \(3, 4\)"),
        ({"boxes": torch.zeros(2, 4).long()}, "boxes must be floating point, got torch.int64"),
        ({"boxes": torch.zeros(2, 4, device="meta")}, "boxes must be on cpu as masks are, got meta"),
        ({"valid": torch.ones(2)}, "valid must be bool, got torch.float32"),
        ({"valid": torch.ones(3).bool()}, r"valid must be \(2,\) .* got \(3,\)"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"width": -1}, "width must be at least 1, got -1"),
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0.0"),
        ({"threshold": float("nan")}, "threshold must be above 0 and at most 1, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            paste_masks(**{**arguments, **change})
