"""Tables of request ids, such as those that select the best animations of an output: Parquet, CSV or JSONL."""

from __future__ import annotations

import hashlib
import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs

from pia_batch.errors import ConfigError, ManifestError, problem_of
from pia_batch.manifest.arrow_types import plain_column
from pia_batch.manifest.files import ManifestFile
from pia_batch.manifest.formats import FileFormat, format_of_file
from pia_batch.storage import filesystems
from pia_batch.storage.store_uris import absolute
from pia_batch.storage.uris import redacted_uri

COLUMN = "request_id"


def read(uri: str) -> pa.Array:
    """Return the distinct ids in the column `request_id` of a table, as strings.

    Args:
        uri: A Parquet, CSV or JSONL file, or a folder of Parquet files.

    Raises:
        ConfigError: The table cannot be read, or has no such column, or no ids.
    """
    shown = redacted_uri(uri)
    try:
        filesystem, path = filesystems.arrow_filesystem(absolute(uri))
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
            raise ConfigError(f"--only: {shown} does not exist; correct its path or URI")
        file_format = format_of_file(filesystem, path)
        table = _parquet(filesystem, path) if file_format == "parquet" else _text(filesystem, path, file_format)
        if COLUMN not in table.schema.names:
            msg = f"--only: {shown} has no column {COLUMN}; it has {', '.join(table.schema.names)}"
            raise ConfigError(msg)
        if table.schema.names.count(COLUMN) > 1:
            raise ConfigError(f"--only: {shown} has more than one column {COLUMN}; rename or drop the others")
        column = plain_column(table[COLUMN]).cast(pa.string())
    except ManifestError as err:
        raise ConfigError(f"--only: {_MANIFEST.sub('', str(err), count=1)}") from None
    except filesystems.unreadable(ValueError, pa.ArrowException) as err:
        remedy = filesystems.reading_remedy(uri, err) or f"give a Parquet, CSV or JSONL table with a column {COLUMN}"
        raise ConfigError(f"--only: cannot read {shown}: {problem_of(err)}; {remedy}") from None
    ids = pc.unique(column).drop_null()
    if not len(ids):
        msg = f"--only: {shown} has no ids in its column {COLUMN}"
        raise ConfigError(msg)
    return ids


_MANIFEST = re.compile("manifest (?:file )?")
"""Words before the path in messages of the manifest's readers."""


def _parquet(filesystem: pyarrow.fs.FileSystem, path: str) -> pa.Table:
    """Return the ids of a Parquet file, or of a folder of them; no column if they have none."""
    found = ds.dataset(path, filesystem=filesystem, format="parquet")
    names = found.schema.names
    return found.to_table([COLUMN]) if COLUMN in names else found.schema.empty_table()


def _text(filesystem: pyarrow.fs.FileSystem, path: str, file_format: FileFormat) -> pa.Table:
    """Return the rows of CSV or JSONL as a manifest has them: the id "007" is a text there, not the number 7."""
    _, contents = ManifestFile.open(filesystem, path, file_format, lambda _path, _version: None)
    return pa.table({}) if contents.table is None else contents.table


def digest_of(ids: pa.Array) -> str:
    """Return a hash of ids in their order, 32 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for value in ids:
        hashed.update(value.as_py().encode() + b"\n")
    return hashed.hexdigest()
