"""What a step should take on an H100, from its schedule: to be read beside the first time that is measured.

The time of a kernel is the longer of two: its bytes over the bandwidth that it reaches, its products over the
rate that it reaches. A step is the sum over its kernels and a gap after each. The shares that are reached are
assumptions, and so there are three estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BYTES_PER_S = 3.35e12  # H100 SXM, NVIDIA's data sheet
FLOPS_PER_S = 989e12  # bf16, dense, the same
UPDATE = "update"


class Shares(NamedTuple):
    bandwidth: float
    flops: float
    gap_s: float  # between two kernels of a CUDA graph


SHARES = {
    "expected": Shares(0.75, 0.40, 1e-6),
    "best": Shares(0.90, 0.50, 0.5e-6),
    "worst": Shares(0.60, 0.27, 2e-6),
}
FORMULA = (
    "sum over the kernels of max(bytes / (3.35 TB/s x a), operations / (989 TFLOP/s x b)) + c; "
    + "; ".join(
        f"{name}: a {s.bandwidth:g}, b {s.flops:g}, c {s.gap_s * 1e6:g} us" for name, s in SHARES.items()
    )
)


def update_bytes(numbers: int) -> int:
    """Of SGD with momentum on so many float32 weights: the norm of the gradient, then the fused update, which
    reads weight, gradient and momentum, and writes weight and momentum."""
    return numbers * 4 * (1 + 5)


def estimate(kernels: Sequence[Mapping[str, Any]], trained_numbers: int) -> dict[str, Any]:
    """Milliseconds by case, of the step and of each part.

    Args:
        kernels: dictionaries of `Kernel`, of forward and backward.
        trained_numbers: weights that the update changes.
    """
    update = {"part": UPDATE, "read": update_bytes(trained_numbers), "written": 0, "flops": 0}
    parts: dict[str, dict[str, float]] = {}
    for kernel in [*kernels, update]:
        row = parts.setdefault(
            kernel["part"], {"gigabytes": 0.0, "teraflops": 0.0, **dict.fromkeys(SHARES, 0.0)}
        )
        moved = kernel["read"] + kernel["written"]
        row["gigabytes"] += moved / 1e9
        row["teraflops"] += kernel["flops"] / 1e12
        for case, shares in SHARES.items():
            moving = moved / (BYTES_PER_S * shares.bandwidth)
            computing = kernel["flops"] / (FLOPS_PER_S * shares.flops)
            row[case] += 1e3 * (max(moving, computing) + shares.gap_s)
    step = {name: sum(row[name] for row in parts.values()) for name in next(iter(parts.values()))}
    return {"formula": FORMULA, "step": step, "parts": parts}
