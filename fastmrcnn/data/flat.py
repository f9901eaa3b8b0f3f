"""The annotations of a set as a few flat arrays, instead of millions of Python objects.

Loader processes share such arrays, since there is no reference count in them that would have their pages
copied, and as they stand they can be a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.records import Box, ObjectRecord

OBJECT = np.dtype(
    [
        ("annotation_id", "<i8"),
        ("area", "<f8"),
        ("box", "<f8", (4,)),  # xyxy
        ("bitmap_bytes", "<i8"),  # of its mask's window, at most; 0 without a mask
        ("first_part", "<i8"),
        ("parts", "<i4"),  # polygons of the object, or 1 for its RLE
        ("keypoints", "<i4"),  # row in the array of keypoints, or -1
        ("class_index", "<i4"),
        ("shape", "u1"),  # one of the four below
        ("crowd", "?"),
    ],
    align=True,
)
NOTHING, POLYGONS, TEXT, RUNS = range(4)  # no segmentation; polygons; RLE compressed; RLE as a list

# Of n images with m objects, whose masks have p parts of w words, and k objects with J labelled keypoints.
DTYPES: dict[str, np.dtype[Any]] = {
    "image_id": np.dtype("<i8"),  # (n,)
    "size": np.dtype("<i4"),  # (n, 2) height and width
    "first_letter": np.dtype("<i8"),  # (n + 1,) where each file_name begins in `letters`
    "letters": np.dtype("u1"),  # UTF-8
    "first_object": np.dtype("<i8"),  # (n + 1,) objects stand in the order of their images
    "object": OBJECT,  # (m,)
    "first_word": np.dtype("<i8"),  # (p + 1,) parts stand in the order of their objects
    "words": np.dtype("<i8"),  # (w,) float64 of polygons, int64 of runs, bytes of compressed RLE
    "keypoints": np.dtype("<f4"),  # (k, J, 3)
}
ODD_LETTERS = "surrogatepass"  # half of a pair of JSON's escapes is no reason to stop here
IN_BULK = ("words", "keypoints")
"""What is most of the bytes, and is read image by image alone."""


class Shapes(NamedTuple):
    """The objects of one image, as they stand in the arrays."""

    objects: NDArray[Any]  # (n,) OBJECT
    first_word: NDArray[np.int64]  # (parts + 1,)
    words: NDArray[np.int64]  # those from first_word[0] on
    keypoints: NDArray[np.float32]  # (objects that have some, J, 3)


class Arrays(Protocol):
    """Where the arrays of `DTYPES` are: in memory, or in a file."""

    def whole(self, name: str) -> NDArray[Any]:
        """One of them. It must not be written to."""

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Some of its rows."""

    def check(self, image: int, shapes: Shapes) -> None:
        """Raise an error if what was read of an image is not what was written."""


class ArraysInMemory:
    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = dict(arrays)

    def whole(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self.arrays[name][start:stop]

    def check(self, image: int, shapes: Shapes) -> None:
        pass


class ObjectColumns(NamedTuple):
    """m objects in any order."""

    image: NDArray[np.int64]
    """(m,) place of each one's image."""
    annotation_ids: Sequence[int]
    classes: Sequence[int]
    boxes: NDArray[np.float64]
    """(m, 4) xyxy."""
    crowd: Sequence[bool]
    areas: Sequence[float]
    extents: NDArray[np.float64]
    """(m, 4) xyxy of the masks, as `mask_extents` gives them; NaN without a mask."""
    shapes: Sequence[Any]
    """Segmentations, as `ObjectRecord` has them."""
    keypoints: Sequence[NDArray[np.float32] | None]


def flatten(
    image_ids: Sequence[int], sizes: Sequence[tuple[int, int]], names: Iterable[str], objects: ObjectColumns
) -> ArraysInMemory:
    """Arrays of n images, given by id, (height, width) and file_name, and of their objects, which keep their
    order within an image."""
    encoded = [name.encode(errors=ODD_LETTERS) for name in names]
    order = np.argsort(objects.image, kind="stable")
    counts = np.bincount(objects.image, minlength=len(image_ids))
    places = order.tolist()
    table = np.zeros(len(order), OBJECT)  # zeros: padding is written to the file, too
    table["annotation_id"] = np.array(objects.annotation_ids, np.int64)[order]
    table["area"] = np.array(objects.areas, np.float64)[order]
    table["box"] = np.asarray(objects.boxes, np.float64).reshape(-1, 4)[order]
    table["class_index"] = np.array(objects.classes, np.int32)[order]
    table["crowd"] = np.array(objects.crowd, np.bool_)[order]
    table["bitmap_bytes"] = bitmap_bytes(objects.extents, np.array(sizes).reshape(-1, 2)[objects.image])[
        order
    ]
    parts: list[NDArray[np.int64]] = []
    shapes, number = np.zeros(len(order), np.uint8), np.zeros(len(order), np.int32)
    for row, place in enumerate(places):
        shapes[row] = _pack(objects.shapes[place], parts)
        number[row] = len(parts)
    table["shape"] = shapes
    table["parts"] = np.diff(number, prepend=0)
    table["first_part"] = number - table["parts"]
    points = [objects.keypoints[place] for place in places]
    labelled = np.array([one is not None for one in points], np.bool_)
    table["keypoints"] = np.where(labelled, np.cumsum(labelled) - 1, -1)
    some = [one for one in points if one is not None]
    return ArraysInMemory(
        {
            "image_id": np.array(image_ids, np.int64),
            "size": np.array(sizes, np.int32).reshape(-1, 2),
            "first_letter": _ends(list(map(len, encoded))),
            "letters": np.frombuffer(b"".join(encoded), np.uint8),
            "first_object": _ends(counts),
            "object": table,
            "first_word": _ends(list(map(len, parts))),
            "words": np.concatenate(parts) if parts else np.zeros(0, np.int64),
            "keypoints": np.stack(some).astype(np.float32) if some else np.zeros((0, 0, 3), np.float32),
        }
    )


def bitmap_bytes(extents: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(m,) bytes of the bitmaps of masks at most, each cut to its window. That of a polygon may reach a pixel
    beyond its vertices.

    Args:
        extents: (m, 4) xyxy, NaN without a mask.
        sizes: (m, 2) height and width of the images.
    """
    most = sizes[:, ::-1].astype(np.float64)
    low = np.clip(np.floor(extents[:, :2]) - 1, 0, most)
    high = np.clip(np.ceil(extents[:, 2:]) + 1, 0, most)
    return np.nan_to_num(np.prod(high - low, axis=1)).astype(np.int64)


def objects_of(
    shapes: Shapes, size: tuple[int, int], classes: NDArray[np.int64] | None
) -> list[ObjectRecord]:
    """The objects of an image, from its part of the arrays.

    Args:
        size: height and width of the image.
        classes: number that each class index is to become; None: as it is.
    """
    table, words = shapes.objects, shapes.words
    indices = table["class_index"].astype(np.int64)
    indices = indices if classes is None else classes[indices]
    ends = (shapes.first_word - shapes.first_word[0]).tolist()
    rows = table["keypoints"]
    points = iter(shapes.keypoints)
    found = []
    part = 0
    for identifier, area, box, index, kind, parts, crowd, row in zip(
        table["annotation_id"].tolist(),
        table["area"].tolist(),
        table["box"].tolist(),
        indices.tolist(),
        table["shape"].tolist(),
        table["parts"].tolist(),
        table["crowd"].tolist(),
        rows.tolist(),
        strict=True,
    ):
        pieces = [words[ends[n] : ends[n + 1]] for n in range(part, part + parts)]
        part += parts
        keypoints = None if row < 0 else next(points)
        xyxy: Box = tuple(box)
        found.append(
            ObjectRecord(identifier, index, xyxy, crowd, _unpack(kind, pieces, size), area, keypoints)
        )
    return found


def _pack(shape: Any, parts: list[NDArray[np.int64]]) -> int:
    """Append the parts of a segmentation; returns what kind it is."""
    if not shape:
        return NOTHING
    if isinstance(shape, list):
        parts += [np.ascontiguousarray(polygon, np.float64).ravel().view(np.int64) for polygon in shape]
        return POLYGONS
    counts = shape["counts"]
    if isinstance(counts, list):
        parts.append(np.array(counts, np.int64))
        return RUNS
    text = counts if isinstance(counts, bytes) else counts.encode()
    parts.append(np.frombuffer(text + bytes(-len(text) % 8), np.int64))  # no letter of an RLE is 0
    return TEXT


def _unpack(kind: int, parts: list[NDArray[np.int64]], size: tuple[int, int]) -> Any:
    if kind == NOTHING:
        return None
    if kind == POLYGONS:
        return [part.view(np.float64) for part in parts]
    [words] = parts
    counts = words.tolist() if kind == RUNS else words.tobytes().rstrip(b"\0").decode()
    return {"size": list(size), "counts": counts}


def _ends(lengths: Any) -> NDArray[np.int64]:
    """(n + 1,) where each of n stretches begins, and the last ends."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))))


def stretches(first: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places in the chosen ones of the stretches that begin at first[i] and end at first[i + 1]."""
    starts, lengths = first[chosen], first[chosen + 1] - first[chosen]
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
