"""From the body of a request to pixels, of bytes that anybody may have sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.images import ImageError, decode_noted
from fastmrcnn.data.pixel_range import RangeNote, Reading
from fastmrcnn.service.limits import RefusedError

log = logging.getLogger("fastmrcnn.service")

# Of Pillow's: those that people send. Rarer ones are decoders that nobody looks at, and one runs a program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
FIELD = "file"
FORM = "multipart/form-data"
HOW = (
    "send the image as the body with Content-Type image/jpeg, image/png or the like, or as the field "
    f"'{FIELD}' of {FORM}"
)
_MOST_SHOWN = 60  # characters of what a client sent
_MOST_PARTS = 8

Image.init()
KNOWN = tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillows lack AVIF

Receive = Callable[[], Awaitable[Any]]


class ClientGoneError(Exception):
    """It hung up before its answer."""


def check_headers(headers: Mapping[str, str], max_bytes: int) -> str:
    """The content type of a body that may be read.

    Raises:
        RefusedError: it is no image by its headers, or too long by them.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind.startswith("image/") or kind in (FORM, "application/octet-stream")):
        what = f"Content-Type {shown(kind)} is no image" if kind else "there is no Content-Type"
        raise RefusedError(415, f"{what}; {HOW}")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedError(415, "the body is compressed by a Content-Encoding; send it without")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise RefusedError(400, "Content-Length is no number")
    if int(length[:20]) > max_bytes:
        raise too_long(max_bytes)
    return headers.get("content-type", "")


def too_long(max_bytes: int) -> RefusedError:
    return RefusedError(413, f"the body has more than the {max_bytes:,} bytes that are taken")


async def read_body(receive: Receive, max_bytes: int, seconds: float) -> bytes:
    """All of it; of one that is too long no more than the piece that makes it so.

    Raises:
        RefusedError: it is too long, or does not come in time.
        ClientGoneError: the rest will not come.
    """
    end = asyncio.get_running_loop().time() + seconds
    body = bytearray()  # not a list of pieces, of which a client could make one for each byte
    while True:
        try:
            message = await asyncio.wait_for(receive(), end - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the body did not come within {seconds:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_long(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def decode(body: bytes, content_type: str, reading: Reading) -> tuple[NDArray[np.uint8], RangeNote | None]:
    """(h, w, 3) RGB pixels of the image in a body, and what there is to say of their values.

    Raises:
        RefusedError: there is none, or it cannot be used.
    """
    if content_type.partition(";")[0].strip().lower() == FORM:
        body = file_of_form(body, content_type)
    if not body:
        raise RefusedError(400, f"there is no image: it has no bytes; {HOW}")
    try:
        return decode_noted(body, reading, KNOWN)
    except ImageError as fault:
        if fault.kind == "unreadable":
            raise RefusedError(
                415, f"this is no image that can be read{fault}; {', '.join(KNOWN)} are"
            ) from None
        if fault.kind == "large":
            most = f"{reading.max_pixels:,}"
            raise RefusedError(413, f"the image has more than the {most} pixels that are taken") from None
        raise RefusedError(400, f"the image cannot be decoded{_reason(str(fault))}") from None
    except Exception:  # whatever a decoder makes of damaged bytes
        log.warning("an image cannot be decoded", exc_info=True)
        raise RefusedError(400, "the image cannot be decoded") from None


def file_of_form(body: bytes, content_type: str) -> bytes:
    """What is in the one field of a form, which is the file.

    Raises:
        RefusedError: the form is damaged, or has other fields.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RefusedError(400, f"Content-Type {FORM} lacks its boundary")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise RefusedError(400, f"the form is damaged; {HOW}") from None
    if not form.ended:
        raise RefusedError(400, "the form is cut short")
    names = [
        parse_options_header(headers.get(b"content-disposition", b""))[1].get(b"name", b"").decode("latin-1")
        for headers in form.headers
    ]
    if names != [FIELD]:
        has = ", ".join(shown(name) for name in names) or "none"
        raise RefusedError(400, f"the form must have one field, '{FIELD}', with the image; it has {has}")
    return b"".join(form.pieces)


class _Form:
    """What the parser of a form tells: the headers of its parts, and the content of all of them."""

    def __init__(self) -> None:
        self.headers: list[dict[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.ended = False
        self._name, self._value = bytearray(), bytearray()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": lambda data, start, end: self.pieces.append(data[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.headers) == _MOST_PARTS:
            raise RefusedError(
                400, f"the form has more than {_MOST_PARTS} parts; it must have one, '{FIELD}'"
            )
        self.headers.append({})

    def _header(self) -> None:
        self.headers[-1][bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        self.ended = True


def shown(text: str) -> str:
    """What a client sent, in quotes and on one line, its start if it is long."""
    return repr(text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}...")


def _reason(text: str) -> str:
    """What Pillow says of it, unless it names things of this process."""
    return "" if not text or "0x" in text or "/" in text else f": {text[:200]}"
