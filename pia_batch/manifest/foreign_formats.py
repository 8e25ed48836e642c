"""Files of other formats, known by their first bytes whatever their names, and refused by name with the remedy."""

from __future__ import annotations

import codecs
import re
from typing import Literal

from pia_batch.errors import ManifestError

HEAD_BYTES = 4096
"""Number of first bytes that are looked at."""

_COMPRESSED = "name JSONL and CSV as such (.jsonl.gz, .csv.zst); decompress Parquet, which is compressed inside"
_UNPACK = "unpack it, and name the files inside"
_AS_PARQUET = "write it as Parquet"
_NO_TABLE = "a manifest is a table, which has the URIs of images"

_MAGIC = (
    (b"PARE", "Parquet with an encrypted footer", "write it without encryption"),
    (b"ARROW1", "an Arrow IPC (Feather) file", _AS_PARQUET),
    (b"\xff\xff\xff\xff", "a stream of Arrow IPC, as Hugging Face datasets keep it", _AS_PARQUET),
    (b"FEA1", "a Feather file", _AS_PARQUET),
    (b"ORC", "an ORC file", _AS_PARQUET),
    (b"Obj\x01", "an Avro file", _AS_PARQUET),
    (b"SEQ\x04", "a Hadoop sequence file", _AS_PARQUET),
    (b"SEQ\x05", "a Hadoop sequence file", _AS_PARQUET),
    (b"SEQ\x06", "a Hadoop sequence file", _AS_PARQUET),
    (b"RCF\x01", "a Hive RCFile", _AS_PARQUET),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _AS_PARQUET),
    (b"\x93NUMPY", "a NumPy array", _AS_PARQUET),
    (b"\x80\x02", "a Python pickle", _AS_PARQUET),
    (b"\x80\x03", "a Python pickle", _AS_PARQUET),
    (b"\x80\x04\x95", "a Python pickle", _AS_PARQUET),
    (b"\x80\x05\x95", "a Python pickle", _AS_PARQUET),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or save it as CSV UTF-8"),
    (b"PK\x05\x06", "an empty zip archive", "write it again"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save it as CSV UTF-8"),
    (b"\x1f\x8b", "compressed with gzip", _COMPRESSED),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _COMPRESSED),
    (b"BZh", "compressed with bzip2", _COMPRESSED),
    (b"\xfd7zXZ", "compressed with xz", "decompress it, or write it as Parquet"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it, or write it as Parquet"),
    (b"\x1f\x9d", "compressed with compress (.Z)", "decompress it, or write it as Parquet"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", "decompress it, or write it as Parquet"),
    (b"\x89LZO\x00\r\n\x1a\n", "compressed with lzop", "decompress it, or write it as Parquet"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"SQLite format 3", "an SQLite database", "export its table to Parquet or CSV"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", _NO_TABLE),
    (b"\xff\xd8\xff", "a JPEG image", _NO_TABLE),
    (b"GIF8", "a GIF image", _NO_TABLE),
    (b"RIFF", "a WebP image, or another RIFF file", _NO_TABLE),
)
"""First bytes of formats, with their names and remedies. Text that happens to begin so is none of them, such as a CSV
whose first column is `ORCID`."""

_TEXTS = (
    (b"%PDF-", "a PDF", "export its table to CSV"),
    (b"{\\rtf", "a document in RTF", "save it as CSV UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file that it stands for", "run: git lfs pull"),
)
"""The same of formats that are text, or may be."""

_MAGIC_INSIDE = (
    (8, b"DUCK", "a DuckDB database", "export its table to Parquet"),
    (4, b"ftyp", "a video or an image (MP4, HEIC, AVIF)", _NO_TABLE),
    (257, b"ustar", "a tar archive", _UNPACK + "; a WebDataset becomes a manifest by pia-batch prepare"),
)
"""Offset and bytes of signatures that do not begin a file."""

_MARKUP = re.compile(rb"\s*<(?:!doctype|!--|\?xml|(?:html|head|body|error)\b)", re.IGNORECASE)
_MARKUP_REMEDY = "a server may have answered with a page or an error; look into the file, and fetch it again"


def refuse_other_format(head: bytes, path: str, expected: Literal["parquet", "text"]) -> None:
    """Refuse a file whose first bytes are those of another format.

    Args:
        head: First HEAD_BYTES bytes, decompressed if the file may be compressed.
        path: Path of the file, for messages.
        expected: Kind of the file by its name.

    Raises:
        ManifestError: The format is another one; the message names it, as far as it is known, and the remedy.
    """
    found = _found(head)
    if found is None and expected == "parquet" and not head.startswith(b"PAR1") and head and _is_text(head):
        found = "text, not Parquet", "JSONL and CSV are known by their names: .jsonl, .ndjson, .csv"
    if found is None and expected == "text":
        found = _no_text(head)
    if found is not None:
        what, remedy = found
        msg = f"manifest file {path} is {what}; {remedy}"
        raise ManifestError(msg)


def _found(head: bytes) -> tuple[str, str] | None:
    signatures = [(0, *each) for each in _TEXTS]
    if not _is_text(head):
        signatures += [*((0, *each) for each in _MAGIC), *_MAGIC_INSIDE]
    for at, magic, what, remedy in signatures:
        if head.startswith(magic, at):
            return what, remedy
    return ("HTML or XML", _MARKUP_REMEDY) if _MARKUP.match(head) else None


def _no_text(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that is named like text in UTF-8; None for such text."""
    if head.startswith(b"PAR1"):
        return "Parquet", "name it .parquet"
    wide = _wide_encoding(head)
    if wide is not None:
        return f"text in {wide}", "save it as UTF-8"
    if b"\0" in head and not _is_text(head):
        return "not text, and of no format that is known here", "JSONL and CSV are text in UTF-8; write it again"
    return None


def _wide_encoding(head: bytes) -> str | None:
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
        if text and text.isascii() and text.isprintable():
            return encoding[:6].upper()
    return None


def _is_text(head: bytes) -> bool:
    """Return True for text in UTF-8, whose last character may be cut, without more than a stray control character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(head)
    except UnicodeDecodeError:
        return False
    return sum(each < " " and each not in "\t\n\r" for each in text) <= len(text) // 20
