"""Our operators in ONNX: what onnxruntime and OpenVINO make of them is what ours give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmrcnn.deployment.onnx_file import to_onnx
from fastmrcnn.kernels import (
    class_mask_logits,
    decode_boxes,
    multilevel_roi_align,
    multilevel_roi_align_max,
    multilevel_roi_pool,
    multilevel_roi_warp,
    padded_nms,
)

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def run(model: Any, inputs: tuple[Tensor, ...], engine: str) -> list[Tensor]:
    feeds = [np.ascontiguousarray(value.numpy()) for value in inputs]
    if engine == "openvino":
        openvino = pytest.importorskip("openvino")
        core = openvino.Core()
        # Without the hint it rounds products to bf16 on processors that have it.
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", hint)
        found = compiled(dict(enumerate(feeds)))
        return [torch.from_numpy(found[port].copy()) for port in compiled.outputs]
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(value) for value in session.run(None, dict(zip(names, feeds, strict=True)))]


def check(
    function: Callable[..., Any],
    *inputs: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    engines: tuple[str, ...] = ("onnxruntime", "openvino"),
) -> None:
    """The same of the function and of its ONNX model, which has no operators but ONNX's."""
    wanted = function(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    names = [f"in{index}" for index in range(len(inputs))]
    model = to_onnx(Call(function), inputs, names, [f"out{i}" for i in range(len(wanted))], 5)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert "NonZero" not in {node.op_type for node in model.graph.node}
    for engine in engines:
        for ours, theirs in zip(wanted, run(model, inputs, engine), strict=True):
            torch.testing.assert_close(
                theirs.to(ours.dtype),
                ours,
                rtol=rtol,
                atol=atol,
                msg=lambda text, engine=engine: f"{engine}: {text}",
            )


def pyramid(seed: int = 0) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 64 >> level, 96 >> level, generator=random) for level in range(4))


def boxes_on(height: int, width: int, count: int = 40) -> Tensor:
    """(2, count, 4) of all levels, within the image; some reach its borders, some are thin or empty."""
    random = torch.Generator().manual_seed(1)
    side = torch.exp(torch.rand(2, count, 2, generator=random) * 5)
    corner = torch.rand(2, count, 2, generator=random) * torch.tensor([width, height])
    boxes = torch.cat([corner - side / 2, corner + side / 2], -1)
    boxes[:, 0] = torch.tensor([0.0, 0.0, width, height])
    boxes[:, 1] = torch.tensor([width - 1.5, 3.0, width, height])
    boxes[:, 2] = torch.tensor([0.0, height - 0.5, width, height])
    limit = torch.tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
POOLS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "adaptive": (multilevel_roi_align, {"aligned": True}),
    "aligned": (multilevel_roi_align, {"aligned": True, "sampling_ratio": 2}),
    "not aligned": (multilevel_roi_align, {"aligned": False, "sampling_ratio": 2}),
    "largest": (multilevel_roi_align_max, {"aligned": False, "sampling_ratio": 2}),
    "pool": (multilevel_roi_pool, {}),
    "warp": (multilevel_roi_warp, {"sampling_ratio": 2}),
}


def pooled_by(kinds: Sequence[str], levels: int) -> Callable[..., tuple[Tensor, ...]]:
    """Of boxes and maps, what each kind of pooling gives."""

    def pooled(boxes: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        # Small boxes are on every level, so that few pixels will do.
        where: dict[str, Any] = {"spatial_scales": SCALES[:levels], "canonical_size": 48.0}
        where["valid"] = torch.ones(boxes.shape[:2], dtype=torch.bool)
        return tuple(POOLS[kind][0](list(features), boxes, 7, **where, **POOLS[kind][1]) for kind in kinds)

    return pooled


@pytest.mark.parametrize("levels", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_pooling(levels: int) -> None:
    pooled = pooled_by([kind for kind in POOLS if kind != "pool"], levels)
    # Places on a canvas of all levels are rounded more coarsely than on one level.
    check(pooled, boxes_on(256, 384), *pyramid()[:levels], atol=1e-4)


@pytest.mark.slow
def test_pooling_of_whole_pixels() -> None:
    """OpenVINO's own operator for it is another."""
    check(pooled_by(["pool"], 4), boxes_on(256, 384), *pyramid(), engines=("onnxruntime",))


def test_nms_keeps_the_same_boxes_in_the_same_order() -> None:
    random = torch.Generator().manual_seed(0)
    boxes = boxes_on(64, 64, 200)
    boxes[:, 100:] = boxes[:, :100] + torch.rand(2, 100, 4, generator=random)
    scores = torch.randn(2, 200, generator=random)
    of_group = torch.randint(0, 3, (2, 200), generator=random)
    valid = torch.rand(2, 200, generator=random) > 0.1
    valid[1] = False

    def kept(boxes: Tensor, scores: Tensor, of_group: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        alone = padded_nms(boxes, scores, None, valid, 0.5, 60)
        return (*padded_nms(boxes, scores, of_group, valid, 0.5, 60), *alone)

    real = kept(boxes, scores, of_group, valid)[1]
    assert real[0].any()
    assert not real[1].any()
    check(kept, boxes, scores, of_group, valid, rtol=0, atol=0)
    scores[:, 50:60] = scores[:, :1]  # they tie, and OpenVINO has no order for that
    check(kept, boxes, scores, of_group, valid, rtol=0, atol=0, engines=("onnxruntime",))


@pytest.mark.parametrize("classes", [1, 4])
def test_masks_of_one_class(classes: int) -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, 8, 8, generator=random)
    weight, bias = torch.randn(classes, 5, 1, 1, generator=random), torch.randn(classes, generator=random)
    own = torch.randint(0, 4, (6,), generator=random)
    check(lambda features, own: class_mask_logits(features, weight, bias, own), features, own)


def test_boxes_from_deltas() -> None:
    random = torch.Generator().manual_seed(0)
    references = boxes_on(64, 96)
    deltas = torch.randn(*references.shape, generator=random)
    deltas[0, 0] = torch.tensor([0.0, 0.0, float("inf"), 1.0])
    deltas[0, 1] = float("nan")
    scores = torch.rand(references.shape[:2], generator=random)
    sizes = torch.tensor([[64, 96], [50, 70]], dtype=torch.int32)

    def decoded(deltas: Tensor, references: Tensor, scores: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return decode_boxes(deltas, references, sizes, scores=scores, min_side=0.0, score_threshold=0.3)

    check(decoded, deltas, references, scores, sizes, atol=1e-4)
