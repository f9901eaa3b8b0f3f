"""What our operators become in ONNX: standard operators alone, of fixed shape between them.

Each function has the arguments of its operator (`kernels/<operator>/op.py`), tensors as ONNX values and the
rest as numbers, and adds nodes to the graph that is being written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmrcnn.config.model import RoiConfig
from fastmrcnn.errors import UserError
from fastmrcnn.kernels.level_assign.reference import first_threshold
from fastmrcnn.kernels.nms.cpu import round_down_to_float32

Value = Any  # of a graph that is being written
LOWEST = -3.4028234663852886e38  # of float32


def translations(groups: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """A function for each operator of ours, for torch.onnx.export's custom_translation_table.

    Args:
        groups: the most that NMS tells apart: levels or classes.
    """
    ops = torch.ops.fastmrcnn_kernels

    def padded_nms(
        boxes: Value, scores: Value, of_group: Value, valid: Value, iou_threshold: float, max_out: int
    ) -> tuple[Value, Value]:
        return nms(boxes, scores, of_group, valid, iou_threshold, max_out, groups)

    return {
        ops.padded_nms.default: padded_nms,
        ops.roi_align.default: roi_align,
        ops.roi_max.default: roi_max,
        ops.assign_levels.default: assign_levels,
        ops.class_mask_logits.default: class_mask_logits,
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.prims.signbit.default: lambda x: _opset().Less(x, _numbers(0.0)),
    }


def nms(
    boxes: Value,
    scores: Value,
    of_group: Value | None,
    valid: Value | None,
    iou_threshold: float,
    max_out: int,
    groups: int,
) -> tuple[Value, Value]:
    """As `kernels.padded_nms`, with an axis of classes for the groups.

    ONNX's operator lists what it keeps, however much that is. Marked in a map of all boxes, the list has a
    fixed shape again; and TopK, which takes equal scores by rising index, brings the order.
    """
    op = _opset()
    images, count, _ = boxes.shape
    if valid is not None:
        scores = op.Where(valid, scores, _numbers(LOWEST))
    by_group = op.Unsqueeze(scores, _integers([1]))  # (N, 1, P)
    if of_group is not None:
        numbers = _integers(list(range(groups)), (1, groups, 1))
        own = op.Equal(op.Cast(op.Unsqueeze(of_group, _integers([1])), to=_INT64), numbers)
        by_group = op.Where(own, by_group, _numbers(LOWEST))  # (N, groups, P)
    chosen = op.NonMaxSuppression(
        boxes,
        by_group,
        _integers([max_out]),
        _numbers([round_down_to_float32(iou_threshold)]),
        _numbers([LOWEST]),
    )  # (kept, 3): image, group, box
    place = op.Gather(chosen, _integers([0, 2]), axis=1)
    ones = op.Cast(op.GreaterOrEqual(op.Gather(chosen, _integers([0]), axis=1), _integers([0])), to=_FLOAT)
    marks = op.ScatterND(_zeros((int(images), int(count))), place, op.Reshape(ones, _integers([-1])))
    ranked = op.Where(op.Greater(marks, _numbers(0.0)), scores, _numbers(LOWEST))
    top, index = op.TopK(ranked, _integers([max_out]), axis=1, largest=1, sorted=1)
    real = op.Greater(top, _numbers(LOWEST))
    return op.Where(real, index, _integers([0])), real


def roi_align(
    features: Sequence[Value],
    boxes: Value,
    batch_index: Value | None,
    valid: Value | None,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    k_min: int,
) -> Value:
    """As `kernels.multilevel_roi_align`; what slots that are not valid hold is unspecified."""
    op = _opset()
    how = {
        "mode": "avg",
        "output_height": output_size[0],
        "output_width": output_size[1],
        "sampling_ratio": sampling_ratio,
        "coordinate_transformation_mode": "half_pixel" if aligned else "output_half_pixel",
    }
    # The operator wants maps and boxes of one type, and fp16 knows no half pixels beyond 1024.
    wide = [op.Cast(feature, to=_FLOAT) for feature in features]
    image = _images(features[0], boxes, batch_index)
    scale = spatial_scales[0]
    if len(features) == 1 and scale != 1.0:
        pooled = op.RoiAlign(wide[0], boxes, image, spatial_scale=scale, **how)
    elif len(features) == 1:  # of RoIWarp, which pools level by level and adds up
        pooled = op.RoiAlign(wide[0], boxes, image, spatial_scale=scale, **how)
        pooled = op.Where(op.Reshape(valid, _integers([-1, 1, 1, 1])), pooled, _numbers(0.0))
    elif aligned:
        level = _levels(boxes, len(features), canonical_size, canonical_level, k_min)
        canvas, corners = _on_one_canvas(features)
        shift = op.Gather(_numbers(corners), level, axis=0)
        scales = op.Gather(_numbers([[scale] for scale in spatial_scales]), level, axis=0)
        placed = op.Add(op.Mul(boxes, scales), shift)
        pooled = op.RoiAlign(op.Cast(canvas, to=_FLOAT), placed, image, spatial_scale=1.0, **how)
    else:

        def of_level(index: int, own: Value) -> Value:
            return op.RoiAlign(wide[index], own, image, spatial_scale=spatial_scales[index], **how)

        level = _levels(boxes, len(features), canonical_size, canonical_level, k_min)
        pooled = _by_level(of_level, boxes, level, len(features))
    return op.CastLike(pooled, features[0])


def roi_max(
    features: Sequence[Value],
    boxes: Value,
    batch_index: Value | None,
    valid: Value | None,
    kind: str,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    k_min: int,
) -> tuple[Value, Value]:
    """As `kernels.multilevel_roi_pool`, and `multilevel_roi_align_max` for a fixed number of samples.

    Its second result, what won, is for the gradient alone.
    """
    op = _opset()
    wide = [op.Cast(feature, to=_FLOAT) for feature in features]
    image = _images(features[0], boxes, batch_index)
    place = op.Reshape(op.Cast(image, to=_FLOAT), _integers([-1, 1]))
    height, width = output_size

    def of_level(index: int, own: Value) -> Value:
        scale = spatial_scales[index]
        if kind == "pool":
            rois = op.Concat(place, own, axis=1)
            return op.MaxRoiPool(wide[index], rois, pooled_shape=[height, width], spatial_scale=scale)
        samples = op.RoiAlign(  # each sample is the mean of a bin of its own
            wide[index],
            own,
            image,
            mode="avg",
            output_height=height * sampling_ratio,
            output_width=width * sampling_ratio,
            sampling_ratio=1,
            spatial_scale=scale,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        )
        side = [sampling_ratio, sampling_ratio]
        largest, _ = op.MaxPool(samples, kernel_shape=side, strides=side)
        return largest

    if len(features) == 1:
        pooled = of_level(0, boxes)
    else:
        level = _levels(boxes, len(features), canonical_size, canonical_level, k_min)
        pooled = _by_level(of_level, boxes, level, len(features))
    return op.CastLike(pooled, features[0]), _integers([0])


def check_operators(roi: RoiConfig) -> None:
    """UserError for what ONNX has no operator of."""
    if roi.mode == "max" and roi.op == "warp":
        raise UserError(
            "ONNX has no RoIWarp of the largest sample (model.roi.op=warp, mode=max); use --format pt2"
        )
    if roi.mode == "max" and roi.op == "align" and roi.sampling_ratio <= 0:
        raise UserError(
            "ONNX has no RoIAlign of the largest of an adaptive number of samples (model.roi.mode=max with "
            "model.roi.sampling_ratio=0); use --format pt2"
        )


def stable_sort(
    values: Value, *, stable: bool, dim: int = -1, descending: bool = False
) -> tuple[Value, Value]:
    """TopK of all: it takes equal values by rising index."""
    op = _opset()
    count = int(values.shape[dim])
    return op.TopK(values, _integers([count]), axis=dim, largest=int(descending), sorted=1)


def assign_levels(boxes: Value, k_min: int, k_max: int, canonical_size: float, canonical_level: int) -> Value:
    """As `kernels.assign_levels`, of boxes (N, S, 4) or (R, 4)."""
    op = _opset()
    shape = [int(side) for side in boxes.shape[:-1]]
    if k_min == k_max:
        return op.Cast(op.ConstantOfShape(_integers(shape)), to=_INT32)
    flat = op.Reshape(boxes, _integers([-1, 4]))
    level = _levels(flat, k_max - k_min + 1, canonical_size, canonical_level, k_min)
    return op.Cast(op.Reshape(level, _integers(shape)), to=_INT32)


def _by_level(pool: Callable[[int, Value], Value], boxes: Value, level: Value, levels: int) -> Value:
    """Each box from its own level. On the others it is empty, and costs little."""
    op = _opset()
    pooled = None
    for index in range(levels):
        own = op.Equal(level, _integers([index]))
        part = pool(index, op.Where(op.Reshape(own, _integers([-1, 1])), boxes, _numbers(0.0)))
        keep = op.Reshape(own, _integers([-1, 1, 1, 1]))
        pooled = part if pooled is None else op.Where(keep, part, pooled)
    return pooled


def class_mask_logits(features: Value, weight: Value, bias: Value | None, classes: Value) -> Value:
    """As `kernels.class_mask_logits`: of each slot the product with the row of its class."""
    op = _opset()
    slots, channels, height, width = (int(side) for side in features.shape)
    if int(weight.shape[0]) == 1:  # class-agnostic
        classes = op.Mul(classes, _integers([0]))
    rows = op.Reshape(op.Gather(weight, classes, axis=0), _integers([slots, 1, channels]))
    flat = op.Reshape(features, _integers([slots, channels, height * width]))
    logits = op.Cast(op.MatMul(op.CastLike(rows, flat), flat), to=_FLOAT)
    if bias is not None:
        own = op.Cast(op.Gather(bias, classes, axis=0), to=_FLOAT)
        logits = op.Add(logits, op.Reshape(own, _integers([slots, 1, 1])))
    return op.Reshape(logits, _integers([slots, height, width]))


def _levels(boxes: Value, levels: int, canonical_size: float, canonical_level: int, k_min: int) -> Value:
    """(R,) int64, as `kernels.assign_levels`."""
    op = _opset()
    x0, y0, x1, y1 = op.Split(op.Cast(boxes, to=_FLOAT), axis=1, num_outputs=4)
    area = op.Mul(op.Sub(x1, x0), op.Sub(y1, y0))  # (R, 1)
    first = first_threshold(k_min, canonical_size, canonical_level)
    borders = _numbers([first * 4.0**index for index in range(levels - 1)])
    above = op.Cast(op.GreaterOrEqual(area, borders), to=_INT64)
    return op.ReduceSum(above, _integers([1]), keepdims=0)


def _on_one_canvas(features: Sequence[Value]) -> tuple[Value, list[list[float]]]:
    """All levels in one map, so that boxes are pooled once; and where each begins, as x, y, x, y.

    Boxes lie within their image. Half-pixel samples then go no further than half a pixel off the map, where
    the value is that of the border: so does a copy of the border give, a pixel wide. The finest level lies
    above, the others below it side by side.
    """
    op = _opset()
    heights, widths = ([int(f.shape[axis]) + 2 for f in features] for axis in (2, 3))
    width = max(widths[0], sum(widths[1:]))
    rimmed = [op.Pad(f, _integers([0, 0, 1, 1, 0, 0, 1, 1]), mode="edge") for f in features]

    def filled(value: Value, below: int, right: int) -> Value:
        if below == right == 0:
            return value
        return op.Pad(value, _integers([0, 0, 0, 0, 0, 0, below, right]), mode="constant")

    lower = [filled(value, heights[1] - own, 0) for value, own in zip(rimmed[1:], heights[1:], strict=True)]
    row = filled(op.Concat(*lower, axis=3), 0, width - sum(widths[1:]))
    canvas = op.Concat(filled(rimmed[0], 0, width - widths[0]), row, axis=2)
    corners = [[1.0, 1.0, 1.0, 1.0]]
    for index in range(1, len(features)):
        x, y = float(sum(widths[1:index]) + 1), float(heights[0] + 1)
        corners.append([x, y, x, y])
    return canvas, corners


def _images(feature: Value, boxes: Value, batch_index: Value | None) -> Value:
    """(R,) int64: image of each box. Without an index each image has as many, one after another."""
    if batch_index is not None:
        return _opset().Cast(batch_index, to=_INT64)
    images, rois = int(feature.shape[0]), int(boxes.shape[0])
    return _integers([index * images // rois for index in range(rois)])


_FLOAT, _INT32, _INT64 = 1, 6, 7  # of onnx.TensorProto


def _opset() -> Any:
    from onnxscript import opset18

    return opset18


def _integers(values: Sequence[int], shape: Sequence[int] | None = None) -> Value:
    from onnxscript import ir

    tensor = torch.tensor(values, dtype=torch.int64).reshape(tuple(shape) if shape else (len(values),))
    return _opset().Constant(value=ir.tensor(tensor.numpy()))


def _numbers(values: Any) -> Value:
    from onnxscript import ir

    return _opset().Constant(value=ir.tensor(torch.tensor(values, dtype=torch.float32).numpy()))


def _zeros(shape: tuple[int, ...]) -> Value:
    from onnxscript import ir

    value = ir.tensor(torch.zeros(1).numpy())
    return _opset().ConstantOfShape(_integers(shape), value=value)
