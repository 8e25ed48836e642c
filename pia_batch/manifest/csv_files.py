"""CSV files: RFC 4180 with a header line, in UTF-8. What another dialect would change silently is refused by line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pia_batch.errors import ManifestError, message_of
from pia_batch.manifest.column_map import NO_MAP, ColumnMap
from pia_batch.manifest.csv_dialect import QUOTES, checked_header, without_separator_line
from pia_batch.schema.columns import REQUEST

NULL_WORDS = (
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
    *("NaT", "\\N"),
    *("#REF!", "#NAME?", "#VALUE!", "#DIV/0!", "#NUM!", "#NULL!"),
)
"""Words that programs write for a missing value. Without quotes they are null in the request's own columns except
`request_id`; every other column keeps them.

Sources: the list of pandas' `read_csv`; `NaT` of its dates; `\\N` of MySQL, PostgreSQL and Hive; Excel's errors."""

_NULL_FIELD = re.compile(
    rb"(?:^|[,\r\n])(?:" + b"|".join(re.escape(word.encode()) for word in NULL_WORDS) + rb")(?:[,\r\n]|\Z)"
)
"""Such a word as a whole field without quotes; inside of longer texts, most files have one."""

_PADDING = " \t\x1a\0"
"""Characters that editors and copies leave on a line or at the end of a file; alone they are no row."""


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
    data = without_separator_line(data.lstrip(b"\r\n"), path)
    if not data.strip(b" \t\r\n"):
        msg = f"manifest file {path} is not CSV with a header line: Empty CSV file; remove it, or write it again"
        raise ManifestError(msg)
    if b"\n" not in data and b"\r" not in data:
        data += b"\n"  # Arrow does not read a header line that does not end
    header = checked_header(data, path, _OURS | {source for _, source in column_map.sources})
    columns = column_map.positions(header, f"manifest file {path}")
    names = [str(number) for number in range(len(header))]
    try:
        table, num_padded = _parsed(data, names, names, [""])
        ours = sorted({number for name, number in columns if name in _WITH_NULLS})
        with_nulls = table
        if ours and _NULL_FIELD.search(data):
            with_nulls, _ = _parsed(data, names, [str(number) for number in ours], ["", *NULL_WORDS])
    except pa.ArrowInvalid as err:
        if "invalid UTF8" in str(err):
            number = int(_COLUMN.findall(str(err))[0])
            msg = (
                f"manifest file {path}, line {_line_without_utf8(data)}: column {header[number]!r} has text that is "
                "not UTF-8; save the file as UTF-8"
            )
            raise ManifestError(msg) from None
        remedy = ""
        if "columns, got" in str(err):
            remedy = (
                f"; {QUOTES}"
                if b'\\"' in data
                else "; give each line as many fields as the header has, and put fields with commas in quotes"
            )
        msg = f"manifest file {path} is not CSV with a header line: {message_of(err)}{remedy}"
        raise ManifestError(msg) from None
    num_rows = len(table)
    if columns:
        arrays = [(with_nulls if name in _WITH_NULLS else table)[str(number)] for name, number in columns]
        table = pa.Table.from_arrays(arrays, [name for name, _ in columns])
    table = _without_blank_rows(table)
    return _without_unnamed_columns(table, path), num_rows - len(table) + num_padded


_COLUMN = re.compile("CSV column #([0-9]+)")
"""Number of a column in Arrow's messages, from 0."""


def _line_without_utf8(data: bytes) -> int:
    """Return the number of the first line with bytes that are not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as err:
        return len(data[: err.start + 1].splitlines())
    return 1


_OURS = frozenset(REQUEST.names)
_WITH_NULLS = _OURS - {"request_id"}


def _parsed(data: bytes, names: Sequence[str], wanted: Sequence[str], nulls: Sequence[str]) -> tuple[pa.Table, int]:
    """Return the wanted columns, and the number of lines of nothing but padding, which are skipped."""
    num_padded = 0

    def skip_padding(row: pyarrow.csv.InvalidRow) -> str:
        nonlocal num_padded
        is_padding = not row.text.strip(_PADDING)
        num_padded += is_padding
        return "skip" if is_padding else "error"

    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(column_names=names or None, skip_rows_after_names=1),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip_padding),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=wanted,
            strings_can_be_null=True,
            null_values=list(nulls),
            quoted_strings_can_be_null=False,
        ),
    )
    return table, num_padded


def _without_blank_rows(table: pa.Table) -> pa.Table:
    """Return the rows that have any value."""
    if not table.num_columns or not len(table):
        return table
    filled = pa.chunked_array([pa.repeat(False, len(table))])
    for column in table.columns:
        filled = pc.or_(filled, _is_filled(column))
        if pc.all(filled).as_py():
            return table
    return table.filter(filled)


def _is_filled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False)


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
        values = values.filter(_is_filled(values))
        if len(values):
            msg = (
                f"manifest file {path}: column {number + 1} has no name in the header line, and values, such as "
                f"{values[0].as_py()[:80]!r}; name it, or leave it out (pandas: to_csv(..., index=False))"
            )
            raise ManifestError(msg)
    return table if len(kept) == table.num_columns else table.select(kept)
