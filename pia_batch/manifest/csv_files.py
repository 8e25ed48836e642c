"""CSV files: RFC 4180 with a header line, in UTF-8. What another dialect would change silently is refused by line."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pia_batch.errors import ManifestError, message_of
from pia_batch.manifest.column_map import NO_MAP, ColumnMap
from pia_batch.manifest.key_prompts import NAMES
from pia_batch.schema.columns import REQUEST

NULL_WORDS = ("nan", "NaN", "None", "NULL", "null", "<NA>", "NaT", "\\N")
"""Words that programs write for a missing value. Without quotes they are null in the request's own columns of text,
except `request_id`; every other column keeps them."""

_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}

_QUOTES = 'write a quote inside of a field as "" (Spark: .option("escape", \'"\'))'


def read_csv(data: bytes, path: str, column_map: ColumnMap = NO_MAP) -> tuple[pa.Table, int]:
    """Read every column as strings: guessing types would turn the id "007" into 7. An empty field is null.

    Args:
        data: Contents of the file, without a byte order mark.
        path: Path of the file for messages.
        column_map: Map of the file's names to ours.

    Returns:
        The rows, and the number of lines with nothing but commas, which Excel writes; they are no rows.

    Raises:
        ManifestError: it is not CSV, or a dialect of it that is not read.
    """
    data = _without_separator_line(data.lstrip(b"\r\n"), path)
    header = _checked_header(data, path)
    columns = column_map.positions(header, f"manifest file {path}")
    names = [str(number) for number in range(len(header))]
    try:
        table = _parsed(data, names, names, [""])
        texts = sorted({number for name, number in columns if name in _TEXTS})
        with_nulls = table
        if texts and any(word.encode() in data for word in NULL_WORDS):
            with_nulls = _parsed(data, names, [str(number) for number in texts], ["", *NULL_WORDS])
    except pa.ArrowInvalid as err:
        remedy = "; save it as UTF-8" if "invalid UTF8" in str(err) else ""
        if "columns, got" in str(err):
            remedy = f"; {_QUOTES}" if b'\\"' in data else "; give each line as many fields as the header has"
        msg = f"manifest file {path} is not CSV with a header line: {message_of(err)}{remedy}"
        raise ManifestError(msg) from None
    num_rows = len(table)
    if columns:
        arrays = [(with_nulls if name in _TEXTS else table)[str(number)] for name, number in columns]
        table = pa.Table.from_arrays(arrays, [name for name, _ in columns])
    table = _without_blank_rows(table)
    return _without_unnamed_columns(table, path), num_rows - len(table)


_TEXTS = frozenset(item.name for item in REQUEST if pa.types.is_string(item.type)) - {"request_id"} | set(NAMES)


def _parsed(data: bytes, names: Sequence[str], wanted: Sequence[str], nulls: Sequence[str]) -> pa.Table:
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(column_names=names or None, skip_rows_after_names=1),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=wanted,
            strings_can_be_null=True,
            null_values=list(nulls),
            quoted_strings_can_be_null=False,
        ),
    )


def _without_separator_line(data: bytes, path: str) -> bytes:
    """Return `data` without the line `sep=,` that names the delimiter for Excel."""
    line, _, rest = data.partition(b"\n")
    if line.strip().lower() == b"sep=,":
        return rest
    if line.lower().startswith(b"sep="):
        mark = line.strip()[4:5].decode("latin1")
        msg = f"manifest file {path} has {mark!r} between its columns; write CSV with commas between the columns"
        raise ManifestError(msg)
    return data


def _checked_header(data: bytes, path: str) -> list[str]:
    """Return the names in the header line, after checking the quotes of all lines."""
    csv.field_size_limit(sys.maxsize)
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="surrogateescape", newline="")  # Arrow names bad bytes
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    start = 1
    try:
        header = next(rows, [])
        if len(header) == 1 and any(mark in header[0] for mark in _DELIMITERS):
            found = next(words for mark, words in _DELIMITERS.items() if mark in header[0])
            msg = (
                f"manifest file {path} has {found} between its columns; it has: {header[0][:200]}; write CSV with "
                "commas between the columns"
            )
            raise ManifestError(msg)
        start = rows.line_num + 1
        for _ in rows:
            start = rows.line_num + 1
    except csv.Error as err:
        if "expected after" in str(err) or "end of data" in str(err):
            msg = (
                f"manifest file {path}, line {start}: text goes on after the closing quote of a field, or a quote is "
                f"not closed ({err}); {_QUOTES}"
            )
            raise ManifestError(msg) from None
    if not "".join(header).isascii() and any("\udc80" <= mark <= "\udcff" for mark in "".join(header)):
        msg = f"manifest file {path} has a header line with invalid UTF8; save it as UTF-8"
        raise ManifestError(msg)
    return header


def _without_blank_rows(table: pa.Table) -> pa.Table:
    """Return the rows that have any value."""
    if not table.num_columns or not len(table):
        return table
    filled = pa.chunked_array([pa.repeat(False, len(table))])
    for column in table.columns:
        filled = pc.or_(filled, pc.fill_null(pc.not_equal(column, ""), False))
        if pc.all(filled).as_py():
            return table
    return table.filter(filled)


def _without_unnamed_columns(table: pa.Table, path: str) -> pa.Table:
    """Drop empty columns without a name, which a comma at the end of each line makes.

    Raises:
        ManifestError: such a column has a value.
    """
    kept = []
    for number, name in enumerate(table.column_names):
        if name.strip():
            kept.append(number)
            continue
        values = table.column(number)
        values = values.filter(pc.fill_null(pc.not_equal(values, ""), False))
        if len(values):
            msg = (
                f"manifest file {path}: column {number + 1} has no name in the header line, and values, such as "
                f"{values[0].as_py()[:80]!r}; name it, or leave it out (pandas: to_csv(..., index=False))"
            )
            raise ManifestError(msg)
    return table if len(kept) == table.num_columns else table.select(kept)
