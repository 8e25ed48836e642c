"""Metadata of GIF, WebP, PNG and MP4 files: writes a comment and an XMP packet into their bytes, and reads comments.

The metadata of MP4 and WebM that libavformat writes is in `codecs.mp4` and `codecs.webm`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

XMP_KEYWORD = "XML:com.adobe.xmp"
"""Keyword of the XMP chunk in a PNG. Source of the places of XMP here: XMP Specification Part 3, Storage in Files."""

_PNG_HEAD_BYTES = 33
"""Size of the signature and of IHDR, which must come first, in bytes."""

_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_XMP_IN_GIF = b"!\xff\x0bXMP DataXMP"
_XMP_TRAILER_IN_GIF = bytes([1, *range(255, -1, -1), 0])
"""Trailer that leads a reader which takes the packet for data blocks to their end, from any position."""

_EXIF_IFD, _SOFTWARE, _USER_COMMENT = 0x8769, 0x0131, 0x9286
_ASCII_COMMENT = b"ASCII\0\0\0"
"""First bytes of a UserComment in ASCII (Exif 3.0, 4.6.6)."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Description of an animation that is embedded in its file."""

    comment: str
    """Text for programs: ASCII on one line."""
    description: str
    """Text for people: one line, without control characters."""
    software: str
    """Program that made the file: ASCII."""
    xmp: bytes
    """XMP packet: UTF-8, without zero bytes."""


def gif_blocks(metadata: Metadata) -> bytes:
    """Return the extension blocks of a GIF, which precede its first frame."""
    comment = metadata.comment.encode("ascii")
    pieces = (comment[start : start + 255] for start in range(0, len(comment), 255))
    blocks = b"".join(bytes([len(piece)]) + piece for piece in pieces)
    return b"!\xfe" + blocks + b"\0" + _XMP_IN_GIF + metadata.xmp + _XMP_TRAILER_IN_GIF


def webp_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Return names and contents of the last chunks of a WebP, in order. Its VP8X chunk must announce both."""
    exif = Image.Exif()
    exif[_SOFTWARE] = metadata.software
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII_COMMENT + metadata.comment.encode("ascii")
    return [(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0")), (b"XMP ", metadata.xmp)]


def in_png(png: bytes, metadata: Metadata) -> bytes:
    """Return the PNG file with its text chunks."""
    texts = {"Software": metadata.software, "Description": metadata.description, "Comment": metadata.comment}
    chunks = [_itxt(keyword, text.encode()) for keyword, text in texts.items()]
    return png[:_PNG_HEAD_BYTES] + b"".join([*chunks, _itxt(XMP_KEYWORD, metadata.xmp)]) + png[_PNG_HEAD_BYTES:]


def mp4_box(metadata: Metadata) -> bytes:
    """Return the box of the XMP packet, which may be the last one of an MP4."""
    return struct.pack(">I4s", 24 + len(metadata.xmp), b"uuid") + _XMP_UUID + metadata.xmp


def gif_comments(data: bytes) -> list[str]:
    """Return the comments of a complete GIF file.

    Raises:
        IndexError: The file is truncated.
        ValueError: The file is not a GIF.
    """
    return [b"".join(blocks).decode("latin-1") for label, blocks, _ in walk_gif(data) if label == b"!\xfe"]


def image_comments(data: bytes, pillow_format: str) -> list[str]:
    """Return the comments of a PNG or WebP file.

    Raises:
        Exception: Any exception that Pillow raises on other bytes.
    """
    with Image.open(io.BytesIO(data), formats=(pillow_format,)) as image:
        found = [image.info.get("Comment"), image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)]
    texts = (item.decode("latin-1") if isinstance(item, bytes) else item for item in found)
    return [text.removeprefix(_ASCII_COMMENT.decode()) for text in texts if isinstance(text, str)]


def walk_gif(data: bytes) -> Iterator[tuple[bytes, list[bytes], int]]:
    """Yield label, contents and end position of each block of a GIF; the last one is the trailer.

    Labels are `b"!"` with the kind of the extension, `b","` for a frame and `b";"` for the trailer.

    Raises:
        IndexError: The file is truncated.
        ValueError: The file is not a GIF, or has bytes that are not a block.
    """

    def colour_table(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    if not data.startswith((b"GIF87a", b"GIF89a")):
        msg = "not a GIF"
        raise ValueError(msg)
    position = 13 + colour_table(data[10])
    while data[position] != ord(";"):
        if data[position] not in b"!,":
            msg = f"not a block at byte {position}"
            raise ValueError(msg)
        is_extension = data[position] == ord("!")
        label = data[position : position + 2] if is_extension else b","
        position += 2 if is_extension else 11 + colour_table(data[position + 9])
        blocks = []
        while size := data[position]:
            blocks.append(data[position + 1 : position + 1 + size])
            position += 1 + size
        position += 1
        yield label, blocks, position
    yield b";", [], position + 1


def _itxt(keyword: str, text: bytes) -> bytes:
    """Return an uncompressed text chunk of a PNG, without a language."""
    body = b"iTXt" + keyword.encode("ascii") + b"\0\0\0\0\0" + text
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
