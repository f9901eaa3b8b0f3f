"""The one place where the configuration's data section becomes sets and loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastmrcnn.config.checks import SplitName
from fastmrcnn.config.schema import Config
from fastmrcnn.data.annotation_cache import AnnotationCache, usual_folder
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.image_check import ImageOptions, shared_line
from fastmrcnn.data.keypoints import KeypointOptions, choose_sigmas
from fastmrcnn.data.loader import EvalLoader, TrainLoader, largest_targets
from fastmrcnn.data.order import WHOLE, Share
from fastmrcnn.data.polygons import largest_polygons
from fastmrcnn.data.proposals import attach_proposals
from fastmrcnn.data.same_classes import check_same_classes
from fastmrcnn.data.transforms import Augment


def keypoint_options(config: Config, least: int = 0) -> KeypointOptions | None:
    """How to read keypoints; None if the model has no head for them."""
    if not config.model.keypoint_head.enabled:
        return None
    return KeypointOptions(config.data.keypoint_flip_pairs, config.data.keypoint_offset, least)


def image_options(config: Config, choose_range: bool = False) -> ImageOptions:
    """How to find and read images.

    Args:
        choose_range: choose the range of their values if the configuration does not say it.
    """
    data = config.data
    given = None if data.pixel_range == "auto" else data.pixel_range
    return ImageOptions(given, choose_range and given is None, data.max_pixels, data.missing == "skip")


def annotation_cache(config: Config) -> AnnotationCache | None:
    """Where annotations are kept for the next start; None: nowhere."""
    place = config.data.cache
    if place == "off":
        return None
    folder = usual_folder() if place == "auto" else Path(place)
    return None if folder is None else AnnotationCache(folder)


def with_pixel_range(config: Config, dataset: CocoDataset) -> Config:
    """The configuration with the range of values that a set's images are read with, if any need one."""
    if dataset.reading.pixel_range is None:
        return config
    data = config.data.model_copy(update={"pixel_range": dataset.reading.pixel_range})
    return config.model_copy(update={"data": data})


def read_split(config: Config, name: SplitName, choose_range: bool = False) -> CocoDataset:
    """The set that data.train or data.val names, with its proposals if it has some.

    Args:
        choose_range: as in `image_options`.
    """
    data, rpn, train = config.data, config.model.rpn, name == "train"
    split = data.train if train else data.val
    assert split.images is not None, "the caller checks"
    assert split.annotations is not None, "the caller checks"
    dataset = read_coco(
        split.images,
        split.annotations,
        max_objects=data.max_objects,
        min_box_side=data.min_box_side,
        require_masks=config.model.mask_head.enabled,
        keypoints=keypoint_options(config, data.min_keypoints if train else 0),
        keep_tree=not train,
        boxes=data.boxes,
        keep_group_classes=data.keep_group_classes,
        image_options=image_options(config, choose_range),
        key=f"data.{name}",
        cache=annotation_cache(config),
    )
    if split.proposals is None:
        return dataset
    most = rpn.post_nms_top_n if train else rpn.post_nms_top_n_test
    return attach_proposals(dataset, split.proposals, most)


def read_sets(
    config: Config,
    settle: Callable[[CocoDataset], CocoDataset] | None = None,
    *,
    choose_range: bool = True,
) -> tuple[CocoDataset, CocoDataset | None]:
    """Training and validation set of a configuration that `check_trainable` let pass.

    Args:
        settle: gives the training set the class indices that both are to have.
        choose_range: choose the range of images that are not 8-bit by the training set, if the configuration
            does not say it; false: of a run that began without one.
    """
    train_set = read_split(config, "train", choose_range)
    if settle is not None:
        train_set = settle(train_set)
    if train_set.num_keypoints is not None:
        choose_sigmas(train_set.num_keypoints, config.evaluate.oks_sigmas)  # not only after the training
    if config.data.val.annotations is None:
        return train_set, None
    val_set = read_split(with_pixel_range(config, train_set), "val")
    if (line := shared_line(val_set.records, train_set.records)) is not None:
        val_set = replace(val_set, image_lines=[*val_set.image_lines, line])
    return train_set, check_same_classes(train_set, val_set)


def resizes_on_device(config: Config, on_gpu: bool) -> bool:
    """Whether loaders hand over images as they are decoded."""
    return config.data.resize == "device" or (config.data.resize == "auto" and on_gpu)


def evaluation_loader(
    dataset: CocoDataset, config: Config, pin_memory: bool = False, share: Share = WHOLE
) -> EvalLoader:
    """All images of a set, or a process's share, resized and padded as the configuration says for
    evaluation."""
    data = config.data
    return EvalLoader(
        dataset,
        batch=config.evaluate.batch,
        short_side=data.short_side_test,
        long_side_max=data.long_side_max,
        buckets=data.buckets,
        workers=data.workers,
        pin_memory=pin_memory,
        raw=resizes_on_device(config, pin_memory),
        share=share,
    )


def augment_options(config: Config) -> Augment:
    """What may change in a training image; what no image covers gets the model's mean colour."""
    mean = config.model.pixel_mean
    red, green, blue = mean if config.model.channel_order == "rgb" else mean[::-1]
    return Augment(**config.data.augment.model_dump(), fill=(round(red), round(green), round(blue)))


def train_loader(
    dataset: CocoDataset, config: Config, start: int, pin_memory: bool, share: Share = WHOLE
) -> TrainLoader:
    """The batches from step `start` on, or a process's share of them."""
    # With the set's largest targets as lower limits, the batches of a bucket share one shape.
    data, augment = config.data, augment_options(config)
    images = max(1, config.train.images // share.parts)
    slots, mask_bytes = largest_targets(dataset, images, augment.layers)
    polygons = config.model.mask_head.reads_polygons
    return TrainLoader(
        dataset,
        batch=config.train.images,
        short_sides=data.short_side,
        long_side_max=data.long_side_max,
        buckets=data.buckets,
        augment=augment,
        seed=config.train.seed,
        start_step=start,
        steps=config.train.steps,
        workers=data.workers,
        max_objects=data.max_objects,
        pin_memory=pin_memory,
        raw=resizes_on_device(config, pin_memory),
        min_slots=slots,
        min_mask_bytes=mask_bytes,
        polygons=largest_polygons(dataset, images * augment.layers) if polygons else None,
        max_broken=data.max_broken,
        share=share,
    )
