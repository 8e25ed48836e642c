"""Formats of a manifest's files, by their names, or by their first bytes where a name says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.fs

from pia_batch.manifest.table_formats import IMAGES_AND_NOTES
from pia_batch.manifest.text_files import COMPRESSIONS, compression_of
from pia_batch.storage.concurrency import map_in_threads

FileFormat = Literal["parquet", "jsonl", "csv"]

EXTENSIONS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".parq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
"""Formats by extension; those of text also under the extension of a compression, such as `.jsonl.gz`."""

_THREADS = 16
_HEAD_BYTES = 64 * 2**10


def format_of(path: str) -> FileFormat | None:
    """Return the format that a file's name gives, or None."""
    return EXTENSIONS.get(_extension(path))


def formats_in(filesystem: pyarrow.fs.FileSystem, paths: Iterable[str]) -> dict[str, FileFormat]:
    """Return the format of each file of a folder that has one, by path.

    Files without an extension, as Athena, Hive and Spark write them, have it by their first bytes. Files named `.json`,
    as Spark writes JSON lines, count only where nothing else does: elsewhere they are notes about a dataset. Temporary
    files of editors, browsers and programs that copy have none.
    """
    paths = [path for path in paths if not _is_temporary(path)]
    found = {path: file_format for path in paths if (file_format := format_of(path)) is not None}
    unnamed = [path for path in paths if path not in found and _is_unnamed(path)]
    by_content = zip(unnamed, map_in_threads(lambda path: _sniffed(filesystem, path), unnamed, _THREADS), strict=True)
    found |= {path: file_format for path, file_format in by_content if file_format is not None}
    return found or {path: "jsonl" for path in paths if _extension(path) == ".json" and not _is_note(path)}


def _is_note(path: str) -> bool:
    """Return True for the notes of a dataset that the library `datasets` has saved."""
    return PurePosixPath(path).name in ("dataset_info.json", "dataset_dict.json", "state.json")


def format_of_file(filesystem: pyarrow.fs.FileSystem, path: str) -> FileFormat:
    """Return the format of a manifest that is one file; Parquet if nothing says otherwise."""
    if _extension(path) == ".json":
        return "jsonl"
    found = format_of(path)
    if found is None:
        with suppress(Exception):  # what is wrong with it is found, and reported, where it is read
            found = _sniffed(filesystem, path)
    return found or "parquet"


def names_file(path: str) -> bool:
    """Return True if a path is that of a manifest file by its name."""
    return format_of(path) is not None or _extension(path) == ".json"


def _is_unnamed(path: str) -> bool:
    """Return True if a file has no extension, or only that of a compression, or a number as some writers append."""
    return _NO_EXTENSION.fullmatch(_extension(path)) is not None


_NO_EXTENSION = re.compile(r"|\.|\.[0-9]+|\.c[0-9]{3}|\.snappy|.*[^.a-z0-9].*|.{10,}")


def _is_temporary(path: str) -> bool:
    """Return True for a file that is being written or fetched, for a lock, or for an editor's copy, by its name."""
    return _TEMPORARY.fullmatch(PurePosixPath(path).name) is not None


_TEMPORARY = re.compile(
    r"~\$.*|#.*#|.*~|"
    r".*\.(_copying_|crdownload|opdownload|downloading|filepart|incomplete|in-?progress|part|partial|tmp|temp)",
    re.IGNORECASE,
)
"""Names of temporary files: of Office, Emacs and Vim, of `hdfs dfs -put`, browsers, WinSCP, the hub and Flink."""


def is_expected(path: str) -> bool:
    """Return True for images and notes, which may be next to a manifest."""
    return PurePosixPath(path).suffix.lower() in IMAGES_AND_NOTES


def _sniffed(filesystem: pyarrow.fs.FileSystem, path: str) -> FileFormat | None:
    """Return the format of a file by its first bytes: Parquet, or compressed JSON lines; None for any other.

    Raises:
        Exception: The client's own exception.
    """
    with filesystem.open_input_file(path) as source:
        head = bytes(source.read_at(min(_HEAD_BYTES, source.size()), 0))
    if head.startswith(b"PAR1"):
        return "parquet"
    compression = compression_of(head)
    if compression is None:
        return None
    try:
        with pa.CompressedInputStream(pa.BufferReader(head), compression) as stream:
            begun = bytes(stream.read(1024)).lstrip(b"\xef\xbb\xbf \t\r\n")
    except (pa.ArrowException, OSError):
        return None
    return "jsonl" if begun.startswith(b"{") else None


def _extension(path: str) -> str:
    """Return the extension in lower case, without that of a compression."""
    name = PurePosixPath(path)
    if name.suffix.lower() in COMPRESSIONS:
        name = name.with_suffix("")
    return name.suffix.lower()
