"""Sigmoid cross-entropy on the mask channel of each slot's class, in Triton.

Forward reads one channel of each slot and nothing else of the logits. Backward writes the dense gradient
once: each program fills a stretch of a slot with zeros in the widest stores there are, then puts the
class's pixels that lie in its stretch over them while they are still in the cache. Both sums have a fixed
order, so the results repeat bit for bit.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, plain
from ..common.library import sum_dtype

PIXELS = 1024  # at once
SLOTS = 1024  # at once, in the last sum
STRETCH = 16384  # elements of the gradient a program writes
ZEROS = 4096  # at once
AXES = ("stride_slot", "stride_channel", "stride_y", "stride_x")


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.mask_loss`."""
    loss, divisor, launches = _forward(logits, classes, targets, weight)
    for launch in launches:
        launch.run()
    return loss, divisor


def mask_loss_backward(
    grad: Tensor, divisor: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    """See `reference.mask_loss_backward`."""
    grad_logits, launch = _backward(grad, divisor, logits, classes, targets, weight)
    if logits.shape[0]:
        launch.run()
    return grad_logits


def _forward(
    logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, list[Launch]]:
    slots, _, height, width = logits.shape
    loss, divisor, slot_sums = (
        logits.new_empty(shape, dtype=sum_dtype(logits)) for shape in ((), (), (slots,))
    )
    inputs = _input_arguments(logits, classes, targets, weight)
    mean = {
        "slot_sum_ptr": slot_sums,
        "weight_ptr": inputs["weight_ptr"],
        "loss_ptr": loss,
        "divisor_ptr": divisor,
        "slots": slots,
        "pixels": height * width,
        "SLOTS": SLOTS,
    }
    launches = [Launch(_slot_loss_kernel, (slots,), {**inputs, "slot_sum_ptr": slot_sums})] if slots else []
    return loss, divisor, [*launches, Launch(_mean_kernel, (1,), mean)]


def _backward(
    grad: Tensor, divisor: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> tuple[Tensor, Launch]:
    slots, K, height, width = logits.shape
    slot_size = K * height * width
    grad_logits = torch.empty_like(logits)
    # The elements of a slot lie together in NCHW and channels_last, but not in every dense layout.
    slot_is_dense = slots == 1 or grad_logits.stride(0) == slot_size
    if not slot_is_dense:
        grad_logits.zero_()
    arguments = {
        "grad_ptr": grad,
        "divisor_ptr": divisor,
        **_input_arguments(logits, classes, targets, weight),
        "grad_logits_ptr": grad_logits,
        **{f"grad_{axis}": grad_logits.stride(i) for i, axis in enumerate(AXES)},
        "FILL": slot_is_dense,
        "STRETCH": STRETCH,
        "ZEROS": ZEROS,
    }
    stretches = triton.cdiv(slot_size, STRETCH) if slot_is_dense else 1
    return grad_logits, Launch(_grad_kernel, (slots, stretches), arguments, num_warps=8)


def _input_arguments(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> dict[str, Any]:
    _, K, height, width = logits.shape
    return {
        "logits_ptr": logits,
        "classes_ptr": classes.contiguous(),
        "targets_ptr": plain(targets),
        "weight_ptr": plain(weight),
        **{axis: logits.stride(i) for i, axis in enumerate(AXES)},
        "K": K,
        "width": width,
        "pixels": height * width,
        "PIXELS": PIXELS,
    }


def compile_specs() -> list[CompileSpec]:
    """1024 slots, 80 classes, 28x28, targets of one byte a pixel."""
    slots, K, side = 1024, 80, 28
    pixels = slots * side * side  # of one channel
    classes = torch.empty((slots,), dtype=torch.int64, device="meta")
    targets = classes.new_empty((slots, side, side), dtype=torch.uint8)
    weight = classes.new_empty((slots,), dtype=torch.float32)
    scalar = weight.new_empty(())
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    specs = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for layout, form in formats.items():
            logits = torch.empty((slots, K, side, side), dtype=dtype, device="meta", memory_format=form)
            _, _, (forward, mean) = _forward(logits, classes, targets, weight)
            grad, backward = _backward(scalar, scalar, logits, classes, targets, weight)
            variant = f"{name} {layout}"
            read = pixels * (dtype.itemsize + 1) + 12 * slots
            # Max, abs, exp, log and the sums of a pixel's cross-entropy; exp, division and products of its
            # gradient.
            specs.append(forward.spec("mask_loss forward", variant, read + 4 * slots, 9 * pixels))
            specs.append(backward.spec("mask_loss backward", variant, read + grad.nbytes, 6 * pixels))
    return [*specs, mean.spec("mask_loss mean", "fp32", 8 * slots + 8, 2 * slots)]


@triton.jit
def _slot_loss_kernel(
    logits_ptr,  # (slots, K, height, width) floating point
    classes_ptr,  # (slots,) int
    targets_ptr,  # (slots, height, width) any
    weight_ptr,  # (slots,) any
    slot_sum_ptr,  # (slots,) fp32 or fp64, written
    stride_slot,
    stride_channel,
    stride_y,
    stride_x,
    K,
    width,
    pixels,
    PIXELS: tl.constexpr,
):
    """Weight times the sum over a slot's pixels."""
    slot = tl.program_id(0).to(tl.int64)
    dtype = slot_sum_ptr.dtype.element_ty
    weight, channel = _slot(classes_ptr, weight_ptr, slot, K, dtype)
    logits_ptr += slot * stride_slot + channel * stride_channel
    counted = tl.where(weight != 0, pixels, 0)
    sums = tl.zeros((PIXELS,), dtype)
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        counts = pixel < counted
        x, target = _pixels(
            logits_ptr, targets_ptr + slot * pixels, pixel, counts, stride_y, stride_x, width, dtype
        )
        cross_entropy = tl.maximum(x, 0.0) - x * target + tl.log(1.0 + tl.exp(-tl.abs(x)))
        sums += tl.where(counts, cross_entropy, 0.0)
    tl.store(slot_sum_ptr + slot, weight * tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["slots"])
def _mean_kernel(
    slot_sum_ptr,  # (slots,) fp32 or fp64
    weight_ptr,  # (slots,) any
    loss_ptr,  # () as slot_sum, written
    divisor_ptr,  # () as slot_sum, written
    slots,
    pixels,
    SLOTS: tl.constexpr,
):
    dtype = loss_ptr.dtype.element_ty
    sums = tl.zeros((SLOTS,), dtype)
    weights = tl.zeros((SLOTS,), dtype)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        sums += tl.load(slot_sum_ptr + slot, mask=slot < slots, other=0.0)
        weights += tl.load(weight_ptr + slot, mask=slot < slots, other=0).to(dtype)
    divisor = tl.maximum(tl.sum(weights, axis=0), 1.0) * pixels
    tl.store(divisor_ptr, divisor)
    tl.store(loss_ptr, tl.sum(sums, axis=0) / divisor)


@triton.jit
def _grad_kernel(
    grad_ptr,  # () fp32 or fp64
    divisor_ptr,  # () fp32 or fp64
    logits_ptr,  # (slots, K, height, width) floating point
    classes_ptr,  # (slots,) int
    targets_ptr,  # (slots, height, width) any
    weight_ptr,  # (slots,) any
    grad_logits_ptr,  # as logits, written; zero if not FILL
    stride_slot,
    stride_channel,
    stride_y,
    stride_x,
    grad_stride_slot,
    grad_stride_channel,
    grad_stride_y,
    grad_stride_x,
    K,
    width,
    pixels,
    FILL: tl.constexpr,
    STRETCH: tl.constexpr,
    ZEROS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    dtype = divisor_ptr.dtype.element_ty
    begin = tl.program_id(1).to(tl.int64) * STRETCH
    grad_logits_ptr += slot * grad_stride_slot
    if FILL:
        zeros = tl.zeros((ZEROS,), grad_logits_ptr.dtype.element_ty)
        for first in tl.static_range(0, STRETCH, ZEROS):
            place = begin + first + tl.arange(0, ZEROS)
            tl.store(grad_logits_ptr + place, zeros, mask=place < tl.cast(K, tl.int64) * pixels)
        tl.debug_barrier()  # the zeros of all threads come before the pixels below

    weight, channel = _slot(classes_ptr, weight_ptr, slot, K, dtype)
    counted = tl.where(weight != 0, pixels, 0)
    scale = weight * (tl.load(grad_ptr).to(dtype) / tl.load(divisor_ptr))
    logits_ptr += slot * stride_slot + channel * stride_channel
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        counts = pixel < counted
        row, column = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
        element = channel * grad_stride_channel + row * grad_stride_y + column * grad_stride_x
        if FILL:
            counts = counts & (element >= begin) & (element < begin + STRETCH)
        x, target = _pixels(
            logits_ptr, targets_ptr + slot * pixels, pixel, counts, stride_y, stride_x, width, dtype
        )
        probability = 1.0 / (1.0 + tl.exp(-x))
        grad_x = ((probability - target) * scale).to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_logits_ptr + element, grad_x, mask=counts)


@triton.jit
def _slot(classes_ptr, weight_ptr, slot, K, dtype: tl.constexpr):
    """Weight of a slot, 0 if its class is out of range, and the channel to read, which is in range."""
    weight = tl.load(weight_ptr + slot).to(dtype)
    channel = tl.load(classes_ptr + slot).to(tl.int64)
    if K == 1:
        channel = channel * 0
    in_range = (channel >= 0) & (channel < K)
    return tl.where(in_range, weight, 0.0), tl.where(in_range, channel, 0)


@triton.jit
def _pixels(channel_ptr, targets_ptr, pixel, mask, stride_y, stride_x, width, dtype: tl.constexpr):
    """Logits and targets of some pixels of one channel."""
    offset = (pixel // width).to(tl.int64) * stride_y + (pixel % width).to(tl.int64) * stride_x
    x = tl.load(channel_ptr + offset, mask=mask, other=0.0).to(dtype)
    return x, tl.load(targets_ptr + pixel, mask=mask, other=0).to(dtype)
