"""Images that are not 8-bit: which values are black and white, and that their numbers are read right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import write_png, write_tiff
from PIL import Image

from fastmrcnn.data.images import read_extent, read_noted, read_pixels, rgb_pixels
from fastmrcnn.data.pixel_range import (
    FULL,
    MAX_PIXELS,
    Extent,
    Reading,
    choose_range,
    note_lines,
    range_note,
    to_bytes,
)
from fastmrcnn.errors import UserError

RAMP = np.arange(32).reshape(4, 8)


@pytest.mark.parametrize(
    ("least", "most", "floating", "chosen"),
    [
        (0, 200, False, (0, 255)),
        (3, 255, False, (0, 255)),
        (0, 256, False, (0, 1023)),
        (12, 4000, False, (0, 4095)),
        (0, 4096, False, (0, 16383)),
        (0, 16384, False, (0, 65535)),
        (0, 65535, False, (0, 65535)),
        (0, 70000, False, (0, 2**18 - 1)),
        (0, 2**32 - 1, False, (0, 2**32 - 1)),
        (-1024, 3071, False, (-1024, 3071)),
        (0, 1, False, (0, 1)),
        (2, 9, False, (2, 9)),
        (0, 0, False, (0, 255)),
        (7, 7, False, (0, 255)),
        (0, 1, True, (0, 1)),
        (0.1, 0.3, True, (0, 1)),
        (0, 254.5, True, (0, 255)),
        (0, 1.25, True, (0, 1.25)),
        (-0.5, 0.5, True, (-0.5, 0.5)),
        (0, 1e30, True, (0, 1e30)),
    ],
)
def test_the_range_that_values_are_meant_in(
    least: float, most: float, floating: bool, chosen: tuple[float, float]
) -> None:
    middle = (least + most) / 2
    sample = [Extent(middle, most, "", floating), Extent(least, middle, "", floating)]
    assert choose_range(sample) == chosen


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.float32])
def test_values_become_bytes(dtype: Any) -> None:
    values = np.array([0, 8, 9, 2048, 4087, 4095], dtype)
    assert to_bytes(values, (0, 4095)).tolist() == [0, 0, 1, 128, 255, 255]
    assert to_bytes(np.array([5000, 60000], dtype), (0, 4095)).tolist() == [255, 255]
    assert to_bytes(np.array([99, 100, 200], dtype), (100, 200)).tolist() == [0, 0, 255]
    for value in (0, 128, 129, 257, 32768, 65000, 65535):
        assert to_bytes(np.array([value], dtype), FULL) == (value + 128) // 257


def test_what_is_not_finite_is_clipped() -> None:
    values = np.array([np.nan, -np.inf, np.inf, -2, 0.5, 7], np.float32)
    assert to_bytes(values, (0, 1)).tolist() == [0, 0, 255, 0, 128, 255]


FILES: dict[str, tuple[str, np.ndarray, dict[str, Any], str]] = {
    "16-bit TIFF": ("tif", (RAMP * 130).astype(np.uint16), {}, "16-bit"),
    "big-endian": ("tif", (RAMP * 130).astype(np.uint16), {"order": ">"}, "16-bit"),
    "signed": ("tif", (RAMP * 100 - 1000).astype(np.int16), {}, "signed 16-bit"),
    "signed 8-bit": ("tif", (RAMP * 4 - 60).astype(np.int8), {}, "signed 8-bit"),
    "32-bit": ("tif", (RAMP * 8).astype(np.int32), {}, "32-bit"),
    "unsigned 32-bit": ("tif", (RAMP.astype(np.uint32) << 27), {}, "32-bit"),
    "floats": ("tif", (RAMP / 31).astype(np.float32), {}, "floating-point"),
    "colour": ("tif", np.stack([RAMP, RAMP * 7, RAMP * 130], 2).astype(np.uint16), {}, "16-bit"),
    "colour, big-endian": (
        "tif", np.stack([RAMP, RAMP * 7, RAMP * 130], 2).astype(np.uint16), {"order": ">"}, "16-bit",
    ),
    "colour, compressed": (
        "tif", np.stack([RAMP, RAMP * 7, RAMP * 130], 2).astype(np.uint16), {"deflate": True}, "16-bit",
    ),
    "colour, big-endian, compressed": (
        "tif",
        np.stack([RAMP, RAMP * 7, RAMP * 130], 2).astype(np.uint16),
        {"order": ">", "deflate": True},
        "16-bit",
    ),
    "16-bit PNG": ("png", (RAMP * 130).astype(np.uint16)[:, :, None], {}, "16-bit"),
    "colour PNG": ("png", np.stack([RAMP, RAMP * 7, RAMP * 130], 2).astype(np.uint16), {}, "16-bit"),
}  # fmt: skip


def write(folder: Path, name: str) -> tuple[Path, np.ndarray, str]:
    suffix, values, options, kind = FILES[name]
    path = folder / f"a.{suffix}"
    if suffix == "png":
        write_png(path, values)
    else:
        write_tiff(path, values, **options)
    return path, values, kind


@pytest.mark.parametrize("name", FILES)
def test_the_numbers_of_a_file(tmp_path: Path, name: str) -> None:
    path, values, kind = write(tmp_path, name)
    extent = read_extent(path, MAX_PIXELS)
    assert extent == Extent(float(values.min()), float(values.max()), kind, values.dtype.kind == "f")
    chosen = (extent.least, extent.most)
    pixels, note = read_noted(path, Reading(chosen))
    low, high = chosen
    wanted = np.floor((values.astype(float) - low) * 255 / (high - low) + 0.5)
    np.testing.assert_array_equal(pixels, np.broadcast_to(wanted.reshape(4, 8, -1), (4, 8, 3)))
    assert note is None


def test_opaque_stays_opaque(tmp_path: Path) -> None:
    values = np.full((2, 3, 4), 4095, np.uint16)
    values[:, :, 3] = [65535, 65535, 0]
    values[0, :, :3] = 0
    for name, some in (("colour.png", values), ("grey.png", values[:, :, [0, 3]])):
        write_png(tmp_path / name, some)
        pixels, note = read_noted(tmp_path / name, Reading((0, 4095)))
        assert pixels[:, :, 1].tolist() == [[0, 0, 255], [255, 255, 255]]
        assert note is None


def test_files_that_pillow_would_misread_are_refused(tmp_path: Path) -> None:
    colour = np.stack([RAMP, RAMP * 7, RAMP * 130], 2).astype(np.uint16)
    write_tiff(tmp_path / "a.tif", colour, separate=True)
    with pytest.raises(
        UserError, match=r"a\.tif: .*channels of 16 bits lie one after the other.*interleaved"
    ):
        read_pixels(tmp_path / "a.tif")
    write_tiff(tmp_path / "b.tif", RAMP.astype(np.float64))
    with pytest.raises(UserError, match=r"b\.tif: .*a TIFF whose channels, bits or compression"):
        read_pixels(tmp_path / "b.tif")


def test_8_bits_are_read_as_they_are_in_any_range(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    for name, image in (("a.png", Image.fromarray(noise)), ("b.tif", Image.fromarray(noise[:, :, 0]))):
        image.save(tmp_path / name)
        assert read_extent(tmp_path / name, MAX_PIXELS) is None
        np.testing.assert_array_equal(
            read_pixels(tmp_path / name, Reading((10, 20))), read_pixels(tmp_path / name)
        )
        np.testing.assert_array_equal(rgb_pixels(image, Reading((10, 20))), rgb_pixels(image))


def test_what_is_said_of_an_image() -> None:
    image = Extent(0, 4095, "16-bit", False)
    assert range_note(image, (0, 4095)) is None
    dark = range_note(image, None)
    assert dark == (False, "16-bit values 0..4095 are read as 0..65535, of which they are a small, dark part")
    clipped = range_note(image, (0, 1023))
    assert clipped == (True, "16-bit values 0..4095 reach beyond 0..1023 and are clipped")
    below = range_note(Extent(-5, 900, "signed 16-bit", False), (0, 1023))
    assert below is not None
    assert below.clipped
    assert range_note(Extent(0, 40000, "16-bit", False), None) is None
    assert note_lines([("a", dark), ("b", clipped), ("c", below), ("d", clipped)]) == [
        f"b: {clipped.text} (one of 3 such images)",
        f"a: {dark.text}",
    ]


def test_a_warning_tells_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray((RAMP * 130).astype(np.uint16)).save(path)
    with pytest.warns(UserWarning, match=r"a\.tif: 16-bit values 0\.\.4030 are read as 0\.\.65535"):
        assert read_pixels(path).max() == 16
    assert read_pixels(path, Reading((0, 4095))).max() == 251
    with pytest.warns(UserWarning, match="small, dark part"):
        assert rgb_pixels(Image.open(path)).max() == 16
    np.testing.assert_array_equal(
        rgb_pixels(Image.open(path), Reading((0, 4095))), read_pixels(path, Reading((0, 4095)))
    )
