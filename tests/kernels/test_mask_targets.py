"""Mask targets against their definition, and against torchvision's on the same bitmaps.

CPU tensors run cpu.py, or Triton's kernel if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from golden import arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import INTEGERS
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn.kernels import mask_targets
from fastmrcnn.kernels.common.library import interpreting
from fastmrcnn.kernels.mask_targets import cpu, naive, op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Matrix = list[list[float]]
HEIGHT, WIDTH = 37, 53  # of the annotated image


class Case(NamedTuple):
    """An annotated image, and how its input came from it."""

    affine: Matrix  # input -> annotation
    size: tuple[int, int]  # height, width of the input


IDENTITY = Case([[1, 0, 0], [0, 1, 0]], (HEIGHT, WIDTH))
CASES = {
    "identity": IDENTITY,
    "enlarged": Case([[0.5, 0, 0], [0, 0.5, 0]], (2 * HEIGHT, 2 * WIDTH)),
    "shrunk": Case([[WIDTH / 31, 0, 0], [0, HEIGHT / 23, 0]], (23, 31)),
    "flipped": Case([[-1, 0, WIDTH], [0, 1, 0]], (HEIGHT, WIDTH)),
    "upside-down": Case([[1, 0, 0], [0, -1, HEIGHT]], (HEIGHT, WIDTH)),
    "turned": Case([[0, 1, 0], [-1, 0, HEIGHT]], (WIDTH, HEIGHT)),
    "turned-enlarged": Case([[0, -0.5, WIDTH], [0.5, 0, 0]], (2 * WIDTH, 2 * HEIGHT)),
    "cropped": Case([[1, 0, 11], [0, 1, 5]], (20, 30)),
}


class Tables(NamedTuple):
    """Objects of two images: three, of which the last has no window, and one."""

    bitmaps: np.ndarray  # (2, 3, HEIGHT, WIDTH)
    arguments: dict[str, Any]


def tables(case: Case, seed: int = 0) -> Tables:
    r = np.random.default_rng(seed)
    windows = np.array([[[3, 4, 20, 17], [30, 11, 23, 26], [0, 0, 0, 0]], [[0, 0, 53, 37], [0] * 4, [0] * 4]])
    bitmaps = np.zeros((2, 3, HEIGHT, WIDTH), np.uint8)
    offset = np.zeros((2, 3), np.int64)
    chunks = [np.ones(5, np.uint8)]  # what stands before the first crop belongs to none
    for image, slot in ((0, 0), (0, 1), (1, 0)):
        x, y, w, h = windows[image, slot]
        crop = (r.random((h, w)) < 0.5).astype(np.uint8)
        bitmaps[image, slot, y : y + h, x : x + w] = crop
        offset[image, slot] = sum(map(len, chunks))
        chunks.append(crop.ravel())
    chunks.append(np.ones(7, np.uint8))
    height, width = case.size
    return Tables(
        bitmaps,
        {
            "buffer": torch.from_numpy(np.concatenate(chunks)),
            "offset": torch.from_numpy(offset),
            "window": torch.from_numpy(windows.astype(np.int32)),
            "to_annotation": torch.tensor([case.affine, case.affine], dtype=torch.float32),
            "size": torch.tensor([[HEIGHT, WIDTH]] * 2, dtype=torch.int32),
            "image_sizes": torch.tensor([case.size, case.size]),
            "image_shape": (height + 9, width + 6),
        },
    )


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def boxes_of(case: Case) -> Tensor:
    """In the middle, the whole image, at its borders, thin, and of no area."""
    height, width = case.size
    shares = [
        [0.21, 0.13, 0.72, 0.81],
        [0, 0, 1, 1],
        [0, 0, 0.3, 0.2],
        [0.66, 0.71, 1, 1],
        [0.4, 0.1, 0.42, 0.9],
        [0.5, 0.5, 0.5, 0.5],
    ]
    return torch.tensor(shares) * torch.tensor([width, height, width, height])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("name", ["turned-enlarged"] if interpreting() else list(CASES))
def test_definition(name: str, ratio: int, aligned: bool, device: str) -> None:
    case = CASES[name]
    tables_ = tables(case).arguments
    arguments = {key: moved(value, device) for key, value in tables_.items()}
    options = {"resolution": 5, "sampling_ratio": ratio, "aligned": aligned}
    # Interpreted, the many samples of a large box take a minute.
    some = [2, 5] if interpreting() and ratio == 0 else range(6)
    for image, matched in ((0, 1), (0, 2)) if interpreting() else ((0, 0), (0, 1), (0, 2), (1, 0)):
        boxes = boxes_of(case)[some]
        rois = (boxes, torch.full((len(boxes),), image), torch.full((len(boxes),), matched))
        exact = naive.mask_targets(*rois, **tables_, **options)
        boxes, *rows = (t.to(device) for t in rois)
        found = mask_targets(boxes, *rows, **arguments, **options)
        assert found.dtype == torch.float32
        double = mask_targets(boxes.double(), *rows, **arguments, **options)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.cpu(), exact, rtol=0, atol=1e-12)
        if ratio > 0:  # adaptive, rounding of a side decides how many samples there are
            torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=2e-4)
        if matched == 2:
            assert not found.any()  # an object without a window


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [2, 0])
def test_each_object_may_have_its_own_map(ratio: int, device: str) -> None:
    """As where an input is put together from parts of several annotated images, one of them rotated."""
    case = CASES["enlarged"]
    arguments = tables(case).arguments
    cos, sin = 0.6 * np.cos(0.3), 0.6 * np.sin(0.3)
    maps = torch.tensor([[0.5, 0, 0], [0, 0.5, 0]]).repeat(2, 3, 1, 1)
    maps[0, 0] = torch.tensor([[cos, sin, -9.0], [-sin, cos, 6.0]])
    maps[1, 0] = torch.tensor([[0, -0.5, WIDTH], [0.5, 0, 0]])
    own = arguments | {"to_annotation": maps, "size": arguments["size"][:, None].repeat(1, 3, 1)}
    own["size"][0, 0] = torch.tensor([25, 24])  # beyond the border of its annotation there is nothing
    options = {"resolution": 4, "sampling_ratio": ratio}
    boxes = boxes_of(case)[:3].repeat(3, 1) if not interpreting() else boxes_of(case)[[2, 2, 2]]
    slots = torch.tensor([[0, 0], [0, 1], [1, 0]]).repeat_interleave(len(boxes) // 3, 0)
    rois = (boxes, *slots.unbind(1))
    exact = naive.mask_targets(boxes, *rois[1:], **own, **options)
    assert exact.sum() > 1
    on_device = {key: moved(value, device) for key, value in own.items()}
    found = mask_targets(*(t.to(device) for t in (boxes.double(), *rois[1:])), **on_device, **options)
    torch.testing.assert_close(found.cpu(), exact, rtol=0, atol=1e-6)
    for each, (image, matched) in enumerate(slots.tolist()):  # the numbers of an image with this map alone
        alone = arguments | {"to_annotation": maps[:, matched], "size": own["size"][:, matched]}
        one = (boxes[each : each + 1].double(), torch.tensor([image]), torch.tensor([matched]))
        on_device = {key: moved(value, device) for key, value in alone.items()}
        expected = mask_targets(*(t.to(device) for t in one), **on_device, **options)
        assert torch.equal(found[each : each + 1], expected)


def test_maps_of_objects_go_with_sizes_of_objects() -> None:
    arguments = tables(IDENTITY).arguments
    arguments["to_annotation"] = arguments["to_annotation"][:, None].repeat(1, 3, 1, 1)
    rois = (boxes_of(IDENTITY)[:1], torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"size must be \(2, 3, 2\)"):
        mask_targets(*rois, **arguments, resolution=4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices_and_windows_of_every_integer_type(dtype: torch.dtype, device: str) -> None:
    """Also where there are more images and slots than it counts."""
    arguments = {key: moved(value, device) for key, value in tables(IDENTITY).arguments.items()}
    arguments["offset"] = arguments["offset"].clamp(max=100)
    for key in ("offset", "window", "to_annotation", "size", "image_sizes"):
        arguments[key] = torch.cat([arguments[key]] * 128)
    for key in ("offset", "window"):
        arguments[key] = torch.cat([arguments[key]] * 86, dim=1)
    boxes = boxes_of(IDENTITY)[:2].to(device)
    image, matched = torch.tensor([[0, 101], [1, 84]], device=device)
    expected = mask_targets(boxes, image, matched, **arguments, resolution=3)
    assert expected.flatten(1).any(1).all()
    for key in ("offset", "window"):
        arguments[key] = arguments[key].to(dtype)
    found = mask_targets(boxes, image.to(dtype), matched.to(dtype), **arguments, resolution=3)
    assert found.equal(expected)


@pytest.mark.parametrize("ratio", [1, 2, 3, 0])
def test_rois_of_both_images_in_any_order(ratio: int) -> None:
    case = CASES["shrunk"]
    boxes = boxes_of(case)[[3, 0, 4, 2, 0]]
    image, matched = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([0, 1, 0, 0, 2])
    arguments = tables(case).arguments
    together = mask_targets(boxes, image, matched, **arguments, resolution=4, sampling_ratio=ratio)
    for row in range(5):
        one = slice(row, row + 1)
        alone = mask_targets(
            boxes[one], image[one], matched[one], **arguments, resolution=4, sampling_ratio=ratio
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize(
    ("name", "flip"),
    [
        ("flipped", lambda mask: mask.flip(-1)),
        ("upside-down", lambda mask: mask.flip(-2)),
        ("turned", lambda mask: mask.mT.flip(-1)),
    ],
    ids=["flipped", "upside-down", "turned"],
)
def test_a_flipped_input_has_the_flipped_target(name: str, flip: Any, ratio: int) -> None:
    """Boxes at multiples of a mask pixel's quarter, so that not even rounding differs."""
    boxes = torch.tensor([[4.0, 8.0, 18.0, 36.0], [0.0, 0.0, 28.0, 28.0], [32.0, 8.0, 53.0, 29.0]])
    x0, y0, x1, y1 = boxes.unbind(1)
    there = {
        "flipped": torch.stack([WIDTH - x1, y0, WIDTH - x0, y1], 1),
        "upside-down": torch.stack([x0, HEIGHT - y1, x1, HEIGHT - y0], 1),
        "turned": torch.stack([HEIGHT - y1, x0, HEIGHT - y0, x1], 1),
    }[name]
    image, matched = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
    options = {"resolution": 14, "sampling_ratio": ratio}
    straight = mask_targets(boxes, image, matched, **tables(IDENTITY).arguments, **options)
    turned = mask_targets(there, image, matched, **tables(CASES[name]).arguments, **options)
    assert straight.std() > 0.1
    torch.testing.assert_close(turned, flip(straight), rtol=0, atol=0)


def test_a_crop_stands_for_the_whole_bitmap() -> None:
    """What lies outside the window is zero, whichever window was chosen."""
    case = CASES["shrunk"]
    bitmaps, arguments = tables(case)
    whole = {
        **arguments,
        "buffer": torch.from_numpy(bitmaps.reshape(-1).copy()),
        "offset": (torch.arange(6) * HEIGHT * WIDTH).reshape(2, 3),
        "window": torch.tensor([0, 0, WIDTH, HEIGHT], dtype=torch.int32).expand(2, 3, 4),
    }
    boxes = boxes_of(case)
    image, matched = torch.tensor([0, 0, 1, 0, 1, 0]), torch.tensor([0, 1, 0, 2, 0, 1])
    for ratio in (2, 0):
        a, b = (
            mask_targets(boxes, image, matched, **table, resolution=6, sampling_ratio=ratio)
            for table in (arguments, whole)
        )
        assert torch.equal(a, b)


def golden_case() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    data = arrays("region_ops.npz", "mask/")
    height, width = int(data["height"]), int(data["width"])
    bitmaps = np.unpackbits(data["bitmaps"], axis=-1)[..., :width]
    count = len(bitmaps)
    arguments = {
        "boxes": torch.from_numpy(data["proposals"]),
        "image": torch.zeros(len(data["match"]), dtype=torch.int64),
        "matched": torch.from_numpy(data["match"]),
        "buffer": torch.from_numpy(bitmaps.reshape(-1).copy()),
        "offset": (torch.arange(count) * height * width)[None],
        "window": torch.tensor([0, 0, width, height], dtype=torch.int32).expand(1, count, 4),
        "to_annotation": torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]),
        "size": torch.tensor([[height, width]], dtype=torch.int32),
        "image_sizes": torch.tensor([[height, width]]),
        "image_shape": (height, width),
        "resolution": 28,
        "sampling_ratio": 0,
    }
    return data, arguments


slow_when_interpreted = pytest.mark.skipif(interpreting(), reason="28 x 28, a second for each RoI")


@pytest.mark.parametrize("device", DEVICES)
def test_torchvisions_targets(device: str) -> None:
    data, arguments = golden_case()
    kept = slice(2 if interpreting() else None)
    for name in ("boxes", "image", "matched"):
        arguments[name] = arguments[name][kept]
    found = mask_targets(**{key: moved(value, device) for key, value in arguments.items()}, aligned=False)
    expected = data["target_bitmap_roialign"][kept]
    np.testing.assert_allclose(found.cpu().numpy(), expected, atol=2e-5)
    if device == "cpu" and not interpreting():
        np.testing.assert_array_equal(found.numpy(), expected)  # bit for bit


@slow_when_interpreted
def test_the_two_peers_differ_and_so_do_ours() -> None:
    """detectron2 shifts by half a pixel and then asks for a half: another target, at the borders only."""
    data, arguments = golden_case()
    soft = torch.from_numpy(data["target_bitmap_roialign"])
    hard = mask_targets(**arguments, aligned=True) >= 0.5
    share = ((soft >= 0.5) != hard).float().mean()
    assert 0 < share < 0.05


def test_no_roi() -> None:
    arguments = tables(IDENTITY).arguments
    empty = torch.zeros(0, dtype=torch.int64)
    for ratio in (2, 0):
        found = mask_targets(torch.zeros(0, 4), empty, empty, **arguments, resolution=4, sampling_ratio=ratio)
        assert found.shape == (0, 4, 4)


def scene(rois: int, side: int, device: str) -> dict[str, Any]:
    """Polygons of two photographs, resized to `side` and one of them flipped; boxes about them."""
    r = np.random.default_rng(0)
    sizes, objects = [(427, 640), (333, 251)], 6
    chunks, window, affine, inputs, boxes, rows = [], [], [], [], [], []
    for image, (height, width) in enumerate(sizes):
        scale = side / min(height, width)
        extent = np.array([round(width * scale), round(height * scale)])
        inputs.append([int(extent[1]), int(extent[0])])
        ratio_x, ratio_y = width / extent[0], height / extent[1]
        affine.append([[-ratio_x if image else ratio_x, 0, width * image], [0, ratio_y, 0]])
        for slot in range(objects):
            centre, radius = r.uniform(0.2, 0.8, 2) * (width, height), r.uniform(8, 150)
            angle = np.sort(r.uniform(0, 2 * np.pi, r.integers(5, 30)))
            length = radius * r.uniform(0.4, 1, len(angle))
            points = centre + length[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
            bitmap = coco_mask.decode(coco_mask.frPyObjects([points.ravel().tolist()], height, width))[..., 0]
            y, x = (np.flatnonzero(bitmap.any(axis)) for axis in (1, 0))
            window.append([x[0], y[0], x[-1] + 1 - x[0], y[-1] + 1 - y[0]])
            chunks.append(bitmap[y[0] : y[-1] + 1, x[0] : x[-1] + 1].ravel())
            low, high = points.min(0) / (ratio_x, ratio_y), points.max(0) / (ratio_x, ratio_y)
            if image:
                low[0], high[0] = extent[0] - high[0], extent[0] - low[0]
            for _ in range(rois // (objects * len(sizes))):
                jitter = r.normal(0, 0.1, 4) * np.tile(high - low, 2)
                box = np.clip(np.concatenate([low, high]) + jitter, 0, np.tile(extent, 2))
                boxes.append(box)
                rows.append([image, slot])
    offset = np.cumsum([0, *map(len, chunks)])[:-1].reshape(2, objects)
    image, matched = torch.tensor(rows).T.contiguous()
    arguments = {
        "boxes": torch.tensor(np.array(boxes), dtype=torch.float32),
        "image": image,
        "matched": matched,
        "buffer": torch.from_numpy(np.concatenate(chunks)),
        "offset": torch.from_numpy(offset),
        "window": torch.tensor(window, dtype=torch.int32).view(2, objects, 4),
        "to_annotation": torch.tensor(affine, dtype=torch.float32),
        "size": torch.tensor(sizes, dtype=torch.int32),
        "image_sizes": torch.tensor(inputs),
        "image_shape": (int(1.5 * side), int(1.5 * side)),
    }
    return {key: moved(value, device) for key, value in arguments.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [2, pytest.param(0, marks=slow_when_interpreted)])
def test_bits_are_those_of_float64(ratio: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one in 10,000 differs."""
    if interpreting():  # a program takes as long for more pixels
        from fastmrcnn.kernels.mask_targets import kernel

        monkeypatch.setattr(kernel, "PIXELS", 1024)
    slow = device == "cpu" and (interpreting() or ratio == 0)
    arguments = scene(12 if slow else 480, 300 if slow else 800, device)
    options = {"resolution": 28, "sampling_ratio": ratio, "bitmap": True}
    found = mask_targets(**arguments, **options)
    assert found.dtype == torch.bool
    assert 0.2 < found.float().mean() < 0.8
    bitmaps = cpu.Bitmaps(*(arguments[name].cpu() for name in cpu.Bitmaps._fields))
    boxes, image, matched = (arguments[name].cpu() for name in ("boxes", "image", "matched"))
    how = cpu.Sampling(arguments["image_shape"], 28, ratio, True, True)
    exact = cpu.mask_targets(boxes.double(), image, matched, None, bitmaps, how)
    assert (found.cpu() != exact).sum() <= found.numel() / 10_000


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [2, 0])
def test_what_is_not_there_gives_zeros(ratio: int, device: str) -> None:
    """Slots that are not valid, indices and boxes that make no sense, and tables that point outside."""
    arguments = {key: moved(value, device) for key, value in tables(IDENTITY).arguments.items()}
    options = {"resolution": 3, "sampling_ratio": ratio, "bitmap": False}
    boxes = torch.tensor([[5.0, 6, 11, 12]]).repeat(10, 1)
    image, matched = torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    valid = torch.ones(10, dtype=torch.bool)
    valid[1] = False
    image[2], image[3], matched[4], matched[5] = -1, 2, -1, 3
    boxes[6, 0], boxes[7, 3], boxes[8] = torch.nan, torch.inf, 1e30
    compiled = torch.compile(mask_targets, fullgraph=True, backend="aot_eager")  # eager CPU would raise
    rois = (t.to(device) for t in (boxes, image, matched))
    found = compiled(*rois, **arguments, **options, valid=valid.to(device)).cpu()
    exact = naive.mask_targets(boxes, image, matched, **tables(IDENTITY).arguments, **options, valid=valid)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    assert found[0].any()
    assert found[9].equal(found[0])
    assert found[1:9].eq(0).all()
    one = [t[:1].to(device) for t in (boxes, image, matched)]
    for name, wrong in (("offset", 1 << 40), ("offset", -(1 << 40)), ("window", 1 << 20)):
        table = arguments[name].clone()
        table[0, 0] = wrong
        assert mask_targets(*one, **{**arguments, name: table}, **options).eq(0).all()
    nothing = {**arguments, "buffer": arguments["buffer"][:0]}
    assert mask_targets(*one, **nothing, **options).eq(0).all()
    no_objects = {**arguments, "offset": arguments["offset"][:, :0], "window": arguments["window"][:, :0]}
    unreal = torch.zeros(1, dtype=torch.bool, device=device)
    assert mask_targets(*one, **no_objects, **options, valid=unreal).eq(0).all()


@settings(max_examples=4 if interpreting() else 15, deadline=None, derandomize=True)
@given(
    corners=st.lists(
        st.one_of(st.floats(-20, 90, width=32), st.sampled_from([0.0, 37.0, 53.0, 1e6])),
        min_size=8,
        max_size=8,
    ),
    matched=st.integers(0, 2),
    ratio=st.integers(0, 2),
    name=st.sampled_from(sorted(CASES)),
    aligned=st.booleans(),
)
def test_any_box(corners: list[float], matched: int, ratio: int, name: str, aligned: bool) -> None:
    """Inverted, empty, outside and huge ones are shares too, those of cpu.py and of the definition."""
    boxes = torch.tensor(corners).view(2, 4)
    arguments = tables(CASES[name]).arguments
    rows = torch.tensor([0, 1]), torch.tensor([matched, 0])
    options = {"resolution": 3, "sampling_ratio": ratio, "aligned": aligned}
    found = mask_targets(boxes, *rows, **arguments, **options)
    assert ((found >= 0) & (found <= 1 + 1e-5)).all()
    bitmaps = cpu.Bitmaps(*(arguments[field] for field in cpu.Bitmaps._fields))
    how = cpu.Sampling(arguments["image_shape"], 3, ratio, aligned, False)
    same_dtype = cpu.mask_targets(boxes, *rows, None, bitmaps, how)
    torch.testing.assert_close(found, same_dtype, rtol=0, atol=1e-4)
    if ratio == 0 and interpreting():  # it takes minutes
        return
    height, width = CASES[name].size
    if ratio == 0:  # of boxes that reach over the image not all samples are taken
        boxes = boxes.minimum(torch.tensor([width, height] * 2)).clamp(min=0)
    double = mask_targets(boxes.double(), *rows, **arguments, **options)
    exact = naive.mask_targets(boxes, *rows, **arguments, **options)
    torch.testing.assert_close(double, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    """opcheck, one graph, and the same bits in every run."""
    arguments = {key: moved(value, device) for key, value in tables(CASES["turned"]).arguments.items()}
    boxes = boxes_of(CASES["turned"]).to(device)
    rows = (torch.tensor([0, 1, 0, 0, 0, 1]).to(device), torch.tensor([0, 0, 1, 2, 1, 0]).to(device))
    for bitmap in (True,) if interpreting() else (False, True):
        names = cpu.Bitmaps._fields
        tables_ = [arguments[name] for name in names]
        how = (list(arguments["image_shape"]), 4, 2, True, bitmap)
        torch.library.opcheck(op._mask_targets, (boxes, *rows, None, *tables_, *how))
        options = {"resolution": 4, "bitmap": bitmap}
        eager = mask_targets(boxes, *rows, **arguments, **options)
        compiled = torch.compile(mask_targets, fullgraph=True, backend="aot_eager")
        assert compiled(boxes, *rows, **arguments, **options).equal(eager)
        assert mask_targets(boxes, *rows, **arguments, **options).equal(eager)


def test_autocast_does_not_round() -> None:
    arguments = tables(IDENTITY).arguments
    rois = (torch.tensor([[4.3, 5.1, 12.7, 14.9]]), torch.tensor([0]), torch.tensor([0]))
    for ratio in (2, 0):
        plain = mask_targets(*rois, **arguments, resolution=3, sampling_ratio=ratio)
        with torch.autocast("cpu", torch.bfloat16):
            assert mask_targets(*rois, **arguments, resolution=3, sampling_ratio=ratio).equal(plain)


def test_bad_input() -> None:
    arguments = {"boxes": boxes_of(IDENTITY), "image": torch.zeros(6, dtype=torch.int64)}
    arguments |= {"matched": torch.zeros(6, dtype=torch.int64), **tables(IDENTITY).arguments, "resolution": 4}
    for change, message in (
        ({"boxes": torch.zeros(6, 5)}, r"boxes must be \(F, 4\), got \(6, 5\)"),
        ({"boxes": torch.zeros(6, 4, dtype=torch.int64)}, "boxes must be floating point, got torch.int64"),
        (
            {"image": torch.zeros(5, dtype=torch.int64)},
            r"image must be \(6,\) for boxes .* got \(5,\)",
        ),
        ({"matched": torch.zeros(6)}, "matched must be of an integer dtype, got torch.float32"),
        ({"matched": torch.full((6,), 3)}, r"matched of valid slots must be in 0..2, got \[3, 3"),
        ({"image": torch.full((6,), -1)}, r"image of valid slots must be in 0..1, got \[-1, -1"),
        ({"buffer": torch.zeros(9)}, "buffer must be uint8, got torch.float32"),
        (
            {"window": torch.zeros(2, 3, 2)},
            r"window must be \(2, 3, 4\) for offset .* got \(2, 3, 2\)",
        ),
        ({"size": torch.zeros(2, 2, device="meta")}, "size must be on cpu as offset is, got meta"),
        ({"image_shape": (0, 5)}, r"image_shape must be a height and a width, got \(0, 5\)"),
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_targets(**{**arguments, **change})
