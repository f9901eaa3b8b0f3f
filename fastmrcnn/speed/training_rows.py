"""Rows of the ladder: ways to make the same training step, each with one technique more."""

from __future__ import annotations

import types
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastmrcnn import device as devices
from fastmrcnn.device import choose_precision
from fastmrcnn.kernels import by_reference
from fastmrcnn.model.mask_head import MaskHead
from fastmrcnn.model.norms import fold_norms
from fastmrcnn.speed.step_workload import Workload, changed
from fastmrcnn.structures import Batch, present, to_device
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.start import new_model

EAGER = Execution()
CUDA_FP32 = "fp32 (TF32 in convolutions)"  # torch's default there, which stays as it is
WARM_UP = 3  # steps before the first that counts; as many as there are batches


@dataclass(frozen=True)
class Row:
    """One way to make the step. `layout` None: whatever the trainer takes on this device."""

    name: str
    program: str = "fastmrcnn"  # or torchvision
    precision: str = "fp32"
    layout: str | None = None  # nchw | channels_last
    packed: bool = False  # mask slots shared by the images of a batch
    box_kernels: bool = True  # boxes are matched and decoded by kernels, or as a detector without them does
    one_class: bool = True  # the masks of the ground-truth class alone, or of all classes
    folded: bool = True  # frozen batch norms, into the convolutions before them
    cudnn_trials: bool = True  # cuDNN times its algorithms for each shape that it meets
    execution: Execution = EAGER


class Runner(Protocol):
    """A row that is ready to run. Steps are numbered from 0; warming up changes no weight."""

    first_losses: dict[str, float]  # at the weights that all rows start from, by name

    def warm_up(self) -> None: ...

    def step(self, number: int) -> list[Tensor]:
        """Make a step; returns its losses before the update, on the device."""
        ...

    def moved(self) -> float:
        """Distance of the weights from where they started (L2)."""
        ...


def cuda_rows(max_autotune: bool) -> list[Row]:
    # The number of RoIs in torchvision's mask head changes from step to step, and cuDNN would time its
    # algorithms for each; torchvision's own trainer leaves that off. In one row it is on.
    peers = [Row(f"torchvision, eager {CUDA_FP32}", "torchvision", cudnn_trials=False)]
    peers.append(replace(peers[-1], name="torchvision, eager AMP bf16", precision="bf16"))
    peers.append(replace(peers[-1], name="torchvision, AMP bf16, channels_last", layout="channels_last"))
    last = peers[-1]
    peers.append(replace(last, name=f"{last.name}, cuDNN's trials", cudnn_trials=True))
    peers.append(replace(last, name=f"{last.name}, compiled", execution=Execution(compiled=True)))
    ours = [Row(f"eager {CUDA_FP32}", layout="nchw", box_kernels=False, one_class=False, folded=False)]
    ours.append(replace(ours[-1], name="+ channels_last", layout="channels_last"))
    ours.append(replace(ours[-1], name="+ bf16", precision="bf16"))
    ours.append(replace(ours[-1], name="+ mask slots packed", packed=True))
    ours.append(replace(ours[-1], name="+ boxes by kernels", box_kernels=True))
    ours.append(replace(ours[-1], name="+ masks of one class", one_class=True))
    ours.append(replace(ours[-1], name="+ batch norm folded", folded=True))
    execution = Execution(compiled=True)
    ours.append(replace(ours[-1], name="+ compiled", execution=execution))
    execution = execution._replace(cuda_graphs=True)
    ours.append(replace(ours[-1], name="+ CUDA graphs", execution=execution))
    execution = execution._replace(fuse_epilogues=True)
    ours.append(replace(ours[-1], name="+ epilogues in cuDNN", execution=execution))
    if max_autotune:
        # A convolution that is given to cuDNN whole cannot be tried as a Triton kernel.
        execution = execution._replace(fuse_epilogues=False, max_autotune=True)
        ours.append(replace(ours[-1], name="max-autotune, without epilogues in cuDNN", execution=execution))
    return peers + ours


def cpu_rows(compiled: bool) -> list[Row]:
    """On a CPU layouts and CUDA graphs are no technique, and bf16 is one where it has instructions for it."""
    rows = [Row("torchvision, eager fp32", "torchvision"), Row("eager fp32", one_class=False, folded=False)]
    rows.append(replace(rows[-1], name="+ mask slots packed", packed=True))
    rows.append(replace(rows[-1], name="+ masks of one class", one_class=True))
    rows.append(replace(rows[-1], name="+ batch norm folded", folded=True))
    if devices.has_bf16():
        rows.insert(1, replace(rows[0], name="torchvision, eager AMP bf16", precision="bf16"))
        rows.append(replace(rows[-1], name="+ bf16", precision="bf16"))
    if compiled:
        peer = replace(rows[0], name="torchvision, compiled fp32", execution=Execution(compiled=True))
        rows.insert(1, peer)
        rows.append(replace(rows[-1], name="+ compiled", execution=Execution(compiled=True)))
    return rows


class OurRunner:
    """The trainer's own step.

    Args:
        mask_slots: an image, for a row that packs them.
    """

    def __init__(self, row: Row, workload: Workload, mask_slots: int) -> None:
        config, device = workload.config, workload.device
        if row.packed and config.model.mask_head.enabled:
            config = changed(config, "model.mask_head.slots_per_image", mask_slots)
        self.row = row
        self.workload = workload
        self.config = config
        card = replace(workload.card, config=config)
        model = new_model(card, device)
        model.load_state_dict(workload.start)
        if row.layout == "nchw":
            model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        fold_norms(model, row.folded)
        if not row.one_class and isinstance(model.mask_head, MaskHead):
            # As any head does that has no shorter way to the ground-truth class's mask.
            all_classes = types.MethodType(MaskHead.loss_of_rois, model.mask_head)
            model.mask_head.loss_of_rois = all_classes  # type: ignore[method-assign]
        self.without = () if row.box_kernels else ("match_boxes", "decode_boxes")
        self.precision = choose_precision(row.precision, device)
        self.make_step = TrainingStep(model, config.optim, self.precision, row.execution, seed=workload.seed)
        self.batches = [self._on_device(batch, row.layout) for batch in workload.batches]
        self.first_losses: dict[str, float] = {}

    def _on_device(self, batch: Batch, layout: str | None) -> Batch:
        batch = to_device(batch, self.workload.device)
        return batch._replace(pixels=batch.pixels.contiguous()) if layout == "nchw" else batch

    def warm_up(self) -> None:
        make_step = self.make_step
        for number in range(WARM_UP):
            with make_step.update.closed(), by_reference(*self.without):
                losses, counts = make_step(self.batches[number % len(self.batches)], number, 0.0)
            if number == 0:
                self.first_losses = {name: float(value) for name, value in present(losses, counts).items()}

    def step(self, number: int) -> list[Tensor]:
        config = self.config
        rate = learning_rate(config.optim, number, config.train.steps, self.workload.images)
        with by_reference(*self.without):
            losses, _ = self.make_step(self.batches[number % len(self.batches)], number, rate)
        return list(present(losses).values())

    def moved(self) -> float:
        model, start = self.make_step.model, self.workload.start
        moves = [
            (p.detach() - start[name].to(p.device)).norm()
            for name, p in model.named_parameters()
            if p.requires_grad
        ]
        return float(torch.stack(moves).norm())
