"""Sigmoid cross-entropy on the mask channel of each slot's class, in Triton.

Forward reads one channel of each slot and nothing else of the logits. Backward writes the dense gradient
once: each program fills a stretch of a slot with zeros in the widest stores there are, then puts the
class's pixels that lie in its stretch over them while they are still in the cache. Both sums have a fixed
order, so the results repeat bit for bit.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._spec import CompileSpec
from .reference import sum_dtype

PIXELS = 1024  # at once
SLOTS = 1024  # at once, in the last sum
STRETCH = 16384  # elements of the gradient a program writes
ZEROS = 4096  # at once


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.mask_loss`."""
    slots, K, height, width = logits.shape
    dtype = sum_dtype(logits)
    slot_sums = logits.new_empty((slots,), dtype=dtype)
    loss = logits.new_empty((), dtype=dtype)
    divisor = logits.new_empty((), dtype=dtype)
    weight = _plain(weight)
    if slots:
        _slot_loss_kernel[(slots,)](
            logits,
            classes.contiguous(),
            _plain(targets),
            weight,
            slot_sums,
            *logits.stride(),
            K,
            width,
            height * width,
            PIXELS=PIXELS,
            num_warps=4,
        )
    _mean_kernel[(1,)](slot_sums, weight, loss, divisor, slots, height * width, SLOTS=SLOTS, num_warps=4)
    return loss, divisor


def mask_loss_backward(
    grad: Tensor, divisor: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    """See `reference.mask_loss_backward`."""
    slots, K, height, width = logits.shape
    slot_size = K * height * width
    grad_logits = torch.empty_like(logits)
    if not slots:
        return grad_logits
    # The elements of a slot lie together in NCHW and channels_last, but not in every dense layout.
    slot_is_dense = slots == 1 or grad_logits.stride(0) == slot_size
    if not slot_is_dense:
        grad_logits.zero_()
    stretches = triton.cdiv(slot_size, STRETCH) if slot_is_dense else 1
    _grad_kernel[(slots, stretches)](
        grad,
        divisor,
        logits,
        classes.contiguous(),
        _plain(targets),
        _plain(weight),
        grad_logits,
        *logits.stride(),
        *grad_logits.stride(),
        K,
        width,
        height * width,
        FILL=slot_is_dense,
        STRETCH=STRETCH,
        ZEROS=ZEROS,
        PIXELS=PIXELS,
        num_warps=8,
    )
    return grad_logits


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and bytes in the place of bools."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def compile_specs() -> list[CompileSpec]:
    """1024 slots, 80 classes, 28x28, targets of one byte a pixel."""
    slots, K, side = 1024, 80, 28
    pixels = side * side
    layouts = {
        "nchw": (K * pixels, pixels, side, 1),
        "channels_last": (K * pixels, 1, side * K, K),
    }
    axes = ("stride_slot", "stride_channel", "stride_y", "stride_x")
    specs = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for layout, strides in layouts.items():
            shared = {
                "logits_ptr": dtype,
                "classes_ptr": torch.int64,
                "targets_ptr": torch.uint8,
                "weight_ptr": torch.float32,
                **dict(zip(axes, strides, strict=True)),
                "K": K,
                "width": side,
                "pixels": pixels,
                "PIXELS": PIXELS,
            }
            forward = {**shared, "slot_sum_ptr": torch.float32}
            backward = {
                **shared,
                "grad_ptr": torch.float32,
                "divisor_ptr": torch.float32,
                "grad_logits_ptr": dtype,
                **{f"grad_{axis}": stride for axis, stride in zip(axes, strides, strict=True)},
                "FILL": True,
                "STRETCH": STRETCH,
                "ZEROS": ZEROS,
            }
            read = slots * (pixels * (dtype.itemsize + 1) + 12)
            written = slots * K * pixels * dtype.itemsize
            programs = slots * triton.cdiv(K * pixels, STRETCH)
            specs += [
                CompileSpec(
                    "mask_loss forward",
                    f"{name} {layout}",
                    _slot_loss_kernel,
                    forward,
                    slots,
                    read + slots * 4,
                    9 * slots * pixels,  # max, abs, exp, log and the sums of one pixel's cross-entropy
                ),
                CompileSpec(
                    "mask_loss backward",
                    f"{name} {layout}",
                    _grad_kernel,
                    backward,
                    programs,
                    read + written,
                    6 * slots * pixels,  # exp, division and the products of one pixel's gradient
                    num_warps=8,
                ),
            ]
    arguments = {
        "slot_sum_ptr": torch.float32,
        "weight_ptr": torch.float32,
        "loss_ptr": torch.float32,
        "divisor_ptr": torch.float32,
        "slots": slots,
        "pixels": pixels,
        "SLOTS": SLOTS,
    }
    specs.append(CompileSpec("mask_loss mean", "fp32", _mean_kernel, arguments, 1, 8 * slots + 8, 2 * slots))
    return specs


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


@triton.jit
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
    begin = tl.program_id(1) * STRETCH
    grad_logits_ptr += slot * grad_stride_slot
    if FILL:
        zeros = tl.zeros((ZEROS,), grad_logits_ptr.dtype.element_ty)
        for first in tl.static_range(0, STRETCH, ZEROS):
            place = begin + first + tl.arange(0, ZEROS)
            tl.store(grad_logits_ptr + place, zeros, mask=place < K * pixels)
        tl.debug_barrier()  # the zeros of all threads come before the pixels below

    weight, channel = _slot(classes_ptr, weight_ptr, slot, K, dtype)
    counted = tl.where(weight != 0, pixels, 0)
    scale = weight * (tl.load(grad_ptr).to(dtype) / tl.load(divisor_ptr))
    logits_ptr += slot * stride_slot + channel * stride_channel
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        counts = pixel < counted
        element = channel * grad_stride_channel
        element += (pixel // width).to(tl.int64) * grad_stride_y + (pixel % width) * grad_stride_x
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
