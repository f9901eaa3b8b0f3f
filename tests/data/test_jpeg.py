"""JPEGs that do not go through Pillow have the pixels that Pillow gives; all others go through it."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from fastmrcnn.data import images, jpeg
from fastmrcnn.data.images import decode_noted, read_image, read_pixels
from fastmrcnn.data.jpeg import decode_plain, plain_jpeg
from fastmrcnn.data.pixel_range import Reading
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.errors import UserError

pytest.importorskip("simplejpeg")
ORIENTATION = 0x0112
HUGE = 10**9


def scene(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """Edges, gradients and noise in all colours."""
    random = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5) * 90, np.cos(y / 3) * 90, ((x // 7 + y // 5) % 2) * 150 - 60], axis=-1)
    noisy = waves + random.normal(0, 20, waves.shape) + 110
    return noisy.clip(0, 255).astype(np.uint8)[:, :, :channels].squeeze()


def jpeg_of(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def by_pillow(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def with_segment(content: bytes, marker: int, segment: bytes) -> bytes:
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + content[2:]


PLAIN: dict[str, dict[str, Any]] = {
    "all chroma": {"subsampling": 0},
    "half chroma": {"subsampling": 1},
    "quarter chroma": {"subsampling": 2},
    "rough": {"quality": 20},
    "fine": {"quality": 98},
    "progressive": {"progressive": True},
    "own tables": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "upright": {"exif": exif(1)},
    "commented": {"comment": b"Orientation"},
    "profile": {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
    "dense": {"dpi": (300, 300)},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("size", [(48, 64), (17, 33), (1, 1)])
def test_plain_ones_have_the_pixels_of_pillow(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], size: tuple[int, int]
) -> None:
    for channels in (3, 1):
        source = scene(*size, channels).reshape(size if channels == 1 else (*size, 3))
        content = jpeg_of(source, **options)
        expected = by_pillow(content)
        with monkeypatch.context() as patched:
            patched.setattr(Image, "open", None)
            pixels, note = decode_noted(content)
        assert pixels.dtype == np.uint8
        assert note is None
        np.testing.assert_array_equal(pixels, expected)


def test_colours_that_are_stored_as_they_are() -> None:
    content = jpeg_of(scene(16, 16), keep_rgb=True)
    found = decode_plain(content, HUGE)
    assert found is not None
    np.testing.assert_array_equal(found, by_pillow(content))


def left_to_pillow() -> dict[str, bytes]:
    content = jpeg_of(scene(24, 40))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    return {
        "turned": jpeg_of(scene(24, 40), exif=exif(6)),
        "turned by XMP": with_segment(content, 0xE1, xmp),
        "metadata that are none": with_segment(content, 0xE1, b"Exif\0\0rubbish"),
        "CMYK": _cmyk(scene(24, 40)),
        "PNG": _png(scene(24, 40)),
    }


def _cmyk(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(stream, "JPEG")
    return stream.getvalue()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", left_to_pillow())
def test_all_others_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    content = left_to_pillow()[name]
    assert decode_plain(content, HUGE) is None
    found, _ = decode_noted(content)
    monkeypatch.setattr(images, "decode_plain", lambda *_, **__: None)
    expected, _ = decode_noted(content)
    np.testing.assert_array_equal(found, expected)
    assert found.shape[:2] == ((40, 24) if name.startswith("turned") else (24, 40))


def outcome(path: Path) -> NDArray[np.uint8] | str:
    try:
        return read_pixels(path)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_is_judged_by_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressive: bool
) -> None:
    """Cut off, bytes changed or taken out: what is read and what is refused is as Pillow would have it."""
    whole = jpeg_of(scene(40, 56), progressive=progressive)
    random = np.random.default_rng(7)
    refused = fast = 0
    for number in range(150):
        content = bytearray(whole)
        place = int(random.integers(2, len(whole)))
        match number % 3:
            case 0:
                del content[place:]
            case 1:
                content[place] ^= int(random.integers(1, 256))
            case 2:
                del content[place : place + int(random.integers(1, 9))]
        path = tmp_path / "a.jpg"
        path.write_bytes(content)
        found = outcome(path)
        fast += decode_plain(path, HUGE) is not None
        with monkeypatch.context() as patched:
            patched.setattr(images, "decode_plain", lambda *_, **__: None)
            expected = outcome(path)
        refused += isinstance(expected, str)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
        else:
            np.testing.assert_array_equal(found, expected)
    assert refused > 20
    assert fast > 10


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    whole = jpeg_of(scene(64, 64))
    for missing in (1, 2, 3, 20, len(whole) // 2, len(whole) - 5):
        assert decode_plain(whole[:-missing], HUGE) is None
    (tmp_path / "a.jpg").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded \(.*truncated"):
        read_pixels(tmp_path / "a.jpg")


def test_large_ones_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_of(scene(30, 40)))
    assert decode_plain(path, 1199) is None
    with pytest.raises(UserError, match=r"has 40 x 30 = 1,200 pixels, more than data\.max_pixels = 1,199"):
        read_pixels(path, Reading(max_pixels=1199))
    assert read_pixels(path, Reading(max_pixels=1200)).shape == (30, 40, 3)


def test_pixels_are_put_where_they_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_of(scene(30, 40)))
    record = ImageRecord(5, path, path.name, 40, 30, [], Path("set.json"))
    expected = read_image(record)[0]
    memory = np.full(3 * 30 * 40 + 5, 77, np.uint8)
    found = read_image(record, memory)[0]
    np.testing.assert_array_equal(found, expected)
    assert np.shares_memory(found, memory[:1])
    np.testing.assert_array_equal(memory[:-5].reshape(30, 40, 3), expected)
    assert (memory[-5:] == 77).all()
    small = np.full(3 * 30 * 40 - 1, 77, np.uint8)
    np.testing.assert_array_equal(read_image(record, small)[0], expected)
    assert (small == 77).all()


def test_without_the_library_pillow_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_of(scene(30, 40)))
    fast = read_pixels(path)
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert decode_plain(path, HUGE) is None
    np.testing.assert_array_equal(read_pixels(path), fast)


def test_headers() -> None:
    content = jpeg_of(scene(30, 40), exif=exif(1))
    assert plain_jpeg(content) == (30, 40)
    assert plain_jpeg(content[:3] + b"\xff" * 4 + content[3:]) == (30, 40)  # fill bytes
    start = content.index(b"\xff\xc0")
    twelve_bits = content[: start + 4] + b"\x0c" + content[start + 5 :]
    arithmetic = content.replace(b"\xff\xc0", b"\xff\xc9", 1)
    twice = content[:2] + content[start : start + 19] + content[2:]
    for other in (twelve_bits, arithmetic, twice, content[: start + 6], content[:start], b"\xff\xd8\xff"):
        assert plain_jpeg(other) is None
