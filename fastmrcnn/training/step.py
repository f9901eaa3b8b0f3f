"""One step of training, from a batch to new weights, without the host waiting for the device.

What changes from step to step (the rate, the step's number, the sampling keys, the loss scale, whether the
run has gone wrong) lives in tensors on the device. So every step is the same sequence of kernels, and that
sequence can be recorded once as a CUDA graph and replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.device import Precision
from fastmrcnn.graphs import Shapes, shapes_of
from fastmrcnn.group import ALONE, Group
from fastmrcnn.model.conv_relu import epilogue_problem
from fastmrcnn.model.convs import fuse_epilogues
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.model.sync_norm import synchronise_norms
from fastmrcnn.pixels import with_pixels
from fastmrcnn.structures import Batch, Counts, Losses, present, to_device, tree_map
from fastmrcnn.training.compile_cache import keep_compile_cache
from fastmrcnn.training.cuda_graph import (
    CudaParts,
    CudaRecorder,
    GraphedStep,
    Record,
    Result,
    Run,
    Staging,
)
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.flat_gradient import FlatGradient
from fastmrcnn.training.optim import Ema, GatedStep, build_optimizer, set_rate
from fastmrcnn.training.reduction import (
    Contribution,
    Parts,
    contribution_of,
    run_through,
    sum_over_processes,
    whole_of,
)


class TrainingStep:
    """
    With several processes each calls it with its own share of a step's images, of the same padded shape
    everywhere, and all get the same losses, counts and weights: those of one process with all the images, but
    for the order of sums. They sum over the default group of torch.distributed, which has been joined. So
    every process makes every call, warm-ups included, and in the same order.

    Args:
        model: in training mode, on its device.
        optim: rate and schedule stay with the caller, who gives the rate of each step.
        precision: of the forward pass.
        execution: eager, compiled, replayed; and how gradients travel.
        seed: with the step's number, of the sampling keys.
        group: this process and how many there are.
        accumulate: K, batches to a step. Each gives a gradient of its own, a mean over what is in it (in all
            processes), and the update is by the mean of the K. Losses that come back are means as well,
            counts are sums.
    """

    def __init__(
        self,
        model: MaskRCNN,
        optim: OptimConfig,
        precision: Precision,
        execution: Execution,
        *,
        seed: int = 0,
        group: Group = ALONE,
        accumulate: int = 1,
    ) -> None:
        self.model = model
        self.seed = seed
        self.group = group
        self.accumulate = accumulate
        self.device = next(model.parameters()).device
        problem = epilogue_problem(self.device) if execution.fuse_epilogues else None
        if problem is not None:  # asked for without `choose_execution`, as a row of the benchmark does
            raise RuntimeError(problem)
        fuse_epilogues(model, execution.fuse_epilogues)
        synchronised = synchronise_norms(model, whole_group() if group.size > 1 else None)
        if synchronised and group.size > 1 and execution.cuda_graphs and execution.parts:
            raise RuntimeError("norms that sum over processes cannot be recorded in parts")
        self.optimizer = build_optimizer(model, optim, capturable=execution.cuda_graphs)
        self.update = GatedStep(
            model, self.optimizer, clip_norm=optim.clip_norm, loss_scale=precision.loss_scale
        )
        self.ema = Ema(model, optim.ema) if optim.ema is not None else None
        self.generator = torch.Generator(self.device)
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self.gradient: FlatGradient | None = None
        if group.size > 1 or accumulate > 1:
            wire = torch.bfloat16 if execution.reduce_bf16 and group.size > 1 else torch.float32
            self.gradient = FlatGradient(self.update.parameters, adds=accumulate > 1, dtype=wire)
        self.loss = torch.zeros((), device=self.device)  # of the batches so far, if there are several
        self.reduce = sum_over_processes
        forward = forward_of(model, self.device, precision)
        self.forward = compiled(forward if group.size == 1 else with_contribution(forward), execution)
        # A step that is not recorded reads a batch to its end: there is no room beside it for the next one.
        self.staging = Staging(self.device) if execution.cuda_graphs and self.device.type == "cuda" else None
        self.run: Callable[[Batch, SamplingKeys], Result] = self._run
        self.finish: Callable[[], Any] = self._finish
        if execution.cuda_graphs:
            self.record(CudaParts(self._sum) if execution.parts else CudaRecorder(), cut=execution.parts)
        self.warm: set[Shapes] = set()

    def record(self, record: Record, *, cut: bool = False) -> None:
        """From now on the step is recorded, and replayed.

        Args:
            record: as `GraphedStep` takes it; with `cut`, of what is cut where processes sum.
        """
        run, finish = (self._parts, self._finish_parts) if cut else (self._run, self._finish)
        closed = self.update.closed if self.accumulate == 1 else self._closed
        self.run = GraphedStep(run, closed, record, self.staging)
        self.finish = GraphedStep(finish, closed, record)

    def __call__(self, batch: Batch | Sequence[Batch], step: int, lr: float) -> Result:
        """Make step number `step` at the rate `lr`; the result is from before the update, on the device.

        Args:
            batch: of n images, of which a step has `group.size * n`, this process's from number
                `group.rank * n` on. With `accumulate` a sequence of K such, as `upload` gives it; batch k
                has those from `(k * group.size + group.rank) * n` on.
        """
        self.number.fill_(step)
        set_rate(self.optimizer, lr)
        batches = (batch,) if isinstance(batch, Batch) else tuple(batch)
        keys = self.draw_keys(batches, step)
        if self.accumulate == 1:
            (batch,) = batches
            return self.run(self._upload(batch), keys[0])
        assert self.gradient is not None
        self.update.before_forward()
        self.gradient.clear()
        self.loss.zero_()
        # Each batch goes to the device when the one before has been begun: a shape has one buffer there.
        results = [self.run(self._upload(one), own) for one, own in zip(batches, keys, strict=True)]
        self.finish()
        self.update.finish()  # replayed, it has not said so
        return _averaged(results)

    @overload
    def upload(self, batch: Batch) -> Batch: ...
    @overload
    def upload(self, batch: Sequence[Batch]) -> Sequence[Batch]: ...
    def upload(self, batch: Batch | Sequence[Batch]) -> Batch | Sequence[Batch]:
        """A batch of the loader on the step's device, for the next step; pinned, the host does not wait.
        Several batches stay where they are, and follow one another within the step; only those whose images
        are still to be resized go to the device at once."""
        if isinstance(batch, Batch):
            return self._upload(batch)
        return [one if one.raw is None else with_pixels(to_device(one, self.device)) for one in batch]

    def _upload(self, batch: Batch) -> Batch:
        if self.staging is None or batch.sizes.device.type == self.device.type:
            return with_pixels(to_device(batch, self.device))
        return self.staging(batch)

    def draw_keys(self, batches: Sequence[Batch], step: int) -> list[SamplingKeys]:
        """Keys of this process's batches of a step. Those of all images are drawn from the seed and the
        step, so that an image's do not depend on how many processes and batches share the work."""
        own = len(batches[0].pixels)
        drawn: dict[Shapes, SamplingKeys] = {}
        found = []
        for number, batch in enumerate(batches):
            shapes = shapes_of(batch)
            if shapes not in drawn:
                self.generator.manual_seed((self.seed << 32) + step)
                images = own * self.group.size * self.accumulate
                drawn[shapes] = self.model.draw_keys(batch, self.generator, images)
            first = (number * self.group.size + self.group.rank) * own
            rows = slice(first, first + own)
            found.append(tree_map(partial(_rows, rows=rows), drawn[shapes]))
        return found

    def warm_up(self, batch: Batch | Sequence[Batch], buckets: Sequence[tuple[int, int]]) -> None:
        """Compile and record the step for every bucket. Weights and all other state stay as they are.

        Args:
            batch: any batch; the others are like it but for the size of the pixels. Of several, each that is
                like none before is one.
        """
        batches = [batch] if isinstance(batch, Batch) else list(batch)
        for one in {shapes_of(one): one for one in batches}.values():
            one = to_device(one, self.device)
            for height, width in buckets:
                pixels = one.pixels.new_zeros((len(one.pixels), 3, height, width))
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                limit = torch.tensor([height, width], device=self.device)
                example = one._replace(pixels=pixels, sizes=torch.minimum(one.sizes, limit))
                with self.update.closed():
                    self(example, 0, 0.0)
                self.warm.add(shapes_of(example))

    def is_new(self, batch: Batch | Sequence[Batch]) -> bool:
        """Whether the step has not been warmed up for batches of these shapes, and would compile now."""
        batches = (batch,) if isinstance(batch, Batch) else batch
        return any(shapes_of(one) not in self.warm for one in batches)

    def align(self) -> None:
        """Let all processes have what the first one has: weights, statistics, averages.

        Only statistics of "bn" come to differ, each process's being those of its own images. To be called by
        all when a run begins, and before they share an evaluation.
        """
        if self.group.size == 1:
            return
        models = [self.model] if self.ema is None else [self.model, self.ema.model]
        for tensor in (value for one in models for value in one.state_dict().values()):
            torch.distributed.broadcast(tensor, src=0)

    def _sum(self, tensor: Tensor) -> None:
        self.reduce(tensor)

    def _run(self, batch: Batch, keys: SamplingKeys) -> Result:
        return run_through(self._parts(batch, keys), self._sum)

    def _finish(self) -> None:
        run_through(self._finish_parts(), self._sum)

    def _parts(self, batch: Batch, keys: SamplingKeys) -> Parts[Result]:
        """The step with one batch; with several, a gradient of one."""
        if self.accumulate == 1:
            self.update.before_forward()
        losses, counts, *own = self.forward(batch, keys)
        if own:
            yield own[0].sums
            part, losses, counts = whole_of(own[0], losses, counts)
            loss = losses.total()
        else:
            part = loss = losses.total()
        if self.accumulate > 1:
            self.loss.add_(loss.detach(), alpha=1 / self.accumulate)
            part = part / self.accumulate
        self.update.differentiate(part)
        if self.gradient is not None:
            self.gradient.take()
        if self.accumulate == 1:
            yield from self._update(loss)
        return tree_map(Tensor.detach, (losses, counts._replace(divisors=None)))

    def _finish_parts(self) -> Parts[None]:
        yield from self._update(self.loss)

    def _update(self, loss: Tensor) -> Parts[None]:
        if self.gradient is not None:
            if self.group.size > 1:
                yield self.gradient.ready()
            self.gradient.give()
        self.update.apply(loss, self.number)
        if self.ema is not None:
            self.ema.update(self.number, self.update.first_bad_step)
        self.update.finish()

    @contextlib.contextmanager
    def _closed(self) -> Iterator[None]:
        """As `GatedStep.closed`, for what makes only a part of a step, and may do so amid one."""
        assert self.gradient is not None
        state = [self.gradient.own, self.loss, *self.update.statistics]
        kept = [tensor.clone() for tensor in state]
        phase = self.update.phase
        try:
            with self.update.closed():
                yield
        finally:
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
            self.update.phase = phase


def _averaged(results: Sequence[Result]) -> Result:
    """Of the batches of a step: means of the losses, sums of the counts."""
    losses, counts = (list(kind) for kind in zip(*results, strict=True))
    means = {name: torch.stack([getattr(one, name) for one in losses]).mean() for name in present(losses[0])}
    sums: dict[str, Any] = {
        name: torch.stack([getattr(one, name) for one in counts]).sum() for name in present(counts[0])
    }
    return Losses(**means), Counts(**sums)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows]


def whole_group() -> str:
    """What torch.distributed calls the group of all processes."""
    group = torch.distributed.group.WORLD
    if group is None:
        raise RuntimeError("several processes must join a group (torch.distributed) before they train")
    return group.group_name


def with_contribution(forward: Run) -> Callable[[Batch, SamplingKeys], tuple[Losses, Counts, Contribution]]:
    """`forward`, and this process's part in its losses."""

    def contributing(batch: Batch, keys: SamplingKeys) -> tuple[Losses, Counts, Contribution]:
        losses, counts = forward(batch, keys)
        return losses, counts, contribution_of(losses, counts)

    return contributing


def forward_of(model: MaskRCNN, device: torch.device, precision: Precision) -> Run:
    """Pixels to losses and counts, under autocast."""

    def forward(batch: Batch, keys: SamplingKeys) -> Result:
        with torch.autocast(device.type, dtype=precision.dtype, enabled=precision.autocast):
            losses, counts = model(batch, keys)
        return losses, counts

    return forward


def compiled(forward: Callable[..., Any], execution: Execution) -> Callable[..., Any]:
    """`forward` as one graph for each shape, if `execution` says so."""
    if not execution.compiled:
        return forward
    keep_compile_cache()
    # Every bucket is a compilation of its own; the default of 8 is for functions that recompile by mistake.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # The whole step is recorded as a CUDA graph, optimizer included, so Inductor is not to make its own.
    mode = "max-autotune-no-cudagraphs" if execution.max_autotune else None
    return torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)
