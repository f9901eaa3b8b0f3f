"""The images of a set as a sequence of records, each made from flat arrays when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.extents import mask_extents
from fastmrcnn.data.flat import ODD_LETTERS, Arrays, ObjectColumns, Shapes, flatten, objects_of, stretches
from fastmrcnn.data.pixel_range import AS_IT_IS, Reading
from fastmrcnn.data.records import ImageRecord, ObjectRecord


@dataclass(frozen=True, eq=False)
class FlatRecords(Sequence[ImageRecord]):
    """Images and objects of a set. What concerns all of them is there as arrays too."""

    arrays: Arrays
    folder: Path
    """To which each file_name is relative."""
    annotations: Path
    """The file that lists the images, for messages."""
    rows: NDArray[np.int64] | None = None
    """The images of the arrays that there are, in their order; None: all."""
    elsewhere: Mapping[int, str] = field(default_factory=dict)
    """By row in the arrays, paths of files that are not where file_name says."""
    reading: Reading = AS_IT_IS
    classes: NDArray[np.int64] | None = None
    """What each class index of the arrays is here; None: the same."""

    def __len__(self) -> int:
        return len(self.arrays.whole("image_id") if self.rows is None else self.rows)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self._record(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._record(place)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self._record, range(len(self)))

    def _record(self, place: int) -> ImageRecord:
        row = place if self.rows is None else int(self.rows[place])
        first = self.arrays.whole("first_letter")
        start, stop = first[row : row + 2].tolist()
        name = self.arrays.whole("letters")[start:stop].tobytes().decode(errors=ODD_LETTERS)
        height, width = self.arrays.whole("size")[row].tolist()
        path = self.elsewhere.get(row)
        return ImageRecord(
            int(self.arrays.whole("image_id")[row]),
            self.folder / name if path is None else Path(path),
            name,
            width,
            height,
            ImageObjects(self, row),
            self.annotations,
            self.reading,
        )

    def objects_in(self, row: int) -> list[ObjectRecord]:
        """The objects of an image of the arrays."""
        arrays = self.arrays
        start, stop = arrays.whole("first_object")[row : row + 2].tolist()
        if start == stop:
            return []
        objects = arrays.part("object", start, stop)
        first, last = objects[0], objects[-1]
        parts = int(first["first_part"]), int(last["first_part"]) + int(last["parts"])
        first_word = arrays.part("first_word", parts[0], parts[1] + 1)
        with_points = objects["keypoints"][objects["keypoints"] >= 0].tolist()
        points = (with_points[0], with_points[-1] + 1) if with_points else (0, 0)
        shapes = Shapes(
            objects,
            first_word,
            arrays.part("words", int(first_word[0]), int(first_word[-1])),
            arrays.part("keypoints", *points),
        )
        arrays.check(row, shapes)
        height, width = arrays.whole("size")[row].tolist()
        return objects_of(shapes, (height, width), self.classes)

    @property
    def _rows(self) -> NDArray[np.int64]:
        return np.arange(len(self)) if self.rows is None else self.rows

    def _column(self, name: str) -> NDArray[Any]:
        column = self.arrays.whole(name)
        return column if self.rows is None else column[self.rows]

    @property
    def image_ids(self) -> NDArray[np.int64]:
        return self._column("image_id")

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(n, 2) height and width."""
        return self._column("size")

    @property
    def object_counts(self) -> NDArray[np.int64]:
        """(n,) objects of each image, crowd regions included."""
        counts = np.diff(self.arrays.whole("first_object"))
        return counts if self.rows is None else counts[self.rows]

    @property
    def objects(self) -> NDArray[Any]:
        """(m,) of `flat.OBJECT`, image by image. `class_index` is that of the file."""
        table = self.arrays.whole("object")
        return table if self.rows is None else table[stretches(self.arrays.whole("first_object"), self.rows)]

    @property
    def image_of(self) -> NDArray[np.int64]:
        """(m,) place of each object's image."""
        return np.repeat(np.arange(len(self)), self.object_counts)

    def per_image(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """(n,) sums of a value (m,) of each object."""
        return np.bincount(self.image_of, weights=values, minlength=len(self)).astype(np.float64)

    def part_lengths(self, objects: NDArray[Any]) -> NDArray[np.int64]:
        """Words of each part of the objects' masks: coordinates of a polygon, runs of an RLE."""
        first, ends = self.arrays.whole("first_word"), objects["first_part"] + objects["parts"]
        bounds = np.stack((objects["first_part"], ends), 1).ravel()
        places = stretches(bounds, np.arange(0, len(bounds), 2))
        return first[places + 1] - first[places]

    @property
    def labelled_keypoints(self) -> NDArray[np.int64]:
        """(n,) how many the objects of each image have."""
        rows = self.objects["keypoints"]
        counts = (self.arrays.whole("keypoints")[:, :, 2] > 0).sum(1)
        return self.per_image(np.where(rows >= 0, np.append(counts, 0)[rows], 0)).astype(np.int64)

    @property
    def file_names(self) -> list[str]:
        first = self.arrays.whole("first_letter").tolist()
        letters = self.arrays.whole("letters").tobytes()
        rows = range(len(self)) if self.rows is None else self.rows.tolist()
        return [letters[first[row] : first[row + 1]].decode(errors=ODD_LETTERS) for row in rows]

    @property
    def paths(self) -> list[str]:
        """Of the images' files."""
        within = os.path.join(self.folder, "")
        rows = range(len(self)) if self.rows is None else self.rows.tolist()
        return [
            self.elsewhere.get(row) or (os.path.join(within, name) if os.path.isabs(name) else within + name)
            for row, name in zip(rows, self.file_names, strict=True)
        ]

    def chosen(self, which: NDArray[Any]) -> FlatRecords:
        """Some of them, by their places or by flags."""
        return replace(self, rows=self._rows[which])

    def found_at(self, paths: Mapping[int, str]) -> FlatRecords:
        """With other paths of the images at these places."""
        rows = self._rows
        return replace(self, elsewhere={int(rows[place]): path for place, path in paths.items()})

    def read_as(self, reading: Reading) -> FlatRecords:
        return replace(self, reading=reading)

    def renumbered(self, classes: Sequence[int]) -> FlatRecords:
        """With other numbers for their classes, given by those of now."""
        new = np.array(classes, np.int64)
        return replace(self, classes=new if self.classes is None else new[self.classes])


class ImageObjects(Sequence[ObjectRecord]):
    """The objects of one image, read when the first of them is asked for."""

    __slots__ = ("_found", "_records", "_row")

    def __init__(self, records: FlatRecords, row: int) -> None:
        self._records, self._row = records, row
        self._found: list[ObjectRecord] | None = None

    def _all(self) -> list[ObjectRecord]:
        if self._found is None:
            self._found = self._records.objects_in(self._row)
        return self._found

    def __len__(self) -> int:
        start, stop = self._records.arrays.whole("first_object")[self._row : self._row + 2].tolist()
        return int(stop - start)

    @overload
    def __getitem__(self, index: int) -> ObjectRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ObjectRecord]: ...

    def __getitem__(self, index: int | slice) -> ObjectRecord | list[ObjectRecord]:
        return self._all()[index]

    def __iter__(self) -> Iterator[ObjectRecord]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._all(),)


def flat_records(records: Sequence[ImageRecord]) -> FlatRecords:
    """Records with their columns; those that have none yet are flattened. All are taken to be read as the
    first one is."""
    if isinstance(records, FlatRecords):
        return records
    objects = [item for record in records for item in record.objects]
    counts = [len(record.objects) for record in records]
    columns = ObjectColumns(
        np.repeat(np.arange(len(records)), counts),
        [item.annotation_id for item in objects],
        [item.class_index for item in objects],
        np.array([item.box for item in objects], np.float64),
        [item.crowd for item in objects],
        [item.area for item in objects],
        _extents([item.segmentation or None for item in objects], records, counts),
        [item.segmentation for item in objects],
        [item.keypoints for item in objects],
    )
    arrays = flatten(
        [record.image_id for record in records],
        [(record.height, record.width) for record in records],
        [record.file_name for record in records],
        columns,
    )
    first = records[0] if records else None
    return FlatRecords(
        arrays,
        Path() if first is None else first.path.parent,
        Path() if first is None else first.annotations,
        elsewhere={row: os.fspath(record.path) for row, record in enumerate(records)},
        reading=AS_IT_IS if first is None else first.reading,
    )


def _extents(
    shapes: Sequence[Any], records: Sequence[ImageRecord], counts: Sequence[int]
) -> NDArray[np.float64]:
    heights = np.repeat([record.height for record in records], counts).astype(np.int64)
    widths = np.repeat([record.width for record in records], counts).astype(np.int64)
    return mask_extents(shapes, heights.tolist(), widths.tolist())[0]
