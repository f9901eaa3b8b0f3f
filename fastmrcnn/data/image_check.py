"""What can be told of a data set's images before training, from their names, headers and some contents."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastmrcnn.data.flat_records import FlatRecords, flat_records
from fastmrcnn.data.headers import Header, check_headers
from fastmrcnn.data.image_files import find_files, require_files
from fastmrcnn.data.images import FLOATING_POINT, ImageError, read_extent
from fastmrcnn.data.pixel_range import (
    FULL,
    MAX_PIXELS,
    Extent,
    PixelRange,
    Reading,
    choose_range,
    note_lines,
    range_note,
    shown,
)
from fastmrcnn.data.records import ImageRecord, Problems
from fastmrcnn.errors import UserError

HEADERS_CHECKED = 10_000  # image files opened before training, spread evenly over the set
_SAMPLE = 64  # images whose values are looked at for their range, of those that are not 8-bit
_BLOCK = 4096  # bytes at a file's beginning, middle and end that are compared before the whole of it

Item = TypeVar("Item")


class ImageOptions(NamedTuple):
    """How a set's images are found and read."""

    pixel_range: PixelRange | None = None
    """As in `Reading`."""
    choose_range: bool = False
    """Choose it by the images, where it is none."""
    max_pixels: int = MAX_PIXELS
    skip_missing: bool = False
    """Leave out images whose file is not there, else an error."""


class SeenImages(NamedTuple):
    records: FlatRecords
    """Of the images that are there, with their paths and how they are read."""
    reading: Reading
    lines: list[str]
    """What to tell."""


def look_at_images(
    records: FlatRecords, folder: Path, file: Path, key: str, options: ImageOptions
) -> SeenImages:
    """Find the files of a set's images, and look at as many as is cheap.

    Args:
        folder: to which file_name is relative.
        file: with the annotations, for messages.
        key: configuration section that gave the paths, for messages.
    Raises:
        UserError: files are missing, cannot be read, or have another size than the annotations say; or the
            values of images cannot be of one range.
    """
    names = records.file_names
    found = find_files(names, folder)
    lines = list(found.lines)
    there = records.found_at(
        {place: found.other_names[name] for place, name in enumerate(names) if name in found.other_names}
        if found.other_names
        else {}
    )
    if found.missing and options.skip_missing:
        if not found.paths:
            raise UserError(f"{file}: none of its images is in {folder}; set {key}.images to their folder")
        lost = np.array([name not in found.paths for name in names])
        objects = records.object_counts[lost].sum()
        lines.append(
            f"left out {_images(int(lost.sum()))} with {objects} objects, whose file is not there "
            f"(data.missing=skip): {_some([name for name in names if name not in found.paths])}"
        )
        there = there.chosen(~lost)
    else:
        require_files(found, len(records), folder, file, key)
    reading = Reading(options.pixel_range, options.max_pixels)
    there = there.read_as(reading)
    looked_at = spread(there, HEADERS_CHECKED)
    problems = Problems()
    headers = check_headers(looked_at, problems)
    if options.pixel_range is None and not options.choose_range:
        for record, header in headers:
            if header.depth is not None and header.depth.kind == "floating-point":
                problems.add("image", record.image_id, f"{record.file_name}: {FLOATING_POINT}", "mode")
    problems.check(file)
    lines += header_lines(headers)
    lines += duplicate_lines(looked_at, there)
    deep = [record for record, header in headers if header.depth is not None]
    if deep:
        chosen, told = look_at_range(deep, file, options)
        lines += told
        if chosen != reading.pixel_range:
            reading = reading._replace(pixel_range=chosen)
            there = there.read_as(reading)
    return SeenImages(there, reading, lines)


def header_lines(headers: Sequence[tuple[ImageRecord, Header]]) -> list[str]:
    """What is not read of images, or not as it stands in the file, each with an example."""
    kinds: tuple[tuple[Callable[[Header], bool], str, str], ...] = (
        (lambda header: header.pages, "has several pages; the first is used", "have several pages; the first"
         " is used"),
        (lambda header: header.turned, "is turned by its EXIF orientation; its annotations are taken as "
         "upright", "are turned by their EXIF orientation; their annotations are taken as upright"),
        (lambda header: header.alpha, "has transparency and is laid on white",
         "have transparency and are laid on white"),
        (lambda header: header.extra_channels, "has more channels than colour and alpha, which are not read",
         "have more channels than colour and alpha, which are not read"),
    )  # fmt: skip
    lines = []
    for has, one, many in kinds:
        names = [record.file_name for record, header in headers if has(header)]
        if names:
            lines.append(f"{_images(len(names))} {one if len(names) == 1 else many} ({_some(names)})")
    rounded = [record for record, header in headers if header.size != (record.width, record.height)]
    if rounded:
        differ = "differs by a pixel in size" if len(rounded) == 1 else "differ by a pixel in size"
        lines.append(
            f"{_images(len(rounded))} {differ} from the annotations; the last row or column is repeated or "
            f"cut off ({_some([record.file_name for record in rounded])})"
        )
    return lines


def duplicate_lines(looked_at: Sequence[ImageRecord], records: FlatRecords) -> list[str]:
    """One file under two ids, and files of the same content."""
    lines = []
    paths = list(map(plain_path, records.paths))
    times = Counter(paths) if len(set(paths)) < len(paths) else Counter[str]()
    shared = [place for place, path in enumerate(paths) if times[path] > 1]
    if shared:
        first = [place for place in shared if paths[place] == paths[shared[0]]]
        ids = " and ".join(str(records[place].image_id) for place in first[:2])
        lines.append(
            f"{_images(len(shared))} share a file with another: {records[first[0]].file_name} has the ids "
            f"{ids}"
        )
    names = {os.fspath(record.path): record.file_name for record in looked_at}
    same = same_content(names)
    if same:
        count, (one, other) = sum(len(group) - 1 for group in same), same[0][:2]
        repeat = "image repeats" if count == 1 else "images repeat"
        lines.append(f"{count} {repeat} the content of another: {names[other]} that of {names[one]}")
    return lines


def shared_line(records: Sequence[ImageRecord], others: Sequence[ImageRecord]) -> str | None:
    """A line if a set has images of another set; None if it has none."""
    real = functools.cache(os.path.realpath)

    def by_path(some: Sequence[ImageRecord]) -> dict[str, int]:
        """The place of each image by its path without links to its folder."""
        parted = map(os.path.split, map(plain_path, flat_records(some).paths))
        return {os.path.join(real(folder), name): place for place, (folder, name) in enumerate(parted)}

    mine, theirs = by_path(records), by_path(others)
    seen = {path: path for path in mine if path in theirs}
    looked_at = [path for some in (mine, theirs) for path in spread(list(some), HEADERS_CHECKED)]
    for group in same_content(dict.fromkeys(looked_at)):
        other = next((path for path in group if path in theirs), None)
        if other is not None:
            seen |= {path: other for path in group if path in mine and path not in seen}
    if not seen:
        return None
    path, other = next(iter(seen.items()))
    be = "is" if len(seen) == 1 else "are"
    one, two = records[mine[path]], others[theirs[other]]
    return f"{_images(len(seen))} {be} in {two.annotations.name} too: {one.file_name}" + (
        f" as {two.file_name}" if one.file_name != two.file_name else ""
    )


def plain_path(path: str) -> str:
    """As `Path` writes it."""
    return os.fspath(Path(path)) if "//" in path or "./" in path or path.endswith((os.sep, ".")) else path


def same_content(paths: Iterable[str]) -> list[list[str]]:
    """Groups of files whose bytes are the same, in their order.

    Files of one size are compared by a few blocks, and read as a whole only if those agree.
    """
    groups: Iterable[list[str]] = [list(paths)]
    for key in (_size, _blocks, _digest):
        finer: list[list[str]] = []
        for group in groups:
            parts = grouped(group, key)
            finer += [part for value, part in parts.items() if value and len(part) > 1]
        groups = finer
    return list(groups)


def look_at_range(
    records: Sequence[ImageRecord], file: Path, options: ImageOptions
) -> tuple[PixelRange | None, list[str]]:
    """The range of images that are not 8-bit, and what to tell of it.

    Raises:
        UserError: images of different kinds have no range in common.
    """
    sample: list[tuple[ImageRecord, Extent]] = []
    for record in spread(records, _SAMPLE):
        try:
            extent = read_extent(record.path, options.max_pixels)
        except ImageError:
            continue  # is told when it is read
        if extent is not None:
            sample.append((record, extent))
    chosen = options.pixel_range
    if not sample:
        return chosen, []
    if chosen is None and options.choose_range:
        ranges: dict[PixelRange, ImageRecord] = {}
        for extents in grouped(sample, lambda one: one[1].kind).values():
            ranges.setdefault(choose_range([extent for _, extent in extents]), extents[0][0])
        if len(ranges) > 1:
            kinds = ", ".join(f"{shown(one)} ({record.file_name})" for one, record in ranges.items())
            raise UserError(
                f"{file}: its images hold values of different ranges, {kinds}; save them in one way, or set "
                "data.pixel_range=[black, white]"
            )
        chosen = next(iter(ranges))
    kinds = " and ".join(dict.fromkeys(extent.kind for _, extent in sample))
    least, most = min(extent.least for _, extent in sample), max(extent.most for _, extent in sample)
    be = "is" if len(records) == 1 else "are"
    lines = [
        f"{_images(len(records))} {be} {kinds}, with values {shown((least, most))}"
        + (f" in the {len(sample)} looked at" if len(sample) < len(records) else "")
        + f"; read as {shown(chosen or FULL)} (data.pixel_range)"
    ]
    notes = [(record.file_name, range_note(extent, chosen)) for record, extent in sample]
    return chosen, lines + note_lines([(name, note) for name, note in notes if note is not None])


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """All, or `most` of them at even distances."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> Mapping[Any, list[Item]]:
    groups: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _blocks(path: str) -> bytes:
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            read = b""
            for start in (0, size // 2, max(size - _BLOCK, 0)):
                stream.seek(start)
                read += stream.read(_BLOCK)
    except OSError:
        return b""
    return hashlib.blake2b(read, digest_size=16).digest()


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            digest = hashlib.blake2b(digest_size=16)
            while part := stream.read(2**20):
                digest.update(part)
    except OSError:
        return b""
    return digest.digest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
