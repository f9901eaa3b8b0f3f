"""Matching against its definition, the matrix of all overlaps, bit for bit.

CPU tensors run cpu.py, or Triton's kernel if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.kernels import BoxMatches, match_boxes
from fastmrcnn.kernels._library import interpreting
from fastmrcnn.kernels.matcher import cpu, naive, op

# NumPy, which the interpreter computes with, remarks on boxes that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_matrix(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, gt_crowd: Tensor, share: float
) -> BoxMatches:
    return BoxMatches(*naive.match_boxes(boxes, gt_boxes, gt_valid, gt_crowd, True, share))


def assert_same(found: BoxMatches, expected: BoxMatches) -> None:
    for name, ours, exact in zip(BoxMatches._fields, found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: n + m)


def scene(
    boxes: int, objects: int, images: int = 2, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes near objects, objects, of which every other image has fewer, and a crowd region in each image.

    Whole pixels, so that ties are many.
    """
    r = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 80, (images, objects, 2), generator=r)
    gt_boxes = torch.cat([corner, corner + torch.randint(4, 40, (images, objects, 2), generator=r)], -1)
    near = torch.randint(0, objects, (images, boxes, 1), generator=r).expand(-1, -1, 4)
    moved = gt_boxes.gather(1, near) + torch.randint(-6, 7, (images, boxes, 4), generator=r)
    gt_valid = torch.arange(objects) < torch.tensor([[objects * 2 // 3], [objects]]).repeat(images // 2, 1)
    gt_crowd = torch.zeros(images, objects, dtype=torch.bool)
    gt_crowd[:, -1], gt_valid[:, -1] = True, False
    return moved.float().to(device), gt_boxes.float().to(device), gt_valid.to(device), gt_crowd.to(device)


def matched(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, gt_crowd: Tensor, share: float) -> BoxMatches:
    return match_boxes(boxes, gt_boxes, gt_valid, low_quality=True, gt_crowd=gt_crowd, crowd_overlap=share)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pairs", [1000] if interpreting() else [1, 1000, cpu.PAIRS])
@pytest.mark.parametrize("shared", [False, True])
def test_every_bit(shared: bool, pairs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few objects cpu.py looks at together; also anchors that the images share."""
    monkeypatch.setattr(cpu, "PAIRS", pairs)
    boxes, *rest = scene(300, 7, device=device)
    boxes = boxes[:1] if shared else boxes
    found = matched(boxes, *rest, 0.7)
    assert_same(found, by_matrix(boxes, *rest, 0.7))
    assert [t.dtype for t in found] == [torch.float32, torch.int64, torch.float32, torch.bool, torch.bool]
    assert found.best.shape == found.matched.shape == (2, 300)
    for flag in found[3:]:
        assert 0 < flag.float().mean() < 1
    for flags in ({}, {"low_quality": True}, {"gt_crowd": rest[2], "crowd_overlap": 0.7}):
        less = match_boxes(boxes, *rest[:2], **flags)
        assert less.best.equal(found.best)
        assert less.matched.equal(found.matched)
        for name, part in less._asdict().items():
            assert part is None or part.equal(getattr(found, name))
        asked = [less.gt_best is not None, less.is_best is not None, less.in_crowd is not None]
        assert asked == [bool(flags.get("low_quality"))] * 2 + ["gt_crowd" in flags]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_first_object_and_all_best_boxes_are_marked(device: str) -> None:
    gt_boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [90, 0, 99, 9]]])
    gt_valid = torch.tensor([[False, True, True, True]])
    boxes = torch.tensor(
        [[[0.0, 0, 10, 5], [0, 5, 10, 10], [20, 0, 30, 9], [20, 0, 30, 8], [50, 50, 60, 60], [5, 0, 25, 10]]]
    )
    found = match_boxes(*(t.to(device) for t in (boxes, gt_boxes, gt_valid)), low_quality=True)
    assert found.matched.tolist() == [[1, 1, 2, 2, 1, 1]]
    assert found.is_best.tolist() == [[True, True, True, False, False, False]]
    torch.testing.assert_close(found.best.cpu(), torch.tensor([[0.5, 0.5, 0.9, 0.8, 0, 0.2]]))
    torch.testing.assert_close(found.gt_best.cpu(), torch.tensor([[-1.0, 0.5, 0.9, 0.0]]))


@pytest.mark.parametrize("device", DEVICES)
def test_images_without_objects_and_nothing_at_all(device: str) -> None:
    boxes, gt_boxes, gt_valid, gt_crowd = scene(5, 3, device=device)
    gt_valid[0], gt_boxes[0] = False, torch.nan
    found = matched(boxes, gt_boxes, gt_valid, gt_crowd, 0.7)
    assert found.best[0].eq(-1).all()
    assert found.matched[0].eq(0).all()
    assert found.gt_best[0].eq(-1).all()
    assert not found.is_best[0].any()
    assert found.is_best[1].any()
    assert_same(found, by_matrix(boxes, gt_boxes, gt_valid, gt_crowd, 0.7))
    none = match_boxes(boxes, gt_boxes[:, :0], gt_valid[:, :0], low_quality=True)
    assert_same(
        none, BoxMatches(*naive.match_boxes(boxes, gt_boxes[:, :0], gt_valid[:, :0], None, True, 0.0))
    )
    assert none.best.eq(-1).all()
    assert none.matched.eq(0).all()
    assert none.gt_best.shape == (2, 0)
    assert not none.is_best.any()
    no_boxes = matched(boxes[:, :0], gt_boxes, gt_valid, gt_crowd, 0.7)
    assert no_boxes.gt_best.equal(torch.where(gt_valid, 0.0, -1.0))
    assert all(no_boxes[i].shape == (2, 0) for i in (0, 1, 3, 4))
    assert_same(no_boxes, by_matrix(boxes[:, :0], gt_boxes, gt_valid, gt_crowd, 0.7))
    no_images = match_boxes(boxes[:1], gt_boxes[:0], gt_valid[:0], low_quality=True)
    assert no_images.best.shape == (0, 5)
    assert no_images.gt_best.shape == (0, 3)


SIDE = st.one_of(
    st.integers(-4, 12).map(float),
    st.floats(-20, 120, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 1e9, -1e9, 3e38, -3e38, math.inf, -math.inf, math.nan]),
)
BOX = st.lists(SIDE, min_size=4, max_size=4)


@settings(max_examples=60 if interpreting() else 200, deadline=None, derandomize=True)
@given(
    boxes=st.lists(BOX, min_size=1, max_size=9),
    objects=st.lists(st.tuples(BOX, st.booleans(), st.booleans()), min_size=1, max_size=5),
    repeated=st.booleans(),
    share=st.floats(0.05, 1.0),
)
def test_any_boxes(
    boxes: list[list[float]], objects: list[tuple[list[float], bool, bool]], repeated: bool, share: float
) -> None:
    """Empty, inverted, outside, touching, huge, not finite, and the objects' own boxes, twice."""
    if repeated:
        boxes = boxes + 2 * [box for box, _, _ in objects]
        objects = objects + objects
    box = torch.tensor(boxes)[None]
    gt_boxes = torch.tensor([box for box, _, _ in objects])[None]
    gt_valid, gt_crowd = (torch.tensor([entry[i] for entry in objects])[None] for i in (1, 2))
    found = matched(box, gt_boxes, gt_valid, gt_crowd, share)
    assert_same(found, by_matrix(box, gt_boxes, gt_valid, gt_crowd, share))


def test_close_to_float64() -> None:
    boxes, gt_boxes, gt_valid, _ = scene(200, 6)
    noise = torch.rand(boxes.shape, generator=torch.Generator().manual_seed(1))
    boxes = boxes + noise
    found = match_boxes(boxes, gt_boxes, gt_valid)
    exact = by_matrix(boxes.double(), gt_boxes.double(), gt_valid, gt_valid, 1.0)
    torch.testing.assert_close(found.best.double(), exact.best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_and_strides(device: str) -> None:
    boxes, gt_boxes, *flags = scene(30, 5, device=device)
    expected = matched(boxes, gt_boxes, *flags, 0.6)
    turned = boxes.transpose(0, 2).contiguous().transpose(0, 2)
    spread = gt_boxes.repeat_interleave(2, 1)[:, ::2]
    assert_same(matched(turned, spread, *(f.T.contiguous().T for f in flags), 0.6), expected)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):  # whole pixels below 256 are exact in all
        assert_same(matched(boxes.to(dtype), gt_boxes.to(dtype), *flags, 0.6), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    """opcheck, also of inputs that are not contiguous, one graph, and the same bits in every run."""
    boxes, gt_boxes, gt_valid, gt_crowd = scene(6, 3, device=device)
    turned = boxes.transpose(0, 1).contiguous().transpose(0, 1)
    for given_boxes in (boxes, turned, boxes[:1]):
        torch.library.opcheck(op._match_boxes, (given_boxes, gt_boxes, gt_valid, gt_crowd, True, 0.7))
    torch.library.opcheck(op._match_boxes, (boxes, gt_boxes, gt_valid, None, False, 0.0))
    compiled = torch.compile(matched, fullgraph=True, backend="aot_eager")
    eager = matched(boxes, gt_boxes, gt_valid, gt_crowd, 0.7)
    assert_same(compiled(boxes, gt_boxes, gt_valid, gt_crowd, 0.7), eager)
    assert_same(matched(boxes, gt_boxes, gt_valid, gt_crowd, 0.7), eager)
    leaf = boxes.clone().requires_grad_()
    assert not match_boxes(leaf, gt_boxes, gt_valid).best.requires_grad


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def largest_tensor(objects: int) -> tuple[int, BoxMatches]:
    """Of cpu.py, for 4 images with 200,000 boxes each."""
    boxes, gt_boxes, gt_valid, gt_crowd = scene(200_000, objects, 4)
    with Largest() as seen:
        found = cpu.match_boxes(boxes, gt_boxes, gt_valid, gt_crowd, True, 0.7)
    return seen.bytes, BoxMatches(*found)


not_interpreted = pytest.mark.skipif(interpreting(), reason="of cpu.py, which is not interpreted")
OF_BOXES = 4 * 200_000 * 16
"""Bytes of the boxes themselves; the matrix of overlaps with 1000 objects has 250 times as many."""


@not_interpreted
def test_memory_does_not_grow_with_boxes_times_objects() -> None:
    torch.use_deterministic_algorithms(False)  # filling fresh memory takes a while
    assert largest_tensor(12)[0] <= OF_BOXES


@not_interpreted
@pytest.mark.slow
def test_memory_with_a_thousand_objects() -> None:
    torch.use_deterministic_algorithms(False)
    size, found = largest_tensor(1000)
    assert size <= OF_BOXES
    boxes, gt_boxes, gt_valid, gt_crowd = scene(200_000, 1000, 4)
    some = torch.arange(0, 200_000, 997)
    expected = by_matrix(boxes[:, some], gt_boxes, gt_valid, gt_crowd, 0.7)
    for name in ("best", "matched", "in_crowd"):
        assert getattr(found, name)[:, some].equal(getattr(expected, name)), name


def test_sizes_of_one_compile() -> None:
    """Triton makes constants of them, with which not everything works that works with a variable."""
    pytest.importorskip("triton")
    from fastmrcnn.kernels.matcher import kernel

    if interpreting():
        pytest.skip("nothing is compiled when interpreting")
    box, flag = torch.empty(1, 1, 4, device="meta"), torch.empty(1, 1, dtype=torch.bool, device="meta")
    found = kernel._outputs(box, flag, flag, True)
    for launch in kernel._launches(box, box, flag, flag, 0.7, found):
        launch.spec("", "", 0, 0).compile()


def test_bad_input() -> None:
    boxes, gt_boxes, gt_valid, gt_crowd = scene(5, 3)
    arguments = {"boxes": boxes, "gt_boxes": gt_boxes, "gt_valid": gt_valid}
    for change, message in (
        ({"boxes": boxes[0]}, r"boxes must be \(2, B, 4\) or \(1, B, 4\), got \(5, 4\)"),
        ({"boxes": boxes.repeat(2, 1, 1)}, r"boxes must be \(2, B, 4\) or \(1, B, 4\), got \(4, 5, 4\)"),
        ({"boxes": boxes.long()}, "boxes must be floating point, got torch.int64"),
        ({"gt_boxes": gt_boxes[..., :2]}, r"gt_boxes must be \(N, G, 4\), got \(2, 3, 2\)"),
        ({"gt_boxes": gt_boxes.long()}, "gt_boxes must be floating point, got torch.int64"),
        ({"gt_boxes": gt_boxes.to("meta")}, "gt_boxes must be on cpu as boxes are, got meta"),
        ({"gt_valid": gt_valid[:, :2]}, r"gt_valid must be \(2, 3\), got \(2, 2\)"),
        ({"gt_valid": gt_valid.long()}, "gt_valid must be bool, got torch.int64"),
        ({"gt_crowd": gt_crowd[:1], "crowd_overlap": 0.5}, r"gt_crowd must be \(2, 3\), got \(1, 3\)"),
        ({"gt_crowd": gt_crowd}, "gt_crowd and crowd_overlap belong together"),
        ({"crowd_overlap": 0.5}, "gt_crowd and crowd_overlap belong together"),
        ({"gt_crowd": gt_crowd, "crowd_overlap": 0.0}, r"crowd_overlap must be above 0, got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            match_boxes(**{**arguments, **change})
