"""Image files of kinds that Pillow reads and does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_png(path: Path, values: NDArray[np.uint16]) -> None:
    """16 bits a channel: (H, W, C), C of 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def write_tiff(
    path: Path,
    values: NDArray[np.generic],
    *,
    order: str = "<",
    separate: bool = False,
    deflate: bool = False,
    extra: Sequence[int] = (),
    orientation: int = 1,
) -> None:
    """(H, W) or (H, W, C) of any number type, in one strip, or one for each channel.

    Args:
        order: of bytes, "<" or ">".
        separate: one channel after the other.
        extra: TIFF's ExtraSamples, such as 0 for a channel without meaning, 2 for alpha.
        orientation: TIFF's, which is EXIF's.
    """
    values = values if values.ndim == 3 else values[:, :, None]
    height, width, channels = values.shape
    number_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    ordered = values.astype(values.dtype.newbyteorder(order))  # type: ignore[call-overload]
    planes = [ordered[:, :, k].tobytes() for k in range(channels)] if separate else [ordered.tobytes()]
    strips = [zlib.compress(plane) for plane in planes] if deflate else planes
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * values.dtype.itemsize] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [2 if channels >= 3 else 1]),
        273: ("I", [0] * len(strips)),
        274: ("H", [orientation]),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if separate else 1]),
        339: ("H", [number_format] * channels),
    }
    if extra:
        tags[338] = ("H", extra)
    size = {"H": 2, "I": 4}
    place = 8 + 2 + 12 * len(tags) + 4
    outside = sum(len(v) * size[t] for t, v in tags.values() if len(v) * size[t] > 4)
    starts = np.cumsum([place + outside, *map(len, strips)])[:-1].tolist()
    tags[273] = ("I", starts)
    entries, rest = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(order + kind * len(numbers), *numbers)
        if len(packed) > 4:
            rest, packed = rest + packed, struct.pack(order + "I", place + len(rest))
        entries += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + packed.ljust(
            4, b"\0"
        )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    path.write_bytes(start + entries + bytes(4) + rest + b"".join(strips))
