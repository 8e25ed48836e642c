"""Tables of request ids, such as those that select the best animations of an output: Parquet, CSV or JSONL."""

from __future__ import annotations

import hashlib
import posixpath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pia_batch.errors import ConfigError, message_of
from pia_batch.storage import filesystems
from pia_batch.storage.object_store import absolute
from pia_batch.storage.uris import redacted_uri

COLUMN = "request_id"

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json"}


def read(uri: str) -> pa.Array:
    """Return the distinct ids in the column `request_id` of a table, as strings.

    Args:
        uri: A Parquet, CSV or JSONL file, or a folder of Parquet files.

    Raises:
        ConfigError: The table cannot be read, or has no such column, or no ids.
    """
    shown = redacted_uri(uri)
    file_format = _FORMATS.get(posixpath.splitext(uri)[1].lower(), "parquet")
    try:
        filesystem, path = filesystems.arrow_filesystem(absolute(uri))
        table = ds.dataset(path, filesystem=filesystem, format=file_format)
        if COLUMN not in table.schema.names:
            msg = f"--only: {shown} has no column {COLUMN}; it has {', '.join(table.schema.names)}"
            raise ConfigError(msg)
        column = table.to_table([COLUMN])[COLUMN].cast(pa.string())
    except (OSError, ValueError, pa.ArrowException) as err:
        msg = (
            f"--only: cannot read {shown}: {message_of(err)}; give a Parquet, CSV or JSONL table with a column {COLUMN}"
        )
        raise ConfigError(msg) from None
    ids = pc.unique(column).drop_null()
    if not len(ids):
        msg = f"--only: {shown} has no ids in its column {COLUMN}"
        raise ConfigError(msg)
    return ids


def digest_of(ids: pa.Array) -> str:
    """Return a hash of ids in their order, 32 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for value in ids:
        hashed.update(value.as_py().encode() + b"\n")
    return hashed.hexdigest()
