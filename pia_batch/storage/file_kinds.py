"""Kinds of files by their first bytes, whatever their names: other formats, archives, web pages and pointers."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from typing import Literal

HEAD_BYTES = 4096
"""Number of first bytes that are looked at."""

Group = Literal["table", "pickle", "weights", "zip", "compressed", "archive", "image", "document", "pointer", "page"]


@dataclass(frozen=True, slots=True)
class FileKind:
    """Kind of a file.

    Attributes:
        what: Name of the kind with its article, for messages, such as `an ORC file`.
        group: Kinds that have the same remedy in one place.
    """

    what: str
    group: Group


_BINARY: tuple[tuple[int, bytes, str, Group], ...] = (
    (0, b"PARE", "Parquet with an encrypted footer", "table"),
    (0, b"ARROW1", "an Arrow IPC (Feather) file", "table"),
    (0, b"\xff\xff\xff\xff", "a stream of Arrow IPC, as Hugging Face datasets keep it", "table"),
    (0, b"VTXF", "a Vortex file", "table"),
    (0, b"FEA1", "a Feather file", "table"),
    (0, b"ORC", "an ORC file", "table"),
    (0, b"Obj\x01", "an Avro file", "table"),
    (0, b"SEQ\x04", "a Hadoop sequence file", "table"),
    (0, b"SEQ\x05", "a Hadoop sequence file", "table"),
    (0, b"SEQ\x06", "a Hadoop sequence file", "table"),
    (0, b"RCF\x01", "a Hive RCFile", "table"),
    (0, b"SQLite format 3", "an SQLite database", "table"),
    (8, b"DUCK", "a DuckDB database", "table"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "weights"),
    (0, b"\x93NUMPY", "a NumPy array", "weights"),
    (0, b"GGUF", "a GGUF file, whose weights are quantized", "weights"),
    (0, b"\x08\x07\x12", "an ONNX file", "weights"),
    (0, b"\x08\x08\x12", "an ONNX file", "weights"),
    (4, b"TFL3", "a TensorFlow Lite file", "weights"),
    (0, b"\x80\x02", "a Python pickle", "pickle"),
    (0, b"\x80\x03", "a Python pickle", "pickle"),
    (0, b"\x80\x04\x95", "a Python pickle", "pickle"),
    (0, b"\x80\x05\x95", "a Python pickle", "pickle"),
    (0, b"PK\x03\x04", "a zip archive or an Excel workbook", "zip"),
    (0, b"PK\x05\x06", "an empty zip archive", "zip"),
    (0, b"\xd0\xcf\x11\xe0", "an old Excel workbook", "document"),
    (0, b"\x1f\x8b", "compressed with gzip", "compressed"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "compressed"),
    (0, b"BZh", "compressed with bzip2", "compressed"),
    (0, b"\xfd7zXZ", "compressed with xz", "compressed"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "compressed"),
    *((0, bytes([0x50 + n]) + b"\x2a\x4d\x18", "compressed with zstd", "compressed") for n in range(16)),
    (0, b"\x02\x21\x4c\x18", "compressed with lz4", "compressed"),
    (0, b"LZIP\x01", "compressed with lzip", "compressed"),
    (0, b"\x5d\x00\x00", "compressed with lzma", "compressed"),
    (0, b"\x78\x01", "compressed with zlib", "compressed"),
    (0, b"\x78\x9c", "compressed with zlib", "compressed"),
    (0, b"\x78\xda", "compressed with zlib", "compressed"),
    (0, b"\x1f\x9d", "compressed with compress (.Z)", "compressed"),
    (0, b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", "compressed"),
    (0, b"\x89LZO\x00\r\n\x1a\n", "compressed with lzop", "compressed"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "archive"),
    (257, b"ustar", "a tar archive", "archive"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", "image"),
    (0, b"\xff\xd8\xff", "a JPEG image", "image"),
    (0, b"GIF8", "a GIF image", "image"),
    (0, b"RIFF", "a WebP image, or another RIFF file", "image"),
    (4, b"ftypavi", "an AVIF image", "image"),
    (4, b"ftyphei", "a HEIC image", "image"),
    (4, b"ftyphev", "a HEIC image", "image"),
    (4, b"ftypmif", "a HEIC image", "image"),
    (4, b"ftyp", "a video or an image (MP4, HEIC, AVIF)", "image"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image", "image"),
    (0, b"\xff\x0a", "a JPEG XL image", "image"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image", "image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", "image"),
    (0, b"II*\x00", "a TIFF image", "image"),
    (0, b"MM\x00*", "a TIFF image", "image"),
    (0, b"\x00\x00\x01\x00", "an ICO image", "image"),
    (0, b"8BPS", "a Photoshop document", "image"),
    (0, b"qoif", "a QOI image", "image"),
)
"""Offset and bytes of formats, with their names and groups. Text that happens to begin so is none of them, such as a
CSV whose first column is `ORCID`."""

_TEXT: tuple[tuple[int, bytes, str, Group], ...] = (
    (0, b"%PDF-", "a PDF", "document"),
    (0, b"{\\rtf", "a document in RTF", "document"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file that it stands for", "pointer"),
)
"""The same of formats that are text, or may be."""

_MARKUP = re.compile(rb"\s*<(?:!doctype|!--|\?xml|(?:html|head|body|error)\b)", re.IGNORECASE)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def identify(head: bytes) -> FileKind | None:
    """Return the kind of a file from its first HEAD_BYTES bytes; None for text and for what is not known."""
    head = head.removeprefix(_BYTE_ORDER_MARK)
    for at, magic, what, group in (*_TEXT, *(() if is_text(head) else _BINARY)):
        if head.startswith(magic, at):
            return FileKind(what, group)
    return FileKind("HTML or XML", "page") if _MARKUP.match(head) else None


def is_text(head: bytes) -> bool:
    """Return True for text in UTF-8, whose last character may be cut, without more than a stray control character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(head)
    except UnicodeDecodeError:
        return False
    return sum(each < " " and each not in "\t\n\r" for each in text) <= len(text) // 20


def wide_encoding(head: bytes) -> str | None:
    """Return the encoding of text with two or four bytes a character, by its mark or by its zeros; None for others."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    begin = head[: min(len(head), 16) // 4 * 4]
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = begin.decode(encoding)
        except UnicodeDecodeError:
            continue
        if text and text.isascii() and "".join(text.split()).isprintable():
            return encoding[:6].upper()
    return None
