"""How many images fit into a GPU's memory: train.batch=auto, and advice where too many were asked for.

Padded shapes are few and known before the first step, and with the set's largest targets as lower limits a
batch of one needs what every other batch of it needs. So what fits is found by warming up, not by guessing.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.buckets import MULTIPLE
from fastmrcnn.data.build import train_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.order import Share
from fastmrcnn.data.transforms import Size
from fastmrcnn.device import choose_device, choose_precision, set_up_cuda
from fastmrcnn.errors import UserError
from fastmrcnn.group import ALONE, Group
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.sharing import own_device
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.start import new_model

SPARE = 0.05  # of the memory: for evaluations, and for what an allocator cannot hand out in one piece
GUESSES = 6  # by a line through what was measured; then the range is halved

# Bytes that a step with so many images of a shape takes; None: more than there is.
Measure = Callable[[int, Size], int | None]


class Meter(Protocol):
    """The memory of a device."""

    limit: int
    """Bytes that a run may take."""

    def fresh(self) -> int:
        """Free what nobody holds, and begin to measure; returns the bytes that are held."""
        ...

    def peak(self) -> int:
        """The most bytes that were taken since then."""
        ...


class CudaMeter:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, _ = torch.cuda.mem_get_info(device)
        self.limit = int((free + torch.cuda.memory_reserved(device)) * (1 - SPARE))

    def fresh(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        # What a CUDA graph keeps for itself is reserved, not allocated.
        return torch.cuda.max_memory_reserved(self.device)


def meter_of(device: torch.device) -> Meter:
    """Raises UserError on a CPU, where more images at once are not faster, and too many make a machine swap
    before anything fails."""
    if device.type != "cuda":
        raise UserError(
            f"train.batch=auto measures a GPU's memory, and this run is on {device}; give a number, such as "
            "train.batch=2"
        )
    return CudaMeter(device)


class Trials:
    """Measures steps that do not count, each from a state as before the first step.

    Args:
        model: what is held besides is not charged to a step.
        make_step: a step that holds nothing yet.
        batch_of: of so many images, as `TrainingStep` takes it.
    """

    def __init__(
        self,
        model: MaskRCNN,
        make_step: Callable[[], TrainingStep],
        batch_of: Callable[[int], list[Batch]],
        meter: Meter,
    ) -> None:
        self.make_step, self.batch_of, self.meter = make_step, batch_of, meter
        tensors = [*model.parameters(), *model.buffers()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.others = max(0, meter.fresh() - weights)

    def __call__(self, images: int, *shapes: Size) -> int | None:
        self.meter.fresh()
        try:
            make_step, batches = self.make_step(), self.batch_of(images)
            make_step.warm_up(batches, shapes)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # or else they hold what there was no room for
            return None
        return self.meter.peak() - self.others


class Fit(NamedTuple):
    images: int  # the most that fit; 0: not even one does
    taken: dict[int, int]  # bytes by number of images, of those that fit


def largest_fit(measure: Callable[[int], int | None], limit: int, most: int) -> Fit:
    """The largest number of images, from 1 to `most`, whose step takes at most `limit` bytes.

    One more has been tried and did not fit, unless it is `most`. What is tried next is where a line through
    the two largest that fit meets the limit: bytes grow almost linearly with images, so a few trials do.
    """
    taken: dict[int, int] = {}
    low, high, number = 0, most + 1, 1
    tried = 0
    while True:
        found = measure(number)
        tried += 1
        if found is not None and found <= limit:
            low = number
            taken[number] = found
        else:
            high = number
        if high - low == 1:
            return Fit(low, taken)
        if tried > GUESSES:
            number = (low + high) // 2
        else:
            number = min(max(_on_the_line(taken, limit, low), low + 1), high - 1)


def _on_the_line(taken: dict[int, int], limit: int, low: int) -> int:
    """The most images, by the two largest numbers of them that were measured; twice as many without two."""
    if len(taken) < 2:
        return 2 * low
    first, second = sorted(taken)[-2:]
    slope = (taken[second] - taken[first]) / (second - first)
    return 2 * low if slope <= 0 else second + int((limit - taken[second]) / slope)


class Advice(NamedTuple):
    """What to ask for instead. One of the first two is not None, unless nothing would do."""

    images: int | None  # as many fit, of the same size
    scale: float | None  # one image fits, its sides so many times as long
    measured: list[tuple[int, Size, int]]  # images, shape and bytes


def advise(measure: Measure, images: int, shape: Size, limit: int) -> Advice:
    """What fits where `images` of a shape did not: by what one image and two take, or if not even one fits,
    one at half and at a quarter of its sides."""
    one = measure(1, shape) if images > 1 else None
    if one is not None and one <= limit:
        measured = [(1, shape, one)]
        two = measure(2, shape) if images > 2 else None
        if two is None or two > limit:
            return Advice(1, None, measured)
        slope = max(two - one, 1)
        fitting = min(2 + (limit - two) // slope, images - 1)
        return Advice(fitting, None, [*measured, (2, shape, two)])
    measured = []
    for part in (2, 4):
        smaller = (_padded(shape[0] // part), _padded(shape[1] // part))
        found = measure(1, smaller)
        if found is not None and found <= limit:
            measured.append((1, smaller, found))
    if not measured:
        return Advice(None, None, [])
    (_, large, most), (_, small, least) = measured[0], measured[-1]
    pixels, fewer = large[0] * large[1], small[0] * small[1]
    fitting_pixels = pixels
    if len(measured) == 2 and pixels > fewer:
        fitting_pixels += int((limit - most) / max((most - least) / (pixels - fewer), 1e-9))
    return Advice(None, min((fitting_pixels / (shape[0] * shape[1])) ** 0.5, 1.0), measured)


def _padded(side: int) -> int:
    return max(MULTIPLE, side // MULTIPLE * MULTIPLE)


def settled_batch(config: Config, train_set: CocoDataset, group: Group = ALONE) -> Config:
    """The configuration with a number in place of train.batch=auto: as many images as fit every process.

    Raises:
        UserError: on a CPU; or not even one image fits, and what would.
    """
    if config.train.batch != "auto":
        return config
    device = choose_device(own_device(config.runtime.device, group))
    set_up_cuda(device)
    passes = config.train.accumulate
    fit, limit, shapes = group.each(lambda: _find(config, train_set, device, group))
    (least,) = group.most([-fit.images])
    images = -least * group.size * passes
    height, width = max(shapes, key=_area)
    shared = "" if group.size * passes == 1 else f", {-least} to a pass of a process"
    end = "as many as the set has" if fit.images == len(train_set.records) else "one more does not fit"
    print(
        f"train.batch=auto: {images} images a step{shared}. {fit.images} of {height}x{width} take "
        f"{gigabytes(fit.taken[fit.images])} of {gigabytes(limit)} GiB; {end}."
    )
    return with_batch(config, images)


def _find(
    config: Config, train_set: CocoDataset, device: torch.device, group: Group
) -> tuple[Fit, int, Sequence[Size]]:
    """What fits this process, how many bytes it may take, and the padded shapes."""
    meter = meter_of(device)
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    model = new_model(card, device)
    limit = meter.limit
    if group.size > 1:  # trials are made alone, without the gradients that travel
        limit -= 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes, trials = trials_of(config, train_set, model, meter)
    worst = max(shapes, key=_area)
    fit = largest_fit(lambda images: trials(images, worst), limit, len(train_set.records))
    while fit.images:  # that of the largest shape is almost all: the others share its memory
        together = trials(fit.images, *shapes)
        if together is not None and together <= limit:
            return Fit(fit.images, fit.taken | {fit.images: together}), limit, shapes
        fit = fit._replace(images=fit.images - 1)
    raise UserError(memory_line(config, advise(trials, 1, worst, limit), 1, worst, limit))


def trials_of(
    config: Config, train_set: CocoDataset, model: MaskRCNN, meter: Meter
) -> tuple[Sequence[Size], Trials]:
    """The padded shapes, and what measures steps of a model."""
    device = next(model.parameters()).device
    precision = choose_precision(config.runtime.precision, device)
    execution = choose_execution(config, device)
    passes = config.train.accumulate
    alone = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})

    def make_step() -> TrainingStep:
        return TrainingStep(
            model, config.optim, precision, execution, seed=config.train.seed, accumulate=passes
        )

    def batch_of(images: int) -> list[Batch]:
        loader = train_loader(train_set, with_batch(alone, images * passes), 0, False, Share(0, 1, passes))
        return [loaded.batch for loaded, _ in zip(loader, range(passes), strict=False)]

    shapes = train_loader(train_set, with_batch(alone, passes), 0, False, Share(0, 1, passes)).buckets
    return shapes, Trials(model, make_step, batch_of, meter)


@contextlib.contextmanager
def telling_what_fits(
    config: Config, train_set: CocoDataset, make_step: TrainingStep, group: Group
) -> Iterator[None]:
    """A block that warms up. If the memory is full, smaller steps are measured and the error says what fits.

    Raises:
        UserError: instead of OutOfMemoryError. Of several processes the others wait, so none is measured.
    """
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        if group.size > 1:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what fills the memory
    # Not within the block above, whose error holds them too.
    meter = meter_of(make_step.device)
    shapes, trials = trials_of(config, train_set, make_step.model, meter)
    worst, images = max(shapes, key=_area), config.train.images // config.train.accumulate
    advice = advise(trials, images, worst, meter.limit)
    raise UserError(memory_line(config, advice, images, worst, meter.limit))


def memory_line(config: Config, advice: Advice, images: int, shape: Size, limit: int) -> str:
    """The line on a memory that is full: which settings to lower, to what, and by which figures.

    Args:
        images: of a pass of one process.
    """
    passes = config.train.accumulate
    several = "s" if images > 1 else ""
    begun = f"the GPU's memory is full with {images} image{several} of {shape[0]}x{shape[1]}"
    figures = " and ".join(
        f"{number} of {h}x{w} {'take' if number > 1 else 'takes'} {gigabytes(bytes_)}"
        for number, (h, w), bytes_ in advice.measured
    )
    figures = f"{figures} of {gigabytes(limit)} GiB"
    if advice.images is not None:
        more = ""
        whole = images * passes
        divisors = (k for k in range(passes + 1, whole + 1) if whole % k == 0 and whole // k <= advice.images)
        if (turns := next(divisors, None)) is not None:
            more = f", or keep the batch with train.accumulate={turns}"
        return f"{begun}; lower train.batch to {advice.images * passes}{more}: {figures}"
    if advice.scale is not None:
        data = config.data
        sides = ", ".join(str(int(side * advice.scale)) for side in data.short_side)
        return (
            f"{begun}, train.batch=1 included; lower data.short_side to [{sides}] and data.long_side_max to "
            f"{int(data.long_side_max * advice.scale)}: {figures}"
        )
    return f"{begun}, and even with one at a quarter of its sides; take a smaller model.backbone"


def with_batch(config: Config, images: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"batch": images})})


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.1f}"


def _area(shape: Size) -> int:
    return shape[0] * shape[1]
