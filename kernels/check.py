"""What `patch("torchvision")` replaces on this machine, how near it comes, and how much faster it is.

    python -m fastmrcnn.kernels.check

Runs each of torchvision's operators as it is and patched, on the GPU or, where there is none, on the CPU
at small shapes, and prints whether the patched call ran the kernel, the largest difference, and on a GPU
the median times. Exits with 1 if a call did not run the kernel or differs by more than it should.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._ops import add_op_namespace_prefix
from .common.library import interpreting
from .patch import patch

REPEATS = 20


class Shape(NamedTuple):
    images: int
    channels: int
    height: int  # of the map, whose stride is 4
    width: int
    rois: int
    candidates: int  # of NMS


TRAINING = Shape(4, 256, 200, 336, 2048, 10000)  # the finest level of 4 images at 800x1344
SMALL = Shape(1, 8, 16, 24, 8, 100)


@dataclass
class Case:
    name: str
    run: Callable[[], Tensor]
    operator: str  # the one of ours that must have run
    tolerance: float  # relative to the largest entry; 0: no index may differ


@dataclass
class Row:
    """What was found of a case. Times in milliseconds."""

    name: str
    runs: bool
    error: str
    fine: bool
    original: float = math.nan
    patched: float = math.nan


def cases(device: str, shape: Shape) -> list[Case]:
    """torchvision's operators on random features and boxes."""
    from torchvision import ops

    random = torch.Generator().manual_seed(0)
    side = 4.0 * torch.tensor([shape.width, shape.height])
    centre = torch.rand(shape.rois, 2, generator=random) * side
    extent = 16 * (min(side.tolist()) / 16) ** torch.rand(shape.rois, 2, generator=random)
    image = torch.randint(shape.images, (shape.rois, 1), generator=random)
    rois = torch.cat([image, centre - extent / 2, centre + extent / 2], 1).to(device)
    features = torch.randn(shape.images, shape.channels, shape.height, shape.width, generator=random)
    gradient = torch.randn(shape.rois, shape.channels, 7, 7, generator=random).to(device)

    def pool(dtype: torch.dtype, memory_format: torch.memory_format, backward: bool) -> Callable[[], Tensor]:
        maps = features.to(device, dtype, memory_format=memory_format)
        maps.requires_grad_(backward)

        def run() -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = ops.roi_align(maps, rois, 7, 0.25, 2)
            if not backward:
                return out
            return torch.autograd.grad(out, maps, gradient.to(dtype))[0]

        return run

    found = []
    for backward in (False, True):
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 1.6e-2)):
            for layout in (torch.contiguous_format, torch.channels_last):
                kind = "float32" if dtype == torch.float32 else "bfloat16 autocast"
                direction = "forward and backward" if backward else "forward"
                nchw = "NCHW" if layout == torch.contiguous_format else "channels_last"
                found.append(
                    Case(
                        f"roi_align {direction}, {kind}, {nchw}",
                        pool(dtype, layout, backward),
                        "roi_align_backward" if backward else "roi_align",
                        tolerance,
                    )
                )

    corner = torch.rand(shape.candidates, 2, generator=random) * side
    boxes = torch.cat([corner, corner + 16 + 100 * torch.rand(shape.candidates, 2, generator=random)], 1)
    boxes = boxes.to(device)
    scores = torch.rand(shape.candidates, generator=random).to(device)
    classes = torch.randint(5, (shape.candidates,), generator=random).to(device)
    found.append(Case("nms, float32", lambda: ops.nms(boxes, scores, 0.5), "nms", 0.0))
    found.append(
        Case("batched_nms, float32", lambda: ops.batched_nms(boxes, scores, classes, 0.5), "nms", 0.0)
    )
    return found


def check(device: str, shape: Shape, timed: bool) -> list[Row]:
    """Run every case as it is and patched. torchvision must not be patched already."""
    rows = []
    for case in cases(device, shape):
        expected = case.run()
        original = median_milliseconds(case.run) if timed else math.nan
        with patch("torchvision", devices=device):
            with _Names() as names:
                actual = case.run()
            patched = median_milliseconds(case.run) if timed else math.nan
        error, fine = _compare(actual, expected, case.tolerance)
        runs = add_op_namespace_prefix(case.operator) in names.seen
        rows.append(Row(case.name, runs, error, fine, original, patched))
    return rows


class _Names(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def _compare(actual: Tensor, expected: Tensor, tolerance: float) -> tuple[str, bool]:
    if expected.dtype == torch.int64:
        wrong = set(actual.tolist()) ^ set(expected.tolist())
        same = torch.equal(actual, expected)
        return ("same indices" if same else f"{len(wrong)} indices differ"), same
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    return f"{error:.1e}", error <= tolerance


def median_milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, after some that warm it up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def table(rows: list[Row], timed: bool) -> str:
    width = max(len(row.name) for row in rows)
    head = f"{'operator':{width}}  {'patched':8}{'error':>16}"
    if timed:
        head += f"{'original ms':>13}{'patched ms':>12}{'speed-up':>10}"
    lines = [head]
    for row in rows:
        line = f"{row.name:{width}}  {'yes' if row.runs else 'NO':8}{row.error:>16}"
        if timed:
            line += f"{row.original:13.3f}{row.patched:12.3f}{row.original / row.patched:9.1f}x"
        lines.append(line + ("" if row.fine else "  TOO FAR"))
    return "\n".join(lines)


def main() -> int:
    try:
        with patch("torchvision"):  # say what is missing before anything else
            import torchvision
    except (ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    timed = torch.cuda.is_available()
    device = "cuda" if timed else "cpu"
    versions = f"torchvision {torchvision.__version__}, torch {torch.__version__}"
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions += f", triton {triton.__version__}"
    print(f"{versions}, {torch.cuda.get_device_name() if timed else platform.machine() + ' CPU'}")
    if timed:
        print(f"Triton's kernels against torchvision's on the GPU, median of {REPEATS} calls each.")
    elif interpreting():
        print("Triton's kernels, interpreted, against torchvision's operators on the CPU.")
    else:
        print("The operators in PyTorch against torchvision's operators on the CPU.")
    print("Errors are relative to the largest entry.\n")
    rows = check(device, TRAINING if timed else SMALL, timed)
    print(table(rows, timed))
    if not timed:
        print("\nSpeed was not measured: there is no GPU here.")
    return 0 if all(row.runs and row.fine for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
