"""Learning rates, groups, and the update that a bad loss cannot reach."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from batches import random_batch, small_config, small_model
from nosync import NoSync
from torch import Tensor, nn

from fastmrcnn.config.checks import RECIPES
from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.model.timm_backbone import TimmBackbone
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.optim import (
    Ema,
    GatedStep,
    build_optimizer,
    describe_groups,
    learning_rate,
    set_rate,
)

SGD = OptimConfig(name="sgd", weight_decay=0.01)
ADAMW = OptimConfig(name="adamw", weight_decay=0.01)


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that what reads it is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3))


def inputs(step: int) -> Tensor:
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(step))


class Trainee:
    """A small network, and whatever a step does to it."""

    def __init__(self, config: OptimConfig = SGD, **gate: float | None) -> None:
        self.model = net()
        self.optimizer = build_optimizer(self.model, config)
        self.update = GatedStep(self.model, self.optimizer, **gate)  # type: ignore[arg-type]
        self.ema = Ema(self.model, 0.9)

    def step(self, step: int, change: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(0.1)
        self.update.before_forward()
        loss = change(self.model(inputs(step)).square().mean())
        self.update.backward(loss, step)
        self.ema.update(step, self.update.first_bad_step)

    def state(self) -> list[Tensor]:
        """Weights, statistics, optimizer state, average, scale."""
        slots = self.optimizer.state_dict()["state"].values()
        return [
            value.clone()
            for value in (
                *self.model.state_dict().values(),
                *(value for slot in slots for value in slot.values()),
                *self.ema.model.state_dict().values(),
                *self.update.state_dict().values(),
            )
        ]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.02 * 0.001),
        (500, 0.02 * 0.5005),
        (999, 0.02 * (0.001 * 0.001 + 0.999)),
        (1000, 0.02),
        (59_999, 0.02),
        (60_000, 0.002),
        (79_999, 0.002),
        (80_000, 0.0002),
        (89_999, 0.0002),
    ],
)
def test_rate_of_the_1x_recipe(step: int, rate: float) -> None:
    config = load_config(RECIPES / "mask_rcnn_r50_fpn_1x.yaml").optim
    assert learning_rate(config, step, 90_000, 16) == pytest.approx(rate, rel=1e-9)
    assert learning_rate(config, step, 90_000, 4) == pytest.approx(rate / 4, rel=1e-9)


def test_cosine_falls_from_the_rate_to_nearly_nothing() -> None:
    config = OptimConfig(lr=0.1, schedule="cosine", warmup_steps=10, reference_batch=8)
    rates = [learning_rate(config, step, 1000, 8) for step in range(1000)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[500] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-6


def test_norms_have_a_decay_of_their_own() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    config = OptimConfig(weight_decay=0.1, weight_decay_norm=0.0)
    groups = build_optimizer(model, config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert found == [["3.weight", "3.bias"], ["1.weight", "1.bias"]]
    same = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in same] == [0.1, 0.1]


def test_model_without_norms_has_one_group() -> None:
    assert len(build_optimizer(nn.Linear(2, 2), ADAMW).param_groups) == 1


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_update_is_that_of_plain_torch(config: OptimConfig, clip: float | None, scale: float | None) -> None:
    gated = Trainee(config, clip_norm=clip, loss_scale=scale)
    model = net()
    parameters = list(model.parameters())
    plain: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    if config.name == "adamw":
        plain = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01)
    for step in range(4):
        gated.step(step)
        model(inputs(step)).square().mean().backward()
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
            assert (norm > clip) == (clip < 1)
        plain.step()
        plain.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(gated.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_moves_from_the_first_bad_loss_on(
    config: OptimConfig, scale: float | None, bad: float
) -> None:
    trainee = Trainee(config, loss_scale=scale, clip_norm=1.0)
    for step in range(3):
        trainee.step(step)
    before = trainee.state()
    trainee.step(3, lambda loss: loss * bad)
    assert_equal(trainee.state(), before)
    for step in (4, 5):
        trainee.step(step)  # these are good, and come too late
    trainee.step(6, lambda loss: loss * bad)
    assert_equal(trainee.state(), before)
    assert trainee.update.first_bad_step == 3
    assert all(value.isfinite().all() for value in before)


def test_statistics_are_kept_from_a_bad_batch() -> None:
    """The running statistics are NaN as soon as the forward pass has seen it."""
    trainee = Trainee()
    trainee.step(0)
    before = [value.clone() for value in trainee.model[1].buffers()]
    trainee.update.before_forward()
    loss = trainee.model(inputs(1) * math.nan).mean()
    assert trainee.model[1].running_mean.isnan().all()
    trainee.update.backward(loss, 1)
    assert_equal(list(trainee.model[1].buffers()), before)


def test_gradient_that_is_not_finite_under_a_finite_loss_is_bad_without_a_scale() -> None:
    trainee = Trainee()
    trainee.step(0)
    before = trainee.state()
    trainee.step(1, lambda loss: loss + overflowing(trainee, math.inf))
    assert_equal(trainee.state(), before)
    assert trainee.update.first_bad_step == 1


def overflowing(trainee: Trainee, gradient: float) -> Tensor:
    """Zero, with a gradient of this size."""
    value = trainee.model[3].bias.sum()
    value.register_hook(lambda _: torch.tensor(gradient))
    return value - value.detach()


def test_overflow_skips_and_halves_the_scale() -> None:
    trainee = Trainee(loss_scale=2.0**10)
    trainee.step(0)
    before = [value.clone() for value in trainee.model.parameters()]
    momentum = [slot["momentum_buffer"].clone() for slot in trainee.optimizer.state.values()]
    statistics = trainee.model[1].running_mean.clone()
    for step in (1, 2):
        trainee.step(step, lambda loss: loss + overflowing(trainee, math.inf))
    assert_equal(list(trainee.model.parameters()), before)
    assert_equal([slot["momentum_buffer"] for slot in trainee.optimizer.state.values()], momentum)
    assert not torch.equal(trainee.model[1].running_mean, statistics)  # the batch itself was good
    assert trainee.update.scale == 2.0**8
    assert trainee.update.first_bad_step == -1
    trainee.step(3)
    assert not torch.equal(trainee.model[0].weight, before[0])


def test_scale_finds_the_largest_that_fits() -> None:
    """Of a gradient of 1e10, whose square must not overflow float32 when scaled."""
    trainee = Trainee(loss_scale=2.0**40)
    for step in range(10):
        trainee.step(step, lambda loss: loss + 1e10 * trainee.model[3].bias.sum())
    assert trainee.update.scale == 2.0**30
    assert trainee.update.first_bad_step == -1


def test_scale_doubles_after_enough_good_steps() -> None:
    trainee = Trainee(loss_scale=8.0, growth_interval=3)
    scales = []
    for step in range(7):
        trainee.step(step, (lambda loss: loss + overflowing(trainee, math.inf)) if step == 3 else lambda x: x)
        scales.append(float(trainee.update.scale))
    assert scales == [8, 8, 16, 8, 8, 8, 16]


def test_overflow_at_a_scale_of_one_is_a_bad_step() -> None:
    """Else the scale would fall for ever, and the run go on without learning."""
    trainee = Trainee(loss_scale=4.0)
    for step in range(5):
        trainee.step(step, lambda loss: loss + overflowing(trainee, math.nan))
    assert trainee.update.first_bad_step == 2
    assert trainee.update.scale == 1


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_first_step_may_be_skipped(config: OptimConfig) -> None:
    """torch's fused SGD leaves its momentum unfilled if its very first update is skipped."""
    late, clean = Trainee(config, loss_scale=2.0**10), Trainee(config, loss_scale=2.0**10)
    late.step(0, lambda loss: loss + overflowing(late, math.inf))
    late.step(1)
    clean.step(1)
    for mine, other in zip(late.model.parameters(), clean.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_average_follows_its_formula() -> None:
    trainee = Trainee()
    expected = {name: value.clone() for name, value in trainee.model.state_dict().items()}
    for step in range(12):
        trainee.step(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in trainee.model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trainee.ema.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert not trainee.ema.model.training
    assert not any(parameter.requires_grad for parameter in trainee.ema.model.parameters())


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_whole_step_never_syncs(config: OptimConfig, scale: float | None, tmp_path: Path) -> None:
    """Forward, backward, clip, update, average and record: all but the read of the metrics."""
    tree = small_config().model.model_dump()
    tree["backbone"]["norm"] = "bn"
    model = small_model(config=small_config(model=tree)).train()
    optimizer = build_optimizer(model, config)
    update = GatedStep(model, optimizer, clip_norm=1.0, loss_scale=scale)
    ema, metrics = Ema(model, 0.9), Metrics(tmp_path)
    before = copy.deepcopy(model.state_dict())
    batch = random_batch(1)
    for step in range(2):
        keys = model.draw_keys(batch, torch.Generator().manual_seed(step))
        with NoSync():
            for group in optimizer.param_groups:
                group["lr"].fill_(0.01)
            update.before_forward()
            losses, counts = model(batch, keys)
            update.backward(losses.total(), step)
            ema.update(step, update.first_bad_step)
            metrics.add(losses, counts, 2, 0.0)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with NoSync(), pytest.raises(AssertionError, match="makes the host wait"):
        metrics.read(1, update.first_bad_step, 0.01, 0)
    metrics.close()


def rates_and_decays(model: nn.Module, config: OptimConfig) -> dict[str, tuple[float, float]]:
    """Share of the rate and weight decay of every parameter that is trained."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    return {
        names[parameter]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def test_rates_fall_from_layer_to_layer() -> None:
    model = small_model()  # a ResNet-18 with group norm: the stem, two blocks in each of four stages
    found = rates_and_decays(model, OptimConfig(layer_decay=0.5, weight_decay=0.1))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (scale, decay) in found.items():
        layer = 9
        if name.startswith("backbone."):
            stage = name.split(".")[1]
            layer = 0 if stage in ("conv1", "bn1") else 2 * int(stage[-1]) - 1 + int(name.split(".")[2])
        assert scale == pytest.approx(0.5 ** (9 - layer)), name
        plain = name.endswith("weight") and "bn" not in name and "downsample.1" not in name
        assert decay == (0.1 if plain else 0.0), name
    norms = rates_and_decays(model, OptimConfig(layer_decay=0.5, weight_decay=0.1, weight_decay_norm=0.3))
    assert norms["backbone.bn1.weight"][1] == norms["backbone.layer1.0.bn1.bias"][1] == 0.3
    assert norms["box_head.classes.bias"][1] == 0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_layer_wise_update_is_that_of_plain_torch(name: str) -> None:
    config = OptimConfig(name=name, layer_decay=0.8, weight_decay=0.05)
    model = small_model().train()
    plain = copy.deepcopy(model)
    found = rates_and_decays(plain, config)
    generator = torch.Generator().manual_seed(1)
    directions = {
        key: torch.randn(value.shape, generator=generator) for key, value in model.named_parameters()
    }

    def loss(of: nn.Module, step: int) -> Tensor:
        """Its gradients are known to the last bit: AdamW would make a step of what rounding leaves of 0."""
        return sum(
            ((value * directions[key]).sum() * (step + 1) for key, value in of.named_parameters()),
            start=torch.zeros(()),
        )

    groups = [
        {"params": [parameter], "lr": 0.01 * found[key][0], "weight_decay": found[key][1]}
        for key, parameter in plain.named_parameters()
    ]
    other: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9)
    if name == "adamw":
        other = torch.optim.AdamW(groups)
    optimizer = build_optimizer(model, config)
    update = GatedStep(model, optimizer, clip_norm=1.0)
    for step in range(2):
        set_rate(optimizer, 0.01)
        update.before_forward()
        update.backward(loss(model, step), step)
        loss(plain, step).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        other.step()
        other.zero_grad()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_layers_are_told() -> None:
    model = small_model()
    line = describe_groups(build_optimizer(model, OptimConfig(layer_decay=0.5)))
    assert line is not None
    assert "10 layers are trained, from 0.00195 of optim.lr to 1" in line
    assert describe_groups(build_optimizer(model, OptimConfig())) is None


@pytest.mark.parametrize(
    "name",
    ["resnet18", "efficientnet_b0", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)],
)
def test_layers_of_a_network_of_timm_are_timms(name: str) -> None:
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    from timm.optim import param_groups_layer_decay

    net = TimmBackbone(timm, name, norm="bn", frozen_stages=0, drop_path=0.0)
    whole = net.whole_network(timm)
    names = {parameter: key for key, parameter in whole.named_parameters()}
    theirs = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            whole,
            weight_decay=0.1,
            no_weight_decay_list=set(getattr(whole, "no_weight_decay", set)()),
            layer_decay=0.5,
        )
        for parameter in group["params"]
    }
    layers, highest = net.layers(), max(net.layers().values())
    wanted = {own: theirs[key] for own, key in net.whole_names().items() if key in theirs}
    assert len(wanted) == len(list(net.timm.parameters()))
    top = max(scale for scale, _ in wanted.values())
    for own, (scale, decay) in wanted.items():
        assert 0.5 ** (highest - layers[own]) == pytest.approx(scale / top), own
        parameter = net.get_parameter(own)
        assert (decay == 0) == (parameter.dim() <= 1 or own in net.no_decay), own


def test_layers_of_convnext_are_its_authors() -> None:
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    net = TimmBackbone(timm, "convnext_tiny", norm="bn", frozen_stages=0, drop_path=0.0)
    layers = net.layers()
    # As mmdetection's layer_decay_optimizer_constructor.py has them for num_layers=6.
    assert layers["timm.stem_0.weight"] == 0
    for stage, block, layer in ((0, 2, 1), (1, 0, 2), (2, 0, 3), (2, 3, 4), (2, 8, 5), (3, 0, 6), (3, 2, 6)):
        assert layers[f"timm.stages_{stage}.blocks.{block}.mlp.fc1.weight"] == layer
    for stage, layer in ((1, 2), (2, 3), (3, 6)):
        assert layers[f"timm.stages_{stage}.downsample.1.weight"] == layer
    assert "norms.0.weight" not in layers  # they learn as the heads do
