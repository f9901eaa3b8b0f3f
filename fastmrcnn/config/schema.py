"""The configuration: typed, documented where it is declared, and closed to unknown keys.

Defaults below, and for the section `model` in model.py, are the COCO recipe of Mask R-CNN R50-FPN.
A YAML file overrides them, `key=value` on the command line overrides the file (file.py), and the
resolved tree is written to the output folder. The commands and the build.py of each room read it; modules
take values.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fastmrcnn.config.model import ModelConfig
from fastmrcnn.config.section import FilePath, Positive, Section, Side

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimConfig",
    "RuntimeConfig",
    "SplitConfig",
    "TrainConfig",
]


class SplitConfig(Section):
    images: FilePath | None = None
    """Folder of images; `file_name` in the annotations is relative to it."""
    annotations: FilePath | None = None
    """COCO-format JSON file."""
    proposals: FilePath | None = None
    """File from `python -m fastmrcnn.propose`, for model.rpn.enabled=false."""


class AugmentConfig(Section):
    """Random changes of a training image. Each is a function of seed and global index alone."""

    flip_horizontal: float = Field(0.5, ge=0, le=1)
    """Probability. Keypoints swap left and right."""
    flip_vertical: float = Field(0.0, ge=0, le=1)
    """Probability. For images without an up, as under a microscope. Keypoints swap left and right here too;
    both flips together are a half turn, which does not swap them."""
    rotate90: float = Field(0.0, ge=0, le=1)
    """Probability of a quarter turn."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Factor drawn from 1 - x .. 1 + x."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Factor about the image's mean, drawn from 1 - x .. 1 + x."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Factor of the distance to grey, drawn from 1 - x .. 1 + x."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Share of a whole turn of the colours about the axis of greys in YIQ, drawn from -x .. x."""
    rotate: float = Field(0.0, ge=0, le=45)
    """Degrees of a rotation about the centre, drawn from -x .. x. Corners turn out of the image; those that
    turn in have the model's mean colour."""
    crop: tuple[Positive, Positive] | None = None
    """[height, width] of the part that is drawn of an image that is larger; an image that is smaller is left
    whole. Every batch has this shape, in multiples of 32."""
    scale: tuple[Side, Side] | None = None
    """[least, most] of large-scale jitter, such as [0.1, 2.0]: an image is fitted into `crop`, scaled by a
    factor drawn from these, and cropped. data.short_side then has no effect on training."""
    copy_paste: float = Field(0.0, ge=0, le=1)
    """Probability that objects of another training image are pasted in (arXiv 2012.07177, without blending);
    that image is resized, flipped, ... as if it were a sample of its own."""
    mosaic: float = Field(0.0, ge=0, le=1)
    """Probability of a mosaic of four images about a point in the middle half of `crop`, each changed as if
    its tile were the crop (YOLOv4, arXiv 2004.10934)."""
    min_visible: float = Field(0.0, ge=0, le=1)
    """Objects of which a crop, a rotation or another image leaves a smaller share are neither learnt nor
    punished. Those of which nothing is left, or less than a pixel's width, are gone."""

    albumentations: FilePath | None = None
    """A pipeline that `albumentations.save` wrote (.json, .yaml), run on each image before all this. It has
    to give uint8 RGB. Needs pip install 'fastmrcnn[albumentations]'."""

    @model_validator(mode="after")
    def _check_together(self) -> AugmentConfig:
        if self.scale is not None and self.crop is None:
            raise ValueError("data.augment.scale needs data.augment.crop, such as [1024, 1024]")
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError("data.augment.scale: the first factor must not exceed the second")
        if self.mosaic and (self.crop is None or min(self.crop) < 4):
            raise ValueError("data.augment.mosaic needs data.augment.crop, such as [1024, 1024]")
        if self.albumentations is not None and (self.mosaic or self.copy_paste):
            raise ValueError(
                "data.augment.albumentations does not go with mosaic and copy_paste; set those to 0"
            )
        return self


class DataConfig(Section):
    shapes: bool = False
    """Draw the embedded data set of shapes into the run's folder and use it."""
    train: SplitConfig = SplitConfig()
    val: SplitConfig = SplitConfig()
    """Validation set; without it there is no evaluation."""
    short_side: list[Positive] = Field([800], min_length=1)
    """Training images are resized to one of these, drawn per image."""
    short_side_test: int = Field(800, gt=0)
    long_side_max: int = Field(1333, gt=0)
    """No image is resized beyond this, whatever its short side."""
    buckets: list[tuple[Positive, Positive]] | Literal["auto"] = "auto"
    """Padded (height, width) shapes, multiples of 32. `auto`: chosen from the sizes of the images: for
    landscape and for portrait one that holds all, and in large sets a smaller one for most."""
    max_objects: int = Field(512, gt=0)
    """Most objects an image may have; ground-truth slots come in powers of two up to this."""
    min_box_side: float = Field(1.0, ge=0)
    """Objects with a side below this, in annotation pixels after clipping to the image, are skipped."""
    boxes: Literal["file", "masks"] = "file"
    """Where boxes come from: `bbox` of the annotations, or the masks, where there are some."""
    keep_group_classes: bool = False
    """Keep categories that have no object and that others name as their supercategory, as classes."""
    keypoint_flip_pairs: list[tuple[str, str]] | None = None
    """Keypoints that swap in a mirror image, such as [[left_eye, right_eye]]; None: those whose names
    differ in the word left or right."""
    keypoint_offset: float = 0.5
    """Added to x and y of annotated keypoints, and taken off again in results: COCO numbers pixels, whose
    centres lie half a pixel further (detectron2). 0: as they are (torchvision)."""
    min_keypoints: int = Field(0, ge=0)
    """Training images with fewer labelled keypoints are left out, where keypoints are learnt."""
    pixel_range: Literal["auto"] | tuple[float, float] = "auto"
    """[black, white]: the values that become 0 and 255 in images that are not 8-bit. auto: chosen when the
    training set is read, by a sample of its images, and kept with the model; in a model that was trained
    on 8-bit images it means [0, 65535]."""
    max_pixels: int = Field(178_956_970, gt=0)
    """Larger images are refused; the default is Pillow's own limit."""
    missing: Literal["error", "skip"] = "error"
    """Of images whose file is not there; skip: they are left out and counted."""
    resize: Literal["auto", "device", "worker"] = "auto"
    """Where images are resized, turned, flipped, cut, coloured and padded: by the loader's processes, which
    then hand over whole batches, or by the device that trains, to which they hand what they decoded. The
    pixels are the same; colours and parts of images can differ by a level or two. auto: device on CUDA,
    worker on a CPU."""
    cache: FilePath = "auto"
    """Folder in which what was read of annotation files of 2 MB and more is kept for the next start, up to
    20 GB; off: nowhere. auto: ~/.cache/fastmrcnn/annotations, or where XDG_CACHE_HOME says."""
    workers: int = Field(2, ge=0)
    """Loader processes; 0 loads in the training process."""
    max_broken: float = Field(0.01, ge=0, le=1)
    """Share of the training images that may turn out not to be readable. Each is named and others, drawn by
    the seed, stand in for it; with more the run saves and stops. 0: the first one stops it."""
    augment: AugmentConfig = AugmentConfig()

    @field_validator("pixel_range", mode="before")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        pair = isinstance(value, list | tuple) and len(value) == 2
        numbers = pair and not any(isinstance(one, bool | str) for one in value)
        try:
            if value == "auto" or (numbers and -math.inf < float(value[0]) < float(value[1]) < math.inf):
                return value
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError("expected auto or [black, white], two numbers of which the second is larger")


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.02, gt=0, allow_inf_nan=False)
    """At `reference_batch` images a step; scaled linearly with the batch."""
    reference_batch: int = Field(16, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    weight_decay_norm: float | None = Field(None, ge=0)
    """Of normalisation layers; None: the same as of everything else."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer of the backbone learns at this share of the rate of the one above it, and the last one at
    this share of the heads' (BEiT, ViTDet, ConvNeXt); biases, norms and position tables then have no weight
    decay, unless weight_decay_norm says otherwise of norms. None: one rate for all."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: list[Positive] = Field([60_000, 80_000])
    """Steps at which multistep multiplies the rate by gamma."""
    gamma: float = Field(0.1, gt=0)
    warmup_steps: int = Field(1000, ge=0)
    warmup_factor: float = Field(0.001, ge=0, le=1)
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient; None: not clipped."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is evaluated."""


class RuntimeConfig(Section):
    """Where and how a model runs, in training and evaluation alike."""

    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, on a CPU what cpu_precision says. fp16 comes with a gradient scaler."""
    cpu_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What precision=auto means on a CPU. auto: bf16 if the CPU has AVX-512 BF16 or AMX and two steps at the
    start of a run show that it is faster, else fp32; the run keeps the answer here, for --resume and for
    detection on such a CPU."""
    threads: int | None = Field(None, gt=0)
    """CPU threads; None: what torch chooses, but no more than a container may use."""
    graphs: Literal["auto", "off"] = "auto"
    """Replay detection as a CUDA graph for each padded shape that comes often. auto: on CUDA. Of training
    there is train.cuda_graphs."""


class TrainConfig(Section):
    steps: int = Field(90_000, gt=0)
    batch: int | Literal["auto"] = 16
    """Images a step, of all processes together; each takes its share. auto: as many as the GPUs' memory
    holds, found by trying before the first step. config.yaml has the number then."""
    accumulate: int = Field(1, gt=0)
    """Passes to a step, each of batch / accumulate images, for batches that do not fit a device. Losses are
    means over what is in a pass (RoIs, mask slots, visible keypoints; of all processes), and the update is by
    the mean of the passes' gradients. That is the gradient of one large pass where passes hold as much, and
    close to it elsewhere."""
    reduce_in: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over processes. bf16 halves what travels, and rounds it to 3 digits."""
    seed: int = Field(0, ge=0, lt=2**32)
    compile: Literal["auto", "on", "off", "max-autotune"] = "auto"
    """Compile the step as one graph. auto: on CUDA, not on CPU. max-autotune: also try out matrix kernels."""
    cuda_graphs: Literal["auto", "on", "off", "parts"] = "auto"
    """Record the step, update included, as CUDA graphs, for each bucket. on: the whole of it as one, with
    what several processes sum by NCCL. parts: it is cut where they sum, and that is done between the graphs,
    by whatever they sum by; sync_bn cannot be cut. auto: on CUDA, whole if it can be."""
    fuse_epilogues: bool = False
    """Let cuDNN's convolutions add bias and residual and apply the ReLU (CUDA only). Not the default, since
    it has not been measured yet; and it stays off where small convolutions, tried at the start of a run, give
    wrong values."""
    log_every: int = Field(20, gt=0)
    """Steps between reads of the losses. The host does not wait for the device in between."""
    checkpoint_every: int = Field(5000, gt=0)
    keep_checkpoints: int = Field(3, gt=0)
    """Older ones are removed."""
    evaluate_every: int | None = Field(None, gt=0)
    """Steps between evaluations; None: only after the last."""
    keep_best: str | None = None
    """A key of the evaluations in metrics.json, such as segm/AP. The weights for which it was highest are
    kept as checkpoints/best.pt (the average, if optim.ema is set), without the optimizer's state."""
    patience: int | None = Field(None, gt=0)
    """The run ends when so many evaluations in a row have not raised keep_best."""
    time_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Hours, of all parts of a run that was resumed. It makes as many of its steps as fit, with the last
    evaluation, and the schedule is shortened to them once the time of a step is known."""

    @field_validator("batch", mode="before")
    @classmethod
    def _check_batch(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value == "auto" or (number and 0 < value < math.inf and value == int(value)):
            return value if value == "auto" else int(value)
        raise ValueError("expected a whole number above 0, or auto")

    @property
    def images(self) -> int:
        """`batch`, once it is a number."""
        assert self.batch != "auto", "a run finds it before its first step"
        return self.batch

    @model_validator(mode="after")
    def _check_passes(self) -> TrainConfig:
        if self.batch != "auto" and self.batch % self.accumulate:
            raise ValueError(
                f"train.accumulate={self.accumulate} must divide train.batch={self.batch}: every pass has as "
                "many images"
            )
        return self


class EvaluateConfig(Section):
    batch: int = Field(1, gt=0)
    pictures: int = Field(8, ge=0)
    """Validation images drawn with ground truth beside predictions."""
    max_dets: int | None = Field(None, gt=10)
    """Best detections that count for each image and class; None: COCO's 100 (keypoints: 20), and where an
    image has more objects of a class, a second table with as many."""
    oks_sigmas: list[Side] | None = None
    """How far each keypoint may be off, in units of the square root of its object's area; None: COCO's own
    for 17 keypoints, else 0.05 for each."""
    background: Literal["auto", "on", "off"] = "auto"
    """Whether evaluations within a run (train.evaluate_every) are made in a process of their own, while steps
    go on. auto: where the run trains on a GPU. On a CPU both would share its cores."""
    engine: Literal["auto", "pycocotools"] = "auto"
    """What computes COCO's numbers. They are the same; auto takes a fraction of the time."""


class Config(Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: FilePath = "runs"
    """Folder under which each run gets a new one."""


# Keys of earlier versions. They are still read, from checkpoints for good.
RENAMED = {
    "train.device": "runtime.device",
    "train.precision": "runtime.precision",
    "train.threads": "runtime.threads",
}
