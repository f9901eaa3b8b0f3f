"""What a training step computes: pinned losses, agreement of the precisions, and that it learns."""

from __future__ import annotations

import json

import pytest
import torch
from batches import random_batch, small_config, small_model
from golden import FIXTURES

from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.device import choose_precision
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Counts, Losses, present
from fastmrcnn.training.optim import GatedStep, build_optimizer
from fastmrcnn.training.step import forward_of

CPU = torch.device("cpu")
GOLDEN = FIXTURES / "step_losses.json"


def model_with(norm: str) -> MaskRCNN:
    tree = small_config().model.model_dump()
    tree["backbone"]["norm"] = norm
    return small_model(config=small_config(model=tree)).train()


def plain(*parts: Losses | Counts) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in present(*parts).items()}


def steps(count: int, norm: str) -> list[dict[str, float]]:
    """Losses of the first steps from seed 0."""
    model = model_with(norm)
    optimizer = build_optimizer(model, OptimConfig())
    update = GatedStep(model, optimizer, clip_norm=5.0)
    found = []
    for step in range(count):
        batch = random_batch(step)
        for group in optimizer.param_groups:
            group["lr"].fill_(0.01)
        update.before_forward()
        losses, counts = model(batch, model.draw_keys(batch, torch.Generator().manual_seed(step)))
        update.backward(losses.total(), step)
        found.append(plain(losses, counts))
    assert update.first_bad_step == -1
    return found


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_losses_from_a_seed_are_pinned(norm: str) -> None:
    """A change that means to change them writes them anew, and says so in its message:

    PYTHONPATH=tests/helpers:tests/training python -c "import test_step; test_step.write_golden()"
    """
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    first, *later = zip(steps(3, norm), golden[norm], strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-4, abs=1e-6)
    # After an update, rounding may keep another proposal: with two threads loss_cls was 1.6e-3 off.
    for found, expected in later:
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-6)


def write_golden() -> None:
    golden = {norm: steps(3, norm) for norm in ("gn", "bn")}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("precision", "loss_error", "gradient_error"),
    [("fp32", 0, 0), ("bf16", 1.5e-2, 0.3), ("fp16", 4e-3, 0.15)],
)
def test_each_precision_gives_the_losses_and_gradients(
    precision: str, loss_error: float, gradient_error: float
) -> None:
    """Of the same weights. A proposal that is ranked otherwise is another RoI, hence the second bound."""
    model = model_with("gn")
    forward = forward_of(model, CPU, choose_precision(precision, CPU))
    for seed in range(2):
        batch = random_batch(seed)
        keys = model.draw_keys(batch, torch.Generator().manual_seed(seed))
        exact, losses = model(batch, keys), forward(batch, keys)
        assert plain(*losses) == pytest.approx(plain(*exact), rel=loss_error, abs=loss_error)
        assert (plain(*losses) == plain(*exact)) == (precision == "fp32")
        assert losses[0].total().dtype == torch.float32
        expected = torch.autograd.grad(exact[0].total(), list(model.parameters()))
        # fp16 needs the scale that training gives it, or small gradients vanish.
        found = torch.autograd.grad(losses[0].total() * 1024, list(model.parameters()))
        assert all(one.dtype == torch.float32 for one in found)
        assert all(one.any() for one in found)
        whole, other = (torch.cat([one.flatten() for one in all_of]) for all_of in (found, expected))
        assert (whole / 1024 - other).norm() <= gradient_error * other.norm()


# What each loss comes down to, of two seeds in three. Seen in five seeds, rounded in two ways each: 0.001,
# 0.0094, 0.15, 0.19 and 0.087 at most; a part that does not learn stays near 0.7, 0.03, 1.3, 0.9 and 0.7.
LEARNT = {
    "loss_rpn_cls": 0.01,
    "loss_rpn_loc": 0.015,
    "loss_cls": 0.2,
    "loss_box_reg": 0.25,
    "loss_mask": 0.12,
}


def test_one_batch_is_learnt_by_heart() -> None:
    """Every loss comes down to nearly nothing, so every part of the network learns."""
    runs = [learnt_by_heart(seed) for seed in range(3)]
    for name, bound in LEARNT.items():
        values = sorted(last[name] for last in runs)
        assert values[1] < bound, f"{name}: {values}"


def learnt_by_heart(seed: int) -> dict[str, float]:
    """Losses of one batch after 150 steps on it."""
    model = small_model(seed=seed).train()
    batch = random_batch(2 + seed, counts=(2, 1), shape=(64, 64))
    keys = model.draw_keys(batch, torch.Generator().manual_seed(seed))
    optimizer = build_optimizer(model, OptimConfig(name="adamw"))
    update = GatedStep(model, optimizer, clip_norm=5.0)
    count = 150
    first: dict[str, float] = {}
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"].fill_(0.004 * min(1, (step + 1) / 10, (count - step) / 90))
        losses, _ = model(batch, keys)
        update.backward(losses.total(), step)
        first = first or plain(losses)
    assert update.first_bad_step == -1
    assert sum(first.values()) > 2.5
    return plain(losses)
