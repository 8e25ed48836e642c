"""Files of other formats, known by their first bytes whatever their names, and refused by name with the remedy."""

from __future__ import annotations

import re
from typing import Literal

from pia_batch.errors import ManifestError
from pia_batch.storage import file_kinds
from pia_batch.storage.file_kinds import Group

_COMPRESSED = "name JSONL and CSV as such (.jsonl.gz, .csv.zst); decompress Parquet, which is compressed inside"
_UNPACK = "unpack it, and name the files inside"
_AS_PARQUET = "write it as Parquet"
_AS_CSV = "save it as CSV UTF-8"

_REMEDIES: dict[Group, str] = {
    "table": _AS_PARQUET,
    "pickle": _AS_PARQUET,
    "weights": _AS_PARQUET,
    "zip": "unpack it, or save it as CSV UTF-8",
    "compressed": "decompress it, or write it as Parquet",
    "archive": _UNPACK,
    "image": "a manifest is a table, which has the URIs of images",
    "document": _AS_CSV,
    "pointer": "run: git lfs pull",
    "page": "a server may have answered with a page or an error; look into the file, and fetch it again",
}
DECOMPRESS = "decompress it (raw snappy, LZ4 and brotli have no mark)"

_CONTROL = re.compile(rb"[\0-\x08\x0e-\x19\x1b-\x1f]")
"""Characters that text in an older encoding has not, and compressed text nearly always."""

_OWN_REMEDIES = {
    "Parquet with an encrypted footer": "write it without encryption",
    "compressed with gzip": _COMPRESSED,
    "compressed with zstd": _COMPRESSED,
    "compressed with bzip2": _COMPRESSED,
    "an empty zip archive": "write it again",
    "an SQLite database": "export its table to Parquet or CSV",
    "a DuckDB database": "export its table to Parquet",
    "a tar archive": f"{_UNPACK}; a WebDataset becomes a manifest by pia-batch prepare",
    "a PDF": "export its table to CSV",
}
"""Remedies of kinds that differ from others of their group."""


EXAMINED_FILES = 16
"""Number of files in a folder with none of ours whose content is looked at, to name its format."""


def refuse_known_format(head: bytes, file: str) -> None:
    """Refuse a file beside which there is none of ours, if its format is known.

    Args:
        head: First `file_kinds.HEAD_BYTES` bytes.
        file: Name of the file for the message, such as `manifest file PATH`.

    Raises:
        ManifestError: The format is known; the message names it and the remedy.
    """
    if file_kinds.identify(head) is not None:
        refuse_other_format(head, file, "parquet")


def refuse_other_format(head: bytes, file: str, expected: Literal["parquet", "text"]) -> None:
    """Refuse a file whose first bytes are those of another format.

    Args:
        head: First `file_kinds.HEAD_BYTES` bytes, decompressed if the file may be compressed.
        file: Name of the file for the message, such as `manifest file PATH`.
        expected: Kind of the file by its name.

    Raises:
        ManifestError: The format is another one; the message names it, as far as it is known, and the remedy.
    """
    kind = file_kinds.identify(head)
    found = None if kind is None else (kind.what, _OWN_REMEDIES.get(kind.what, _REMEDIES[kind.group]))
    if found is None and expected == "parquet" and not head.startswith(b"PAR1") and head and file_kinds.is_text(head):
        found = "text, not Parquet", "JSONL and CSV are known by their names: .jsonl, .ndjson, .csv"
    if found is None and expected == "text":
        found = _no_text(head)
    if found is not None:
        what, remedy = found
        msg = f"{file} is {what}; {remedy}"
        raise ManifestError(msg)


def _no_text(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that is named like text in UTF-8; None for such text."""
    if head.startswith(b"PAR1"):
        return "Parquet", "name it .parquet"
    wide = file_kinds.wide_encoding(head)
    if wide is not None:
        return f"text in {wide}", "save it as UTF-8"
    if _CONTROL.search(head) and not file_kinds.is_text(head):
        remedy = f"JSONL and CSV are text in UTF-8; {DECOMPRESS}, or write it again"
        return "not text, and of no format that is known here", remedy
    return None
