"""Resizing with padding against its definition, and against Pillow 12, whose levels it has to the last bit.

CPU tensors run `cpu.py`, or Triton's kernel if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fastmrcnn.kernels import resize_pad
from fastmrcnn.kernels.common.library import interpreting
from fastmrcnn.kernels.resize_pad import cpu, naive, op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Size = tuple[int, int]


class Scene(NamedTuple):
    """Arguments by name, without the output's size."""

    buffer: Tensor
    offset: Tensor
    source: Tensor
    resized: Tensor
    sizes: Tensor
    turns: Tensor
    flips: Tensor
    origin: Tensor
    colour: Tensor | None = None

    def on(self, device: str) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in self._asdict().items() if value is not None}


def pack(images: list[np.ndarray], resized: list[Size], gap: int = 5) -> Scene:
    """Images in one buffer with bytes between them that belong to none; nothing is moved."""
    parts, offset, start = [], [], 0
    for image in images:
        parts += [np.full(gap, 255, np.uint8), image.ravel()]
        offset.append(start + gap)
        start += gap + image.size
    count, pair = len(images), torch.tensor(resized)
    return Scene(
        torch.from_numpy(np.concatenate(parts)),
        torch.tensor(offset),
        torch.tensor([image.shape[:2] for image in images]),
        pair,
        pair.clone(),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros((count, 2), dtype=torch.bool),
        torch.zeros((count, 2), dtype=torch.int32),
    )


def noise(rng: np.random.Generator, *size: int) -> np.ndarray:
    """All levels, black and white among them oftener: sums that reach both ends."""
    return (rng.integers(-128, 384, (*size, 3)).clip(0, 255)).astype(np.uint8)


def moving(seed: int, colour: bool, few: bool = False) -> Scene:
    """All turns with all flips, images that grow and shrink, parts that begin within, before and behind.

    Args:
        few: every fifth of the 16 images.
    """
    rng = np.random.default_rng(seed)
    sizes = [tuple(rng.integers(1, 14, 2).tolist()) for _ in range(16)]
    resized = [tuple(rng.integers(3, 14, 2).tolist()) for _ in range(16)]
    scene = pack([noise(rng, *size) for size in sizes], resized)
    turns, ways = torch.arange(16) % 4, torch.arange(16) // 4
    moved = scene.resized.flip(1).where((turns % 2 == 1)[:, None], scene.resized)
    origin = torch.from_numpy(rng.integers(-3, 6, (16, 2)))
    origin[::3] = 0
    part = torch.from_numpy(rng.integers(0, 12, (16, 2))).where(origin != 0, moved)
    mixed = torch.from_numpy(rng.normal(0, 0.6, (16, 3, 5))).float()
    mixed[:, :, 4] *= 60
    mixed[::2, :, 3] = 0
    scene = scene._replace(
        turns=turns,
        flips=torch.stack([ways % 2 == 1, ways >= 2], 1),
        origin=origin,
        sizes=part,
        colour=mixed if colour else None,
    )
    return Scene(scene.buffer, *(v if v is None else v[:: 5 if few else 1] for v in scene[1:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [12, 11])
def test_the_definition(width: int, device: str) -> None:
    """To the last bit, with an output that cuts, and whose rows are whole words of memory or not."""
    scene = moving(seed=width, colour=False)
    expected = naive.resize_pad(**scene.on("cpu"), height=10, width=width)
    found = resize_pad(**scene.on(device), height=10, width=width)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.cpu().equal(expected)
    assert 0.2 < (expected != 0).float().mean() < 0.8
    assert (expected == 255).any()


@pytest.mark.parametrize("device", DEVICES)
def test_colours(device: str) -> None:
    """By a matrix and the mean level, of which exact numbers round to the same or, at a half, to the next."""
    scene = moving(seed=3, colour=True, few=interpreting())
    expected = naive.resize_pad(**scene.on("cpu"), height=10, width=12)
    found = resize_pad(**scene.on(device), height=10, width=12).cpu()
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 0.01
    assert scene.colour is not None
    other = scene._replace(colour=scene.colour.where(torch.arange(5) != 3, 0))
    without_mean = resize_pad(**other.on(device), height=10, width=12).cpu()
    changed = (without_mean != found).flatten(1).any(1)
    assert changed[1::2].any()
    assert not changed[::2].any()
    same = torch.eye(3, 5).repeat(len(changed), 1, 1)
    plain = scene._replace(colour=None).on(device)
    assert resize_pad(**plain, colour=same.to(device), height=10, width=12).equal(
        resize_pad(**plain, height=10, width=12)
    )


PAIRS = [
    ((7, 9), (20, 31)),
    ((30, 40), (11, 13)),
    ((24, 32), (40, 53)),
    ((5, 6), (5, 17)),
    ((9, 20), (66, 70)),
]
EDGES = [((1, 1), (5, 3)), ((3, 4), (24, 32)), ((48, 12), (3, 4)), ((8, 8), (8, 8)), ((1, 50), (9, 1))]


def by_pillow(image: np.ndarray, size: Size) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def assert_levels_of_pillow(found: Tensor, image: np.ndarray, size: Size) -> None:
    """Those of Pillow 12 to the last bit; Pillow 13 rounds otherwise at some sizes."""
    apart = np.abs(found.cpu().numpy().astype(int) - by_pillow(image, size).astype(int)).max()
    assert apart <= (int(PIL.__version__.split(".")[0]) >= 13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("source", "size"), PAIRS + EDGES)
def test_the_levels_of_pillow(source: Size, size: Size, device: str) -> None:
    """Growing 8-fold and shrinking 16-fold too, and an image that is as large as the output."""
    image = noise(np.random.default_rng(sum(source)), *source)
    found = resize_pad(**pack([image], [size]).on(device), height=size[0], width=size[1])
    assert_levels_of_pillow(found[0].permute(1, 2, 0), image, size)


@pytest.mark.skipif(interpreting(), reason="takes a minute when interpreted")
def test_the_levels_of_pillow_at_the_sizes_of_photographs() -> None:
    rng = np.random.default_rng(0)
    for source, size in (((480, 640), (800, 1067)), ((427, 640), (640, 959)), ((600, 901), (333, 500))):
        image = noise(rng, *source)
        found = resize_pad(**pack([image], [size]).on("cpu"), height=800, width=1088)[0].permute(1, 2, 0)
        assert_levels_of_pillow(found[: size[0], : size[1]], image, size)
        assert not found[size[0] :].any()
        assert not found[:, size[1] :].any()


SIDE = st.one_of(st.integers(1, 40), st.sampled_from([333, 480, 640, 800, 1067, 1333, 4000]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(source=SIDE, result=SIDE, share=st.floats(0, 1, exclude_max=True))
def test_weights_as_ratios_of_integers(source: int, result: int, share: float) -> None:
    """They are those that Pillow computes in float64, for any sides."""
    place = int(share * result)
    first, weights = naive.window(place, source, result)
    ours, column = cpu.windows(torch.tensor([place]), source, result)
    given_by = {first + i: k for i, k in enumerate(weights) if k}
    assert {int(ours) + i: k for i, k in enumerate(column[:, 0].tolist()) if k} == given_by


@pytest.mark.parametrize("device", DEVICES)
def test_parts_are_those_of_the_whole(device: str) -> None:
    rng = np.random.default_rng(5)
    scene = pack([noise(rng, 20, 30)], [(33, 41)])._replace(
        turns=torch.tensor([3]), flips=torch.tensor([[True, False]])
    )
    whole = resize_pad(**scene._replace(sizes=torch.tensor([[41, 33]])).on(device), height=41, width=33)
    for y, x, height, width in ((0, 0, 10, 10), (31, 20, 10, 13), (7, 3, 1, 30)):
        part = scene._replace(origin=torch.tensor([[y, x]]), sizes=torch.tensor([[height, width]]))
        found = resize_pad(**part.on(device), height=12, width=32)
        assert found[:, :, :height, :width].equal(whole[:, :, y : y + height, x : x + width])
        assert int(found.sum()) == int(found[:, :, :height, :width].sum())


@pytest.mark.parametrize("device", DEVICES)
def test_integers_strides_and_what_is_left_out(device: str) -> None:
    scene = moving(seed=1, colour=False, few=True)
    arguments = scene.on(device)
    expected = resize_pad(**arguments, height=9, width=16)
    narrow = {
        name: value.to(torch.int32) if name in ("source", "resized", "sizes", "turns", "origin") else value
        for name, value in arguments.items()
    }
    turned = {
        name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in arguments.items()
    }
    spread = {**arguments, "buffer": arguments["buffer"].repeat_interleave(2)[::2]}
    for other in (narrow, turned, spread):
        assert resize_pad(**other, height=9, width=16).equal(expected)
    still = scene._replace(
        turns=torch.zeros_like(scene.turns),
        flips=torch.zeros_like(scene.flips),
        origin=torch.zeros_like(scene.origin),
    )
    left_out = {name: v for name, v in still.on(device).items() if name not in ("turns", "flips", "origin")}
    assert resize_pad(**left_out, height=9, width=16).equal(
        resize_pad(**still.on(device), height=9, width=16)
    )
    none = {name: value[:0] for name, value in arguments.items()}
    assert resize_pad(**none, height=9, width=16).shape == (0, 3, 9, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_that_is_not_there_gives_zeros(device: str) -> None:
    """Where values may not be looked at: within a compiled step, and on a GPU. Others stay as they are."""
    rng = np.random.default_rng(2)
    scene = pack([noise(rng, 4, 4) for _ in range(7)], [(4, 4)] * 7)
    scene.source[0, 1] = scene.resized[2, 0] = 0
    scene.offset[3], scene.offset[4] = -1, scene.buffer.numel() - 47
    scene.source[5], scene.resized[6, 1] = torch.tensor([2**16, 2**16]), 2**27
    colour = torch.eye(3, 5).repeat(7, 1, 1).to(device)
    colour[:, 0, 3] = 0.5
    values = [value.to(device) for value in scene[:8]]
    for given_colour in (None, colour):
        found = op._resize_pad(*values, given_colour, 5, 6)
        assert found.flatten(1).any(1).tolist() == [False, True, False, False, False, False, False]


def test_beyond_31_bits() -> None:
    """The second image begins 2**31 bytes after the first: address space, hardly any memory."""
    torch.use_deterministic_algorithms(False)  # it would touch all of it
    image = noise(np.random.default_rng(0), 6, 7)
    near = pack([image, image], [(9, 9), (9, 9)])
    buffer = torch.empty(2**31 + 400, dtype=torch.uint8)
    for start in (3, 2**31 + 130):
        buffer[start : start + image.size] = torch.from_numpy(image.ravel())
    far = near._replace(buffer=buffer, offset=torch.tensor([3, 2**31 + 130]))
    expected = resize_pad(**near.on("cpu"), height=10, width=12)
    assert resize_pad(**far.on("cpu"), height=10, width=12).equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    """opcheck, one graph, and no gradient: neither of levels, which are integers, nor of colours."""
    scene = moving(seed=2, colour=True, few=True)
    values = [value.to(device) for value in scene if value is not None]
    torch.library.opcheck(op._resize_pad, (*values, 6, 8))
    torch.library.opcheck(op._resize_pad, (*values[:5], None, None, None, None, 6, 8))
    compiled = torch.compile(resize_pad, fullgraph=True, backend="aot_eager")
    arguments = scene.on(device)
    assert compiled(**arguments, height=6, width=8).equal(resize_pad(**arguments, height=6, width=8))
    learnt = {**arguments, "colour": arguments["colour"].clone().requires_grad_()}
    assert not resize_pad(**learnt, height=6, width=8).requires_grad


def test_sizes_of_one_compile() -> None:
    """Triton makes constants of them, with which not everything works that works with a variable."""
    pytest.importorskip("triton")
    from fastmrcnn.kernels.resize_pad import kernel

    if interpreting():
        pytest.skip("nothing is compiled when interpreting")
    one = torch.empty(1, dtype=torch.int64, device="meta")
    pair = one.new_empty((1, 2), dtype=torch.int32)
    images = (one.new_empty(1, dtype=torch.uint8), one, pair, pair, pair)
    for rest, sums in (((None,) * 4, False), ((one, pair.bool(), pair, one.new_empty((1, 3, 5))), True)):
        kernel._launch(*images, *rest, 1, 1, sums)[1].spec("", "", 0, 0).compile()


def test_bad_input() -> None:
    scene = pack([np.zeros((4, 5, 3), np.uint8)] * 2, [(3, 3)] * 2)
    arguments: dict[str, Any] = {**scene.on("cpu"), "height": 4, "width": 4}
    outside = scene.offset + torch.tensor([0, 1])
    for change, message in (
        ({"buffer": scene.buffer.float()}, "buffer must be uint8, got torch.float32"),
        ({"buffer": scene.buffer[None]}, r"buffer must be \(B,\)"),
        ({"offset": scene.offset.int()}, "offset must be int64, got torch.int32"),
        ({"source": scene.source[:1]}, r"source must be \(2, 2\) .* got \(1, 2\)"),
        ({"resized": scene.resized.float()}, "resized must be of an integer dtype"),
        ({"sizes": scene.sizes.to("meta")}, "sizes must be on cpu as buffer is, got meta"),
        ({"turns": scene.turns[:, None]}, r"turns must be \(2,\)"),
        ({"flips": scene.flips.int()}, "flips must be bool"),
        ({"origin": scene.origin.float()}, "origin must be of an integer dtype"),
        ({"colour": torch.zeros(2, 3, 4)}, r"colour must be \(2, 3, 5\)"),
        ({"colour": torch.zeros(2, 3, 5).double()}, "colour must be float32"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"width": -1}, "width must be at least 1, got -1"),
        (
            {"offset": outside},
            r"image 1 must lie within the buffer of 130 bytes .* offset 71, source \[4, 5\]",
        ),
        ({"resized": scene.resized * torch.tensor([[1, 0], [1, 1]])}, r"image 0 .* resized \[3, 0\]"),
        ({"resized": scene.resized * 2**26}, r"each times what it becomes below 2\*\*29"),
    ):
        with pytest.raises(ValueError, match=message):
            resize_pad(**{**arguments, **change})
