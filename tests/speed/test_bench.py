"""The benchmarks: that their gates bite, that the floor is right, and that they run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_mask_loss
import bench_mask_paste
import bench_mask_predictor
import bench_nms
import bench_resize_pad
import bench_roi_align
import harness
import pytest
import record
import table
import torch
import workload
from harness import Contest, Inputs, NotCloseError, Traffic, measure
from places import ROOT
from torch import Tensor

from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.markdown import origin
from fastmrcnn.speed.markdown import table as markdown_table
from fastmrcnn.speed.timing import copy_bandwidth

BENCH = ROOT / "bench"
CPU = torch.device("cpu")
SECONDS = 0.001
FIRST_ROI = [931.3832, 577.1635, 1290.2048, 593.5695]


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are tests of the harness; PyTorch will do."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def doubled() -> Contest:
    """An operator of which everything is known: twice the input."""

    def make_inputs(device: torch.device) -> Inputs:
        x = (torch.arange(1, 9, device=device) / 8).bfloat16().requires_grad_()
        return Inputs({"x": x}, [x], torch.full((8,), 1e-6, device=device).bfloat16())

    return Contest(
        "double",
        make_inputs,
        lambda x: x * 2,
        lambda x: x.double() * 2,
        {"peer": lambda x: x + x},
        Traffic(
            {"read x": 16, "write y": 16}, {"read gradient": 16, "write gradient of x": 16, "read x": 16}
        ),
    )


class Gradient(torch.autograd.Function):
    """Right forward, and a gradient of one's choice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


@pytest.mark.parametrize("which", harness.PASSES)
def test_measures_what_is_close(which: str) -> None:
    found = measure(doubled(), which, CPU, SECONDS, bandwidth=1e9)
    assert found["error"] == 0
    assert 0 < found["ours"]["p20_ms"] <= found["ours"]["p50_ms"] <= found["ours"]["p80_ms"]
    assert found["ours"]["extra_bytes"] is None
    peer = found["peers"]["peer"]
    assert peer["ratio"] == pytest.approx(peer["p50_ms"] / found["ours"]["p50_ms"])
    seconds = found["ours"]["p50_ms"] / 1e3
    unique = {"forward": 32, "backward": 48, "both": 64}[which]
    assert found["unique_bytes"] == unique
    assert found["gb_per_s"] == pytest.approx(unique / seconds / 1e9)
    assert found["floor_share"] == pytest.approx(unique / 1e9 / seconds)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a little": lambda x: x * 2 * 1.02,
    "one entry": lambda x: x * 2 + torch.nn.functional.one_hot(torch.tensor(3), 8) * 0.1,
    "NaN": lambda x: x * 2 + torch.tensor([0] * 7 + [float("nan")]),
    "zeros": lambda x: x * 0,
    "shape": lambda x: x.repeat(2)[:9] * 2,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_refuses_a_wrong_result(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotCloseError, match="ours"):
        measure(replace(doubled(), ours=wrong), "forward", CPU, SECONDS, None)


@pytest.mark.parametrize("which", ["backward", "both"])
@pytest.mark.parametrize("factor", [0.0, 2.04, float("nan")])
def test_refuses_a_wrong_gradient_however_small(which: str, factor: float) -> None:
    wrong = replace(doubled(), ours=lambda x: Gradient.apply(x, factor))
    assert measure(wrong, "forward", CPU, SECONDS, None)["error"] == 0
    with pytest.raises(NotCloseError, match="ours"):
        measure(wrong, which, CPU, SECONDS, None)


def test_refuses_a_peer_that_is_wrong_and_names_one_that_cannot_run() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    with pytest.raises(NotCloseError, match="peer"):
        measure(replace(doubled(), peers={"peer": lambda x: x * 3}), "forward", CPU, SECONDS, None)
    found = measure(replace(doubled(), peers={"peer": broken}), "forward", CPU, SECONDS, None)
    assert found["peers"] == {"peer": {"failure": "RuntimeError: no such kernel"}}


def test_indices_compare_exactly() -> None:
    kept = [torch.tensor([1, 2, 3]), torch.tensor([True, False])]
    assert harness.check("ours", kept, kept, 1) == 0
    with pytest.raises(NotCloseError, match="1 of 3"):
        harness.check("ours", [torch.tensor([1, 2, 4]), kept[1]], kept, 1)
    with pytest.raises(NotCloseError, match="1 of 2"):
        harness.check("ours", [kept[0], torch.tensor([True, True])], kept, 1)
    with pytest.raises(NotCloseError, match="returns 1 tensors"):
        harness.check("ours", kept[:1], kept, 1)


def test_of_zeros_every_entry_must_be_zero() -> None:
    zeros = [torch.zeros(3, dtype=torch.float64)]
    assert harness.check("ours", [torch.zeros(3)], zeros, 1) == 0
    with pytest.raises(NotCloseError, match="inf"):
        harness.check("ours", [torch.tensor([0, 0, 1e-30])], zeros, 1)


@pytest.mark.parametrize("which", ["forward", "both"])
def test_the_operators_gates_bite(which: str) -> None:
    """A kernel that pools from the wrong level, or scales one channel of the loss, is not timed."""
    pool = bench_roi_align.contest(workload.SMALL, CPU, 7, 2, False)
    wrong = replace(pool, ours=lambda features, boxes: pool.ours(features, boxes + 0.5))
    with pytest.raises(NotCloseError):
        measure(wrong, which, CPU, SECONDS, None)
    loss = bench_mask_loss.contest(workload.SMALL, CPU)
    wrong = replace(loss, ours=lambda logits, **rest: loss.ours(logits * 1.01, **rest))
    with pytest.raises(NotCloseError):
        measure(wrong, which, CPU, SECONDS, None)
    for fused in (False, True):
        masks = bench_mask_predictor.contest(workload.SMALL, CPU, fused)
        wrong = replace(masks, ours=lambda bias, ours=masks.ours, **rest: ours(bias=bias * 1.01, **rest))
        with pytest.raises(NotCloseError):
            measure(wrong, which, CPU, SECONDS, None)
    paste = bench_mask_paste.paste_contest(workload.SMALL, CPU, packed=False)
    runs = bench_mask_paste.rle_contest(workload.SMALL)
    for pasted in (paste, runs):
        wrong = replace(pasted, ours=lambda masks, ours=pasted.ours, **rest: ours(masks=masks * 1.01, **rest))
        with pytest.raises(NotCloseError):
            measure(wrong, "forward", CPU, SECONDS, None)
    pixels = bench_resize_pad.contest(workload.SMALL, CPU)
    wrong = replace(pixels, ours=lambda resized, **rest: pixels.ours(resized=resized - 1, **rest))
    with pytest.raises(NotCloseError):
        measure(wrong, "forward", CPU, SECONDS, None)
    nms = bench_nms.contest(workload.SMALL)
    wrong = replace(nms, ours=lambda scores, **rest: nms.ours(scores=scores.flip(1), **rest))
    with pytest.raises(NotCloseError):
        measure(wrong, "forward", CPU, SECONDS, None)


def test_floor_by_hand() -> None:
    # 2 GB in 1 ms are 2 TB/s, half of what a device of 4 TB/s can do.
    found = harness.floor(2_000_000_000, 1.0, 4e12)
    expected = {"gb_per_s": 2000.0, "copy_gb_per_s": 4000.0, "floor_share": 0.5}
    assert found == {"unique_bytes": 2_000_000_000, **expected}
    assert "floor_share" not in harness.floor(1, 1.0, None)


def test_traffic_of_roi_align_by_hand() -> None:
    """Two RoIs of the finest level, whose samples touch pixels 0 to 7, and 4 to 11, of each axis."""
    maps = [torch.zeros(1, 16, side, side, dtype=torch.bfloat16) for side in (32, 16, 8, 4)]
    boxes = torch.tensor([[[0.0, 0, 28, 28], [16.0, 16, 44, 44]]])
    how = bench_roi_align.pooling(7, 2, False)
    traffic = bench_roi_align.traffic(maps, boxes, how)
    pixels = 8 * 8 + 8 * 8 - 4 * 4
    out = 2 * 16 * 7 * 7 * 2
    gradients = 16 * (32 * 32 + 16 * 16 + 8 * 8 + 4 * 4) * 2
    assert traffic.bytes("forward") == 32 + pixels * 16 * 2 + out
    assert traffic.bytes("backward") == 32 + out + gradients
    assert traffic.bytes("both") == 32 + pixels * 16 * 2 + out + out + gradients


def test_traffic_of_the_mask_loss_by_hand() -> None:
    meta = {"device": "meta"}
    traffic = bench_mask_loss.traffic(
        torch.empty(1024, 80, 28, 28, dtype=torch.bfloat16, **meta),
        torch.empty(1024, dtype=torch.int64, **meta),
        torch.empty(1024, 28, 28, dtype=torch.bool, **meta),
        torch.empty(1024, **meta),
    )
    read = 1024 * (784 * 2 + 8 + 784 + 4)
    assert traffic.bytes("forward") == read + 4
    assert traffic.bytes("backward") == read + 4 + 1024 * 80 * 784 * 2
    assert traffic.bytes("both") == read + 8 + 1024 * 80 * 784 * 2


def test_traffic_of_the_mask_predictor_by_hand() -> None:
    meta = {"device": "meta"}
    given = bench_mask_predictor.Predictor(
        torch.empty(1024, 256, 28, 28, dtype=torch.bfloat16, **meta),
        torch.empty(80, 256, **meta),
        torch.empty(80, **meta),
        torch.empty(1024, dtype=torch.int64, **meta),
        torch.empty(1024, **meta),
    )
    targets = torch.empty(1024, 28, 28, dtype=torch.bool, **meta)
    traffic = bench_mask_predictor.traffic(given, [targets])
    features, weight, slots = 1024 * 256 * 784 * 2, 80 * 256 * 4, 1024 * (8 + 4)
    forward = features + weight + 80 * 4 + slots + 1024 * 784 + 4
    written = features + weight + 80 * 4
    assert traffic.bytes("forward") == forward
    assert traffic.bytes("backward") == weight + slots + 4 + written
    assert traffic.bytes("both") == forward + 4 + written


def test_traffic_of_pasted_masks_by_hand() -> None:
    """What is written: 100 bitmaps of 800x1344 in bools or bits, or 4096 runs and their number for each."""
    read = 100 * (28 * 28 + 4) * 4
    load, pixels = workload.TRAINING, 100 * 800 * 1344
    bools, bits = (bench_mask_paste.paste_contest(load, CPU, packed) for packed in (False, True))
    assert bools.traffic is not None
    assert bools.traffic.bytes("forward") == read + pixels
    assert bits.traffic is not None
    assert bits.traffic.bytes("forward") == read + pixels // 8
    runs = bench_mask_paste.rle_contest(load).traffic
    assert runs is not None
    assert runs.bytes("forward") == read + 100 * 4097 * 4


def test_traffic_of_resizing_by_hand() -> None:
    """8 images of 480x640 in bytes, what is said of each, and the pixels of 800x1344."""
    traffic = bench_resize_pad.contest(workload.TRAINING, CPU).traffic
    assert traffic is not None
    assert traffic.bytes("forward") == 8 * (3 * 480 * 640 + 8 + 2 * 2 * 4) + 8 * 3 * 800 * 1344


def test_the_workload_is_what_it_says() -> None:
    load = workload.TRAINING
    boxes = workload.rois(load, load.box_rois)
    assert boxes.shape == (8, 512, 4)
    low, high = boxes[..., :2], boxes[..., 2:]
    assert (low >= 0).all()
    assert (high <= torch.tensor([1344, 800])).all()
    sides = (high - low)[:, 128:]
    assert sides.min() >= 15.99
    assert sides.max() <= 800.01
    # Log-uniform from 16 to 800: a quarter of the sides lies in each quarter of the logarithm.
    logarithm = (sides / 16).log() / torch.tensor(50.0).log()
    counts = logarithm.histc(4, 0, 1) / logarithm.numel()
    assert (counts - 0.25).abs().max() < 0.02
    # Jittered RoIs have another of their image close by; few of the others do.
    objects = boxes[:, :128]
    distance = torch.cdist(objects, objects, compute_mode="donot_use_mm_for_euclid_dist")
    distance += torch.eye(128) * 1e9
    nearest = distance.min(2).values / (objects[..., 2:] - objects[..., :2]).mean(2)
    assert (nearest < 0.5).float().mean() > 0.95
    # Fixed for good: results of other numbers do not compare.
    expected = torch.tensor(FIRST_ROI)
    torch.testing.assert_close(boxes[0, 0], expected, rtol=0, atol=1e-2)
    _, scores, levels = workload.proposals(load)
    assert all(len(row.unique()) == 10_000 for row in scores)
    assert levels.unique(return_counts=True)[1].tolist() == [16_000] * 5


FACTS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "1.2",
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0", "triton": "3.7.1", "torchvision": "0.27.1"},
}


def row(operator: str, which: str, **more: Any) -> dict[str, Any]:
    times = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "extra_bytes": 4_000_000, "calls": 10}
    slower = {**times, "p50_ms": 8.0, "ratio": 4.0}
    peers = {"torchvision": slower, "compiled reference": {"failure": "RuntimeError: no"}}
    return {"operator": operator, "pass": which, "error": 0.001, "ours": times, "peers": peers, **more}


def test_results_are_written_and_read(tmp_path: Path) -> None:
    floor = harness.floor(10**9, 2.0, 1e12)
    rows = [row("RoIAlign", "both", **floor), row("NMS", "forward", host_syncs={"ours": 0, "torchvision": 8})]
    path = record.write(tmp_path, FACTS, rows)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    lines = table.markdown(json.loads(path.read_text())).splitlines()
    versions = "torch 2.13.0, torchvision 0.27.1, triton 3.7.1"
    copy = "A plain copy moves 1000 to 1000 GB/s."
    assert lines[0] == f"NVIDIA H100 80GB HBM3, driver 1.2, {versions}, commit c0ffee. {copy}"
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    times = "2.000 (1.000 to 3.000)"
    assert cells == [
        "RoIAlign", "both", times, "500", "50%", "4.0", "8.000, 4.0, 4.0x", "did not run", "1.0e-03",
    ]  # fmt: skip
    assert "host syncs: 0 of ours, 8 of torchvision" in lines[5]
    assert {line.count("|") for line in lines[2:]} == {len(table.HEAD) + 1}


def test_the_environment_is_that_of_the_whole_step() -> None:
    """One function for both; a commit that is given is not asked of git."""
    facts = environment(CPU, "c0ffee")
    assert facts["commit"] == "c0ffee"
    assert facts["gpu"] is None
    assert facts["driver"] is None
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert environment(CPU) == {**facts, "commit": environment(CPU)["commit"]}
    assert origin(facts).endswith(", commit c0ffee.")
    assert origin(facts).startswith(f"CPU ({facts['cpu']}, {facts['threads']} threads), ")
    assert origin({**facts, "gpu": "GPU", "commit": None}).startswith("GPU, driver unknown, ")


def test_a_row_of_a_table_may_end_early_and_cannot_break_it() -> None:
    assert markdown_table(["a", "b", "c"], [["1", "2", "3"], ["x | y"]]).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1 | 2 | 3 |",
        "| x / y |  |  |",
    ]


def test_runs_of_one_commit_add_up(tmp_path: Path) -> None:
    def operators(path: Path) -> dict[str, float]:
        return {r["operator"]: r["error"] for r in json.loads(path.read_text())["results"]}

    record.write(tmp_path, FACTS, [row("a", "both"), row("b", "both")])
    path = record.write(tmp_path, FACTS, [{**row("b", "both"), "error": 0.5}])
    assert operators(path) == {"a": 0.001, "b": 0.5}
    record.write(tmp_path, {**FACTS, "commit": "decaf"}, [row("c", "both")])
    assert operators(path) == {"c": 0.001}
    for _ in range(2):
        name = {**FACTS, "commit": "decaf-dirty"}
        record.write(tmp_path, name, [row("d", "both")])
    record.write(tmp_path, name, [row("e", "both")])
    assert operators(path) == {"e": 0.001}


def test_table_says_what_is_no_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert table.main([str(tmp_path / "other.json")]) == 2
    assert table.main([str(tmp_path / "none.json")]) == 2
    assert table.main([]) == 2
    assert capsys.readouterr().err.count("not a file of results") == 2


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", *arguments]
    # Beside a worker of pytest-xdist, pytest-benchmark does not measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(command, cwd=BENCH.parent, env=environment, capture_output=True, text=True)


def test_end_to_end_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "bench.json"
    before = sorted((BENCH / "results").iterdir())
    done = run_bench(f"--benchmark-json={path}", "--seconds=0.001")
    assert done.returncode == 0, done.stdout
    found = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    passes: dict[str, set[str]] = {}
    for entry in found:
        passes.setdefault(entry["operator"].split(",")[0].split(" x ")[0], set()).add(entry["pass"])
        assert entry["ours"]["p50_ms"] > 0
        assert "floor_share" not in entry  # a CPU's cache has no floor
        assert not any("failure" in peer for peer in entry["peers"].values())
    every = set(harness.PASSES)
    assert passes == {
        "RoIAlign 7x7": every,
        "RoIAlign 14x14": every,
        "RoIAlign 7x7 and 14x14": {"backward", "both"},
        "mask loss 8": every,
        "mask predictor and loss": every,
        "mask predictor and loss from bitmaps": every,
        "padded NMS": {"forward"},
        "matcher": {"forward"},
        "box decode": {"forward"},
        "level assignment": {"forward"},
        "mask paste to bools": {"forward"},
        "mask paste to bits": {"forward"},
        "mask RLE": {"forward"},
        "resize and pad": {"forward"},
        "training step": {"step"},
    }
    assert sorted((BENCH / "results").iterdir()) == before


def test_refuses_to_record_a_cpu() -> None:
    pytest.importorskip("pytest_benchmark")
    done = run_bench("--record")
    assert done.returncode == 4
    assert "needs a CUDA device" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu_waits_are_counted_and_memory_is_measured() -> None:
    device = torch.device("cuda")
    x = torch.ones(1 << 20, device=device)
    assert harness.host_syncs(lambda: x.sum()) == 0
    assert harness.host_syncs(lambda: (x.sum().item(), x.max().item())) == 2
    harness.assert_no_sync(lambda: x.sum())
    with pytest.raises(RuntimeError):
        harness.assert_no_sync(lambda: x.sum().item())
    assert harness.extra_memory(lambda: x * 2) == 0
    assert harness.extra_memory(lambda: (x * 2) * 3) == x.nbytes
    assert 1e10 < copy_bandwidth(device) < 1e14
    found = measure(doubled(), "both", device, SECONDS, bandwidth=1e12)
    assert found["ours"]["extra_bytes"] >= 0
    assert 0 < found["floor_share"] < 1


def tune() -> Any:
    pytest.importorskip("triton")
    import tune

    return tune


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune().main(["roi_align", "nms", "mask_loss"]) == 2
    assert capsys.readouterr().err == "error: tuning needs a GPU, and there is none here\n"


def test_tuning_tries_every_choice_with_the_grid_that_it_needs() -> None:
    """Of the launches at the small workload, which are described here and not run."""
    module = tune()
    names = set()
    for operator, trials in module.OPERATORS.items():
        for trial in trials(workload.SMALL, CPU):
            names.add(trial.name)
            assert trial.name.startswith(operator)
            assert trial.grid(trial.launch.arguments) == trial.launch.grid
            parameters = {parameter.name for parameter in trial.launch.kernel.params}
            assert set(trial.launch.arguments) == parameters
            options = {"num_warps", "num_stages", "maxnreg"}
            assert set(trial.choices) <= parameters | options
            found = list(module.variants(trial))
            assert len({str(choice) for choice, _ in found}) == len(found) > 1
            for choice, launch in found:
                assert launch.num_warps == choice["num_warps"]
                assert all(launch.arguments[k] == v for k, v in choice.items() if k in parameters)
                for option in ("num_stages", "maxnreg"):
                    expected = choice.get(option, trial.launch.options.get(option))
                    assert launch.options.get(option) == expected
                assert launch.grid == trial.grid(launch.arguments)
    assert len(names) == 8
    # 16 channels in blocks of 64: one program an RoI where the launch has one of 16.
    pool = next(module.roi_align_trials(workload.SMALL, CPU))
    _, launch = next(module.variants(pool))
    assert launch.grid == (workload.SMALL.images * workload.SMALL.box_rois, 1)


def test_tuning_shows_the_fastest_and_what_does_not_run() -> None:
    choices = [{"BLOCK_C": 128, "num_warps": 8, "ms": 0.25}, {"BLOCK_C": 64, "num_warps": 4, "ms": 0.5}]
    failed = [{"BLOCK_C": 256, "num_warps": 4, "why": "OutOfResources: shared memory"}]
    shown = tune().text({"kernel": "roi_align", "in_use_ms": 0.3, "choices": choices, "failed": failed})
    assert shown.splitlines() == [
        "roi_align: 0.3000 ms as it is launched now",
        "  0.2500 ms  BLOCK_C 128, num_warps 8",
        "  0.5000 ms  BLOCK_C 64, num_warps 4",
        "  1 others do not run here: OutOfResources: shared memory",
    ]


@pytest.mark.gpu
def test_tuning_on_a_gpu() -> None:
    """At the small workload: every trial finds a choice, and the gate passes all of them."""
    module = tune()
    for trials in module.OPERATORS.values():
        for trial in trials(workload.SMALL, torch.device("cuda", 0)):
            found = module.sweep(trial, repeats=3)
            assert found["choices"], found["failed"][:1]
