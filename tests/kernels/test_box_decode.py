"""Decoded boxes against their formula in float64, and against each filter by itself.

CPU tensors run the reference, or Triton's kernel if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_near
from torch import Tensor

from fastmrcnn.kernels import decode_boxes
from fastmrcnn.kernels.box_decode import op, reference
from fastmrcnn.kernels.common.library import interpreting

# NumPy, which the interpreter computes with, remarks on deltas that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = torch.tensor([[300, 500], [480, 400]])
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
EVERYWHERE = torch.tensor([[10_000, 10_000]])


def scene(total: int, images: int = 2, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Deltas, references and scores, of which a tenth are not finite."""
    r = torch.Generator().manual_seed(seed)
    corner, side = (torch.rand(images, total, 2, generator=r) * 300 for _ in range(2))
    deltas = torch.randn(images, total, 4, generator=r) * 4
    scores = torch.randn(images, total, generator=r)
    scores[:, ::10] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(images) % 3, None]
    return deltas.to(device), torch.cat([corner, corner + side], -1).to(device), scores.to(device)


def by_formula(delta: list[float], box: list[float], size: list[float], most: float) -> list[float]:
    """One box in double precision, with weights, before any filter."""
    width, height = box[2] - box[0], box[3] - box[1]
    x = box[0] + width / 2 + delta[0] / WEIGHTS[0] * width
    y = box[1] + height / 2 + delta[1] / WEIGHTS[1] * height
    width *= math.exp(min(delta[2] / WEIGHTS[2], most))
    height *= math.exp(min(delta[3] / WEIGHTS[3], most))
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return [min(max(c, 0.0), size[(i + 1) % 2]) for i, c in enumerate(corners)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_box(dtype: torch.dtype, device: str) -> None:
    deltas, references, _ = scene(300, device=device)
    deltas = deltas * torch.tensor([1.0, 1, 5, 5], device=device)  # some grow beyond the limit
    boxes, valid = decode_boxes(
        deltas.to(dtype), references.to(dtype), SIZES.to(device), weights=WEIGHTS, max_log_scale=1.5
    )
    assert boxes.dtype == dtype
    assert valid.all()
    expected = [
        [by_formula(d, b, size, 1.5) for d, b in zip(*image, strict=True)]
        for size, *image in zip(SIZES.tolist(), deltas.tolist(), references.tolist(), strict=True)
    ]
    assert_near(boxes, torch.tensor(expected, dtype=torch.float64), dtype)
    shared, _ = decode_boxes(deltas, references[:1], SIZES.to(device), weights=WEIGHTS)
    own, _ = decode_boxes(deltas, references[:1].repeat(2, 1, 1), SIZES.to(device), weights=WEIGHTS)
    assert shared.equal(own)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score_threshold", [None, 0.25])
@pytest.mark.parametrize("min_side", [None, 0.0, 60.0])
def test_filters(min_side: float | None, score_threshold: float | None, device: str) -> None:
    deltas, references, scores = scene(300, device=device)
    deltas[1, 3, 0], deltas[0, 5, 3], deltas[0, 6, 2] = torch.nan, torch.nan, torch.inf
    references[0, 7, 1], references[1, 9, 2] = torch.nan, torch.inf
    deltas[0, 8] = torch.tensor([100.0, 0, 0, 0])  # far to the right of the image: no width is left
    plain, finite = decode_boxes(deltas, references, SIZES.to(device), weights=WEIGHTS)
    assert (~finite).nonzero().tolist() == [[0, 5], [0, 7], [1, 3], [1, 9]]
    filters = {"min_side": min_side, "score_threshold": score_threshold}
    boxes, valid = decode_boxes(
        deltas, references, SIZES.to(device), scores=scores, weights=WEIGHTS, **filters
    )
    expected = finite & scores.isfinite()
    if min_side is not None:
        expected &= (plain[..., 2:] - plain[..., :2] > min_side).all(-1)
        assert not valid[0, 8]
    if score_threshold is not None:
        expected &= scores > score_threshold
    assert valid.equal(expected)
    assert 0.1 < valid.float().mean() < 0.95
    assert boxes.equal(plain.where(valid[..., None], 0.0))


NUMBER = st.one_of(
    st.floats(-6, 6, width=32),
    st.sampled_from([0.0, -0.0, 100.0, -100.0, 1e30, math.inf, -math.inf, math.nan]),
)
SIDE = st.one_of(
    st.floats(-50, 500, width=32),
    st.sampled_from([0.0, 300.0, 1e9, 3e38, -3e38, math.inf, -math.inf, math.nan]),
)


@settings(max_examples=40 if interpreting() else 100, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(NUMBER, min_size=4, max_size=4), min_size=1, max_size=6),
    corners=st.lists(SIDE, min_size=24, max_size=24),
    scores=st.lists(NUMBER, min_size=6, max_size=6),
    min_side=st.sampled_from([None, 0.0, 2.0]),
    score_threshold=st.sampled_from([None, -1.0, 0.5]),
)
def test_any_numbers(
    rows: list[list[float]],
    corners: list[float],
    scores: list[float],
    min_side: float | None,
    score_threshold: float | None,
) -> None:
    """What comes out lies within the image whatever goes in, and is what the reference says."""
    total = len(rows)
    deltas = torch.tensor(rows)[None]
    references = torch.tensor(corners).view(1, 6, 4)[:, :total]
    score = torch.tensor(scores)[None, :total]
    filters = {"min_side": min_side, "score_threshold": score_threshold}
    boxes, valid = decode_boxes(deltas, references, SIZES[:1], scores=score, **filters)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([500.0, 300, 500, 300])).all()
    assert boxes[~valid].eq(0).all()
    ones = [1.0] * 4
    exact = reference.decode_boxes(
        deltas, references, SIZES[:1], score, ones, reference.MAX_LOG_SCALE, min_side, score_threshold
    )
    # exp() may be a unit off, which decides where a side is about as long as asked.
    sure = torch.ones_like(valid)
    if min_side is not None:
        free = reference.decode_boxes(
            deltas, references, SIZES[:1], None, ones, reference.MAX_LOG_SCALE, None, None
        )[0]
        sure = ((free[..., 2:] - free[..., :2] - min_side).abs() > 1e-2).all(-1)
    assert valid[sure].equal(exact[1][sure])
    torch.testing.assert_close(boxes[sure], exact[0][sure], rtol=0, atol=2e-3)


@pytest.mark.skipif(interpreting(), reason="of the reference's own numbers")
def test_the_numbers_of_both_peers_at_a_few_boxes() -> None:
    """By hand: a shift by a tenth of the width, a side that doubles, and one that stops growing."""
    references = torch.tensor([[[100.0, 100, 200, 180]]]).repeat(1, 3, 1)
    doubled = math.log(2) * 5
    deltas = torch.tensor([[[1.0, 0, 0, 0], [0, 0, doubled, 0], [0, 0, 1e9, 0]]])
    boxes, valid = decode_boxes(deltas, references, EVERYWHERE, weights=WEIGHTS)
    expected = [[110.0, 100, 210, 180], [50, 100, 250, 180], [0, 100, 150 + 50 * 62.5, 180]]
    assert valid.all()
    torch.testing.assert_close(boxes, torch.tensor([expected]))


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_strides_and_nothing(device: str) -> None:
    deltas, references, scores = scene(20, device=device)
    sizes = SIZES.to(device)
    expected, valid = decode_boxes(deltas.bfloat16().float(), references, sizes, scores=scores)
    half, also_valid = decode_boxes(deltas.bfloat16(), references, sizes, scores=scores)
    assert half.dtype == torch.float32
    assert half.equal(expected)
    assert also_valid.equal(valid)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (deltas, references, sizes)]
    plain = decode_boxes(deltas, references, sizes, scores=scores)
    strided = decode_boxes(*turned, scores=scores.T.contiguous().T)
    floating = decode_boxes(deltas, references, sizes.float(), scores=scores)
    for found in (strided, floating):
        assert found[0].equal(plain[0])
        assert found[1].equal(plain[1])
    for empty in ((deltas[:, :0], references[:, :0], sizes), (deltas[:0], references[:0], sizes[:0])):
        boxes, valid = decode_boxes(*empty)
        assert boxes.shape == empty[0].shape
        assert valid.shape == empty[0].shape[:2]


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    """opcheck, also of inputs that are not contiguous, one graph, and no gradient."""
    deltas, references, scores = scene(5, device=device)
    sizes = SIZES.to(device)
    turned = deltas.transpose(0, 1).contiguous().transpose(0, 1)
    for given_deltas, score, min_side, threshold in (
        (deltas, scores, 1.0, 0.5),
        (turned, None, None, None),
        (deltas.bfloat16(), scores.double(), None, 0.1),
    ):
        filters = (score, list(WEIGHTS), 4.0, min_side, threshold)
        torch.library.opcheck(op._decode_boxes, (given_deltas, references, sizes, *filters))
    options = {"scores": scores, "weights": WEIGHTS, "min_side": 1.0, "score_threshold": 0.1}
    compiled = torch.compile(decode_boxes, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        compiled(deltas, references, sizes, **options),
        decode_boxes(deltas, references, sizes, **options),
        strict=True,
    ):
        assert ours.equal(eager)
    assert not decode_boxes(deltas.clone().requires_grad_(), references, sizes)[0].requires_grad


def test_autocast_does_not_round() -> None:
    deltas, references, _ = scene(9)
    plain = decode_boxes(deltas, references, SIZES)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_boxes(deltas, references, SIZES)[0].equal(plain)


def test_sizes_of_one_compile() -> None:
    """Triton makes constants of them, with which not everything works that works with a variable."""
    pytest.importorskip("triton")
    from fastmrcnn.kernels.box_decode import kernel

    if interpreting():
        pytest.skip("nothing is compiled when interpreting")
    row, sizes = torch.empty(1, 1, 4, device="meta"), torch.empty(1, 2, device="meta")
    for dtype, score, filters in (
        (torch.float32, row[..., 0], (1.0, 1.0)),
        (torch.float64, None, (None,) * 2),
    ):
        launch = kernel._launch(row.to(dtype), row.to(dtype), sizes, score, WEIGHTS, 4.0, *filters)[2]
        launch.spec("", "", 0, 0).compile()


def test_bad_input() -> None:
    deltas, references, scores = scene(3)
    arguments = {"deltas": deltas, "references": references, "sizes": SIZES}
    for change, message in (
        ({"deltas": deltas[0]}, r"deltas must be \(N, B, 4\), got \(3, 4\)"),
        ({"deltas": deltas.long()}, "deltas must be floating point, got torch.int64"),
        (
            {"references": references[:, :2]},
            r"references must be \(2, 3, 4\) or \(1, 3, 4\) .* got",
        ),
        ({"references": references.to("meta")}, "references must be on cpu as deltas are, got meta"),
        ({"sizes": SIZES[:1]}, r"sizes must be \(2, 2\) for deltas \(2, 3, 4\), got \(1, 2\)"),
        ({"scores": scores[0]}, r"scores must be \(2, 3\) .* got \(3,\)"),
        ({"scores": scores.long()}, "scores must be floating point, got torch.int64"),
        ({"weights": (1.0, 1.0)}, r"weights must be four numbers other than 0, got \(1.0, 1.0\)"),
        ({"weights": (1, 0, 1, 1)}, r"weights must be four numbers other than 0"),
        ({"score_threshold": 0.5}, "score_threshold needs scores"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_boxes(**{**arguments, **change})
