"""The mask predictor of a slot's class and its loss against their definition and the mask loss.

CPU tensors run cpu.py, or Triton's kernels if TRITON_INTERPRET=1; the tests are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import INTEGERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.kernels import class_mask_logits, class_mask_loss, class_mask_loss_from_bitmaps, mask_targets
from fastmrcnn.kernels.common.library import interpreting, runs_triton
from fastmrcnn.kernels.mask_loss.op import mask_loss
from fastmrcnn.kernels.mask_predictor import cpu, naive, op
from fastmrcnn.kernels.mask_targets.cpu import Bitmaps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SOURCES = [(2, True), (1, False), (0, True)]  # sampling ratio, and whether targets are bits
ORDERS = [(0, 2, 3, 1), (0, 1, 2, 3), (3, 1, 0, 2)]
if interpreting():  # it takes 10 ms a program
    SOURCES, ORDERS = SOURCES[::2], ORDERS[:1]
# Relative to the largest entry. Gradients of features have one rounding to their dtype, and the interpreter
# truncates; all sums are float32, and products of half precision are exact there.
GRAD_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SUM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


class Inputs(NamedTuple):
    features: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor
    targets: Tensor
    slot_weight: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.features, self.weight, self.bias]


def inputs(
    slots: int = 6,
    K: int = 4,
    channels: int = 5,
    side: int = 6,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    device: str = "cpu",
    weight_dtype: torch.dtype | None = None,
) -> Inputs:
    """Two slots do not count, and hold what must not leak."""
    r = torch.Generator().manual_seed(0)
    features = torch.randn(slots, channels, side, side, generator=r)
    weight, bias = torch.randn(K, channels, generator=r), torch.randn(K, generator=r)
    classes = torch.randint(0, K, (slots,), generator=r)
    targets, slot_weight = torch.rand(slots, side, side, generator=r), torch.ones(slots)
    for slot in (1, 4):
        if slot < slots:
            slot_weight[slot], classes[slot], features[slot], targets[slot] = 0, K, torch.nan, torch.inf
    features = features.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    wide = weight_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    parameters = (t.to(device, wide).requires_grad_() for t in (weight, bias))
    rest = (t.to(device) for t in (classes, targets, slot_weight))
    return Inputs(features.requires_grad_(), *parameters, *rest)


def exact(given: Inputs) -> list[Tensor]:
    """Loss and gradients by the definition, on the CPU."""
    features, weight, bias, *rest = (t.detach().cpu() for t in given)
    leaves = [t.double().requires_grad_() for t in (features, weight.flatten(1), bias)]
    loss = naive.class_mask_loss(*leaves, *rest)
    if not loss.requires_grad:
        return [loss, *(torch.zeros_like(leaf) for leaf in leaves)]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def check(given: Inputs) -> None:
    dtype = given.features.dtype
    loss = class_mask_loss(*given)
    grads = torch.autograd.grad(loss * 3, given.leaves())
    assert loss.dtype == cpu.sum_dtype(given.features)
    expected_loss, *expected = exact(given)
    assert largest(loss.detach().cpu().double() - expected_loss) <= SUM_TOLERANCE[dtype] * max(
        largest(expected_loss), 1
    )
    for leaf, grad, wanted in zip(given.leaves(), grads, expected, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        error = largest(grad.cpu().double().view(wanted.shape) / 3 - wanted)
        assert error <= max(SUM_TOLERANCE[dtype], GRAD_TOLERANCE[leaf.dtype]) * largest(wanted)
    assert grads[0][given.slot_weight == 0].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", GRAD_TOLERANCE)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, device: str) -> None:
    given = inputs(4, dtype=dtype, layout=layout, device=device)
    check(given)
    if interpreting() and dtype != torch.float32:
        return
    grad = torch.autograd.grad(class_mask_loss(*given), given.features)[0]
    assert grad.is_contiguous(memory_format=LAYOUTS[layout])
    classes, targets, slot_weight = given[3:]
    hard = torch.where(targets > 0.5, 1, 0)
    check(given._replace(classes=classes.int(), targets=hard.bool(), slot_weight=slot_weight.bool()))
    check(given._replace(classes=classes.short(), targets=hard.byte(), slot_weight=slot_weight * 0.7))
    convolution = given.weight.detach()[:, :, None, None].requires_grad_()
    check(given._replace(weight=convolution))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_classes_of_every_integer_type(dtype: torch.dtype, device: str) -> None:
    """Also where the number of classes is too large for it."""
    given = inputs(4, 256, side=2, device=device)
    check(given._replace(classes=(given.classes % 100).to(dtype)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_weights_of_other_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    check(inputs(4, dtype=dtype, weight_dtype=weight_dtype, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("slots", "K", "channels", "side"),
    [(0, 3, 4, 4), (1, 1, 1, 1), (5, 1, 7, 3), (2, 3, 70, 15), (1, 9, 16, 2), (1, 2, 8, 28)],
)
def test_shapes(slots: int, K: int, channels: int, side: int, layout: str, device: str) -> None:
    """None, one, class-agnostic, and more pixels and channels than a program takes at once."""
    check(inputs(slots, K, channels, side, layout=layout, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_more_slots_and_channels_than_are_summed_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(11, 3, 9, 3, device=device)
    if runs_triton(given.features):
        from fastmrcnn.kernels.mask_predictor import backward, tiles

        monkeypatch.setattr(backward, "SLOTS", 4)
        monkeypatch.setattr(backward, "CHANNELS", 4)
        monkeypatch.setattr(tiles, "TILE", 32)
        monkeypatch.setattr(tiles, "PART", 4)
    check(given)


@pytest.mark.parametrize("device", DEVICES)
def test_features_of_other_layouts(device: str) -> None:
    """Permuted, sliced, and expanded."""
    given = inputs(6, 3, 4, 6, device=device)
    plain = given.features.detach()
    for order in ((3, 0, 1, 2), (1, 0, 2, 3), (0, 3, 2, 1)):
        inverse = [order.index(i) for i in range(4)]
        permuted = plain.permute(order).contiguous().permute(inverse)
        check(given._replace(features=permuted.requires_grad_()))
    wide = torch.cat([plain, plain], 1).contiguous(memory_format=torch.channels_last)
    check(given._replace(features=wide[:, 2:6].detach().requires_grad_()))
    part = given._replace(targets=given.targets[:, ::2, 1:], features=plain[:, :, ::2, 1:].requires_grad_())
    check(part)
    check(given._replace(features=plain[:, :, :1, :1].expand(-1, -1, 6, 6).requires_grad_()))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_the_two_steps(device: str) -> None:
    """A 1x1 convolution to all classes, then the mask loss."""
    given = inputs(dtype=torch.float64, device=device)
    features = given.features.detach().nan_to_num().requires_grad_()
    logits = F.conv2d(features, given.weight[:, :, None, None], given.bias)
    two = mask_loss(logits, given.classes, given.targets, given.slot_weight)
    one = class_mask_loss(features, *given[1:])
    torch.testing.assert_close(one, two, rtol=1e-13, atol=0)
    leaves = [features, given.weight, given.bias]
    for a, b in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(two, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits(dtype: torch.dtype, layout: str, device: str) -> None:
    """Those of the definition, and their gradients."""
    given = inputs(3, 3, 6, 15, dtype=dtype, layout=layout, device=device)
    features, classes = given.features.detach().nan_to_num().requires_grad_(), given.classes.clamp(max=2)
    logits = class_mask_logits(features, given.weight, given.bias, classes)
    r = torch.Generator().manual_seed(1)
    grad = torch.randn(logits.shape, generator=r).to(device, logits.dtype).mT  # not contiguous
    leaves = [features, given.weight, given.bias]
    grads = torch.autograd.grad(logits, leaves, grad)
    doubles = [t.detach().cpu().double().requires_grad_() for t in leaves]
    expected = naive.class_mask_logits(*doubles, classes.cpu())
    wanted = torch.autograd.grad(expected, doubles, grad.cpu().double())
    assert logits.dtype == cpu.sum_dtype(features)
    tolerance = SUM_TOLERANCE[dtype]
    assert largest(logits.cpu().double() - expected) <= tolerance * largest(expected)
    tables = (GRAD_TOLERANCE, SUM_TOLERANCE, SUM_TOLERANCE)
    for got, want, table in zip(grads, wanted, tables, strict=True):
        assert largest(got.cpu().double() - want) <= table[dtype] * largest(want)
    assert grads[0].is_contiguous(memory_format=LAYOUTS[layout])
    without = class_mask_logits(features, given.weight[:, :, None, None], None, classes)
    at_class = given.bias.index_select(0, classes)[:, None, None]
    torch.testing.assert_close(without + at_class, logits, rtol=1e-4, atol=1e-5)


def ground_truth(slots: int, device: str) -> dict[str, Any]:
    """One rectangle of ones in each of two images; boxes over its corners."""
    r = torch.Generator().manual_seed(2)
    corner = torch.rand(slots, 2, generator=r) * 12
    window = torch.tensor([[[4, 5, 9, 8]], [[2, 3, 12, 6]]], dtype=torch.int32)
    arguments = {
        "boxes": torch.cat([corner, corner + 4 + torch.rand(slots, 2, generator=r) * 9], 1),
        "image": torch.arange(slots) % 2,
        "matched": torch.zeros(slots, dtype=torch.int64),
        "buffer": torch.ones(256, dtype=torch.uint8),
        "offset": torch.tensor([[3], [80]]),
        "window": window,
        "to_annotation": torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[-0.5, 0, 12], [0, 0.5, 0]]]),
        "size": torch.tensor([[20, 24], [14, 16]]),
        "image_sizes": torch.tensor([[20, 24], [28, 24]]),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()} | {"image_shape": (28, 24)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ratio", "bitmap"), SOURCES)
def test_from_bitmaps(ratio: int, bitmap: bool, layout: str, device: str) -> None:
    """As with the targets of `mask_targets`, to the last bit."""
    side = 5 if ratio == 0 else 15
    given = inputs(3, 3, 4, side, layout=layout, device=device)
    truth = ground_truth(3, device)
    sampling = {"sampling_ratio": ratio, "bitmap": bitmap, "aligned": bitmap}
    targets = mask_targets(**truth, **sampling, resolution=side)
    assert 0.2 < targets.float().mean() < 0.8
    features, weight, bias, classes, _, slot_weight = given
    two = class_mask_loss(features, weight, bias, classes, targets, slot_weight)
    one = class_mask_loss_from_bitmaps(features, weight, bias, classes, slot_weight, **truth, **sampling)
    assert one.equal(two)
    grads = [torch.autograd.grad(loss, given.leaves()) for loss in (one, two)]
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))
    check(given._replace(targets=targets))
    predictor = [t.detach().cpu() for t in (features, weight, bias, classes, slot_weight)]
    expected = naive.class_mask_loss_from_bitmaps(*predictor, **ground_truth(3, "cpu"), **sampling)
    torch.testing.assert_close(one.detach().cpu().double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_from_bitmaps_with_maps_of_objects(device: str) -> None:
    features, weight, bias, classes, _, slot_weight = inputs(3, 3, 4, 15, device=device)
    truth = ground_truth(3, device)
    own = truth | {name: truth[name][:, None] for name in ("to_annotation", "size")}
    predictor = (features, weight, bias, classes, slot_weight)
    one, two = (class_mask_loss_from_bitmaps(*predictor, **each) for each in (truth, own))
    assert one.equal(two)


@pytest.mark.parametrize("device", DEVICES)
def test_no_real_slot(device: str) -> None:
    given = inputs(device=device)
    given = given._replace(slot_weight=given.slot_weight * 0)
    loss = class_mask_loss(*given)
    assert loss.item() == 0
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, given.leaves()))


@pytest.mark.parametrize("device", DEVICES)
def test_class_out_of_range_when_compiled(device: str) -> None:
    """Adds nothing and gets no gradient, but counts in the mean as the slot it is; even if it holds NaN."""
    given = inputs(device=device)
    wrong, features = given.classes.clone(), given.features.detach().clone()
    wrong[0], wrong[2] = -1, 4
    features[2] = torch.nan
    given = given._replace(classes=wrong, features=features.requires_grad_())
    loss = torch.compile(class_mask_loss, fullgraph=True, backend="aot_eager")(*given)
    grads = torch.autograd.grad(loss, given.leaves())
    expected_loss, *expected = exact(given)
    torch.testing.assert_close(loss.detach().cpu().double(), expected_loss, rtol=1e-6, atol=0)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-7)
    logits = torch.compile(class_mask_logits, fullgraph=True, backend="aot_eager")(*given[:4])
    assert logits[[0, 2]].eq(0).all()
    seen = torch.autograd.grad(logits.nan_to_num().sum(), given.leaves())
    assert seen[0][[0, 2]].eq(0).all()


@settings(max_examples=5 if interpreting() else 25, deadline=None, derandomize=True)
@given(
    x=st.lists(
        st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1e4, -1e4])), min_size=12, max_size=12
    ),
    targets=st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6),
    slot_weight=st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3),
    classes=st.lists(st.integers(0, 1), min_size=3, max_size=3),
)
def test_any_features(
    x: list[float], targets: list[float], slot_weight: list[float], classes: list[int]
) -> None:
    """Logits on which exp overflows too."""
    given = Inputs(
        torch.tensor(x).view(3, 2, 2, 1).requires_grad_(),
        torch.tensor([[1.0, 0.5], [-1.0, 0.25]]).requires_grad_(),
        torch.tensor([0.5, -0.5]).requires_grad_(),
        torch.tensor(classes),
        torch.tensor(targets).view(3, 2, 1),
        torch.tensor(slot_weight),
    )
    check(given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, device: str) -> None:
    given = inputs(2, 2, 2, 1 if interpreting() else 2, torch.float64, layout, device)
    features = given.features.detach().nan_to_num().requires_grad_()
    leaves = (features, given.weight, given.bias)
    rest = given[3:]
    assert torch.autograd.gradcheck(lambda *three: class_mask_loss(*three, *rest), leaves)
    classes = given.classes.clamp(max=1)
    assert torch.autograd.gradcheck(lambda *three: class_mask_logits(*three, classes), leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    given = inputs(3, 2, 4, 3, device=device)
    truth = ground_truth(3, device)
    del truth["image_shape"]
    order = ("boxes", "image", "matched", *Bitmaps._fields)
    classes = given.classes.clamp(max=1)
    for axes in ORDERS:
        inverse = [axes.index(i) for i in range(4)]
        plain = given.features.detach().nan_to_num()
        features = plain.permute(axes).contiguous().permute(inverse).requires_grad_()
        predictor = (features, given.weight, given.bias)
        torch.library.opcheck(op._class_mask_logits, (*predictor, classes))
        loss = (*predictor, classes, given.targets.nan_to_num(posinf=1), given.slot_weight)
        torch.library.opcheck(op._class_mask_loss, loss)
        grad = torch.ones((3, 3, 3), device=device)
        torch.library.opcheck(
            op._class_mask_logits_backward, (grad, features.detach(), given.weight.detach(), classes)
        )
    fused = (*predictor, classes, given.slot_weight, *(truth[name] for name in order))
    torch.library.opcheck(op._from_bitmaps, (*fused, [28, 24], features.shape[-1], 1, True, True))
    sums = [t.detach() for t in op._class_mask_loss(*loss)[1:]]
    backward = (grad.sum(), *sums, given.weight.detach(), classes, given.slot_weight)
    for dtype, channels_last in ((torch.float32, False), (torch.bfloat16, True)):
        torch.library.opcheck(op._class_mask_loss_backward, (*backward, dtype, channels_last))


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph(device: str) -> None:
    """The same numbers compiled, forward and backward, of bf16 features and float32 weights in autocast."""
    given = inputs(3, dtype=torch.bfloat16, layout="channels_last", device=device)
    truth = ground_truth(3, device)

    def step(*arguments: Tensor) -> Tensor:
        features, weight, bias, classes, targets, slot_weight = arguments
        loss = class_mask_loss(features, weight, bias, classes, targets, slot_weight)
        fused = class_mask_loss_from_bitmaps(features, weight, bias, classes, slot_weight, **truth)
        logits = class_mask_logits(features[:1], weight, bias, classes[:1])
        return loss + fused + logits.mean()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with torch.autocast(device, torch.bfloat16):
            loss = function(*given)
        assert loss.dtype == torch.float32
        found.append([loss, *torch.autograd.grad(loss, given.leaves())])
    assert found[0][1].dtype == torch.bfloat16
    assert found[0][2].dtype == torch.float32
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_repeatable(device: str) -> None:
    given = inputs(5, 3, 8, 15, device=device)
    runs = []
    for _ in range(3):
        loss = class_mask_loss(*given)
        runs.append([loss, *torch.autograd.grad(loss, given.leaves())])
    for again in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], again, strict=True))


def test_backward_keeps_no_features() -> None:
    given = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        class_mask_loss(*given)
    assert given.slot_weight.numel() in kept
    assert max(kept) < given.features.numel()


class Record(TorchDispatchMode):
    """The largest result, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_cpu_makes_no_logits_of_all_classes_and_does_not_wait() -> None:
    given = inputs(K=50, channels=3)
    slots, _, side, _ = given.features.shape
    plain = Inputs(*(t.detach() for t in given))
    with Record() as record:
        loss, sums = cpu.class_mask_loss(*plain)
        layout = cpu.layout_of(plain.features)
        cpu.class_mask_loss_backward(loss, sums, plain.weight, plain.classes, plain.slot_weight, layout)
        class_mask_loss(*plain)
    assert slots * 3 * side * side <= record.largest < slots * 50 * side * side
    assert not record.names & {"_local_scalar_dense", "nonzero", "index", "index_put", "index_put_"}


def test_beyond_31_bits() -> None:
    """Channels of a slot more than 2**31 elements apart; 4 GiB of address space, hardly any used."""
    torch.use_deterministic_algorithms(False)  # it would touch all of it
    given = inputs(slots=2, K=2, channels=3, side=2, dtype=torch.float16)
    near = given.features.detach().nan_to_num()
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided(near.shape, (4, 2**30 + 16, 2, 1))
    far.copy_(near)
    results = []
    for features in (far, near):
        leaf = features.detach().requires_grad_()
        changed = given._replace(features=leaf, classes=torch.tensor([1, 0]))
        for value in (class_mask_loss(*changed), class_mask_logits(*changed[:4]).sum()):
            results.append((value.detach(), *torch.autograd.grad(value, changed.leaves())))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_bad_input() -> None:
    given = inputs()
    wrong = given.classes.clone()
    wrong[3] = 4
    for change, message in (
        ({"features": given.features[0]}, r"features must be \(F, C, H, W\) .* got \(5, 6, 6\)"),
        ({"features": given.features.long()}, "features must be floating point, got torch.int64"),
        ({"weight": given.weight[:, 1:]}, r"weight must be \(K, 5\) or \(K, 5, 1, 1\) .* got \(4, 4\)"),
        ({"weight": given.weight[:0]}, r"weight must be \(K, 5\) .* got \(0, 5\)"),
        ({"bias": given.bias[1:]}, r"bias must be \(4,\) .* got \(3,\)"),
        ({"bias": given.bias.double()}, "bias must be float32, got torch.float64"),
        ({"weight": given.weight.to("meta")}, "weight must be on cpu as features are, got meta"),
        ({"classes": given.classes.float()}, "classes must be of an integer dtype, got torch.float32"),
        ({"classes": wrong}, r"classes of slots with weight must be in 0..3, got \[4\]"),
        ({"targets": given.targets[:, 1:]}, r"targets must be \(6, 6, 6\) .* got \(6, 5, 6\)"),
        ({"slot_weight": given.slot_weight[1:]}, r"slot_weight must be \(6,\) .* got \(5,\)"),
        ({"slot_weight": given.slot_weight + 1j}, "slot_weight must be real, got torch.complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            class_mask_loss(*given._replace(**change))
    with pytest.raises(ValueError, match=r"classes of slots with weight must be in 0..3, got \[4"):
        class_mask_logits(*given[:4])
    features, weight, bias, classes, _, slot_weight = given
    truth = ground_truth(6, "cpu")
    oblong = features[:, :, 1:]
    with pytest.raises(ValueError, match=r"features must be \(F, C, M, M\) .* got \(6, 5, 5, 6\)"):
        class_mask_loss_from_bitmaps(oblong, weight, bias, classes, slot_weight, **truth)
    truth["boxes"] = truth["boxes"][1:]
    with pytest.raises(ValueError, match=r"boxes must be \(6, 4\) .* got \(5, 4\)"):
        class_mask_loss_from_bitmaps(features, weight, bias, classes, slot_weight, **truth)


@pytest.mark.skipif(interpreting(), reason="nothing is compiled")
def test_feature_loads_are_wide_beside_those_of_the_tables() -> None:
    from fastmrcnn.kernels.mask_predictor import kernel
    from fastmrcnn.kernels.report import inspect_kernel

    specs = kernel._specs(8 * 48, torch.bfloat16, True)
    (fused,) = (spec for spec in specs if "from_bitmaps" in spec.name)
    row = inspect_kernel(fused, "sm_90")
    assert (row.widest_load, row.spilled, row.failures) == (16, 0, [])


@pytest.mark.skipif(interpreting(), reason="nothing is compiled")
def test_features_are_loaded_ahead() -> None:
    """Past the registers, in pieces of 16 bytes, wherever they are read."""
    from fastmrcnn.kernels.mask_predictor import kernel

    for spec in kernel._specs(8 * 48, torch.bfloat16, True):
        if "features_ptr" in spec.arguments:
            assert "cp.async.cg.shared.global" in spec.compile().asm["ptx"], spec.name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_shapes(layout: str) -> None:
    """Against cpu.py at real sizes, with less memory than a tenth of the features and no host sync."""
    given = inputs(384, 80, 256, 28, torch.bfloat16, layout, "cuda")
    truth = ground_truth(384, "cuda")
    features, weight, bias, classes, _, slot_weight = given
    targets = mask_targets(**truth, resolution=28, bitmap=True)
    arguments = [t.detach() for t in (features, weight, bias, classes, targets, slot_weight)]
    expected, _ = cpu.class_mask_loss(arguments[0].double(), *arguments[1:])
    torch.use_deterministic_algorithms(False)  # filling fresh memory is no part of it
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = class_mask_loss_from_bitmaps(features, weight, bias, classes, slot_weight, **truth)
            grads = torch.autograd.grad(loss, given.leaves())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        extra = torch.cuda.max_memory_allocated() - before - features.nbytes
        assert extra < 0.1 * features.nbytes
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    check(given._replace(targets=targets))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    features = torch.zeros(11000, 256, 28, 28, dtype=torch.bfloat16, device="cuda")
    features[-1] = 1
    weight = torch.full((2, 256), 1 / 256, device="cuda")
    classes, slot_weight = (
        torch.ones(11000, dtype=torch.int64, device="cuda"),
        torch.zeros(11000, device="cuda"),
    )
    slot_weight[-1] = 1
    targets = torch.zeros(11000, 28, 28, dtype=torch.bool, device="cuda")
    features.requires_grad_()
    loss = class_mask_loss(features, weight, None, classes, targets, slot_weight)
    (grad,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(1.3132617, rel=1e-5)
    assert grad[-1].float().sum().item() == pytest.approx(0.7310586, rel=1e-2)
    assert grad[:-1].count_nonzero() == 0
