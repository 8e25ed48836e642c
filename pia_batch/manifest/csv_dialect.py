"""Dialect of a CSV file: whatever is not RFC 4180 with a header line, and would be read wrongly, is refused by line."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import pairwise

from pia_batch.errors import ManifestError, printable
from pia_batch.manifest.foreign_formats import DECOMPRESS

QUOTES = 'write a quote inside of a field as "" (Spark: .option("escape", \'"\'))'
"""Remedy where quotes inside of a field are not doubled."""

_DELIMITERS = {
    ";": "semicolons",
    "\t": "tabs",
    "|": "vertical bars",
    "\x01": "the character \\x01",
    "^": "carets",
    ":": "colons",
    " ": "spaces",
}
"""Delimiters of other dialects; the last three are such only between names that a manifest has."""

_QUOTES = "'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"
"""Marks that other programs put around a name."""

_SURE = ";\t|\x01"

_MARK = "\ufeff"
"""Byte order mark."""

_SPACE_BEFORE_QUOTE = re.compile(rb'[,\r\n] +"')

_WORD = re.compile("[A-Za-z0-9_]+")

_LOOKED_AT = 20
"""Number of lines among which a header line is looked for, where the first line is none."""


def without_separator_line(data: bytes, path: str) -> bytes:
    """Return `data` without the line `sep=,` that names the delimiter for Excel.

    Raises:
        ManifestError: The line names another delimiter.
    """
    line, _, rest = data.partition(b"\n")
    named = line.strip().strip(b'"').lower()
    if named == b"sep=,":
        return rest
    if named.startswith(b"sep="):
        mark = named[4:5].decode("latin1")
        msg = f"manifest file {path} has {mark!r} between its columns; write CSV with commas between the columns"
        raise ManifestError(msg)
    return data


def checked_header(data: bytes, path: str, known: AbstractSet[str]) -> list[str]:
    """Return the names in the header line, after checking the quotes of all lines.

    Args:
        data: Contents of the file, without a byte order mark. Bytes that are no UTF-8 are accepted outside the header.
        path: Path of the file for messages.
        known: Names of columns that a manifest may have, those of its column map included.

    Raises:
        ManifestError: The file is of another dialect, or its first line is no header.
    """
    csv.field_size_limit(sys.maxsize)
    _check_first_line(_text(data).readline(), path, known)
    rows = csv.reader(_text(data), strict=True)
    header: list[str] = []
    start = 1
    try:
        header = next(rows, [])
        _check_names(header, path, known)
        start = rows.line_num + 1
        is_header = not known.isdisjoint(header)
        for row in rows:
            is_joined = bool(row) and row[0].startswith(_MARK)
            if row == header or (is_joined and [row[0].lstrip(_MARK), *row[1:]] == header):
                msg = f"manifest file {path}, line {start}: the header line again, as where files are joined; remove it"
                raise ManifestError(msg)
            if is_joined:
                msg = (
                    f"manifest file {path}, line {start}: a byte order mark, as where files are joined, would be part "
                    "of the first field; remove it"
                )
                raise ManifestError(msg)
            if not is_header and start <= _LOOKED_AT and len(known & set(row)) > 1:
                msg = (
                    f"manifest file {path}, line {start}: the header line, which must be the first; remove the lines "
                    "above it"
                )
                raise ManifestError(msg)
            start = rows.line_num + 1
    except csv.Error as err:
        _refuse_quotes(err, f"manifest file {path}", start)
    if _SPACE_BEFORE_QUOTE.search(data):
        _check_spaces(data, path)
    return header


def check_quotes(lines: Iterable[str], file: str) -> None:
    """Check the quotes of a whole file.

    Args:
        lines: Its lines with their ends.
        file: Name of the file for the message.

    Raises:
        ManifestError: Quotes inside of a field are not doubled, or one is not closed; the message names the line.
    """
    csv.field_size_limit(sys.maxsize)
    rows, start = csv.reader(lines, strict=True), 1
    try:
        for _ in rows:
            start = rows.line_num + 1
    except csv.Error as err:
        _refuse_quotes(err, file, start)


def _refuse_quotes(err: csv.Error, file: str, start: int) -> None:
    """Raise a ManifestError for the row that begins on a line, if it is about quotes."""
    if "expected after" in str(err) or "end of data" in str(err):
        msg = (
            f"{file}, line {start}: text goes on after the closing quote of a field, or a quote is not closed ({err}); "
            f"{QUOTES}"
        )
        raise ManifestError(msg) from None


def _text(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="surrogateescape", newline="")  # Arrow names bad bytes


def _check_first_line(line: str, path: str, known: AbstractSet[str]) -> None:
    """Refuse JSON, and other delimiters than commas: they would make quotes look wrong, and names unknown."""
    if line.lstrip().startswith(("{", "[")):
        msg = f"manifest file {path} is JSON, not CSV; write one object on each line, and name the file .jsonl"
        raise ManifestError(msg)
    columns = _split(line, ",")
    num_known = len(known & set(columns))
    for mark, words in _DELIMITERS.items():
        others = _split(line, mark)
        num_others = len(known & {each.strip() for each in others})
        is_one_column = len(columns) == 1 and mark in _SURE
        if len(others) > 1 and (is_one_column or num_others > max(1, num_known)):
            msg = (
                f"manifest file {path} has {words} between its columns; it has: {printable(line.strip()[:200])}; write "
                "CSV with commas between the columns"
            )
            raise ManifestError(msg)
    for one, two in pairwise(_WORD.finditer(line)) if len(columns) == 1 else ():
        if one[0] in known and two[0] in known:
            mark = printable(line[one.end() : two.start()][:20])
            msg = f"manifest file {path} has {mark!r} between its columns; write CSV with commas between the columns"
            raise ManifestError(msg)


def _split(line: str, mark: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=mark), [])
    except csv.Error:
        return []


def _check_names(header: list[str], path: str, known: AbstractSet[str]) -> None:
    if not "".join(header).isascii() and any("\udc80" <= mark <= "\udcff" for mark in "".join(header)):
        msg = f"manifest file {path} has a header line with invalid UTF8; save it as UTF-8, or {DECOMPRESS}"
        raise ManifestError(msg)
    spaced = [name for name in header if name != name.strip() and name.strip() in known and name not in known]
    spaced = [name for name in spaced if name.strip() not in header]
    quoted = [name for name in header if name not in known and name.strip().strip(_QUOTES) in known]
    if quoted and not spaced:
        msg = (
            f'manifest file {path} has other marks than " around the names of its columns: '
            f'{", ".join(quoted[:3])}; write names and fields without quotes, or in "'
        )
        raise ManifestError(msg)
    if spaced:
        msg = (
            f"manifest file {path} has spaces around the names of its columns: {', '.join(map(repr, spaced[:3]))}; "
            "write commas without spaces around them"
        )
        raise ManifestError(msg)


def _check_spaces(data: bytes, path: str) -> None:
    """Refuse a field whose quotes follow a space: by RFC 4180, space and quotes are part of its value."""
    as_written = csv.reader(_text(data), strict=True)
    for start, row, other in _side_by_side(as_written, csv.reader(_text(data), strict=True, skipinitialspace=True)):
        pairs = zip(row, other, strict=False)
        if len(row) != len(other) or any(one not in (two, " " * (len(one) - len(two)) + two) for one, two in pairs):
            msg = (
                f"manifest file {path}, line {start}: a quote after a space does not begin a quoted field; write "
                "commas without spaces around them"
            )
            raise ManifestError(msg)


def _side_by_side(one: Iterator[list[str]], two: Iterator[list[str]]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield the number of the first line of each row with the row in two readings, until one of them fails."""
    start = 1
    try:
        for row, other in zip(one, two, strict=False):
            yield start, row, other
            start = getattr(one, "line_num", 0) + 1
    except csv.Error:
        return
