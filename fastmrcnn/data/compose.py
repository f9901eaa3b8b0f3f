"""Samples that are put together from several images: copy-paste and mosaic.

Copy-paste is that of "Simple Copy-Paste is a Strong Data Augmentation Method" (arXiv 2012.07177), without
blending; a mosaic is that of YOLOv4 (arXiv 2004.10934). Each object keeps the bitmap of its own annotation
and has maps of its own; where something else is shown, pixels of that bitmap are erased.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.affine import place_keypoints
from fastmrcnn.data.collate import ObjectMaps, RasterisedObjects, Sample, select_seen
from fastmrcnn.data.object_tables import join_objects, select_objects, split_crops
from fastmrcnn.data.transforms import (
    COMPOSE_DRAWS,
    Augment,
    Plan,
    Size,
    Window,
    apply_plan,
    draws,
    image_to_input,
    input_to_image,
    plan_image,
)
from fastmrcnn.data.visible import Cover, seen_objects

TILES = 4
PASTED = TILES  # the layer that objects are taken from; 0 to 3 are a mosaic's
NEAREST_EDGE = 0.25  # of the middle of a mosaic, as a share of its sides
_COPY_PASTE, _MOSAIC, _MIDDLE_X, _MIDDLE_Y, _FIRST_TILE, _OTHER, _PLACE_X, _PLACE_Y = range(
    *COMPOSE_DRAWS.indices(64)
)


class Layer(NamedTuple):
    """An image's part in a sample."""

    image: int
    plan: Plan
    place: tuple[int, int]  # left and top of the plan's result within the sample
    pasted: bool = False  # whether objects alone are taken

    @property
    def area(self) -> tuple[int, int, int, int]:
        """xyxy in pixels of the sample."""
        left, top = self.place
        return left, top, left + self.plan.size[1], top + self.plan.size[0]


class Composition(NamedTuple):
    size: Size
    layers: list[Layer]  # from the ground up; the first is that of the sample's own image


class Source(NamedTuple):
    """What a layer is made of."""

    resized: NDArray[np.uint8]  # what `apply_plan` takes
    annotated: Size
    objects: RasterisedObjects


def plan_composition(
    index: int,
    sizes: Sequence[Size],
    seed: int,
    number: int,
    short_sides: Sequence[int],
    long_side_max: int,
    augment: Augment,
    without: Container[int] = (),
) -> Composition | None:
    """How a sample is put together; None if it is of one image.

    With `augment.crop` the result has that size, else (copy-paste alone) that of the sample's own image.

    Args:
        index: of the sample's own image.
        sizes: height and width of every image.
        number: global index of the sample.
        without: images that cannot be read; the sample's own takes their places.
    """
    numbers = draws(seed, number)[0]
    mosaic, paste = numbers[_MOSAIC] < augment.mosaic, numbers[_COPY_PASTE] < augment.copy_paste
    if not mosaic and not paste:
        return None

    def layer(which: int, image: int, window: Window | None) -> Layer:
        own = draws(seed, number, layer=which)[0]
        changes = augment if window is None else replace(augment, crop=(window[3], window[2]))
        plan = plan_image(*sizes[image], own, short_sides, long_side_max, changes)
        left, top, width, height = window or (0, 0, plan.size[1], plan.size[0])
        room = (width - plan.size[1] + 1, height - plan.size[0] + 1)
        across, down = (
            int(share * free) for share, free in zip(own[[_PLACE_X, _PLACE_Y]], room, strict=True)
        )
        return Layer(image, plan, (left + across, top + down), which == PASTED)

    def another(which: int) -> int:
        step = 1 + int(draws(seed, number, layer=which)[0, _OTHER] * (len(sizes) - 1))
        other = (index + step) % len(sizes)
        return index if other in without else other

    size = augment.crop
    whole = None if size is None else (0, 0, size[1], size[0])
    if mosaic and size is not None:
        middle = [
            round(side * (NEAREST_EDGE + (1 - 2 * NEAREST_EDGE) * float(share)))
            for side, share in zip(size, numbers[[_MIDDLE_Y, _MIDDLE_X]], strict=True)
        ]
        first = int(numbers[_FIRST_TILE] * TILES)
        tiles = _tiles(size, middle)
        images = [index, *(another(which) for which in range(1, TILES))]
        layers = [layer(k, image, tiles[(first + k) % TILES]) for k, image in enumerate(images)]
    else:
        layers = [layer(0, index, whole)]
    size = layers[0].plan.size if size is None else size
    if paste:
        layers.append(layer(PASTED, another(PASTED), (0, 0, size[1], size[0])))
    return Composition(size, layers)


def choice_of(seed: int, number: int) -> np.random.Generator:
    """What decides which objects of a sample are pasted."""
    return np.random.Generator(np.random.Philox(key=[seed, 4], counter=[0, number, 0, 0]))


def compose(
    composition: Composition,
    sources: Sequence[Source],
    *,
    mirror: Sequence[int] | None,
    min_visible: float,
    fill: tuple[int, int, int],
    choice: np.random.Generator,
) -> Sample:
    """Carry out a plan.

    Args:
        sources: of each layer.
        mirror: which keypoint each one becomes in a mirror image; None: keypoints are not learnt.
        min_visible: as in `make_sample`.
        fill: RGB of what no image covers.
        choice: of the objects that are pasted: from one to all, each number with the same chance.
    """
    height, width = composition.size
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = fill
    parts: list[_Part] = []
    cover = None
    for layer, source in list(zip(composition.layers, sources, strict=True))[::-1]:
        # from the top down, since what is pasted hides what is below
        objects = _chosen(source.objects, choice) if layer.pasted else source.objects
        part = _part(layer, source._replace(objects=objects), cover, mirror, min_visible)
        parts.insert(0, part)
        if layer.pasted and len(part.boxes):
            cover = _cover(part)
    for layer, source, part in zip(composition.layers, sources, parts, strict=True):
        left, top, right, bottom = layer.area
        view, shown = pixels[top:bottom, left:right], apply_plan(source.resized, layer.plan)
        if layer.pasted:
            mask = _shown_objects(layer, part)
            view[mask] = shown[mask]
        else:
            view[:] = shown
    keypoints = [part.keypoints for part in parts if part.keypoints is not None]
    counts = [len(part.boxes) for part in parts]
    maps = [
        np.repeat(np.stack(some), counts, axis=0) for some in zip(*(part.maps for part in parts), strict=True)
    ]
    return Sample(
        pixels,
        parts[0].maps.image_to_input,
        parts[0].maps.input_to_image,
        sources[0].annotated,
        np.concatenate([part.boxes for part in parts]),
        join_objects([part.objects for part in parts]),
        np.concatenate(keypoints) if keypoints else None,
        maps=ObjectMaps(*maps),
    )


class _Part(NamedTuple):
    """What a layer brings to the sample."""

    objects: RasterisedObjects
    boxes: NDArray[np.float32]
    keypoints: NDArray[np.float32] | None
    maps: ObjectMaps  # of the layer


def _part(
    layer: Layer, source: Source, cover: Cover | None, mirror: Sequence[int] | None, min_visible: float
) -> _Part:
    plan, size = layer.plan, source.annotated
    to_sample = np.array([[1.0, 0, layer.place[0]], [0, 1, layer.place[1]], [0, 0, 1]])
    forward = (to_sample @ _square(image_to_input(plan, *size)))[:2]
    back = (_square(input_to_image(plan, *size)) @ np.linalg.inv(to_sample))[:2]
    objects = source.objects
    shapes = (objects.boxes, split_crops(objects), objects.windows, objects.polygons)
    seen = seen_objects(*shapes, forward, layer.area, cover=cover, erase=True)
    objects, boxes = select_seen(objects, seen, min_visible)
    keypoints = None
    if objects.keypoints is not None and mirror is not None:
        swap = mirror if plan.mirrored else None
        keypoints = place_keypoints(objects.keypoints, forward, layer.area, swap)
        if cover is not None:
            keypoints = _hidden(keypoints, cover)
    return _Part(objects, boxes, keypoints, ObjectMaps(forward, back, np.array(size)))


def _square(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([affine, [[0.0, 0, 1]]])


def _hidden(keypoints: NDArray[np.float32], cover: Cover) -> NDArray[np.float32]:
    """Keypoints of which those that are covered are labelled still, but not visible any more."""
    flat = keypoints.reshape(-1, 3).copy()
    flat[(flat[:, 2] == 2) & cover.hides(flat[:, :2].astype(np.float64)), 2] = 1
    return flat.reshape(keypoints.shape)


def _chosen(objects: RasterisedObjects, choice: np.random.Generator) -> RasterisedObjects:
    """Some of the objects that have a bitmap."""
    able = np.flatnonzero(~objects.crowd & (objects.windows[:, 2:] > 0).all(axis=1))
    count = int(choice.integers(1, len(able) + 1)) if len(able) else 0
    return select_objects(objects, np.sort(choice.permutation(able)[:count]))


def _union(part: _Part) -> NDArray[np.uint8]:
    """The bitmap of all objects, in pixels of their annotation."""
    whole = np.zeros(tuple(part.maps.annotated), np.uint8)
    for crop, (x, y, width, height) in zip(
        split_crops(part.objects), part.objects.windows.tolist(), strict=True
    ):
        whole[y : y + height, x : x + width] |= crop
    return whole


def _cover(part: _Part) -> Cover:
    union, back = _union(part), part.maps.input_to_image

    def hides(places: NDArray[np.float64]) -> NDArray[np.bool_]:
        column, row = np.floor(places @ back[:, :2].T + back[:, 2]).astype(int).T
        within = (column >= 0) & (column < union.shape[1]) & (row >= 0) & (row < union.shape[0])
        return within & (union[row.clip(0, union.shape[0] - 1), column.clip(0, union.shape[1] - 1)] > 0)

    return Cover(part.boxes, hides)


def _shown_objects(layer: Layer, part: _Part) -> NDArray[np.bool_]:
    """Which pixels of the layer's image its objects cover: the annotation's pixel at the centre of each."""
    left, top, right, bottom = layer.area
    from_area = np.array([[1.0, 0, left], [0, 1, top], [0, 0, 1]])
    back = (_square(part.maps.input_to_image) @ from_area)[:2]
    method, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
    image = Image.fromarray(_union(part)).transform(
        (right - left, bottom - top), method, tuple(back.ravel().tolist()), nearest
    )
    return np.asarray(image) > 0


def _tiles(size: Size, middle: Sequence[int]) -> list[Window]:
    """The four windows about a row and a column."""
    (height, width), (row, column) = size, middle
    return [
        (0, 0, column, row),
        (column, 0, width - column, row),
        (column, row, width - column, height - row),
        (0, row, column, height - row),
    ]
