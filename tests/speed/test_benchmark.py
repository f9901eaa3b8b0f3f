"""The benchmark of the whole step: that its gates bite, its parts add up, and its commands run."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmrcnn import benchmark, device
from fastmrcnn.config.file import parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.data.synthetic import full_masks, synthetic_batch, synthetic_batches
from fastmrcnn.detection import recorded
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_head import MaskHead
from fastmrcnn.speed import entry, inference_rows, ladder, loading, timing, torchvision_row
from fastmrcnn.speed.entry import Entry
from fastmrcnn.speed.ladder import broken, climb, compare, matching_slots
from fastmrcnn.speed.parts import OPTIMIZER, OTHER, PARTS, Parts, Place, places
from fastmrcnn.speed.profile import profile_step, profile_table, times_by_part
from fastmrcnn.speed.step_workload import Workload, changed, check_synthetic, load_recipe
from fastmrcnn.speed.torchvision_row import TorchvisionRunner, not_comparable
from fastmrcnn.speed.training_rows import OurRunner, Row, cpu_rows, cuda_rows
from fastmrcnn.training import run
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.step import TrainingStep

CPU = torch.device("cpu")
COMPILE = torch.compile
TREE: dict[str, Any] = {
    "data": {"short_side": [64], "short_side_test": 64, "long_side_max": 64, "workers": 0},
    "model": {
        "backbone": {"name": "resnet18", "frozen_stages": 2, "width": 8},
        "fpn": {"channels": 8},
        "anchors": {"sizes": [[8], [16], [24], [40], [64]]},
        "rpn": {
            "pre_nms_top_n": 30,
            "pre_nms_top_n_test": 30,
            "post_nms_top_n": 20,
            "post_nms_top_n_test": 20,
            "batch_per_image": 32,
        },
        "roi": {"batch_per_image": 32, "sampling_ratio": 1},
        "box_head": {"hidden": 16, "detections": 10},
        "mask_head": {"convs": 1, "channels": 8, "target_sampling_ratio": 1},
    },
    "runtime": {"device": "cpu"},
}


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own; here PyTorch will do."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(TREE, "the test")


@pytest.fixture(scope="module")
def workload(config: Config) -> Workload:
    return Workload(config, CPU, (64, 96), images=2, steps=2, objects=3, num_classes=3)


def quiet(line: str) -> None:
    pass


# Synthetic batches


def test_synthetic_batch_is_as_the_loader_makes_it() -> None:
    batch = synthetic_batch(2, (60, 90), objects=5, num_classes=4, seed=1, polygons=True)
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.pixels[:, :, :60, :90].float().std() > 60  # noise,
    assert batch.pixels[:, :, 60:].max() == 0  # but not in the padding
    assert batch.sizes.tolist() == [[60, 90]] * 2
    targets = batch.targets
    assert targets is not None
    assert targets.valid.sum(1).tolist() == [5, 5]
    assert targets.polygons is not None
    boxes = targets.boxes[targets.valid]
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 16
    assert (boxes[:, 0::2].max() <= 90) & (boxes[:, 1::2].max() <= 60)
    assert targets.classes[targets.valid].max() < 4
    for image, masks in enumerate(full_masks(batch)):
        for mask, box in zip(masks, targets.boxes[image, :5], strict=True):
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            touched = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
            assert touched == box.tolist()
            area = float((box[2:] - box[:2]).prod())
            assert int(mask.sum()) == pytest.approx(area * torch.pi / 4, rel=0.1)


def test_synthetic_batches_are_equal_in_shape_and_repeatable() -> None:
    many = synthetic_batches([0, 1, 2], 1, (64, 320), objects=3)
    shapes = {tuple((t.shape, t.dtype) for t in leaves(batch)) for batch in many}
    assert len(shapes) == 1
    again = synthetic_batch(1, (64, 320), objects=3, seed=1)
    assert torch.equal(many[1].pixels, again.pixels)
    assert not torch.equal(many[0].pixels, many[1].pixels)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        synthetic_batch(1, (8, 64))
    with pytest.raises(ValueError, match="objects at least 0, got 1 images with -1 objects of 80 classes"):
        synthetic_batch(1, (64, 64), objects=-1)


def leaves(batch: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def test_frozen_norms_are_fitted_so_that_losses_are_of_a_trained_networks_size(workload: Workload) -> None:
    runner = OurRunner(Row("a row"), workload, 4)
    maps = runner.make_step.model.backbone(runner.make_step.model.normalize(workload.batches[0]))
    assert all(0.1 < float(m.detach().std()) < 10 for m in maps)


# The ladder


class Scripted:
    """A runner of which everything is known: it writes down when it is asked to step."""

    def __init__(self, name: str, log: list[str], loss: float = 2.0, moved: float = 1.0) -> None:
        self.name, self.log, self.loss = name, log, loss
        self.distance = moved
        self.first_losses = {"loss_cls": 2.0, "loss_mask": 1.0, "num_fg": 7.0}

    def warm_up(self) -> None:
        self.log.append(f"warm {self.name}")

    def step(self, number: int) -> list[Tensor]:
        self.log.append(f"{self.name}{number}")
        if self.name == "broken" and number == 1:
            raise RuntimeError("CUDA error: out of\nmemory")
        return [torch.tensor(self.loss), torch.tensor(1.0)]

    def moved(self) -> float:
        return self.distance


def scripted(*runners: Scripted) -> Callable[..., Any]:
    named = {runner.name: runner for runner in runners}
    return partial(Entry, make=lambda row, workload, slots: named[row.name])


def test_rows_take_turns_on_a_cpu(workload: Workload) -> None:
    log: list[str] = []
    start = scripted(Scripted("a", log), Scripted("b", log))
    found = climb([Row("a"), Row("b")], workload, start=start, report=quiet)
    assert log == ["warm a", "warm b", "a0", "b0", "a1", "b1"]
    assert not broken(found)
    assert [row["last_loss"] for row in found] == [3.0, 3.0]


def test_a_rows_figures_follow_from_its_times(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    monkeypatch.setattr(timing.Stopwatch, "milliseconds", lambda self: times)
    (row,) = climb([Row("a")], workload, start=scripted(Scripted("a", [])), report=quiet)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == (20.0, 35.0, 50.0)
    assert row["steps"] == 6
    assert row["total_s"] == pytest.approx(0.21)
    assert row["images_per_second"] == pytest.approx(2 * 6 / 0.21)


def test_a_row_that_fails_leaves_the_others_alone(workload: Workload) -> None:
    log: list[str] = []
    start = scripted(Scripted("a", log), Scripted("broken", log), Scripted("c", log))
    found = climb([Row("a"), Row("broken"), Row("none"), Row("c")], workload, start=start, report=quiet)
    assert log[-3:] == ["a1", "broken1", "c1"]
    assert found[1]["failure"] == "RuntimeError: CUDA error: out of"
    assert found[2]["failure"].startswith("KeyError")
    assert "images_per_second" not in found[1]
    assert all("failure" not in found[index] and found[index]["steps"] == 2 for index in (0, 3))
    assert broken(found)
    table = ladder.ladder_table(found)
    assert "FAILED: RuntimeError: CUDA error: out of" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Scripted("b", [], loss=2.5), "last loss 3.5, expected 3 within 3%"),
        (Scripted("b", [], moved=0.0), "distance of the weights 0, expected 1 within 5%"),
        (Scripted("b", [], loss=float("nan")), "its loss is not finite"),
    ],
)
def test_a_row_that_trains_otherwise_is_flagged(workload: Workload, other: Scripted, message: str) -> None:
    found = climb([Row("a"), Row("b")], workload, start=scripted(Scripted("a", []), other), report=quiet)
    assert "disagrees" not in found[0]
    assert message in found[1]["disagrees"]
    assert broken(found)
    assert f"DISAGREES: {found[1]['disagrees']}" in ladder.ladder_table(found)


def test_bf16_may_differ_more_than_fp32_and_torchvision_as_it_likes() -> None:
    def row(precision: str, first: float, program: str = "fastmrcnn") -> dict[str, Any]:
        return {
            "row": f"{program}, {precision}",
            "program": program,
            "precision": precision,
            "first_losses": {"loss_cls": first},
            "last_loss": 1.0,
            "moved": 1.0,
        }

    found = [row("fp32", 9.0, "torchvision"), row("fp32", 1.0), row("fp32", 1.008), row("bf16", 1.008)]
    compare(found)
    assert ["disagrees" in row for row in found] == [False, False, True, False]
    assert ["compared_with" in row for row in found] == [False, False, True, True]


def test_mask_slots_match_torchvisions_foreground() -> None:
    found: list[dict[str, Any]] = [{}, {}]
    assert matching_slots(found, 2) is None
    found[0]["foreground"] = 33
    assert matching_slots(found, 2) == 24  # 48 of the batch
    assert matching_slots(found, 12) == 4


def test_fp32_on_a_gpu_is_called_what_it_is() -> None:
    fp32 = [row.name for row in cuda_rows(max_autotune=False) if row.precision == "fp32"]
    assert len(fp32) == 3  # torchvision's, ours, ours in the other layout
    assert [name for name in fp32 if "TF32" not in name] == ["+ channels_last"]  # one technique more
    assert not [row.name for row in cpu_rows(compiled=True) if "TF32" in row.name]


def test_the_rows_add_one_technique_each() -> None:
    ours = [row for row in cuda_rows(max_autotune=True) if row.program == "fastmrcnn"]
    for before, after in itertools.pairwise(ours):
        changes = sum(
            getattr(before, name) != getattr(after, name)
            for name in ("precision", "layout", "packed", "box_kernels", "one_class", "folded", "execution")
        )
        assert changes == 1, after.name
    assert [row.name for row in cpu_rows(compiled=True)][-1] == "+ compiled"


class Ours(TorchDispatchMode):
    """Counts the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "fastmrcnn_kernels":
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_plain_boxes_give_the_same_loss_and_weights(workload: Workload) -> None:
    """Bit for bit, by other functions."""
    losses = []
    for box_kernels in (False, True):
        runner = OurRunner(Row("a row", box_kernels=box_kernels), workload, 4)
        with Ours() as ours:
            losses.append([float(loss) for loss in runner.step(0)] + [runner.moved()])
        assert ours.seen["match_boxes"] == (2 if box_kernels else 0)  # of anchors and of RoIs
        assert ours.seen["decode_boxes"] == (1 if box_kernels else 0)
        assert ours.seen["roi_align_sets"] > 0
    assert losses[0] == losses[1]


def test_masks_of_all_classes_give_the_same_loss_and_weights(workload: Workload) -> None:
    losses = []
    for one_class in (False, True):
        runner = OurRunner(Row("a row", one_class=one_class), workload, 4)
        head = runner.make_step.model.mask_head
        assert isinstance(head, MaskHead)
        assert ("loss_of_rois" in vars(head)) is not one_class
        calls: list[object] = []
        assert isinstance(head.get_submodule("predictor"), nn.Conv2d)
        head.get_submodule("predictor").register_forward_hook(lambda *_, calls=calls: calls.append(1))
        losses.append([float(loss) for loss in runner.step(0)] + [runner.moved()])
        assert bool(calls) is not one_class
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_torchvision_does_not_have_is_named() -> None:
    recipe = load_recipe(None, [])
    assert not_comparable(recipe.model) is None
    reason = not_comparable(changed(recipe, "model.backbone.norm", "gn").model)
    assert reason == "torchvision's Mask R-CNN has model.backbone.norm=frozen_bn"


def without_inductor(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return COMPILE(function, **{**options, "backend": "eager"})


@pytest.mark.slow
def test_the_compiled_row_is_one_graph(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced in earnest, but without Inductor, which takes minutes and counts nothing here."""
    monkeypatch.setattr(torch, "compile", without_inductor)
    rows = [Row("eager"), Row("compiled", execution=Execution(compiled=True))]
    found = climb(rows, workload, mask_slots=4, report=quiet)
    assert not broken(found)
    assert (found[1]["graphs"], found[1]["graph_breaks"]) == (1, 0)


@pytest.mark.torchvision
@pytest.mark.slow
def test_torchvision_starts_from_the_same_losses(config: Config) -> None:
    """Its losses of boxes and proposals are near ours at the same weights; the samples are its own."""
    recipe = load_recipe(None, [])
    workload = Workload(recipe, CPU, (96, 128), images=1, steps=1, objects=3)
    theirs = TorchvisionRunner(Row("torchvision", "torchvision"), workload)
    ours = OurRunner(Row("ours"), workload, 16)
    theirs.warm_up()
    ours.warm_up()
    assert theirs.first_losses["loss_classifier"] == pytest.approx(ours.first_losses["loss_cls"], rel=0.1)
    assert theirs.first_losses["loss_objectness"] == pytest.approx(ours.first_losses["loss_rpn_cls"], rel=0.2)
    assert theirs.first_losses["num_fg"] > 0


@pytest.mark.torchvision
@pytest.mark.slow
def test_torchvision_runs_in_channels_last_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced in earnest, without Inductor. Its first losses differ by what it samples alone."""
    monkeypatch.setattr(torch, "compile", without_inductor)
    monkeypatch.setattr(torchvision_row, "COMPILED_TAKES", 1)
    workload = Workload(load_recipe(None, []), CPU, (96, 128), images=1, steps=1, objects=3)
    plain = Row("plain", "torchvision", cudnn_trials=False)
    last = replace(plain, name="channels_last", layout="channels_last")
    rows = [plain, last, replace(last, name="compiled", execution=Execution(compiled=True))]
    found = climb(rows, workload, report=quiet)
    assert not [row["failure"] for row in found if "failure" in row]
    losses = [row["first_losses"]["loss_classifier"] for row in found]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)
    assert found[2]["graphs"] > 1
    assert found[2]["graph_breaks"] > 0


@pytest.mark.gpu
def test_on_a_gpu_every_row_of_ours_runs_and_agrees(config: Config, tmp_path: Path) -> None:
    workload = Workload(config, torch.device("cuda"), (64, 96), images=2, steps=10, objects=3, num_classes=3)
    rows = [row for row in cuda_rows(max_autotune=False) if row.program == "fastmrcnn"]
    found = climb(rows, workload, mask_slots=4, report=quiet)
    assert not broken(found), ladder.ladder_table(found)
    assert all(row["peak_bytes"] > 0 for row in found)
    assert (found[-1]["graphs"], found[-1]["graph_breaks"], found[-1]["syncs"]) == (1, 0, 0)
    assert found[-1]["launches"] < found[0]["launches"] / 5
    runner = OurRunner(benchmark.profiled_row(workload.device), workload, 4)
    runner.warm_up()
    profiled = profile_step(runner, tmp_path)
    named = sum(row["ms"] for row in profiled["parts"] if row["part"] != OTHER)
    assert named > 0.9 * profiled["step_ms"] > 0
    for row in inference_rows.measure_inference(workload, compiled=True, report=quiet):
        assert row.get("failure") is None
        if row["way"] != inference_rows.PYTHON:
            assert row["detections_per_image"] == 10


# Clocks and counters


def test_times_are_quantiles() -> None:
    times = timing.summary([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    assert times == timing.Times(p20_ms=20.0, p50_ms=35.0, p80_ms=50.0)


def test_calls_are_timed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on only when it is told to."""
    now = [0.0]

    def take(seconds: float) -> str:
        now[0] += seconds
        return "done"

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 2 * now[0])
    monkeypatch.setattr(timing, "time", clock)
    calls = [partial(take, 1.0), partial(take, 2.0)]
    assert timing.call_times(calls, CPU, before=partial(take, 10.0)) == [1000.0, 2000.0]
    assert timing.waited_for(partial(take, 3.0), CPU) == ("done", 3000.0)
    watch = timing.Stopwatch(CPU)
    assert [watch(call) for call in calls] == ["done", "done"]
    assert watch.milliseconds() == [1000.0, 2000.0]
    assert watch.processor_ms() == 3000.0


def test_calls_are_counted_within_the_step_alone() -> None:
    def event(name: str, start: float, end: float | None = None) -> Any:
        when = SimpleNamespace(start=start, end=end or start)
        return SimpleNamespace(name=name, time_range=when, device_type=DeviceType.CPU)

    events = [
        event("cudaLaunchKernel", 1),
        event(timing.STEP, 10, 90),
        event("aten::mm", 11),
        event("cudaLaunchKernelExC_v11060", 12),
        event("cuLaunchKernelEx", 13),
        event("cudaMemcpyAsync", 14),
        event("cudaStreamSynchronize", 15),
        event("cudaMemcpy", 16),
        event("cudaGraphLaunch_v10000", 89),
        event("cudaDeviceSynchronize", 95),
    ]
    events[1:1] = [SimpleNamespace(**{**vars(event(timing.STEP, 0, 99)), "device_type": DeviceType.CUDA})]
    assert timing.count_calls(events) == timing.DeviceCalls(launches=4, syncs=2)


def test_what_a_gpu_did_is_summed_by_name() -> None:
    def event(name: str, device: DeviceType, micros: float) -> Any:
        when = SimpleNamespace(start=10.0, end=10.0 + micros)
        return SimpleNamespace(name=name, time_range=when, device_type=device)

    events = [
        event("aten::mm", DeviceType.CPU, 500),
        event(timing.STEP, DeviceType.CUDA, 900),
        event("gemm", DeviceType.CUDA, 100),
        event("fill", DeviceType.CUDA, 250),
        event("gemm", DeviceType.CUDA, 200),
    ]
    kernels = timing.kernels_by_time(events)
    assert kernels == [timing.Kernel("gemm", 2, 0.3), timing.Kernel("fill", 1, 0.25)]
    lines = ladder.kernel_table({"row": "a", "kernels": kernels}, 1).splitlines()
    assert lines[0] == "a: 3 kernels, copies and fills in a step, 0.55 ms"
    assert lines[-1] == "| 0.300 | 2 | gemm |"
    assert ladder.kernel_table({"row": "a"}, 1) == ""


def test_ceilings_are_measured() -> None:
    found = timing.ceilings(CPU, torch.float32)
    assert found.dtype == "float32"
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.bytes < 1e12


# The profile


def test_profile_tells_the_parts_apart(workload: Workload, tmp_path: Path) -> None:
    runner = OurRunner(Row("a row", packed=True), workload, 4)
    model = runner.make_step.model
    pieces = dict(vars(model))
    runner.warm_up()
    for _ in range(3):  # another program may disturb any stretch of time, also one between the parts
        found = profile_step(runner, tmp_path / "new" / "folder")
        named = sum(row["ms"] for row in found["parts"] if row["part"] != OTHER)
        if named > 0.9 * found["step_ms"]:
            break
    assert vars(model).keys() == pieces.keys()
    assert model.sampler is pieces["sampler"]
    assert "forward" not in vars(model.backbone)

    rows = {(row["part"], row["pass"]): row for row in found["parts"]}
    assert named > 0.9 * found["step_ms"]
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(found["step_ms"], rel=0.02)
    both = ["backbone", "FPN", "RoIAlign", "box head", "mask head", "mask loss", "RPN losses"]
    assert all((part, way) in rows for part in both for way in ("forward", "backward"))
    for part in ("RPN head", "proposals", "sampling", OPTIMIZER):  # nothing flows back through these
        assert (part, "forward") in rows
        assert (part, "backward") not in rows

    with FlopCounterMode(display=False) as counter:
        model.backbone(model.normalize(workload.batches[0]))
    flops = rows["backbone", "forward"]["gflop"] * 1e9
    assert flops == pytest.approx(counter.get_total_flops())
    # Twice as much backward, but stem and res2 are frozen.
    assert 0.5 < rows["backbone", "backward"]["gflop"] / rows["backbone", "forward"]["gflop"] < 2
    assert rows["box head", "backward"]["gflop"] == pytest.approx(2 * rows["box head", "forward"]["gflop"])

    trace = json.loads((tmp_path / "new" / "folder" / "trace.json").read_text())
    assert any(event.get("name") == "part: RoIAlign" for event in trace["traceEvents"])
    table = profile_table(found)
    assert len(table.splitlines()) == 2 + 2 + len(rows) + 1


VARIANTS: dict[str, dict[str, Any]] = {  # sections of the model that are not as above
    "FPN": {},
    "C4": {"architecture": "c4", "anchors": {"sizes": [[8, 16]]}},
    "MLP": {"mask_head": {"kind": "mlp"}},
    "keypoints": {"keypoint_head": {"enabled": True, "convs": 1, "channels": 8}},
    "RPN alone": {"mask_head": {"enabled": False}, "box_head": {"enabled": False}},
}


def step_of(config: Config) -> TrainingStep:
    model = build_model(config.model, 3, num_keypoints=17)
    precision = device.choose_precision("fp32", CPU)
    return TrainingStep(model.train(), config.optim, precision, Execution())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_has_the_parts_that_it_should(variant: str) -> None:
    tree = {**TREE, "model": {**TREE["model"], **VARIANTS[variant]}}
    make_step = step_of(parse_config(tree, "the test"))
    watched = {part for _, _, part in places(make_step)}
    expected = {
        "FPN": set(PARTS) - {"res5", "keypoint head", "keypoint loss"},
        "C4": set(PARTS) - {"FPN", "keypoint head", "keypoint loss"},
        "MLP": set(PARTS) - {"res5", "keypoint head", "keypoint loss"},
        "keypoints": set(PARTS) - {"res5"},
        "RPN alone": set(PARTS[: PARTS.index("res5")]) | {OPTIMIZER, OTHER},
    }
    assert watched == expected[variant] - {OTHER}
    with Parts().watching(make_step):
        pass


@pytest.mark.parametrize(
    ("owner", "name", "path", "part"),
    [
        ("rpn", "propose", "rpn.propose", "proposals"),
        ("box_head", "losses", "box_head.losses", "box losses"),
        ("mask_head", "features", "mask_head.features", "mask head"),
    ],
)
def test_a_part_that_is_not_where_it_was_is_named(
    config: Config, monkeypatch: pytest.MonkeyPatch, owner: str, name: str, path: str, part: str
) -> None:
    """And what was watched before it is let go."""
    make_step = step_of(config)
    piece = make_step.model.get_submodule(owner)
    monkeypatch.delattr(type(piece), name)
    before = dict(vars(make_step.model))
    message = f"the part '{part}' is not at {path}: {type(piece).__name__} has no {name}"
    with pytest.raises(AttributeError, match=re.escape(message)), Parts().watching(make_step):
        pass
    assert vars(make_step.model) == before


def test_a_module_that_is_gone_is_named(config: Config) -> None:
    make_step = step_of(config)
    del make_step.model.fpn
    message = "the part 'FPN' is not at fpn.forward: MaskRCNN has no fpn"
    with pytest.raises(AttributeError, match=re.escape(message)), Parts().watching(make_step):
        pass


def test_profile_needs_a_folder(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot hold a trace .*; choose another folder"):
        profile_step(OurRunner(Row("a row", packed=True), workload, 4), tmp_path / "file")


def test_kernels_count_with_the_part_that_launched_them() -> None:
    """What is known of a GPU's profile without a GPU: the shape of its events."""

    def event(name: str, parent: Any = None, scope: int = 0, node: int = -1, **kernels: float) -> Any:
        return SimpleNamespace(
            name=name,
            scope=scope,
            sequence_nr=node,
            cpu_parent=parent,
            device_type=DeviceType.CPU,
            time_range=SimpleNamespace(start=1.0, end=2.0),
            kernels=[SimpleNamespace(name=kernel, duration=micros) for kernel, micros in kernels.items()],
        )

    parts = Parts()
    parts.ranges = [(10, 20, "FPN"), (20, 40, "mask head")]
    step = event(timing.STEP)
    fpn = event("part: FPN", step, **{"part: FPN": 99.0})
    back = event("autograd::engine::evaluate_function", scope=1, node=30)
    events = [step, fpn, event("aten::conv2d", fpn, gemm=3.0, fill=1.0), event("aten::mm", back, gemm=5.0)]
    found, whole = times_by_part(events, parts, on_device=True)
    assert found == {Place("FPN", False): pytest.approx(4e-6), Place("mask head", True): pytest.approx(5e-6)}
    assert whole == pytest.approx(9e-6)


# Inference and the loader


def test_inference_fills_its_detection_slots(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_rows, "BATCHES", (2,))
    monkeypatch.setattr(inference_rows, "WARM_UP", 1)
    row, python = inference_rows.measure_inference(workload, compiled=False, report=quiet)
    assert (row["way"], python["way"]) == (inference_rows.EAGER, inference_rows.PYTHON)
    assert row["detections_per_image"] == 10
    assert python["detections_per_image"] == pytest.approx(3, abs=1)  # as there are objects; scores may tie
    assert row["p50_ms"] >= max(row["model_ms"], row["paste_ms"]) > 0
    for one in (row, python):
        assert one["images_per_second"] == pytest.approx(2000 / one["p50_ms"])
        assert f"{one['detections_per_image']:.0f} an image" in inference_rows.inference_table([one])
    apart = inference_rows.Inference(workload)
    with pytest.raises(RuntimeError, match="could not be recorded"):  # there are no CUDA graphs on a CPU
        apart.measure(2, inference_rows.RECORDED)
    monkeypatch.setattr(recorded, "CudaRecorder", lambda: lambda run, batch: (run(batch), lambda: None))
    assert apart.measure(2, inference_rows.RECORDED)["detections_per_image"] == 10
    monkeypatch.setattr(inference_rows, "paste_masks", None)
    row, _ = inference_rows.measure_inference(workload, compiled=False, report=quiet)
    assert "not callable" in row["failure"]
    assert "FAILED" in inference_rows.inference_table([row])


def test_loader_is_measured_beside_a_batch_that_is_there(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(write_shapes, train=6, val=3, size=64)
    monkeypatch.setattr(run, "write_shapes", few)
    found = loading.measure_loading(config, CPU, images=2, steps=2)
    assert (found["height"], found["width"]) == (64, 64)
    assert found["data"] == "embedded shapes"
    assert found["waited_s"] > 0
    assert found["with_loader"] > 0
    assert found["without_loader"] > 0
    assert "in 2 steps" in loading.loading_table(found)
    with pytest.raises(UserError, match="both images and annotations"):
        loading.measure_loading(changed(config, "data.train.images", "somewhere"), CPU, 2, 2)


# The command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TREE), encoding="utf-8")
    return path


def test_command_prints_the_ladder_and_writes_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    arguments = ["--config", str(recipe), "--shape", "64", "96", "--steps", "2", "--json", str(output)]
    benchmark.main(arguments)
    printed = capsys.readouterr().out
    assert "A CPU's figures say nothing about a GPU." in printed
    assert (
        "| torchvision, eager fp32 | not run: torchvision's Mask R-CNN has model.backbone.width=64" in printed
    )
    assert printed.count("\n| ") == 7
    found = json.loads(output.read_text())
    assert found["gpu"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert {"cpu", "threads", "driver", "commit", "workload", "config", "ladder"} <= found.keys()
    assert found["workload"]["images"] == 2
    peer, eager, packed, one_class, folded = found["ladder"]
    assert "not_run" in peer
    for row in (eager, packed, one_class, folded):
        assert row["steps"] == 2
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["processor_ms"] > 0
        assert row["images_per_second"] == pytest.approx(4 / row["total_s"])
        assert row["moved"] > 0
        assert row["first_losses"]["num_fg"] > 0
        assert "disagrees" not in row
        assert row["waiting_processor_ms"] < 100
    assert packed["mask_slots_per_image"] == 48
    assert found["rows_took_turns"] is True
    assert "in a process of its own, and they took turns step by step; waiting" in printed
    assert Config.model_validate(found["config"]).model.backbone.weights is None


def here(*arguments: Any, limit_s: float | None, **options: Any) -> list[dict[str, Any]]:
    """Rows in this process, which sees what a test has changed."""
    return climb(*arguments, **options)


def test_command_fails_when_rows_do_not_agree(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A step that forgets half of its gradient is slower to learn, and is found out."""

    class Wrong(OurRunner):
        def step(self, number: int) -> list[Tensor]:
            if self.precision.name == "fp32" and self.config.model.mask_head.slots_per_image is not None:
                before = [p.detach().clone() for p in self.make_step.update.parameters]
                losses = super().step(number)
                for p, old in zip(self.make_step.update.parameters, before, strict=True):
                    p.data.lerp_(old, 0.5)
                return losses
            return super().step(number)

    monkeypatch.setattr(entry, "OurRunner", Wrong)
    monkeypatch.setattr(benchmark, "climb_apart", here)
    output = tmp_path / "found.json"
    arguments = ["--config", str(recipe), "--shape", "64", "96", "--steps", "2", "--json", str(output)]
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 1
    assert "distance of the weights" in json.loads(output.read_text())["ladder"][2]["disagrees"]
    assert "DISAGREES" in capsys.readouterr().out


def test_rows_can_be_chosen(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One that takes too long is a row with its reason, and the file holds what there is after each."""
    benchmark.main(["--rows", "help", "runtime.device=cpu"])
    assert capsys.readouterr().out.splitlines() == [row.name for row in cpu_rows(compiled=True)]
    output = tmp_path / "found.json"
    arguments = ["--config", str(recipe), "--shape", "64", "96", "--steps", "1", "--json", str(output)]
    chosen = ["--rows", "+ mask slots packed", "train.seed=3"]
    with pytest.raises(SystemExit):
        benchmark.main([*arguments, "--row-limit", "0.01", *chosen])
    (row,) = json.loads(output.read_text())["ladder"]
    assert (row["row"], row["failure"]) == ("+ mask slots packed", "stopped after 0.01 s")
    assert json.loads(output.read_text())["workload"]["seed"] == 3


def test_the_file_is_written_after_each_row(workload: Workload) -> None:
    kept: list[list[tuple[str, bool]]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        kept.append([(row["row"], "p50_ms" in row) for row in found])

    start = scripted(Scripted("a", []), Scripted("b", []))
    climb([Row("a"), Row("b")], workload, start=start, report=quiet, keep=keep)
    assert kept[0] == kept[1] == [("a", False), ("b", False)]
    assert kept[2:] == [[("a", True), ("b", False)], [("a", True), ("b", True)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "-1"], "--batch must be at least 1, got -1"),
        (["--shape", "320", "16"], "--shape must be at least 32, got 16"),
        (["--mask-slots", "some"], "--mask-slots must be a number above 0, or match, got some"),
        (["model.rpn.enabled=false"], "no proposals: set model.rpn.enabled=true"),
        (
            ["--rows", "+ warp", "train.steps=3"],
            r"no row '\+ warp' on this device; there are: torchvision, .*; ",
        ),
        (["--profil", "x"], "see python -m fastmrcnn.benchmark --help"),
    ],
)
def test_mistakes_are_named_before_anything_runs(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark.main(["--config", str(recipe), *arguments])


def test_keypoints_cannot_be_made_up(config: Config) -> None:
    with pytest.raises(UserError, match=r"no keypoints: set model\.keypoint_head\.enabled=false"):
        check_synthetic(changed(config, "model.keypoint_head.enabled", True))
