"""torchvision's operators patched to run the kernels, and put back.

Without a GPU the patch is exercised on the CPU, which runs PyTorch, or Triton if
TRITON_INTERPRET=1; the keys of CUDA are exercised on fake tensors, which have no data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from with_torchvision import ops, torchvision

from fastmrcnn.kernels import check, patch, unpatch
from fastmrcnn.kernels.common.library import interpreting

OPERATORS = ("roi_align", "_roi_align_backward", "nms")
OURS = "fastmrcnn_kernels::"
ROIS = torch.tensor([[0.0, 1.0, 2.0, 40.0, 30.0], [1.0, 0.0, 0.0, 15.0, 50.0], [1.0, -9.0, 20.0, 70.0, 90.0]])


@pytest.fixture(autouse=True)
def _leave_unpatched() -> Iterator[None]:
    yield
    unpatch("torchvision")


class Recorder(TorchDispatchMode):
    """Names of the operators that run, and the dtype of their first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        if leaves:
            self.calls[func.name()] = leaves[0].dtype
        return func(*args, **(kwargs or {}))


def dispatch_tables() -> list[str]:
    return [torch._C._dispatch_dump(f"torchvision::{name}") for name in OPERATORS]


def runs_ours() -> bool:
    with Recorder() as recorder:
        ops.nms(ROIS[:, 1:], torch.ones(3), 0.5)
    return OURS + "nms" in recorder.calls


def overrides(device_key: str) -> bool:
    """Whether a key of torchvision's nms leads to this package."""
    active = [line for line in dispatch_tables()[2].splitlines() if line.startswith(f"{device_key}:")]
    assert len(active) == 1
    return "patch.py" in active[0]


def features(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    maps = torch.randn(2, 3, 12, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return maps.contiguous(memory_format=layout).requires_grad_()


def random_boxes(count: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=random) * 60
    boxes = torch.cat([corner, corner + 5 + 40 * torch.rand(count, 2, generator=random)], 1)
    return boxes, torch.rand(count, generator=random)


@contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """torch.autocast, which switches itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_other_libraries_and_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r'only library .* "torchvision", got \'detectron2\'.*patch\("torch'):
        patch("detectron2")
    with pytest.raises(ValueError, match=r"got 'torchaudio'$"):
        unpatch("torchaudio")
    with pytest.raises(ValueError, match="devices must be among cuda, cpu, got 'xpu'"):
        patch("torchvision", devices="xpu")
    with pytest.raises(ValueError, match="devices must be among"):
        patch("torchvision", devices=[])


def test_missing_torchvision_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ImportError, match=r'patch\("torchvision"\): torchvision cannot be imported'
    ) as caught:
        patch("torchvision")
    assert "\n" not in str(caught.value)
    assert check.main() == 2
    assert capsys.readouterr().err.startswith("error: patch(")
    unpatch("torchvision")  # nothing to do, and no error


@pytest.mark.torchvision
def test_torchvision_without_operators_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.extension._has_ops", lambda: False)
    with pytest.raises(ImportError, match=r"operators of torchvision .* do not load beside torch"):
        patch("torchvision")


@pytest.mark.torchvision
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("ratio", "aligned"), [(2, False), (-1, True)])
def test_roi_align_and_its_gradient(
    dtype: torch.dtype, channels_last: bool, ratio: int, aligned: bool
) -> None:
    maps, rois = features(dtype, channels_last), ROIS.to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        out = ops.roi_align(maps, rois, (3, 2), 0.25, ratio, aligned)
        return out, torch.autograd.grad((out * out).sum(), maps)[0]

    expected = run()
    with patch("torchvision", devices="cpu"), Recorder() as recorder:
        actual = run()
    assert recorder.calls.keys() >= {OURS + "roi_align", OURS + "roi_align_backward"}
    assert actual[0].is_contiguous()
    assert actual[0].dtype == dtype
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.torchvision
def test_lists_of_boxes_modules_and_inference_mode() -> None:
    maps, boxes = features(), [ROIS[:1, 1:], ROIS[1:, 1:]]
    module = ops.RoIAlign(3, 0.25, 2)
    pooler = ops.MultiScaleRoIAlign(["a", "b"], 3, 2)
    pyramid = {"a": maps, "b": maps[:, :, ::2, ::2]}
    expected = module(maps, boxes), pooler(pyramid, boxes, [(48, 64)] * 2)
    with patch("torchvision", devices="cpu"), torch.inference_mode():
        actual = module(maps, boxes), pooler(pyramid, boxes, [(48, 64)] * 2)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.torchvision
def test_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that torchvision built before the patch calls the overridden backward operator."""
    module = sys.modules[patch.__module__]
    ours, calls = module._backward, []
    monkeypatch.setattr(module, "_backward", lambda *args: calls.append(args) or ours(*args))
    maps = features()
    out = ops.roi_align(maps, ROIS, 3, 0.25)
    (expected,) = torch.autograd.grad((out * out).sum(), maps, retain_graph=True)
    assert not calls
    with patch("torchvision", devices="cpu"):
        (actual,) = torch.autograd.grad((out * out).sum(), maps)
    assert len(calls) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.torchvision
def test_gradients_outlive_the_patch_and_can_be_differentiated() -> None:
    maps = features(torch.float64)
    with patch("torchvision", devices="cpu"):
        out = ops.roi_align(maps, ROIS.double(), 2, 0.25, 1)
    (gradient,) = torch.autograd.grad((out**3).sum(), maps, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), maps)
    step = torch.randn(maps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def slope(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        pooled = ops.roi_align(at, ROIS.double(), 2, 0.25, 1)
        return torch.autograd.grad((pooled**3).sum(), at)[0].square().sum()

    difference = (slope(maps + 1e-6 * step) - slope(maps - 1e-6 * step)) / 2e-6
    torch.testing.assert_close((second * step).sum(), difference, rtol=1e-6, atol=0)


@pytest.mark.torchvision
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.bfloat16])  # detectron2 rounds the boxes
def test_autocast_keeps_the_dtype_of_the_features(boxes_dtype: torch.dtype) -> None:
    maps, rois = features(torch.bfloat16), ROIS.to(boxes_dtype)
    boxes, scores = random_boxes(30)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.roi_align(maps, rois, 3, 0.25, 2)
            kept = ops.nms(boxes, scores, 0.5)
        return out, torch.autograd.grad(out.float().square().sum(), maps)[0], kept

    expected = run()
    with patch("torchvision", devices="cpu"), Recorder() as recorder:
        actual = run()
    for name in ("roi_align", "roi_align_backward"):
        assert recorder.calls[OURS + name] == torch.bfloat16
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert ours.dtype == torch.bfloat16
        # A rounding of bf16 in ours and in theirs, and where they square, of what is squared.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.detach().abs().max()))
    assert torch.equal(actual[2], expected[2])


@pytest.mark.torchvision
def test_nms() -> None:
    boxes, scores = random_boxes(60)
    classes = torch.arange(60) % 3
    expected = ops.nms(boxes, scores, 0.3), ops.batched_nms(boxes, scores, classes, 0.3)
    assert 0 < expected[0].numel() < 60
    with patch("torchvision", devices="cpu"), Recorder() as recorder:
        actual = ops.nms(boxes, scores, 0.3), ops.batched_nms(boxes, scores, classes, 0.3)
    assert OURS + "nms" in recorder.calls
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.torchvision
def test_cuda_keys_on_fake_tensors_and_no_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under deterministic algorithms, every name that torchvision has bound roi_align to runs the kernel."""
    module = sys.modules["torchvision.ops.roi_align"]
    slow: list[Tensor] = []
    monkeypatch.setattr(module, "_roi_align", lambda input, *how: slow.append(input))
    monkeypatch.setattr(module, "is_compile_supported", lambda device: True)  # it looks for a GPU
    original = module._roi_align
    torch.use_deterministic_algorithms(True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        maps = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.bfloat16).requires_grad_()
        rois = torch.rand(5, 5, device="cuda")
        for roi_align in (ops.roi_align, ops.poolers.roi_align, ops.RoIAlign(7, 0.25, 2)):
            how = () if isinstance(roi_align, torch.nn.Module) else (7, 0.25, 2)
            with patch("torchvision"), autocast_of_cuda(), Recorder() as recorder:
                out = roi_align(maps, rois, *how)
                kept = ops.nms(rois[:, 1:], rois[:, 0], 0.5)
            assert not slow
            assert recorder.calls[OURS + "roi_align"] == torch.bfloat16
            assert OURS + "nms" in recorder.calls
            assert (tuple(out.shape), out.dtype, out.device.type) == ((5, 4, 7, 7), torch.bfloat16, "cuda")
            assert out.requires_grad
            assert kept.dtype == torch.int64
            roi_align(maps, rois, *how)
            assert len(slow) == 1
            slow.clear()
        with patch("torchvision", devices="cpu"):
            ops.roi_align(maps, rois, 7)
        assert len(slow) == 1  # a device that is not patched keeps torchvision's path
    assert module._roi_align is original


@pytest.mark.torchvision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(dtype: torch.dtype) -> None:
    maps = features(dtype, channels_last=True)

    def run(maps: Tensor, rois: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return ops.roi_align(maps, rois, 3, 0.25, 2).view(3, -1).float().square().sum()

    with patch("torchvision", devices="cpu"):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(maps, ROIS), maps)
        (expected,) = torch.autograd.grad(run(maps, ROIS), maps)
    torch.testing.assert_close(actual, expected)


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_comes_along() -> None:
    maps = features()
    script = torch.jit.script(ops.RoIAlign(3, 0.25, 2))
    expected = script(maps, ROIS)
    with patch("torchvision", devices="cpu"), Recorder() as recorder:
        actual = script(maps, ROIS)
    assert OURS + "roi_align" in recorder.calls
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.torchvision
def test_everything_is_put_back() -> None:
    tables, slow = dispatch_tables(), sys.modules["torchvision.ops.roi_align"]._roi_align
    for _ in range(2):
        patch("torchvision", devices=["cuda", "cpu"])
        assert runs_ours()
        assert dispatch_tables() != tables
        unpatch("torchvision")
        assert dispatch_tables() == tables
        assert sys.modules["torchvision.ops.roi_align"]._roi_align is slow
        assert not runs_ours()
    unpatch("torchvision")
    assert dispatch_tables() == tables
    with pytest.raises(KeyError), patch("torchvision", devices="cpu"):
        raise KeyError
    assert dispatch_tables() == tables
    assert sys.modules["torchvision.ops.roi_align"]._roi_align is slow


@pytest.mark.torchvision
def test_patching_twice_and_nesting() -> None:
    patch("torchvision", devices="cpu")
    patch("torchvision", devices="cpu")
    assert runs_ours()
    unpatch("torchvision")  # once is enough
    assert not runs_ours()

    patch("torchvision")
    assert overrides("CUDA")
    assert not overrides("CPU")
    with patch("torchvision", devices="cpu") as outer:
        assert outer.devices == {"cpu", "cuda"}
        with patch("torchvision", devices="cpu"):
            assert runs_ours()
        assert runs_ours()  # the inner block found it patched
        unpatch("torchvision")
        assert not overrides("CUDA")
    assert overrides("CUDA")  # as the block found it
    assert not overrides("CPU")
    unpatch("torchvision")

    handle = patch("torchvision", devices="cpu")
    unpatch("torchvision")
    with handle:  # a handle can be entered later, and again
        assert runs_ours()
    assert not runs_ours()


@pytest.mark.torchvision
@pytest.mark.skipif(interpreting(), reason="takes minutes when interpreted")
def test_a_detector_of_torchvision_trains_and_predicts_alike() -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.ReLU())
        backbone.out_channels = 8
        return torchvision.models.detection.MaskRCNN(
            backbone,
            num_classes=3,
            rpn_anchor_generator=torchvision.models.detection.anchor_utils.AnchorGenerator(
                ((32, 64),), ((0.5, 1.0, 2.0),)
            ),
            box_roi_pool=ops.MultiScaleRoIAlign(["0"], 7, 2),
            mask_roi_pool=ops.MultiScaleRoIAlign(["0"], 14, 2),
            min_size=128,
            max_size=160,
            box_score_thresh=0.0,
            rpn_pre_nms_top_n_test=100,
        )

    images = [torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mask = torch.zeros(1, 128, 160, dtype=torch.uint8)
    mask[:, 20:90, 10:70] = 1
    box = torch.tensor([[10.0, 20.0, 70.0, 90.0]])
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": mask}

    def run() -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
        model = build()
        losses = model(images, [target, target])
        sum(losses.values()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        with torch.no_grad():
            return losses, gradients, model.eval()(images)

    expected = run()
    with patch("torchvision", devices="cpu"):
        actual = run()
    # Sums in another order, through four convolutions with ReLU and back.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.torchvision
def test_check_reports_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = check.Shape(1, 4, 8, 12, 3, 20)
    rows = check.check("cpu", shape, timed=False)
    assert len(rows) == 10
    assert all(row.runs and row.fine for row in rows)
    shown = check.table(rows, timed=False)
    assert shown.count("\n") == 10
    assert "NO" not in shown
    assert "TOO FAR" not in shown

    module = sys.modules[patch.__module__]
    monkeypatch.setattr(module, "nms", lambda boxes, scores, threshold: torch.arange(len(boxes)))
    wrong = [row for row in check.check("cpu", shape, timed=False) if not (row.runs and row.fine)]
    assert [row.name for row in wrong] == ["nms, float32", "batched_nms, float32"]
    assert check.table(wrong, timed=False).count("TOO FAR") == 2


@pytest.mark.torchvision
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_check_says_that_speed_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(check, "SMALL", check.Shape(1, 4, 8, 12, 3, 20))
    assert check.main() == 0
    printed = capsys.readouterr().out
    assert f"torchvision {torchvision.__version__}" in printed
    assert "Speed was not measured: there is no GPU here." in printed
    assert "speed-up" not in printed
    assert not overrides("CUDA")


@pytest.mark.torchvision
@pytest.mark.gpu
def test_check_on_a_gpu() -> None:
    rows = check.check("cuda", check.Shape(2, 64, 50, 84, 64, 500), timed=True)
    assert all(row.runs and row.fine and row.patched > 0 for row in rows), check.table(rows, timed=True)
