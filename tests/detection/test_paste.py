"""Pasted masks against the peers' bitmaps, and their RLE against pycocotools' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn.detection import paste
from fastmrcnn.detection.paste import encode_images, paste_masks, paste_to_host


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """detectron2's and torchvision's bitmaps of 8 masks, bit-packed."""
    return arrays("region_ops.npz", "paste/")


def smooth_masks(count: int, side: int = 28, seed: int = 0) -> Tensor:
    coarse = torch.rand((count, 1, 6, 6), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0].clamp(0, 1)


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Some of them partly or wholly outside the image, some inverted."""
    r = torch.Generator().manual_seed(seed)
    corners = (torch.rand((count, 2, 2), generator=r) * 1.6 - 0.3) * torch.tensor([width, height])
    boxes = torch.cat((corners.amin(1), corners.amax(1)), dim=1)
    boxes[::7] = boxes[::7][:, [2, 3, 0, 1]]
    return boxes


def encode_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> list[dict[str, object]]:
    return encode_images([masks], [boxes], [(height, width)], threshold)[0]


def encoded_by_pycocotools(bitmaps: Tensor) -> list[dict[str, object]]:
    found = coco_mask.encode(np.asfortranarray(bitmaps.permute(1, 2, 0).numpy().astype(np.uint8)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in found]


@pytest.mark.parametrize(("method", "peer"), [("sample", "d2"), ("resize", "tv")])
def test_golden(golden: dict[str, np.ndarray], method: str, peer: str) -> None:
    height, width = int(golden["height"]), int(golden["width"])
    want = np.unpackbits(golden[peer], axis=-1)[..., :width].reshape(-1, height, width).astype(bool)
    masks, boxes = torch.from_numpy(golden["prob"]), torch.from_numpy(golden["boxes"])
    found = paste_masks(masks, boxes, height, width, method=method)  # type: ignore[arg-type]
    assert found.dtype == torch.bool
    assert want.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(found.numpy(), want)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_windows_equal_grid_sample_over_the_whole_image(threshold: float) -> None:
    height, width, masks = 61, 83, smooth_masks(24)
    boxes = random_boxes(24, height, width)
    boxes = torch.cat(
        (torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1
    )
    x = (torch.arange(width) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(height) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    values = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    found = paste_masks(masks, boxes, height, width, threshold)
    sure = (values - threshold).abs() > 1e-5  # rounding decides the others
    assert sure.float().mean() > 0.999
    assert torch.equal(found[sure], (values >= threshold)[sure])


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CPU tensors run takes the place of a GPU."""
    monkeypatch.setattr(paste, "on_accelerator", lambda masks: True)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5])
@pytest.mark.parametrize(("height", "width"), [(45, 70), (40, 64)])
def test_accelerator_path_gives_the_same(
    threshold: float, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: bitmaps, bitmaps that travel as bits, and runs."""
    masks, boxes = smooth_masks(20), random_boxes(20, height, width)
    arguments = (masks, boxes, height, width, threshold)
    windows, encoded = paste_masks(*arguments), encode_masks(*arguments)
    assert windows.any()
    np.testing.assert_array_equal(paste_to_host(*arguments), windows.numpy())
    monkeypatch.setattr(paste, "on_accelerator", lambda masks: True)
    assert torch.equal(paste_masks(*arguments), windows)
    host = paste_to_host(*arguments)
    assert host.dtype == np.bool_
    np.testing.assert_array_equal(host, windows.numpy())
    assert encode_masks(*arguments) == encoded


@pytest.mark.parametrize("room", [4, 1])
@pytest.mark.usefixtures("accelerator")
def test_images_are_encoded_together(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes, one of them without objects. Where runs find no room, the host makes them."""
    sizes, counts = [(45, 70), (60, 33), (61, 90)], [5, 0, 9]
    masks = [smooth_masks(n, seed=i) if n else torch.zeros(0, 28, 28) for i, n in enumerate(counts)]
    boxes = [random_boxes(n, *size, seed=i) for i, (n, size) in enumerate(zip(counts, sizes, strict=True))]
    monkeypatch.setattr(paste, "ROOM", room)
    on_host = []
    by_windows = paste.runs_of_windows
    monkeypatch.setattr(paste, "runs_of_windows", lambda *a: on_host.append(a) or by_windows(*a))
    found = encode_images(masks, boxes, sizes)
    assert (len(on_host) > 0) == (room == 1)
    assert [len(own) for own in found] == counts
    for own, own_masks, own_boxes, size in zip(found, masks, boxes, sizes, strict=True):
        if len(own):
            assert own == encoded_by_pycocotools(paste_masks(own_masks, own_boxes, *size))
    assert encode_images([masks[1]], [boxes[1]], [sizes[1]]) == [[]]


def test_boxes_that_are_not_finite_give_nothing() -> None:
    inf, nan = float("inf"), float("nan")
    boxes = torch.tensor([[-inf, 0, inf, 9], [nan, 0, 8, 9], [0, 0, inf, 9], [0, -3e38, 9, 3e38]])
    masks = torch.ones(4, 7, 7)
    assert not paste_masks(masks, boxes, 12, 10).any()
    assert {rle["counts"] for rle in encode_masks(masks, boxes, 12, 10)} == {
        encoded_by_pycocotools(torch.zeros(1, 12, 10))[0]["counts"]
    }


def test_a_full_mask_fills_its_box() -> None:
    boxes = torch.tensor([[2.0, 3.0, 9.0, 5.0], [-4.0, -4.0, 3.0, 100.0]])
    want = torch.zeros((2, 12, 10), dtype=torch.bool)
    want[0, 3:5, 2:9] = True
    want[1, :, :3] = True
    assert torch.equal(paste_masks(torch.ones(2, 28, 28), boxes, 12, 10), want)
    empty = torch.tensor([[4.0, 4.0, 4.0, 8.0], [8.0, 8.0, 4.0, 4.0]])
    assert not paste_masks(torch.ones(2, 28, 28), empty, 12, 10).any()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 57), (120, 40)])
def test_rle_is_that_of_the_bitmaps(height: int, width: int) -> None:
    masks, boxes = smooth_masks(30), random_boxes(30, height, width)
    want = encoded_by_pycocotools(paste_masks(masks, boxes, height, width))
    assert encode_masks(masks, boxes, height, width) == want


@settings(max_examples=60, deadline=None)
@given(
    corners=st.lists(st.floats(-30, 60, width=32), min_size=4, max_size=4),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    threshold=st.sampled_from([0.2, 0.5, 1.0]),
)
def test_any_box(corners: list[float], size: tuple[int, int], threshold: float) -> None:
    masks, boxes = smooth_masks(1, side=7), torch.tensor([corners])
    bitmaps = paste_masks(masks, boxes, *size, threshold)
    assert encode_masks(masks, boxes, *size, threshold) == encoded_by_pycocotools(bitmaps)
    resized = paste_masks(masks, boxes, *size, threshold, method="resize")
    assert resized.shape == bitmaps.shape == (1, *size)


def test_nothing_to_paste() -> None:
    none = torch.zeros(0, 28, 28), torch.zeros(0, 4)
    for method in ("sample", "resize"):
        assert paste_masks(*none, 5, 6, method=method).shape == (0, 5, 6)  # type: ignore[arg-type]
    assert encode_masks(*none, 5, 6) == []


@pytest.mark.parametrize(
    ("masks", "boxes", "threshold", "message"),
    [
        ((2, 28, 27), (2, 4), 0.5, r"masks must be \(D, M, M\), got \(2, 28, 27\)"),
        ((2, 28, 28), (3, 4), 0.5, r"boxes must be \(2, 4\), got \(3, 4\)"),
        ((2, 28, 28), (2, 4), 0.0, "threshold must be above 0 and at most 1, got 0.0"),
    ],
)
def test_mistakes(masks: tuple[int, ...], boxes: tuple[int, ...], threshold: float, message: str) -> None:
    for function in (paste_masks, encode_masks):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(masks), torch.zeros(boxes), 8, 8, threshold)
