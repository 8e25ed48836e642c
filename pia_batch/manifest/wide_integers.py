"""Integers of 128 bits in Parquet, as Polars writes them: pyarrow opens no file that has them, so name the columns."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.errors import ManifestError

REFUSAL = "Integers with more than 64 bits"
"""Beginning of pyarrow's message about such a file."""

_SCHEMA_KEY = b"ARROW:schema"
_MAGIC = b"PAR1"
_NUM_BYTES = 16


def refuse(source: pa.NativeFile, path: str) -> None:
    """Refuse a file that pyarrow has refused with `REFUSAL`.

    Args:
        source: The file.
        path: Its path, for messages.

    Raises:
        ManifestError: Always; the message names the columns.
    """
    names = _columns(source)
    which = f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}" if names else "a column"
    msg = (
        f"manifest file {path}: {which} may have integers of 128 bits (Polars: Int128, UInt128), which are not read; "
        "cast them to 64 bits, or to text, or drop them"
    )
    raise ManifestError(msg)


def _columns(source: pa.NativeFile) -> list[str]:
    """Return the names of the columns with values of 16 bytes and no other meaning.

    The footer is opened without the Arrow schema that Polars added, which is what pyarrow fails at.
    """
    size = source.size()
    tail = bytes(source.read_at(8, size - 8))
    footer_bytes = int.from_bytes(tail[:4], "little")
    footer = bytes(source.read_at(footer_bytes, size - 8 - footer_bytes)).replace(_SCHEMA_KEY, _SCHEMA_KEY.lower())
    try:
        schema = pq.ParquetFile(pa.BufferReader(_MAGIC + footer + tail)).schema
    except pa.ArrowException:
        return []
    columns = [schema.column(number) for number in range(len(schema))]
    wide = [one for one in columns if one.physical_type == "FIXED_LEN_BYTE_ARRAY" and one.length == _NUM_BYTES]
    return list(dict.fromkeys(one.path.split(".")[0] for one in wide if one.logical_type.type == "NONE"))
