"""Optimizer, learning rate, and an update that a bad loss cannot reach. Nothing here reads the device."""

from __future__ import annotations

import contextlib
import copy
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.model.backbone import ResNet
from fastmrcnn.model.timm_backbone import TimmBackbone

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Fused SGD or AdamW over the parameters that are trained; norms may have a decay of their own, and
    layers of the backbone a share of the rate (`lr_scale`).

    Args:
        capturable: the update will be recorded in a CUDA graph.
    """
    groups = _by_norm(model, config) if config.layer_decay is None else _by_layer(model, config)
    device = next(model.parameters()).device
    for group in groups:
        # The rate is a tensor on the device, so that changing it neither waits nor recompiles.
        group["lr"] = torch.tensor(0.0, device=device)
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, fused=True)
        if config.momentum > 0:
            # torch allocates momentum without filling it, so an update that is skipped at the first step
            # would leave what stood in that memory.
            for parameter in (p for group in groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return torch.optim.AdamW(groups, fused=True, capturable=capturable)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step; a group that has a share of its own gets that."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr * group.get("lr_scale", 1.0))


def describe_groups(optimizer: torch.optim.Optimizer) -> str | None:
    """A line on layer-wise rates; None if there are none."""
    groups = optimizer.param_groups
    if "lr_scale" not in groups[0]:
        return None
    scales = [group["lr_scale"] for group in groups]
    count = sum(len(group["params"]) for group in groups)
    free = sum(len(group["params"]) for group in groups if group["weight_decay"] == 0)
    return (
        f"Layer-wise rates: {len(set(scales))} layers are trained, from {min(scales):.3g} of optim.lr to "
        f"{max(scales):.3g}; {free} of {count} tensors without weight decay."
    )


def _by_norm(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    norms: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        into = norms if isinstance(module, _NORMS) else others
        into += [p for p in module.parameters(recurse=False) if p.requires_grad]
    decay = config.weight_decay
    norm_decay = decay if config.weight_decay_norm is None else config.weight_decay_norm
    groups = [{"params": others, "weight_decay": decay}, {"params": norms, "weight_decay": norm_decay}]
    return [group for group in groups if group["params"]]


def _by_layer(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """A group for each layer of the backbone, and one for all that stands on it, with decay and without.

    As BEiT (arXiv 2106.08254, its optim_factory.py) has it: the rate falls by `layer_decay` from layer to
    layer downwards, and biases, norms and position tables have no weight decay.
    """
    assert config.layer_decay is not None
    backbone = model.backbone
    assert isinstance(backbone, ResNet | TimmBackbone)
    layers = {f"backbone.{name}": layer for name, layer in backbone.layers().items()}
    tables = {f"backbone.{name}" for name in getattr(backbone, "no_decay", ())}
    norms = {p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    above = max(layers.values()) + 1
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.dim() <= 1 or name in tables else config.weight_decay
        if parameter in norms and config.weight_decay_norm is not None:
            decay = config.weight_decay_norm
        groups.setdefault((layers.get(name, above), decay), []).append(parameter)
    return [
        {
            "params": groups[layer, decay],
            "weight_decay": decay,
            "lr_scale": config.layer_decay ** (above - layer),
        }
        for layer, decay in sorted(groups)
    ]


def learning_rate(config: OptimConfig, step: int, steps: int, batch: int) -> float:
    """Rate at a step (from 0) of a run of `steps`: linear warm-up, then multistep or cosine."""
    base = config.lr * batch / config.reference_batch
    if config.schedule == "multistep":
        rate = base * config.gamma ** bisect_right(sorted(config.milestones), step)
    else:
        rate = base * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
    if step < config.warmup_steps:
        done = step / config.warmup_steps
        rate *= config.warmup_factor * (1 - done) + done
    return rate


class GatedStep:
    """Scale, check, clip and step, all on the device.

    An update whose loss is not finite is not made, and neither is any after it: the weights stay those
    before the first bad step, whose number stays in `first_bad_step` until the host comes to look.
    With a loss scale (fp16), gradients that overflow under a finite loss only skip their update and
    halve the scale, which doubles again after `growth_interval` good steps. At a scale of 1 they are
    a bad step: it is not the scale that made them overflow.

    All state is changed in place, so that a CUDA graph of the step can be replayed.

    Args:
        clip_norm: largest norm of the whole gradient; None: not clipped.
        loss_scale: initial scale; None: no scaling, and gradients that overflow are a bad step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        loss_scale: float | None = None,
        growth_interval: int = 2000,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.clip_norm = clip_norm
        self.growth_interval = growth_interval
        self.scaled = loss_scale is not None
        device = self.parameters[0].device
        self.scale = torch.tensor(loss_scale or 1.0, device=device)
        self.good_steps = torch.tensor(0, device=device)
        self.first_bad_step = torch.tensor(-1, device=device)
        # A bad batch reaches running statistics in the forward pass already: keep what they were.
        self.statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
            for buffer in module.buffers(recurse=False)
        ]
        self.saved = [buffer.clone() for buffer in self.statistics]
        self.phase: Literal["whole", "forward", "update"] = "whole"
        """How far the step has come, on the host: between steps; before anything but the statistics has
        changed; where weights and state do not belong together."""

    def before_forward(self) -> None:
        if self.statistics:
            torch._foreach_copy_(self.saved, self.statistics)
        self.phase = "forward"

    def undo_forward(self) -> None:
        """After a step that failed before its update: all state is that of the step before."""
        if self.phase == "forward" and self.statistics:
            torch._foreach_copy_(self.statistics, self.saved)
        self.phase = "whole"

    def finish(self) -> None:
        """The step is whole: what belongs to it, such as an average, has been updated too."""
        self.phase = "whole"

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Steps made within change nothing: the gate is shut as after a bad loss, then as it was."""
        before = self.first_bad_step.clone()
        self.first_bad_step.zero_()
        try:
            yield
        finally:
            self.first_bad_step.copy_(before)

    def backward(self, loss: Tensor, step: int | Tensor) -> None:
        """Backward and update, for the loss of step number `step`."""
        self.differentiate(loss)
        self.apply(loss, step)

    def differentiate(self, loss: Tensor) -> None:
        """Gradients of the scaled loss, or of a part of it, into or onto those of the parameters."""
        (loss * self.scale).backward()

    def apply(self, loss: Tensor, step: int | Tensor) -> None:
        """Update by the gradients that the parameters have, which are of this loss."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm(grads) / self.scale
            finite = norm.isfinite()
            bad = ~(loss.isfinite() & (finite | (self.scale > 1)))
            self.first_bad_step.copy_(torch.where(bad & (self.first_bad_step < 0), step, self.first_bad_step))
            stopped = self.first_bad_step >= 0
            skip = stopped | ~finite
            if self.scaled or self.clip_norm is not None:
                factor = 1 / self.scale
                if self.clip_norm is not None:
                    factor = factor * (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(grads, factor)
            # Fused optimizers look at this flag on the device and then leave weights and state alone.
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.phase = "update"
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for now, before in zip(self.statistics, self.saved, strict=True):
                now.copy_(torch.where(stopped, before, now))
            if self.scaled:
                self._rescale(finite, stopped)

    def _rescale(self, finite: Tensor, stopped: Tensor) -> None:
        good_steps = torch.where(finite, self.good_steps + 1, 0)
        grow = good_steps >= self.growth_interval
        scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale * 0.5)
        self.scale.copy_(torch.where(stopped, self.scale, scale))
        self.good_steps.copy_(torch.where(stopped, self.good_steps, torch.where(grow, 0, good_steps)))

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])


class Ema:
    """Exponential moving average of a model's weights and statistics.

    The decay starts low and rises to `decay`, so that the first random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average = self._tensors(self.model)
        self._source = self._tensors(model)

    @staticmethod
    def _tensors(model: nn.Module) -> list[Tensor]:
        tensors: Sequence[Tensor] = list(model.state_dict(keep_vars=True).values())
        return [t.data for t in tensors if t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int | Tensor, first_bad_step: Tensor | None = None) -> None:
        """After step number `step` (from 0); nothing moves once `GatedStep.first_bad_step` is set."""
        weight: float | Tensor
        if isinstance(step, Tensor):
            number = step.double()
            # In the averages' own type, or else CUDA multiplies them one by one.
            weight = (1 - ((1 + number) / (10 + number)).clamp(max=self.decay)).float()
        else:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
        if first_bad_step is not None:
            weight = torch.where(first_bad_step < 0, weight, 0.0)
        moves = torch._foreach_sub(self._source, self._average)
        torch._foreach_mul_(moves, weight)
        torch._foreach_add_(self._average, moves)
