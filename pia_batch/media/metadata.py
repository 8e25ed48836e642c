"""Where GIF, WebP, PNG and MP4 files keep a comment and an XMP packet: written into their bytes, and read back.

Knows nothing of what the comment says. The tags that libavformat writes are `video`'s business.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

XMP_KEYWORD = "XML:com.adobe.xmp"
"""Of the PNG chunk. Source of this and of the places of XMP below: XMP Specification Part 3, Storage in Files."""

_PNG_HEAD_BYTES = 33
"""Signature and IHDR, which nothing may precede."""

_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_XMP_IN_GIF = b"!\xff\x0bXMP DataXMP"
_XMP_TRAILER_IN_GIF = bytes([1, *range(255, -1, -1), 0])
"""Leads a reader that takes the packet for blocks to their end, wherever it comes from."""

_EXIF_IFD, _SOFTWARE, _USER_COMMENT = 0x8769, 0x0131, 0x9286
_ASCII_COMMENT = b"ASCII\0\0\0"
"""What a UserComment in ASCII starts with (Exif 3.0, 4.6.6)."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a file says of itself."""

    comment: str
    """For programs: ASCII on one line."""
    description: str
    """For people: one line, without control characters."""
    software: str
    """What made it: ASCII."""
    xmp: bytes
    """An XMP packet: UTF-8, without zero bytes."""


def gif_blocks(metadata: Metadata) -> bytes:
    """The extension blocks of a GIF; they stand before its first frame."""
    comment = metadata.comment.encode("ascii")
    pieces = (comment[start : start + 255] for start in range(0, len(comment), 255))
    blocks = b"".join(bytes([len(piece)]) + piece for piece in pieces)
    return b"!\xfe" + blocks + b"\0" + _XMP_IN_GIF + metadata.xmp + _XMP_TRAILER_IN_GIF


def webp_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Names and contents of the last chunks of a WebP, in order. Its VP8X chunk has to announce both."""
    exif = Image.Exif()
    exif[_SOFTWARE] = metadata.software
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII_COMMENT + metadata.comment.encode("ascii")
    return [(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0")), (b"XMP ", metadata.xmp)]


def in_png(png: bytes, metadata: Metadata) -> bytes:
    """The PNG file with its texts."""
    texts = {"Software": metadata.software, "Description": metadata.description, "Comment": metadata.comment}
    chunks = [_itxt(keyword, text.encode()) for keyword, text in texts.items()]
    return png[:_PNG_HEAD_BYTES] + b"".join([*chunks, _itxt(XMP_KEYWORD, metadata.xmp)]) + png[_PNG_HEAD_BYTES:]


def mp4_box(metadata: Metadata) -> bytes:
    """The box of the XMP packet, which may stand at the end of an MP4."""
    return struct.pack(">I4s", 24 + len(metadata.xmp), b"uuid") + _XMP_UUID + metadata.xmp


def gif_comments(data: bytes) -> list[str]:
    """The comments of a GIF file that is whole.

    Raises:
        IndexError: it is cut off.
        ValueError: it is no GIF.
    """
    return [b"".join(blocks).decode("latin-1") for label, blocks, _ in walk_gif(data) if label == b"!\xfe"]


def image_comments(data: bytes, pillow_format: str) -> list[str]:
    """The comments of a PNG or WebP file.

    Raises:
        Exception: what Pillow raises on other bytes.
    """
    with Image.open(io.BytesIO(data), formats=(pillow_format,)) as image:
        told = [image.info.get("Comment"), image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)]
    texts = (item.decode("latin-1") if isinstance(item, bytes) else item for item in told)
    return [text.removeprefix(_ASCII_COMMENT.decode()) for text in texts if isinstance(text, str)]


def walk_gif(data: bytes) -> Iterator[tuple[bytes, list[bytes], int]]:
    """Each block of a GIF: its label, what is in it, and where the next one starts. The last one is the trailer.

    Labels are `b"!"` with the kind of the extension, `b","` for a frame and `b";"` for the trailer.

    Raises:
        IndexError: the file is cut off.
        ValueError: something else than a block.
    """

    def colour_table(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    if not data.startswith((b"GIF87a", b"GIF89a")):
        msg = "no GIF"
        raise ValueError(msg)
    position = 13 + colour_table(data[10])
    while data[position] != ord(";"):
        if data[position] not in b"!,":
            msg = f"no block at byte {position}"
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
    """An uncompressed text chunk of a PNG, in no particular language."""
    body = b"iTXt" + keyword.encode("ascii") + b"\0\0\0\0\0" + text
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
