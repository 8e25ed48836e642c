"""Tables with a log of their own, such as Delta, found by content and refused by name.

Files of tables of Delta, Iceberg, Hudi, Paimon, DuckLake, and Hive with transactions are Parquet, but only a log says
which of their rows are current.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

import pyarrow.fs

from pia_batch.errors import ManifestError

IMAGES_AND_NOTES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".mp4"),
        *(".md", ".rst", ".html", ".pdf", ".crc", ".yaml", ".yml", ".py"),
    )
)
"""Extensions of files that are expected next to a manifest and do not look like rows of it."""

_REMEDIES = {
    "a Delta table": "make a manifest of its current rows: pia-batch prepare {table} --to DEST",
    "an Apache Iceberg table": "make a manifest of its current rows: pia-batch prepare {table} --to DEST",
    "an Apache Hudi table": "export its current rows to Parquet with Spark and Hudi's reader, and make a manifest of "
    "them: pia-batch prepare EXPORT --to DEST",
    "an Apache Paimon table": "export its current rows to Parquet with Spark or Flink and Paimon's reader, and make a "
    "manifest of them: pia-batch prepare EXPORT --to DEST",
    "a transactional Hive table": "export its current rows to Parquet with Hive, and make a manifest of them: "
    "pia-batch prepare EXPORT --to DEST",
    "a DuckLake table": "export its current rows with DuckDB (COPY TABLE TO 'rows.parquet'), and make a manifest of "
    "them: pia-batch prepare rows.parquet --to DEST",
    "a Lance dataset": "make a manifest of it: pia-batch prepare {table} --to DEST",
}

_PARENT_LEVELS = 8
"""Number of parent folders that are looked at."""


def refuse_data_of_table(metadata: Mapping[bytes, bytes], columns: Iterable[str], file: str) -> None:
    """Refuse a Parquet file that an Iceberg or Hudi table has written, wherever it is now.

    Args:
        metadata: Keys and values of the file's footer.
        columns: Names of its columns.
        file: Name of the file for the message, such as `manifest file PATH`.

    Raises:
        ManifestError: It is such a file; the message names the table's format and the remedy.
    """
    columns = tuple(columns)
    if any(key in metadata for key in (b"iceberg.schema", b"delete-type")):
        what = "an Apache Iceberg table"
    elif {"_change_type", "_commit_version", "_commit_timestamp"} <= {*columns}:
        what = "a Delta table"
    elif any(name.startswith(("_hoodie_commit_", "_hoodie_record_")) for name in columns) or any(
        key.startswith((b"org.apache.hudi.", b"hoodie_")) for key in metadata
    ):
        what = "an Apache Hudi table"
    elif "_VALUE_KIND" in columns and "_SEQUENCE_NUMBER" in columns:
        what = "an Apache Paimon table"
    else:
        return
    msg = (
        f"{file} is a data file of {what}: it may also have rows that were deleted or replaced, and only "
        f"the table's log says which; {_REMEDIES[what].format(table='TABLE')}"
    )
    raise ManifestError(msg)


def refuse_table(found: Iterable[str], root: str, uri: str, use: str = "manifest") -> None:
    """Refuse a folder that is, or contains, a table with a log of its own.

    Args:
        found: Paths of everything in the folder, hidden names included.
        root: Path of the folder.
        uri: URI of the folder for the message.
        use: Noun for the message: what the folder is read as.

    Raises:
        ManifestError: There is such a table; the message names its format, folder and remedy.
    """
    relative = (PurePosixPath(path.removeprefix(root).lstrip("/")).parts for path in found)
    tables = [table for parts in relative if (table := _table_at(parts)) is not None]
    if tables:
        what, folder = min(tables, key=lambda table: len(table[1]))  # data files of Lance are named like datasets
        raise ManifestError(_refusal(what, posixpath.join(root, *folder), uri, use))
    if root.endswith(".lance"):
        raise ManifestError(_refusal("a Lance dataset", root, uri, use))


def refuse_part_of_table(
    filesystem: pyarrow.fs.FileSystem, root: str, uri: str, use: str = "manifest", *, is_file: bool
) -> None:
    """Refuse a file or folder inside a table: a data file, a partition, or the folder `data`.

    Raises:
        ManifestError: It is part of a table; the message names the table's format, folder and remedy.
    """
    if root.startswith(_WEB) and "?" in root:  # the signature of one file does not open others
        return
    folder = posixpath.dirname(root) if is_file else root
    for _ in range(_PARENT_LEVELS):
        if is_file or folder != root:
            for path in _logs_in(filesystem, folder):
                refuse_table([path], folder, uri, use)
        name = posixpath.basename(folder)
        if _HIVE_TRANSACTION.fullmatch(name):
            raise ManifestError(_refusal("a transactional Hive table", posixpath.dirname(folder), uri, use))
        if _INSIDE.fullmatch(name) is None:
            return
        folder = posixpath.dirname(folder)


_INSIDE = re.compile(r".*=.*|data|_change_data|bucket-[0-9]+|[0-9A-Za-z]{1,4}|[0-9-]+")
"""Names of folders inside tables: partitions, changes, buckets, dates, and the random prefixes of object storage."""


def _logs_in(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Return the logs of tables in a folder; empty where the folder may not be read."""
    logs = [posixpath.join(folder, name) for name in ("_delta_log", ".hoodie", ".hoodie_partition_metadata")]
    directory = pyarrow.fs.FileType.Directory
    if folder.startswith(_WEB):
        return [
            f"{folder}/{name}" for name, content in _FIRST_FILES.items() if _holds(filesystem, folder, name, content)
        ]
    try:
        paths = [info.path for info in filesystem.get_file_info(logs) if info.type != pyarrow.fs.FileType.NotFound]
        for name in ("metadata", "snapshot"):
            inside = posixpath.join(folder, name)
            if filesystem.get_file_info(inside).type == directory:
                paths += [info.path for info in filesystem.get_file_info(pyarrow.fs.FileSelector(inside))]
    except Exception:  # noqa: BLE001 - every file system has its own classes; a parent may be forbidden
        return []
    return paths


_WEB = ("http://", "https://")

_FIRST_FILES = {
    "_delta_log/00000000000000000000.json": rb"\s*\{",
    "_delta_log/_last_checkpoint": rb"\s*\{",
    ".hoodie/hoodie.properties": rb"(?s).*hoodie\.",
    "metadata/v1.metadata.json": rb"\s*\{",
}
"""Files that a table's log has in most cases, and the beginning of their content: http has no folders to list."""


def _holds(filesystem: pyarrow.fs.FileSystem, folder: str, name: str, content: bytes) -> bool:
    """Return True if a web server has this file with such content; some servers answer to every path."""
    try:
        with filesystem.open_input_stream(f"{folder}/{name}") as file:
            return re.match(content, file.read(_HEAD_BYTES)) is not None
    except Exception:  # noqa: BLE001 - see above
        return False


_HEAD_BYTES = 512


def _table_at(parts: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:  # noqa: PLR0911 - one for each format
    """Return the format of the table that a path is a log of, and the segments of the table's folder."""
    for at, part in enumerate(parts):
        if part == "_delta_log":
            return "a Delta table", parts[:at]
        if part in (".hoodie", ".hoodie_partition_metadata"):
            return "an Apache Hudi table", parts[:at]
        if part == "_versions" and parts[-1].endswith((".manifest", ".txn")):
            return "a Lance dataset", parts[:at]
        if part.endswith(".lance"):
            return "a Lance dataset", parts[: at + 1]
        if part == "metadata" and _ICEBERG_METADATA.search(parts[-1]):
            return "an Apache Iceberg table", parts[:at]
        if part == "snapshot" and _PAIMON_SNAPSHOT.fullmatch(parts[-1]):
            return "an Apache Paimon table", parts[:at]
        if _HIVE_TRANSACTION.fullmatch(part) and part != parts[-1]:
            return "a transactional Hive table", parts[:at]
        if _DUCKLAKE_FILE.fullmatch(part):
            return "a DuckLake table", parts[:at]
    return None


_ICEBERG_METADATA = re.compile(r"\.metadata\.json(\.gz)?$|^snap-[0-9]+-.*\.avro$|-m[0-9]+\.avro$")
_PAIMON_SNAPSHOT = re.compile(r"snapshot-[0-9]+")
_HIVE_TRANSACTION = re.compile(r"base_[0-9]{7,}(_v[0-9]+)?|(delta|delete_delta)(_[0-9]{7,}){2}(_[0-9]+)?(_v[0-9]+)?")
"""Folders of a write into a Hive table with transactions; those that a later write replaces stay for a while."""

_DUCKLAKE_FILE = re.compile(r"ducklake-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(-delete)?\.parquet")


def _place(folder: str, uri: str) -> str:
    """Return the folder of a table as a command takes it: a local path, or a URI with the scheme of the manifest's."""
    scheme, separator, _ = uri.partition("://")
    is_remote = bool(separator) and scheme != "file" and "://" not in folder
    return shlex.quote(f"{scheme}://{folder}" if is_remote else folder)


def _refusal(what: str, folder: str, uri: str, use: str) -> str:
    return (
        f"{use} {uri} is {what} (folder {folder}): its files also have rows that were deleted or replaced, and only "
        f"its log says which; {_REMEDIES[what].format(table=_place(folder, uri))}"
    )
