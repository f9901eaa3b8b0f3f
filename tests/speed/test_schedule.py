"""The CUDA schedule as a tool: what is counted, on a CPU's schedule; the estimate; the tool where it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmrcnn import benchmark
from fastmrcnn.errors import UserError
from fastmrcnn.kernels import assign_levels
from fastmrcnn.speed.kernel_list import Kernel, kernels_of
from fastmrcnn.speed.schedule import LARGEST, schedule_tables, summary
from fastmrcnn.speed.step_estimate import SHARES, estimate, update_bytes


def kernels_when_compiled(function: Any, *inputs: Any) -> list[Kernel]:
    """Of the one graph that a function becomes on this machine."""
    from torch._inductor import scheduler

    found: list[Kernel] = []
    codegen = scheduler.Scheduler.codegen

    def listed(self: Any) -> Any:
        found.extend(kernels_of(self.nodes))
        return codegen(self)

    scheduler.Scheduler.codegen = listed  # type: ignore[method-assign]
    torch._dynamo.reset()
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            torch.compile(function, fullgraph=True)(*inputs)
    finally:
        scheduler.Scheduler.codegen = codegen  # type: ignore[method-assign]
    return found


def test_kernels_of_a_known_graph() -> None:
    def work(a: Tensor, b: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return (a @ b).relu() * 2 + 1, assign_levels(boxes)

    a, b, boxes = torch.randn(64, 32), torch.randn(32, 128), torch.rand(10, 4)
    by_kind = {kernel.kind: kernel for kernel in kernels_when_compiled(work, a, b, boxes)}
    assert set(by_kind) == {"library", "generated", "ours"}
    product = by_kind["library"]
    assert (product.read, product.written) == (4 * (64 * 32 + 32 * 128), 4 * 64 * 128)
    assert product.flops == 2 * 64 * 32 * 128
    after = by_kind["generated"]
    assert (after.read, after.written, after.flops) == (4 * 64 * 128, 4 * 64 * 128, 0)
    assert "relu" in after.name
    levels = by_kind["ours"]
    assert levels.bytes == 4 * 40 + assign_levels(boxes).nbytes
    assert levels.name.endswith("assign_levels")
    assert levels.sources[0].startswith("kernels/level_assign/op.py:")


def test_additions_to_places_of_a_map_count_those_places() -> None:
    """In one kernel with others too, as the gradients of all levels of a pyramid are."""

    def work(a: Tensor, b: Tensor, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return tuple((x + 1).index_put((rows,), values, accumulate=True) for x in (a, b))  # type: ignore[return-value]

    a, b, rows, values = torch.zeros(1000, 64), torch.ones(1000, 64), torch.arange(8) * 3, torch.ones(8, 64)
    kernels = kernels_when_compiled(work, a, b, rows, values)
    adding = [kernel for kernel in kernels if "index_put" in kernel.name]
    places = values.nbytes  # of each map, read and written
    assert sum(kernel.written for kernel in adding) == 2 * places
    own = len(adding) * (values.nbytes + rows.nbytes)
    assert sum(kernel.read for kernel in adding) == 2 * places + own


def some(part: str, read: int, flops: int = 0, kind: str = "generated") -> dict[str, Any]:
    return Kernel(kind, f"of {part}", part, ["model/fpn.py:1"], read, 0, flops)._asdict()


def test_the_estimate_takes_the_longer_of_moving_and_computing() -> None:
    moving, computing = some("FPN", int(3.35e9)), some("FPN", 8, int(989e9))
    found = estimate([moving, computing], trained_numbers=10**6)
    for case, shares in SHARES.items():
        gaps = 1e3 * shares.gap_s
        row = found["parts"]["FPN"]
        assert row[case] == pytest.approx(1 / shares.bandwidth + 1 / shares.flops + 2 * gaps)
        update = 1e3 * update_bytes(10**6) / (3.35e12 * shares.bandwidth) + gaps
        assert found["step"][case] == pytest.approx(row[case] + update)
    assert found["step"]["best"] < found["step"]["expected"] < found["step"]["worst"]


def test_a_summary_counts_and_names_the_largest() -> None:
    forward = [some("RPN", 1000 * n) for n in range(1, 9)] + [some("FPN", 5, 7, "library")]
    backward = [some("backbone", 10**9, kind="ours"), *[some("RPN", 1) for _ in range(5)]]
    traced = {"forward": forward, "backward": backward, "saved_bytes": 3e9, "trained_numbers": 100}
    found = summary(traced)
    assert found["forward"] == {"generated": 8, "library": 1, "ours": 0, "gigabytes": pytest.approx(36005e-9)}
    assert found["backward"]["ours"] == 1
    assert found["gigabytes"] == pytest.approx(1 + 36010e-9)
    assert found["saved_gigabytes"] == 3
    assert len(found["largest"]) == LARGEST
    assert found["largest"][0]["direction"] == "backward"
    text = schedule_tables(found, 12)
    assert "| 1000 | backward, ours: of backbone | model/fpn.py:1 |" in text
    assert "whole step" in text


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build")
def test_a_cpu_build_is_told_what_is_needed() -> None:
    with pytest.raises(UserError, match=r"CUDA build of torch.*needs no GPU"):
        benchmark.main(["--schedule", "cuda"])


def test_mask_slots_have_nothing_to_match() -> None:
    with pytest.raises(UserError, match="give --mask-slots a number"):
        benchmark.main(["--schedule", "cuda", "--mask-slots", "match"])


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
def test_the_schedule_of_a_small_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schedule.json"
    shape = ["--batch", "2", "--shape", "128", "192"]
    benchmark.main(["--schedule", "cuda", *shape, "--json", str(file), "model.backbone.name=resnet18"])
    found = json.loads(file.read_text(encoding="utf-8"))["schedule"]
    for direction in ("forward", "backward"):
        assert all(found[direction][kind] > 0 for kind in ("generated", "library", "ours"))
    parts = found["estimate"]["parts"]
    assert {"backbone", "FPN", "RPN", "RoI heads", "update"} <= set(parts)
    assert sum(row["gigabytes"] for name, row in parts.items() if name != "update") == pytest.approx(
        found["gigabytes"]
    )
    # Convolutions of ResNet-18 at half of a 128x192 image: all of them at least once forward.
    assert found["teraflops"] > 0.01
    assert 0 < found["saved_gigabytes"] < found["gigabytes"]
    assert "the largest kernels" in capsys.readouterr().out
