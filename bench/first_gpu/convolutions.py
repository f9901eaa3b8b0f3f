"""python bench/first_gpu/convolutions.py FILE [--small]: every convolution of the step, by itself.

Forward, input gradient and weight gradient, at the shapes and types of the eager step, on random numbers.
Their sum is what the step takes at least, and the first number to read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from shapes import start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.device import choose_precision
from fastmrcnn.speed.apart import one_line
from fastmrcnn.speed.ladder import MASK_SLOTS
from fastmrcnn.speed.step_workload import Workload
from fastmrcnn.speed.timing import call_times, summary
from fastmrcnn.speed.training_rows import OurRunner, Row

REPEATS = 10
PREDICTORS = (3, 12, 15, 16)  # channels of RPN predictors, alone and together, padded or not
aten = torch.ops.aten


class Seen(TorchDispatchMode):
    """Counts the convolutions of a step, forward and backward, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.convolution.default, aten.convolution_backward.default):
            backward = func is aten.convolution_backward.default
            x, w = args[1:3] if backward else args[:2]
            # stride, padding, dilation, transposed, output padding, groups
            how = args[4:10] if backward else args[3:9]
            wanted = tuple(args[10])[:2] if backward else None
            how = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in how)
            self.counts[tuple(x.shape), tuple(w.shape), x.dtype, how, wanted] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    file, small, config, device = start(__doc__)
    shape, images = ((64, 96), 1) if small else ((800, 1344), 12)
    row = Row("eager", precision="bf16" if device.type == "cuda" else "fp32", packed=True)
    runner = OurRunner(row, Workload(config, device, shape, images, 1), MASK_SLOTS)
    with Seen() as seen:
        runner.step(0)
    del runner
    found: dict[str, Any] = {"convolutions": [], "predictors": []}
    total: Counter[str] = Counter()
    for (x, w, dtype, how, wanted), count in sorted(seen.counts.items(), key=lambda item: -work(item[0])):
        one: dict[str, Any] = {"x": x, "w": w, "transposed": how[3], "stride": how[0], "count": count}
        try:
            times = measure(x, w, dtype, how, wanted, device)
        except RuntimeError as error:  # one that cuDNN cannot do, or for which memory is short
            one["failure"] = one_line(error)
            times = {}
        gflop = work((x, w, dtype, how, wanted)) / 1e9
        for name, ms in times.items():
            total[name] += count * ms  # type: ignore[assignment]
            one[name] = {"ms": ms, "tflops": gflop / ms}
        found["convolutions"].append(one)
        shown = ", ".join(f"{name} {ms:.3f} ms, {gflop / ms:.1f} TFLOP/s" for name, ms in times.items())
        print(f"{count} x {list(x)} {list(w)}: {one.get('failure') or shown}", flush=True)
        found["sum_ms"] = dict(total)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    precision = choose_precision(row.precision, device)
    channels = config.model.fpn.channels
    side = (images, channels, shape[0] // 4, shape[1] // 4)
    plain = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    dtype = precision.dtype if precision.autocast else torch.float32
    for outputs in PREDICTORS:
        times = {}
        for wanted in (None, (True, True)):
            times |= measure(side, (outputs, channels, 1, 1), dtype, plain, wanted, device)
        found["predictors"].append({"channels": outputs, **times})
        print(f"RPN predictor of {outputs} channels: {times}", flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("sum over the step, ms:", {name: round(ms, 2) for name, ms in total.items()})


def work(key: tuple[Any, ...]) -> float:
    """Operations of one convolution, or of one of its gradients."""
    x, w, _, how, _ = key
    places = x[2] * x[3] if how[3] else math.prod(output_side(x, w, how))
    return 2.0 * x[0] * math.prod(w) * places / how[5]


def output_side(x: tuple[int, ...], w: tuple[int, ...], how: tuple[Any, ...]) -> list[int]:
    stride, padding, dilation = how[:3]
    sides = zip(x[2:], w[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]


def measure(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: torch.dtype,
    how: tuple[Any, ...],
    wanted: tuple[bool, bool] | None,
    device: torch.device,
) -> dict[str, float]:
    """Milliseconds: of the forward pass, or of the gradients that are wanted, of input and weight."""

    def random(shape: tuple[int, ...]) -> Tensor:
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)

    x, w = random(x_shape), random(w_shape)
    y = aten.convolution(x, w, None, *how)
    if wanted is None:
        return {"forward": median(lambda: aten.convolution(x, w, None, *how), device)}
    gradient = random(tuple(y.shape))

    def backward(*mask: bool) -> Callable[[], Any]:
        return lambda: aten.convolution_backward(gradient, x, w, None, *how, [*mask, False])

    found = {}
    if wanted[0]:
        found["input gradient"] = median(backward(True, False), device)
    if wanted[1]:
        found["weight gradient"] = median(backward(False, True), device)
    return found


def median(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    return summary(call_times([call] * REPEATS, device)).p50_ms


if __name__ == "__main__":
    main()
