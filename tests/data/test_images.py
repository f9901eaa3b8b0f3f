"""Image files of every kind come out as a person would see them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from fastmrcnn.data.headers import check_headers, read_header
from fastmrcnn.data.images import ImageError, decode_noted, read_image, read_noted, read_pixels
from fastmrcnn.data.pixel_range import Reading
from fastmrcnn.data.records import ImageRecord, Problems
from fastmrcnn.errors import UserError

ORIENTATION = 0x0112


def record(path: Path, width: int = 6, height: int = 4) -> ImageRecord:
    return ImageRecord(5, path, path.name, width, height, [], Path("set.json"))


def picture() -> Image.Image:
    """6 wide, 4 high, every pixel different."""
    values = np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3
    return Image.fromarray(values)


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(record(tmp_path / "a.png"))[0], np.asarray(picture()))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "LAB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    source = (
        picture().convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (6, 4), (90, 128, 128))
    )
    path = tmp_path / "a.tif"
    source.save(path)
    pixels = read_image(record(path))[0]
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    if mode != "LAB":
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    if mode in ("L", "1", "LA"):
        assert (pixels == pixels[:, :, :1]).all()


def test_palette_colours(tmp_path: Path) -> None:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png")
    assert (read_pixels(tmp_path / "a.png") == [10, 200, 30]).all()
    image.save(tmp_path / "b.png", transparency=1)
    assert (read_pixels(tmp_path / "b.png") == 255).all()


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (6, 4), (100, 0, 0, 255))
    image.putpixel((1, 2), (100, 0, 0, 0))
    image.putpixel((2, 2), (100, 0, 0, 51))
    image.save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png")
    assert pixels[0, 0].tolist() == [100, 0, 0]
    assert pixels[2, 1].tolist() == [255, 255, 255]
    assert pixels[2, 2].tolist() == [224, 204, 204]  # a fifth of the colour


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65000, 65535, 514]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    pixels = read_pixels(tmp_path / f"a.{suffix}")
    assert pixels.shape == (2, 4, 3)
    assert pixels[:, :, 0].tolist() == [[0, 0, 1, 1], [128, 253, 255, 2]]


def test_pixels_without_a_known_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: cannot be decoded \(its pixels are floating-point"):
        read_pixels(tmp_path / "a.tif")
    Image.fromarray(np.full((4, 6), 70000, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match="more than 16 bits"):
        read_pixels(tmp_path / "b.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture().save(tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    width, height = upright.size
    assert (width, height) == ((6, 4) if orientation < 5 else (4, 6))
    path = tmp_path / "a.png"
    np.testing.assert_array_equal(read_image(record(path, width, height))[0], np.asarray(upright))
    if orientation == 6:  # what a camera held upright writes: the file's left column is the top row
        np.testing.assert_array_equal(np.asarray(upright)[0], np.asarray(picture())[::-1, 0])
    if orientation >= 5:
        with pytest.raises(UserError, match="turned by its EXIF orientation to width 4, height 6") as caught:
            read_image(record(path, 6, 4))
        assert "image 5 of set.json" in str(caught.value)
        problems = Problems()
        check_headers([record(path, 6, 4)], problems)
        with pytest.raises(UserError, match="turned by its EXIF"):
            problems.check(Path("set.json"))
    problems = Problems()
    check_headers([record(path, width, height)], problems)
    problems.check(Path("set.json"))


def test_headers_of_png_are_read_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the orientation that stands behind them, for which Pillow decodes."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture().save(tmp_path / "before.png", exif=exif)
    picture().save(tmp_path / "none.png")
    content = (tmp_path / "before.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    (tmp_path / "after.png").write_bytes(
        content[:start] + content[end:last] + content[start:end] + content[last:]
    )
    after = read_header(tmp_path / "after.png", 10**6)
    assert (after.size, after.turned, after.swapped) == ((4, 6), True, True)
    assert read_pixels(tmp_path / "after.png").shape == (6, 4, 3)

    def decode(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    assert read_header(tmp_path / "before.png", 10**6) == after
    none = read_header(tmp_path / "none.png", 10**6)
    assert (none.size, none.turned, none.swapped) == ((6, 4), False, False)


@pytest.mark.parametrize(("width", "height"), [(6, 5), (5, 4), (7, 3), (7, 5)])
def test_a_size_that_was_rounded_otherwise(tmp_path: Path, width: int, height: int) -> None:
    """What is too much is cut off; what is missing is as the last row and column."""
    picture().save(tmp_path / "a.png")
    pixels, note = read_image(record(tmp_path / "a.png", width, height))
    rows, columns = np.minimum(np.arange(height), 3), np.minimum(np.arange(width), 5)
    np.testing.assert_array_equal(pixels, np.asarray(picture())[np.ix_(rows, columns)])
    assert note is None


def test_another_size_than_the_annotations_say(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        read_image(record(tmp_path / "a.png", 12, 8))
    assert (
        "image 5 of set.json: a.png has width 6, height 4, but the annotations say width 12, height 8"
        in str(caught.value)
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=f"a.{suffix}: ") as caught:
            read_image(record(path, 64, 64))
        message = str(caught.value)
        assert "\n" not in message
        assert "replace the file or remove image 5 of set.json" in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: no such image file"):
        read_pixels(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_pixels(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "deep.png", "turned.jpg", "a.tif", "a.webp"])
def test_what_stands_in_a_file_is_read_as_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[ORIENTATION] = 6
    deep = Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000)
    (deep if name == "deep.png" else picture()).save(path, exif=exif)
    pixels, note = read_noted(path)
    again, same = decode_noted(path.read_bytes())
    np.testing.assert_array_equal(again, pixels)
    assert same == note


def test_what_cannot_be_an_image_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for content, kind, formats in (
        (b"", "unreadable", None),
        (b"II*\0", "unreadable", None),
        (whole[: len(whole) // 2], "damaged", None),
        (whole, "unreadable", ("JPEG", "GIF")),
    ):
        with pytest.raises(ImageError) as fault:
            decode_noted(content, formats=formats)
        assert fault.value.kind == kind
    with pytest.raises(ImageError) as fault:
        decode_noted(whole, Reading(max_pixels=899))
    assert fault.value.kind == "large"
