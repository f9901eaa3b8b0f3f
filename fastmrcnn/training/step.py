"""One step of training, from a batch to new weights, without the host waiting for the device.

What changes from step to step (the rate, the step's number, the sampling keys, the loss scale, whether the
run has gone wrong) lives in tensors on the device. So every step is the same sequence of kernels, and that
sequence can be recorded once as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.device import Precision
from fastmrcnn.graphs import Shapes, shapes_of
from fastmrcnn.model.conv_relu import epilogue_problem
from fastmrcnn.model.convs import fuse_epilogues
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.structures import Batch, to_device, tree_map
from fastmrcnn.training.compile_cache import keep_compile_cache
from fastmrcnn.training.cuda_graph import GraphedStep, Result, Run, Staging
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.optim import Ema, GatedStep, build_optimizer, set_rate


class TrainingStep:
    """
    Args:
        model: in training mode, on its device.
        optim: rate and schedule stay with the caller, who gives the rate of each step.
        precision: of the forward pass.
        execution: eager, compiled, replayed.
        seed: with the step's number, of the sampling keys.
    """

    def __init__(
        self,
        model: MaskRCNN,
        optim: OptimConfig,
        precision: Precision,
        execution: Execution,
        *,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.seed = seed
        self.device = next(model.parameters()).device
        problem = epilogue_problem(self.device) if execution.fuse_epilogues else None
        if problem is not None:  # asked for without `choose_execution`, as a row of the benchmark does
            raise RuntimeError(problem)
        fuse_epilogues(model, execution.fuse_epilogues)
        self.optimizer = build_optimizer(model, optim, capturable=execution.cuda_graphs)
        self.update = GatedStep(
            model, self.optimizer, clip_norm=optim.clip_norm, loss_scale=precision.loss_scale
        )
        self.ema = Ema(model, optim.ema) if optim.ema is not None else None
        self.generator = torch.Generator(self.device)
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self.forward = compiled(forward_of(model, self.device, precision), execution)
        self.run: Run = self._run
        # A step that is not recorded reads a batch to its end: there is no room beside it for the next one.
        self.staging = Staging(self.device) if execution.cuda_graphs and self.device.type == "cuda" else None
        if execution.cuda_graphs:
            self.run = GraphedStep(self._run, self.update.closed, staging=self.staging)
        self.warm: set[Shapes] = set()

    def __call__(self, batch: Batch, step: int, lr: float) -> Result:
        """Make step number `step` at the rate `lr`; the result is from before the update, on the device."""
        self.number.fill_(step)
        set_rate(self.optimizer, lr)
        return self.run(batch, self.draw_keys(batch, step))

    def upload(self, batch: Batch) -> Batch:
        """A batch of the loader on the step's device, for the next step; pinned, the host does not wait."""
        return to_device(batch, self.device) if self.staging is None else self.staging(batch)

    def draw_keys(self, batch: Batch, step: int) -> SamplingKeys:
        self.generator.manual_seed((self.seed << 32) + step)
        return self.model.draw_keys(batch, self.generator)

    def warm_up(self, batch: Batch, buckets: Sequence[tuple[int, int]]) -> None:
        """Compile and record the step for every bucket. Weights and all other state stay as they are.

        Args:
            batch: any batch; the others are like it but for the size of the pixels.
        """
        for height, width in buckets:
            pixels = batch.pixels.new_zeros((len(batch.pixels), 3, height, width))
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            limit = torch.tensor([height, width], device=self.device)
            example = batch._replace(pixels=pixels, sizes=torch.minimum(batch.sizes, limit))
            with self.update.closed():
                self(example, 0, 0.0)
            self.warm.add(shapes_of(example))

    def is_new(self, batch: Batch) -> bool:
        """Whether the step has not been warmed up for a batch of these shapes, and would compile now."""
        return shapes_of(batch) not in self.warm

    def _run(self, batch: Batch, keys: SamplingKeys) -> Result:
        self.update.before_forward()
        losses, counts = self.forward(batch, keys)
        self.update.backward(losses.total(), self.number)
        if self.ema is not None:
            self.ema.update(self.number, self.update.first_bad_step)
        self.update.finish()
        return tree_map(Tensor.detach, (losses, counts))


def forward_of(model: MaskRCNN, device: torch.device, precision: Precision) -> Run:
    """Pixels to losses and counts, under autocast."""

    def forward(batch: Batch, keys: SamplingKeys) -> Result:
        with torch.autocast(device.type, dtype=precision.dtype, enabled=precision.autocast):
            losses, counts = model(batch, keys)
        return losses, counts

    return forward


def compiled(forward: Run, execution: Execution) -> Run:
    """`forward` as one graph for each shape, if `execution` says so."""
    if not execution.compiled:
        return forward
    keep_compile_cache()
    # Every bucket is a compilation of its own; the default of 8 is for functions that recompile by mistake.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # The whole step is recorded as a CUDA graph, optimizer included, so Inductor is not to make its own.
    mode = "max-autotune-no-cudagraphs" if execution.max_autotune else None
    return torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)
