"""Image headers: format, size and orientation from an image's first bytes, without decoding it.

They are parsed here, in bounded time, because Pillow does more when it opens a file: it unpacks text and profiles,
follows every reference in EXIF, and can open some formats only as a whole. `lean` removes such parts for it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pia_batch.errors import ImageUnreadableError
from pia_batch.storage import file_kinds

ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP"]
"""Accepted formats, in Pillow's spelling."""

MAX_SIDE = 65_535
"""Longest accepted side, in pixels; also the limit of JPEG and GIF.

Resampling one row of 40 million pixels takes 2 GB and 9 s (measured).
"""

MAX_PARTS = 10_000
"""Largest number of chunks, segments or blocks before the pixels.

An honest file has some dozens; a GIF with a colour profile has a few thousand.
"""

MAX_CHUNKS = 200_000
"""Largest number of chunks of a PNG in all. Encoders write pixels in chunks of 8 KiB or more."""

MAX_SCANS = 100
"""Largest number of scans of a JPEG.

Encoders write about ten; each costs 26 ms at 40 million pixels and can be as short as 60 bytes (measured).
"""

MAX_PROFILE_BYTES = 4 * 2**20
"""Largest size of an ICC profile, in bytes; that of a printing press has about 2 MiB."""

_SIGNATURES: dict[bytes, ImageFormat] = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"RIFF": "WEBP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
_ACCEPTED = "PNG, JPEG, WebP, GIF or BMP"

_BASE64 = re.compile(rb"(?:data:image/|[A-Za-z0-9+/_-]{16})")

_ORIENTATION, _SHORT, _LONG = 0x0112, 3, 4  # TIFF 6.0
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOS, _EOI = 0xDA, 0xD9
_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
"""JPEG markers without a length, and the zero byte that escapes 0xFF."""
_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
"""JPEG markers of the tables for decoding: Huffman and arithmetic tables, quantization, restart interval."""
_COLOURS = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
"""Application segments that define a JPEG's colours, with their first bytes."""
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class IncompleteError(Exception):
    """Bytes that end before the requested part of the image."""


@dataclass(frozen=True)
class ImageHeader:
    """Header of an image."""

    format: ImageFormat
    width: int
    """Width as stored, in pixels, from 1 to MAX_SIDE."""
    height: int
    """Height as stored, in pixels, from 1 to MAX_SIDE."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 is upright."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after the orientation is applied, in pixels."""
        return (self.height, self.width) if self.orientation > 4 else (self.width, self.height)  # noqa: PLR2004 - EXIF


def read(data: bytes) -> ImageHeader:
    """Return the header of an image, from its beginning or from the whole file.

    Uses only the EXIF before the pixels, where JPEG and PNG store it; in a WebP it may follow them.

    Raises:
        IncompleteError: `data` ends too early.
        ImageUnreadableError: The format is not supported, the header is corrupt, or a side has no pixels or too many.
    """
    file_format = _format_of(data)
    width, height, exif = _READERS[file_format](data)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        msg = f"unsupported size (got {width} x {height} pixels, expected sides of 1 to {MAX_SIDE} pixels)"
        raise ImageUnreadableError(msg)
    return ImageHeader(file_format, width, height, _orientation(exif))


def lean(data: bytes, file_format: ImageFormat) -> bytes:
    """Return a whole file without parts that endanger a decoder and define neither pixels nor colours.

    A JPEG loses EXIF, comments, previews, and everything after its first picture. An animated WebP is marked as one
    with transparency. Refuses files with more parts than an honest file has.

    Raises:
        IncompleteError: The file ends before its pixels.
        ImageUnreadableError: The file has too many parts.
    """
    if file_format == "JPEG":
        return _lean_jpeg(data)
    if file_format == "WEBP":
        return _webp_with_canvas(data)
    return data


def _format_of(data: bytes) -> ImageFormat:
    for signature, file_format in _SIGNATURES.items():
        if data.startswith(signature) and (file_format != "WEBP" or b"WEBP".startswith(data[8:12])):
            _need(data, 12)
            return file_format
        if signature.startswith(data):
            raise IncompleteError
    kind = file_kinds.identify(data[: file_kinds.HEAD_BYTES])
    if kind is not None:
        found, remedy = kind.what, _REMEDIES.get(kind.group, _OTHER_REMEDY)
    elif _BASE64.match(data):
        found, remedy = "text such as base64", "decode it to bytes"
    else:
        found, remedy = "bytes", _OTHER_REMEDY
    msg = f"not a readable {_ACCEPTED} image (got {found}: {len(data)} bytes that begin with {data[:8]!r}); {remedy}"
    raise ImageUnreadableError(msg)


_REMEDIES: dict[file_kinds.Group, str] = {
    "image": "save it as PNG",
    "pointer": "run: git lfs pull",
    "page": "a server may have answered with a page or an error; look at it",
    "compressed": "decompress it",
}
_OTHER_REMEDY = "correct the URI, or save the image as PNG"


def _need(data: bytes, end: int) -> None:
    if len(data) < end:
        raise IncompleteError


def _corrupt(what: str) -> ImageUnreadableError:
    return ImageUnreadableError(f"corrupt or truncated image: {what}")


# --- PNG: chunks of length, name, payload, checksum (ISO/IEC 15948) --------------------------------------------------


def _png(data: bytes) -> tuple[int, int, bytes]:
    _need(data, 26)
    if data[12:16] != b"IHDR":
        raise _corrupt("a PNG without IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    exif = b""
    for name, start, end in png_chunks(data, MAX_PARTS + 1):
        if name in (b"IDAT", b"IEND"):
            return width, height, exif
        _need(data, end + 4)
        if name == b"eXIf":
            exif = data[start:end]
    raise IncompleteError


def png_chunks(data: bytes, limit: int = MAX_CHUNKS) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the payload of every chunk whose header is complete."""
    position = 8
    for _ in range(limit):
        if len(data) < position + 8:
            return
        length, name = struct.unpack_from(">I4s", data, position)
        yield name, position + 8, position + 8 + length
        position += 12 + length
    if len(data) >= position + 8:
        raise _corrupt(f"a PNG of more than {limit} chunks")


# --- JPEG: segments of marker, length, payload (ITU-T T.81) ----------------------------------------------------------


def _jpeg(data: bytes) -> tuple[int, int, bytes]:
    exif = b""
    for marker, start, end in _jpeg_segments(data):
        if marker in _SOF:
            _need(data, start + 5)
            height, width = struct.unpack_from(">HH", data, start + 1)
            return width, height, exif
        _need(data, end)
        if marker == _SOS:
            raise _corrupt("a JPEG without a size")
        if marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", start):  # noqa: PLR2004 - APP1
            exif = data[start:end]
    raise IncompleteError


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the payload of every segment up to that of the first scan."""
    position = 2
    for _ in range(MAX_PARTS + 1):
        position = data.find(b"\xff", position)
        if position < 0 or len(data) < position + 4:
            return
        marker = data[position + 1]
        if marker == _EOI:
            raise _corrupt("a JPEG without pixels")
        if marker == 0xFF or marker in _ALONE:  # noqa: PLR2004 - a byte of padding
            position += 1 if marker == 0xFF else 2  # noqa: PLR2004
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if length < 2:  # noqa: PLR2004 - it counts itself
            raise _corrupt("a JPEG with a segment of no length")
        yield marker, position + 4, position + 2 + length
        if marker == _SOS:
            return
        position += 2 + length
    raise _corrupt(f"a JPEG of more than {MAX_PARTS} segments")


def _lean_jpeg(data: bytes) -> bytes:
    kept, profile_bytes = [b"\xff\xd8"], 0
    for marker, start, end in _jpeg_segments(data):
        _need(data, end)
        segment = data[start - 4 : end]
        if marker == _SOS:
            kept.append(data[start - 4 : _end_of_scans(data, end)])
            return b"".join(kept)
        if marker == 0xE2:  # noqa: PLR2004 - APP2: 18 bytes, then a part of the profile
            profile_bytes += len(segment) - 18
            if profile_bytes > MAX_PROFILE_BYTES:
                continue
        coloured = marker in _COLOURS and segment.startswith(_COLOURS[marker], 4)
        if coloured or marker in _TABLES or marker in _SOF:
            kept.append(segment)
    raise IncompleteError


def _end_of_scans(data: bytes, position: int) -> int:
    """Return the position after the picture's end marker, or the end of the data if there is none."""
    scans = 1
    for _ in range(MAX_PARTS):
        found = _NEXT_MARKER.search(data, position)
        if found is None:
            return len(data)
        marker = data[found.start() + 1]
        if marker == _EOI:
            return found.end()
        scans += marker == _SOS
        if scans > MAX_SCANS:
            raise _corrupt(f"a JPEG of more than {MAX_SCANS} scans")
        if marker in _ALONE:
            position = found.end()
            continue
        if len(data) < found.end() + 2:
            return len(data)
        position = found.end() + max(struct.unpack_from(">H", data, found.end())[0], 2)
    raise _corrupt(f"a JPEG of more than {MAX_PARTS} segments")


# --- WebP: a RIFF of chunks of name, length, payload (RFC 9649) -------------------------------------------------------


def _webp(data: bytes) -> tuple[int, int, bytes]:
    _need(data, 30)
    name = data[12:16]
    if name == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise _corrupt("a WebP whose first frame is no key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, b""
    if name == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1, b""
    if name != b"VP8X":
        raise _corrupt("a WebP without a picture")
    size = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return *size, _webp_exif(data) if data[20] & 0x08 else b""


def _webp_with_canvas(data: bytes) -> bytes:
    """Set the alpha flag of an animation, whose first frame need not cover the canvas.

    The rest of the canvas is transparent in browsers; RFC 9649 lets a reader ignore the background colour. Without the
    flag, Pillow shows it black.
    """
    if data[12:16] != b"VP8X" or not data[20] & 0x02:
        return data
    return data[:20] + bytes((data[20] | 0x10,)) + data[21:]


def _webp_exif(data: bytes) -> bytes:
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    position = 12
    for _ in range(MAX_PARTS + 1):
        if position + 8 > 8 + riff_bytes:
            return b""
        _need(data, position + 8)
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"EXIF":
            _need(data, position + 8 + length)
            return data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    raise _corrupt(f"a WebP of more than {MAX_PARTS} chunks")


# --- GIF: a screen, then blocks (GIF89a specification) ---------------------------------------------------------------


def _gif(data: bytes) -> tuple[int, int, bytes]:
    """Return the size of the canvas, enlarged to hold the first picture, as Pillow enlarges it."""
    _need(data, 13)
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    parts = 0
    while parts <= MAX_PARTS:
        _need(data, position + 9)
        if data[position] == 0x2C:  # noqa: PLR2004 - an image
            x, y, w, h = struct.unpack_from("<HHHH", data, position + 1)
            return max(width, x + w), max(height, y + h), b""
        parts += 1
        if data[position] == 0x21:  # noqa: PLR2004 - an extension: label, then sub-blocks up to an empty one
            position += 2
            while parts <= MAX_PARTS and data[position]:
                position += 1 + data[position]
                parts += 1
                _need(data, position + 1)
            position += 1
        elif data[position] == 0:
            position += 1
        else:
            raise _corrupt("a GIF without a picture")
    raise _corrupt(f"a GIF of more than {MAX_PARTS} blocks")


# --- BMP -------------------------------------------------------------------------------------------------------------


def _bmp(data: bytes) -> tuple[int, int, bytes]:
    _need(data, 26)
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:  # noqa: PLR2004 - OS/2
        width, height = struct.unpack_from("<HH", data, 18)
        return width, height, b""
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height), b""  # negative: stored from the top


# --- EXIF: a TIFF, of which one tag is read --------------------------------------------------------------------------


def _orientation(exif: bytes) -> int:
    """Return the EXIF orientation; 1 if EXIF is missing or broken, as browsers do."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _ORIENTATION and kind in (_SHORT, _LONG):
                (value,) = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", exif, entry + 8)
                return int(value) if 1 <= value <= 8 else 1  # noqa: PLR2004 - EXIF
    except struct.error:
        pass
    return 1


_READERS = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "GIF": _gif, "BMP": _bmp}
