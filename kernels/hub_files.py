"""Files of a repository for the Hub that are not these kernels: for kernel-builder, tests, a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

BUILD = """\
[general]
name = "@NAME@"
version = @VERSION@
edition = 5
license = "@LICENSE@"
backends = [@BACKENDS@]

[general.hub]
repo-id = "@REPO_ID@"

[torch-noarch]
"""

FLAKE = """\
{
  description = "@NAME@";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

IGNORED = """\
__pycache__/
build/
"""

# A template: the builder puts in what stands in braces.
CARD = """\
---
library_name: kernels
license: {{ license }}
tags:
- object-detection
- instance-segmentation
---

# {{ repo_id }}

Triton kernels for object detectors, each beside plain PyTorch that says what it computes: RoIAlign of one map
or of a whole feature pyramid, RoIPool, NMS of all images and classes at once, matching of boxes with objects,
decoding of boxes, the mask head of one class with its loss, mask targets, pasting and run lengths of masks,
and decoded images resized and padded to a batch.
On CPU tensors plain PyTorch runs. Forward and backward repeat bit for bit; no function waits for the device
but `nms` and `batched_nms`. torch 2.11 or newer is needed.

```python
import torch
from kernels import get_kernel

detection = get_kernel("{{ repo_id }}", version={{ version }}, trust_remote_code=True)
features = torch.randn(1, 256, 50, 84)
rois = torch.tensor([[0.0, 40.0, 40.0, 200.0, 120.0]])  # image, x1, y1, x2, y2
pooled = detection.roi_align(features, rois, 7, spatial_scale=1 / 16, sampling_ratio=2, aligned=True)
```

torchvision's own calls run on these kernels within `with detection.patch("torchvision"):`.

## Functions
{% for function in functions %}
- `{{ function }}`
{% endfor %}

Shapes, dtypes and errors are in their docstrings: `help(detection.roi_align)`.

## Layers
{% for layer in layers %}
- `{{ layer }}`
{% endfor %}

For `kernels.kernelize`, in place of torchvision's layers of these names; `RoIAlign` also of detectron2's
`ROIAlign`.

## Tests and benchmark

`pytest tests` compares with the definitions, on the CPU and on a GPU. `kernels benchmark` compares with
torchvision, which it needs.
"""

TESTS = '''\
"""The kernels against their definitions, on the CPU and, where there is one, on a GPU."""

import importlib
import inspect

import kernels
import pytest
import torch

detection = kernels.get_kernel("@REPO_ID@", version=@VERSION@, trust_remote_code=True)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SCALES = [1 / 4, 1 / 8]

pytestmark = pytest.mark.kernels_ci


def definition(operator):
    return importlib.import_module(f"{detection.__name__}.{operator}.naive")


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return request.param


def boxes_in(images, slots, side):
    corner = torch.rand(images, slots, 2) * side * 0.7
    return torch.cat([corner, corner + 1 + torch.rand(images, slots, 2) * side * 0.3], -1)


def test_operators_are_in_the_namespace_of_this_build(device):
    pooled = detection.roi_align(
        torch.ones(1, 1, 4, 4, device=device, requires_grad=True),
        torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]], device=device),
        2,
    )
    assert detection.__name__ in type(pooled.grad_fn).__name__
    assert hasattr(getattr(torch.ops, detection.__name__), "roi_align")


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_and_its_gradient(device, aligned):
    features = torch.randn(2, 3, 16, 20, device=device, requires_grad=True)
    rois = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), boxes_in(1, 3, 64)[0]], 1)
    pooled = detection.roi_align(features, rois.to(device), 3, 1 / 4, 2, aligned)
    exact = features.detach().cpu().double().requires_grad_()
    how = {"sampling_ratio": 2, "aligned": aligned}
    expected = definition("roi_align").roi_align(exact, rois, (3, 3), 1 / 4, **how)
    torch.testing.assert_close(pooled.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(pooled.shape)
    pooled.backward(gradient.to(device))
    expected.backward(gradient.double())
    torch.testing.assert_close(features.grad.cpu().double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roi_align_of_a_pyramid(device, dtype):
    features = [torch.randn(2, 3, 64 // s, 64 // s).to(device, dtype) for s in (4, 8)]
    boxes = boxes_in(2, 4, 64)
    valid = torch.tensor([[True, True, False, True], [True, False, True, True]])
    pooled = detection.multilevel_roi_align(
        features, boxes.to(device), 2, spatial_scales=SCALES, valid=valid.to(device), canonical_size=32.0
    )
    expected = definition("roi_align").multilevel_roi_align(
        [f.cpu() for f in features], boxes, (2, 2), spatial_scales=SCALES, valid=valid, canonical_size=32.0
    )
    error = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(pooled.cpu().double(), expected, rtol=error, atol=error)
    assert not pooled[~valid.to(device)].any()


def test_nms(device):
    boxes, scores = boxes_in(2, 60, 40), torch.rand(2, 60)
    kept = detection.nms(boxes[0].to(device), scores[0].to(device), 0.3)
    assert torch.equal(kept.cpu(), definition("nms").nms(boxes[0], scores[0], 0.3))
    groups = torch.randint(3, (2, 60))
    ours = (boxes.to(device), scores.to(device), groups.to(device))
    index, valid = detection.padded_nms(*ours, None, 0.3, 20)
    expected, real = definition("nms").padded_nms(boxes, scores, groups, None, 0.3, 20)
    assert torch.equal(valid.cpu(), real)
    assert torch.equal(index.cpu()[real], expected[real])


def test_mask_loss_and_its_gradient(device):
    logits = torch.randn(4, 5, 6, 6, device=device, requires_grad=True)
    classes = torch.tensor([0, 4, 2, 2], device=device)
    targets = torch.rand(4, 6, 6, device=device) < 0.5
    loss = detection.mask_loss(logits, classes, targets, torch.ones(4, device=device))
    (gradient,) = torch.autograd.grad(loss, logits)
    chosen = logits[torch.arange(4, device=device), classes]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(chosen, targets.float())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_resize_pad(device):
    sizes, resized = torch.tensor([[5, 7], [9, 4]]), torch.tensor([[8, 10], [4, 6]])
    given = {
        "buffer": torch.randint(256, (3 * (5 * 7 + 9 * 4),)).to(torch.uint8),
        "offset": torch.tensor([0, 3 * 5 * 7]),
        "source": sizes,
        "resized": resized,
        "sizes": resized,
        "turns": torch.tensor([0, 2]),
        "flips": torch.tensor([[False, True], [True, False]]),
        "origin": torch.zeros_like(sizes),
    }
    found = detection.resize_pad(**{k: v.to(device) for k, v in given.items()}, height=9, width=12)
    expected = definition("resize_pad").resize_pad(**given, height=9, width=12)
    assert torch.equal(found.cpu(), expected)


class Adopting(torch.nn.Module):
    """The members of torchvision's RoIAlign and MultiScaleRoIAlign."""

    def __init__(self, **members):
        super().__init__()
        for name, value in members.items():
            setattr(self, name, value)


def test_layers_compute_what_the_functions_do(device):
    features = torch.randn(1, 3, 16, 16, device=device)
    boxes = boxes_in(1, 4, 64).to(device)[0]
    how = {"output_size": (2, 2), "sampling_ratio": 2}
    single = Adopting(spatial_scale=1 / 4, aligned=True, **how)
    rois = torch.cat([torch.zeros(4, 1, device=device), boxes], 1)
    expected = detection.roi_align(features, rois, (2, 2), 1 / 4, 2, True)
    assert torch.equal(detection.layers.RoIAlign.forward(single, features, rois), expected)

    several = Adopting(featmap_names=["a", "b"], canonical_scale=224, canonical_level=4, **how)
    maps = {"a": features, "b": features[..., ::2, ::2], "other": features}
    pooled = detection.layers.MultiScaleRoIAlign.forward(several, maps, [boxes], [(64, 64)])
    expected = detection.multilevel_roi_align(
        [maps["a"], maps["b"]], boxes[None], 2, spatial_scales=SCALES, sampling_ratio=2
    )
    assert torch.equal(pooled, expected[0])


@pytest.mark.parametrize("name", ["RoIAlign", "MultiScaleRoIAlign"])
def test_layers_have_no_state(name):
    layer = getattr(detection.layers, name)
    assert layer.__init__ is torch.nn.Module.__init__
    own = {member for member, _ in inspect.getmembers(layer)} - {
        member for member, _ in inspect.getmembers(torch.nn.Module)
    }
    assert own <= {"can_torch_compile", "has_backward"}
'''

BENCHMARK = '''\
"""RoIAlign, NMS and the mask loss beside torchvision's and PyTorch's, for `kernels benchmark`.

On a GPU at the shapes of a training step with two images of 800x1344, elsewhere at small ones.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torchvision import ops

STRIDES = (4, 8, 16, 32)


def random_boxes(count, height, width, device):
    """(count, 4), of all sizes: from 16 pixels to half the image."""
    side = torch.tensor([width, height], device=device)
    extent = 16 * (side / 32) ** torch.rand(count, 1, device=device)
    corner = torch.rand(count, 2, device=device) * (side - extent)
    return torch.cat([corner, corner + extent], 1)


class Detection(Benchmark):
    seed = 0

    def setup(self):
        on_gpu = self.device == "cuda"
        self.height, self.width = (800, 1344) if on_gpu else (128, 160)
        self.rois, self.candidates, self.masks = (512, 8000, 128) if on_gpu else (32, 500, 8)

    def setup_roi_align(self):
        self.setup()
        maps = [
            torch.randn(2, 256 if self.device == "cuda" else 16, self.height // s, self.width // s)
            for s in STRIDES
        ]
        self.maps = {str(i): m.to(self.device) for i, m in enumerate(maps)}
        self.boxes = [random_boxes(self.rois, self.height, self.width, self.device) for _ in range(2)]
        self.sizes = [(self.height, self.width)] * 2
        how = (list(self.maps), 7, 2)
        self.ours, self.theirs = self.kernel.MultiScaleRoIAlign(*how), ops.MultiScaleRoIAlign(*how)

    def benchmark_roi_align(self):
        self.out = self.ours(self.maps, self.boxes, self.sizes)

    def verify_roi_align(self):
        return self.theirs(self.maps, self.boxes, self.sizes)

    def setup_nms(self):
        self.setup()
        self.boxes = random_boxes(self.candidates, self.height, self.width, self.device)
        self.scores = torch.rand(self.candidates, device=self.device)

    def benchmark_nms(self):
        self.out = self.kernel.nms(self.boxes, self.scores, 0.7)

    def verify_nms(self):
        return ops.nms(self.boxes, self.scores, 0.7)

    def setup_mask_loss(self):
        self.setup()
        self.logits = torch.randn(self.masks, 80, 28, 28, device=self.device)
        self.classes = torch.randint(80, (self.masks,), device=self.device)
        self.targets = torch.rand(self.masks, 28, 28, device=self.device) < 0.5
        self.weight = torch.ones(self.masks, device=self.device)

    def benchmark_mask_loss(self):
        self.out = self.kernel.mask_loss(self.logits, self.classes, self.targets, self.weight)

    def verify_mask_loss(self):
        chosen = self.logits[torch.arange(self.masks, device=self.device), self.classes]
        return F.binary_cross_entropy_with_logits(chosen, self.targets.float())
'''


def texts(name: str, repo_id: str, version: int, license: str, backends: Sequence[str]) -> dict[str, str]:
    """The files by their path in the repository."""
    values = {
        "NAME": name,
        "REPO_ID": repo_id,
        "VERSION": str(version),
        "LICENSE": license,
        "BACKENDS": ", ".join(f'"{backend}"' for backend in backends),
    }
    files = {
        ".gitignore": IGNORED,
        "CARD.md": CARD,
        "benchmarks/benchmark.py": BENCHMARK,
        "build.toml": BUILD,
        "flake.nix": FLAKE,
        "tests/__init__.py": "",
        "tests/test_kernels.py": TESTS,
    }
    for key, value in values.items():
        files = {path: text.replace(f"@{key}@", value) for path, text in files.items()}
    return files
