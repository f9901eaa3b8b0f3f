"""The training step as a unit: recorded and replayed, warmed up without a trace, one graph per shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from batches import random_batch, small_config, small_model
from group_runs import Recorder
from nosync import NoSync

from fastmrcnn.config.file import parse_config
from fastmrcnn.config.schema import Config, OptimConfig
from fastmrcnn.device import choose_precision, set_up_cuda
from fastmrcnn.errors import UserError
from fastmrcnn.model.convs import Conv2d
from fastmrcnn.structures import present, to_device
from fastmrcnn.training.cuda_graph import GraphedStep
from fastmrcnn.training.execution import Execution, choose_execution
from fastmrcnn.training.step import TrainingStep

CPU = torch.device("cpu")
SGD = OptimConfig(clip_norm=5.0, ema=0.9)
ADAMW = OptimConfig(name="adamw", ema=0.9)


def make_step(
    optim: OptimConfig = SGD, precision: str = "fp32", execution: Execution | None = None
) -> TrainingStep:
    config = small_config()
    backbone = config.model.backbone.model_copy(update={"norm": "bn"})
    model_config = config.model.model_copy(update={"backbone": backbone})
    model = small_model(config=config.model_copy(update={"model": model_config})).train()
    return TrainingStep(model, optim, choose_precision(precision, CPU), execution or Execution(), seed=3)


def everything(step: TrainingStep) -> dict[str, torch.Tensor]:
    """All that training changes, copied."""
    assert step.ema is not None
    state = {f"model.{k}": v for k, v in step.model.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in step.ema.model.state_dict().items()}
    state |= {f"gate.{k}": v for k, v in step.update.state_dict().items()}
    for index, own in step.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v for k, v in own.items()}
    return {key: value.clone() for key, value in state.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [key for key in a if not a[key].equal(b[key])]


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_replayed_steps_are_the_steps(optim: OptimConfig, precision: str) -> None:
    plain, replayed = make_step(optim, precision), make_step(optim, precision)
    recorder = Recorder()
    replayed.run = GraphedStep(replayed._run, replayed.update.closed, recorder)
    kept = []
    for number, seed in enumerate((1, 2, 1, 5)):
        # Two sizes in turn: two recordings, over the same weights.
        batch = random_batch(seed, shape=(128, 96) if seed == 1 else (96, 128))
        expected, _ = plain(batch, number, 0.01)
        losses, _ = replayed(batch, number, 0.01)
        assert losses.total().item() == expected.total().item()
        kept.append((losses, expected))
    for losses, expected in kept:  # no replay has written over what was handed out
        assert losses.loss_mask.item() == expected.loss_mask.item()
    assert_equal(everything(plain), everything(replayed))
    assert recorder.recorded == 2


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_warming_up_leaves_no_trace(optim: OptimConfig, precision: str) -> None:
    fresh, warmed = make_step(optim, precision), make_step(optim, precision)
    batch = random_batch(1)
    warmed.warm_up(batch, [(128, 96), (96, 128)])
    before = {k: v for k, v in everything(warmed).items() if k.startswith(("model.", "ema.", "gate."))}
    assert_equal(before, {k: v for k, v in everything(fresh).items() if k in before})
    assert warmed.update.first_bad_step == -1
    assert not warmed.is_new(batch)
    assert not warmed.is_new(random_batch(2, shape=(96, 128)))
    assert warmed.is_new(random_batch(2, slots=16))
    for number in range(2):
        fresh(batch, number, 0.01)
        warmed(batch, number, 0.01)
    assert_equal(everything(fresh), everything(warmed))


def test_a_whole_step_never_syncs() -> None:
    for optim in (SGD, ADAMW):
        step, batch = make_step(optim, "fp16"), random_batch(1)
        with NoSync():
            step(batch, 0, 0.01)


def test_a_bad_step_shuts_the_gate_for_replays_too() -> None:
    step = make_step()
    step.run = GraphedStep(step._run, step.update.closed, Recorder())
    step(random_batch(1), 0, 0.01)
    before = everything(step)
    bad = random_batch(1)
    bad = bad._replace(pixels=torch.full_like(bad.pixels.float(), float("nan")))
    step(bad, 1, 0.01)
    step(random_batch(1)._replace(pixels=random_batch(1).pixels.float()), 2, 0.01)
    assert step.update.first_bad_step == 1
    assert_equal(before, everything(step))


def test_what_is_chosen_is_said() -> None:
    config = Config()
    chosen = choose_execution(config, CPU)
    assert (chosen.compiled, chosen.cuda_graphs) == (False, False)
    assert "train.compile=on" in chosen.description
    chosen = choose_execution(config, torch.device("cuda"))
    assert (chosen.compiled, chosen.max_autotune, chosen.cuda_graphs) == (True, False, True)
    train = config.train.model_copy(update={"compile": "max-autotune", "cuda_graphs": "off"})
    chosen = choose_execution(config.model_copy(update={"train": train}), torch.device("cuda"))
    assert (chosen.compiled, chosen.max_autotune, chosen.cuda_graphs) == (True, True, False)
    assert not chosen.fuse_epilogues
    train = config.train.model_copy(update={"fuse_epilogues": True})
    fusing = config.model_copy(update={"train": train})
    chosen = choose_execution(fusing, torch.device("cuda"), lambda device: None)
    assert chosen.fuse_epilogues
    assert "within cuDNN" in chosen.description
    chosen = choose_execution(fusing, torch.device("cuda"), lambda device: "it gives NaN")
    assert not chosen.fuse_epilogues
    assert "train.fuse_epilogues=true stays off: it gives NaN" in chosen.description
    with pytest.raises(UserError, match="fuse_epilogues=true needs a CUDA device"):
        choose_execution(config.model_copy(update={"train": train}), CPU)
    train = config.train.model_copy(update={"cuda_graphs": "on"})
    with pytest.raises(UserError, match="cuda_graphs=on needs a CUDA device"):
        choose_execution(config.model_copy(update={"train": train}), CPU)


@pytest.mark.parametrize(
    ("backend", "asked", "norm", "wanted"),
    [
        (None, "auto", "sync_bn", "whole"),
        (None, "on", "gn", "whole"),
        (None, "parts", "sync_bn", "parts"),
        (None, "off", "gn", "off"),
        ("cpu:gloo,cuda:nccl", "auto", "sync_bn", "whole"),
        ("cpu:gloo,cuda:nccl", "parts", "gn", "parts"),
        ("cpu:gloo,cuda:nccl", "parts", "sync_bn", "sync_bn sums amid"),
        ("cpu:gloo,cuda:gloo", "auto", "gn", "parts"),
        ("cpu:gloo,cuda:gloo", "auto", "sync_bn", "off"),
        ("cpu:gloo,cuda:gloo", "on", "gn", "no graph can hold what processes sum by cpu:gloo,cuda:gloo"),
    ],
)
def test_graphs_hold_what_the_backend_lets_them(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, asked: str, norm: str, wanted: str
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    changes = {"train": {"cuda_graphs": asked}, "model": {"backbone": {"norm": norm}}}
    config = parse_config(changes, "the test")
    if " " in wanted:
        with pytest.raises(UserError, match=wanted):
            choose_execution(config, torch.device("cuda"))
        return
    chosen = choose_execution(config, torch.device("cuda"))
    assert (chosen.cuda_graphs, chosen.parts) == (wanted != "off", wanted == "parts")
    assert ("in parts" in chosen.description) == chosen.parts
    assert ("sync_bn" in chosen.description) == (asked == "auto" and wanted == "off")


def test_passes_are_of_equal_size() -> None:
    assert parse_config({"train": {"batch": 12, "accumulate": 4}}, "the test").train.accumulate == 4
    with pytest.raises(UserError, match=r"train.accumulate=5 must divide train.batch=12"):
        parse_config({"train": {"batch": 12, "accumulate": 5}}, "the test")


def test_a_gpu_becomes_the_current_one_and_cudnn_tries_its_algorithms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_up_cuda(CPU)
    assert not torch.backends.cudnn.benchmark
    set_up_cuda(torch.device("cuda"))  # which is the current one
    assert not current
    set_up_cuda(torch.device("cuda:1"))
    assert current == [torch.device("cuda:1")]
    assert torch.backends.cudnn.benchmark


def test_epilogues_are_fused_where_that_was_chosen() -> None:
    losses = []
    for fused in (False, True):
        step = make_step(execution=Execution(fuse_epilogues=fused))
        convs = [module for module in step.model.modules() if isinstance(module, Conv2d)]
        assert {conv.fused for conv in convs if conv.kernel_size[0] <= 3} == {fused}
        losses.append(present(*step(random_batch(1), 0, 0.01)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_an_update_that_is_recorded_must_allow_it() -> None:
    """AdamW refuses to be recorded unless it was told; SGD always can be."""
    model = small_model().train()
    for recorded in (False, True):
        step = TrainingStep(model, ADAMW, choose_precision("fp32", CPU), Execution(cuda_graphs=recorded))
        assert {group["capturable"] for group in step.optimizer.param_groups} == {recorded}


@pytest.mark.gpu
@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_graphs_train_as_eager_steps_do(precision: str, optim: OptimConfig) -> None:
    """Same weights, batches and keys: losses agree within what the order of float sums allows."""
    device = torch.device("cuda")
    steps = []
    for graphs in (False, True):
        model = small_model().to(device, memory_format=torch.channels_last).train()
        execution = Execution(cuda_graphs=graphs)
        steps.append(TrainingStep(model, optim, choose_precision(precision, device), execution, seed=3))
    eager, graphed = steps
    batches = [to_device(random_batch(seed, shape=shape), device) for seed, shape in SHAPES]
    graphed.warm_up(batches[0], [(128, 96), (96, 128)])
    first = 1e-4 if precision == "fp32" else 3e-2
    # After an update rounding may keep another proposal. Two that change places, of all that are sampled:
    later = max(first, 2 / (len(batches[0].pixels) * small_config().model.roi.batch_per_image))
    for number, batch in enumerate(batches):
        expected = eager(batch, number, 0.002)[0].total().item()
        guard = syncs_are_errors() if number else nullcontext()
        with guard:
            losses, _ = graphed(batch, number, 0.002)
        assert losses.total().item() == pytest.approx(expected, rel=later if number else first)
    assert isinstance(graphed.run, GraphedStep)
    assert len(graphed.run.recordings) == 2


SHAPES = [(1, (128, 96)), (2, (96, 128)), (3, (128, 96)), (4, (96, 128))]


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
