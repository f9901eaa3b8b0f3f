"""The mask loss against float64 arithmetic on the gathered channel and detectron2's results.

CPU tensors run the reference, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import INTEGERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.kernels.common.library import runs_triton
from fastmrcnn.kernels.mask_loss import op, reference
from fastmrcnn.kernels.mask_loss.op import mask_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Error of the gradient relative to its largest entry: a rounding of the result, and a few of float32.
GRAD_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LOSS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


def inputs(
    slots: int = 7,
    num_classes: int = 5,
    side: int = 6,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, classes, soft targets and weights; two slots do not count, and hold what must not leak."""
    r = torch.Generator().manual_seed(seed)
    logits = torch.randn(slots, num_classes, side, side, generator=r) * 4
    classes = torch.randint(0, num_classes, (slots,), generator=r)
    targets = torch.rand(slots, side, side, generator=r)
    weight = torch.ones(slots)
    for slot in (1, 4):
        if slot < slots:
            weight[slot], classes[slot], logits[slot], targets[slot] = 0, num_classes, torch.nan, torch.inf
    logits = logits.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    return logits.requires_grad_(), classes.to(device), targets.to(device), weight.to(device)


def exact(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and dense gradient in float64, slot by slot."""
    logits = logits.detach().double().cpu().requires_grad_()
    total = logits.new_zeros(())
    for slot in weight.cpu().nonzero()[:, 0].tolist():
        channel = logits[slot, int(classes[slot]) if logits.shape[1] > 1 else 0]
        target = targets[slot].double().cpu()
        total = total + weight[slot].double().cpu() * F.binary_cross_entropy_with_logits(channel, target)
    loss = total / weight.double().cpu().sum().clamp(min=1)
    loss.backward() if loss.requires_grad else None
    return loss.detach(), torch.zeros_like(logits) if logits.grad is None else logits.grad


def check(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor, largest: float = 1) -> None:
    """
    Args:
        largest: logit. A pixel's loss is a difference of terms of its size, and as exact as they are.
    """
    loss = mask_loss(logits, classes, targets, weight)
    (grad,) = torch.autograd.grad(loss * 3, logits)
    expected_loss, expected_grad = exact(logits, classes, targets, weight)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert grad.dtype == logits.dtype
    assert grad.stride() == logits.stride()
    loss_error = (loss.detach().double().cpu() - expected_loss).abs()
    assert loss_error <= LOSS_TOLERANCE[logits.dtype] * max(expected_loss, largest)
    grad_error = (grad.double().cpu() / 3 - expected_grad).abs().max() if logits.numel() else 0
    assert grad_error <= GRAD_TOLERANCE[logits.dtype] * (expected_grad.abs().max() if logits.numel() else 1)
    assert grad.cpu()[expected_grad == 0].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    names = ("logits", "labels", "target_polygon", "loss_polygon", "grad_logits")
    logits, labels, packed, expected_loss, expected = load(*(f"mask/{name}" for name in names))
    targets = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)[..., : logits.shape[-1]]).bool()
    logits = logits.to(device).requires_grad_()
    weight = torch.ones(len(targets), device=device)
    loss = mask_loss(logits, labels.to(device), targets.to(device), weight)
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        logits.grad.cpu(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", GRAD_TOLERANCE)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, device: str) -> None:
    logits, classes, targets, weight = inputs(dtype=dtype, layout=layout, device=device)
    check(logits, classes, targets, weight)
    check(logits, classes.int(), targets > 0.5, weight.bool())
    check(logits, classes.short(), (targets > 0.5).byte(), weight.long())
    check(logits, classes, targets.to(torch.bfloat16), weight * 0.7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_classes_of_every_integer_type(dtype: torch.dtype, device: str) -> None:
    """Also where the number of classes is too large for it."""
    logits, classes, targets, weight = inputs(4, 256, 2, device=device)
    check(logits, (classes % 100).to(dtype), targets, weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("slots", "num_classes", "side"),
    [(0, 3, 4), (1, 1, 1), (6, 1, 28), (1, 81, 15), (2, 24, 28), (3, 2, 56)],
)
def test_shapes(slots: int, num_classes: int, side: int, layout: str, device: str) -> None:
    """None, one, class-agnostic, and more pixels and channels than a program takes at once."""
    check(*inputs(slots, num_classes, side, layout=layout, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_more_slots_than_are_summed_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(11, 2, 3, device=device)
    if runs_triton(arguments[0]):
        from fastmrcnn.kernels.mask_loss import kernel

        monkeypatch.setattr(kernel, "SLOTS", 4)
    check(*arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_other_dense_layouts(device: str) -> None:
    logits, classes, targets, weight = inputs(5, 4, 6, device=device)
    for order in ((3, 0, 1, 2), (1, 0, 2, 3), (2, 3, 0, 1), (0, 3, 2, 1)):
        inverse = [order.index(i) for i in range(4)]
        permuted = logits.detach().permute(order).contiguous().permute(inverse).requires_grad_()
        check(permuted, classes, targets.transpose(1, 2).contiguous().transpose(1, 2), weight)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_that_are_not_dense(device: str) -> None:
    logits, classes, targets, weight = inputs(7, 10, 12, device=device)
    part = logits.detach()[:, ::2, 1::2, 3:9].requires_grad_()
    loss = mask_loss(part, classes.clamp(max=4), targets[:, ::2, :6], weight)
    (grad,) = torch.autograd.grad(loss, part)
    expected_loss, expected_grad = exact(part, classes.clamp(max=4), targets[:, ::2, :6], weight)
    torch.testing.assert_close(loss.detach().double().cpu(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double().cpu(), expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_no_real_slot(device: str) -> None:
    logits, classes, targets, weight = inputs(device=device)
    loss = mask_loss(logits, classes, targets, weight * 0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    x=st.lists(
        st.one_of(st.floats(-100, 100, width=32), st.sampled_from([0.0, 1e4, -1e4])), min_size=6, max_size=6
    ),
    targets=st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6),
    weight=st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3),
    classes=st.lists(st.integers(0, 1), min_size=3, max_size=3),
)
def test_any_logits(x: list[float], targets: list[float], weight: list[float], classes: list[int]) -> None:
    """Logits on which exp overflows too."""
    logits = torch.tensor(x).view(3, 1, 2, 1).repeat(1, 2, 1, 1).requires_grad_()
    largest = max(1.0, *map(abs, x))
    check(logits, torch.tensor(classes), torch.tensor(targets).view(3, 2, 1), torch.tensor(weight), largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, device: str) -> None:
    logits, classes, targets, weight = inputs(2, 2, 2, torch.float64, layout, device)
    logits = logits.detach().nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, classes, targets, weight), logits)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    logits, classes, targets, weight = inputs(4, 3, 4, device=device)
    logits = logits.detach().nan_to_num().requires_grad_()
    grad = torch.ones((), device=device)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)):
        inverse = [order.index(i) for i in range(4)]
        permuted = logits.detach().permute(order).contiguous().permute(inverse)
        torch.library.opcheck(op._mask_loss, (permuted.requires_grad_(), classes, targets, weight))
        backward_args = (grad, grad * 5, permuted.detach(), classes, targets, weight)
        torch.library.opcheck(op._mask_loss_backward, backward_args)


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph(device: str) -> None:
    """The same numbers compiled, forward and backward, in bf16 under autocast."""
    logits, classes, targets, weight = inputs(dtype=torch.bfloat16, layout="channels_last", device=device)
    compiled = torch.compile(mask_loss, fullgraph=True, backend="aot_eager")
    losses, grads = [], []
    for function in (mask_loss, compiled):
        with torch.autocast(device, torch.bfloat16):
            loss = function(logits, classes, targets, weight)
        losses.append(loss)
        grads += torch.autograd.grad(loss, logits)
    assert losses[0].dtype == torch.float32
    assert losses[0].equal(losses[1])
    assert grads[0].dtype == torch.bfloat16
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize("device", DEVICES)
def test_class_out_of_range_when_compiled(device: str) -> None:
    """Adds nothing and gets no gradient, but counts in the mean as the slot it is."""
    logits, classes, targets, weight = inputs(device=device)
    wrong = classes.clone()
    wrong[0], wrong[2] = -1, 5
    loss = torch.compile(mask_loss, fullgraph=True, backend="aot_eager")(logits, wrong, targets, weight)
    (grad,) = torch.autograd.grad(loss, logits)
    kept = weight.clone()
    kept[0] = kept[2] = 0
    expected, expected_grad = exact(logits, classes, targets, kept)
    share = kept.sum().item() / weight.sum().item()
    torch.testing.assert_close(loss.detach().double().cpu(), expected * share, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double().cpu(), expected_grad * share, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_repeatable(device: str) -> None:
    logits, classes, targets, weight = inputs(9, 3, 14, device=device)
    first = mask_loss(logits, classes, targets, weight)
    (first_grad,) = torch.autograd.grad(first, logits)
    for _ in range(3):
        again = mask_loss(logits, classes, targets, weight)
        assert again.equal(first)
        assert torch.autograd.grad(again, logits)[0].equal(first_grad)


class Record(TorchDispatchMode):
    """Names of the operations, and the dtypes of the results of a given size."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names, self.dtypes = numel, set(), set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(out, Tensor) and out.numel() == self.numel:
            self.dtypes.add(out.dtype)
        return out


def test_reference_makes_no_wide_copy_and_does_not_wait() -> None:
    logits, classes, targets, weight = inputs(dtype=torch.bfloat16)
    logits = logits.detach()
    with Record(logits.numel()) as record:
        loss, divisor = reference.mask_loss(logits, classes, targets, weight)
        reference.mask_loss_backward(loss, divisor, logits, classes, targets, weight)
        mask_loss(logits, classes, targets, weight)
    assert record.dtypes == {torch.bfloat16}
    assert not record.names & {
        "_local_scalar_dense",
        "nonzero",
        "index",
        "index_put",
        "index_put_",
        "_unique2",
    }


def test_bad_input() -> None:
    logits, classes, targets, weight = inputs()
    wrong = classes.clone()
    wrong[3] = 5
    for args, message in (
        ((logits[0], classes, targets, weight), r"logits must be \(F, K, H, W\) .* got \(5, 6, 6\)"),
        ((logits[:, :0], classes, targets, weight), r"logits must be \(F, K, H, W\) .* got \(7, 0, 6, 6\)"),
        ((logits.long(), classes, targets, weight), "logits must be floating point, got torch.int64"),
        ((logits, classes[1:], targets, weight), r"classes must be \(7,\) .* got \(6,\)"),
        (
            (logits, classes.float(), targets, weight),
            "classes must be of an integer dtype, got torch.float32",
        ),
        ((logits, classes, targets[:, 1:], weight), r"targets must be \(7, 6, 6\) .* got \(7, 5, 6\)"),
        ((logits, classes, targets, weight[:, None]), r"weight must be \(7,\) .* got \(7, 1\)"),
        ((logits, classes, targets.to("meta"), weight), "targets must be on cpu as logits are, got meta"),
        ((logits, classes, targets, weight.to(torch.complex64)), "weight must be real, got torch.complex64"),
        ((logits, wrong, targets, weight), r"classes of slots with weight must be in 0..4, got \[5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_loss(*args)


def test_beyond_31_bits() -> None:
    """Slots, and then the first and last column, 2**31 elements apart; 4 GiB, hardly any used."""
    torch.use_deterministic_algorithms(False)  # it would touch all of it
    classes, targets, weight = torch.tensor([1, 0]), torch.ones(2, 2, 4), torch.ones(2)
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    near = torch.randn(2, 2, 2, 4, generator=torch.Generator().manual_seed(0)).half()
    for strides in ((2**31, 8, 4, 1), (1, 2, 4, 2**31 // 3 + 1)):
        far = room.as_strided(near.shape, strides)
        far.copy_(near)
        results = []
        for logits in (far, near):
            leaf = logits.detach().requires_grad_()
            loss = mask_loss(leaf, classes, targets, weight)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        assert results[0][0].equal(results[1][0])
        assert results[0][1].equal(results[1][1])


@pytest.mark.gpu
def test_extra_memory() -> None:
    """Beyond inputs and the dense gradient, at most a tenth of that gradient, and no host sync."""
    logits, classes, targets, weight = inputs(1024, 80, 28, torch.bfloat16, "channels_last", "cuda")
    targets = targets > 0.5
    mask_loss(logits, classes, targets, weight).backward()
    logits.grad = None
    torch.use_deterministic_algorithms(False)  # filling fresh memory is no part of it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask_loss(logits, classes, targets, weight).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    dense = logits.numel() * logits.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * dense


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    logits = torch.zeros(2**17, 32, 23, 23, dtype=torch.bfloat16, device="cuda")
    logits[-1, 30] = 1
    weight = torch.zeros(2**17, device="cuda")
    weight[-1] = 1
    targets = torch.zeros(2**17, 23, 23, dtype=torch.uint8, device="cuda")
    classes = torch.full((2**17,), 30, device="cuda")
    loss, divisor = op._mask_loss(logits, classes, targets, weight)
    grad = op._mask_loss_backward(torch.ones_like(loss), divisor, logits, classes, targets, weight)
    assert loss.item() == pytest.approx(np.log1p(np.e), rel=1e-6)
    assert grad[-1, 30].float().sum().item() == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-2)
    assert grad[:-1].count_nonzero() == 0
