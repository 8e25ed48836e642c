"""JSON lines: one object per line, under our names. Values of several types in one column stay apart, or are text."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pia_batch.errors import ManifestError, message_of
from pia_batch.manifest import key_prompts
from pia_batch.manifest.arrow_types import is_nested
from pia_batch.manifest.column_layout import MAX_COLUMNS
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.schema.columns import REQUEST, mixed, mixed_type


def read_json_lines(data: bytes, path: str, column_map: ColumnMap) -> pa.Table:
    """Read one row of each line that is not blank; a value that a line lacks is null.

    Args:
        data: Contents of the file, without a byte order mark.
        path: Path of the file for messages.
        column_map: Map of the file's names to ours.

    Raises:
        ManifestError: a line is no JSON object, or does not fit the map; or there are too many names.
        pa.ArrowException: a text is no Unicode.
    """
    columns: dict[str, list[Any]] = {}
    num_rows = 0
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            repeated: list[_Repeated] = []
            row = _members(_object(line, repeated), line, column_map, repeated)
        except ValueError as err:
            msg = f"manifest file {path}, line {number}: {err}"
            raise ManifestError(msg) from None
        for name in row:
            columns.setdefault(name, [None] * num_rows)
        if len(columns) > MAX_COLUMNS:
            msg = f"manifest file {path}, line {number}: more than {MAX_COLUMNS} different names; are they values?"
            raise ManifestError(msg)
        for name, values in columns.items():
            values.append(row.get(name))
        num_rows += 1
    if num_rows and not columns:
        msg = f"manifest file {path}: its objects are empty; give each a request_id, an image and a prompt"
        raise ManifestError(msg)
    try:
        return pa.table({name: _infer(name, values) for name, values in columns.items()})
    except RecursionError:
        msg = f"manifest file {path}: lists or objects are nested too deeply; write them as text"
        raise ManifestError(msg) from None


def _object(line: bytes, repeated: list[_Repeated]) -> dict[str, Any]:
    """Return the JSON object of a line, and add the objects inside of it that have a name twice to `repeated`.

    Raises:
        ValueError: it is no JSON object, or has a name twice, or a text that is no Unicode.
    """
    try:
        # Decoded here, because `json` takes the bytes of half a surrogate pair.
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _unique(pairs, repeated))
    except UnicodeDecodeError as err:
        raise ValueError(f"not JSON: {message_of(err)}; save it as UTF-8") from None
    except json.JSONDecodeError as err:
        raise ValueError(f"not JSON: {err.msg} (column {err.colno}); {_ONE_A_LINE}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply; write them as text") from None
    except ValueError:  # Python reads no number of more digits
        raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits; write it as text") from None
    if isinstance(row, _Repeated):
        msg = f"the object has the name {row.name!r} more than once; rename or drop the others"
        raise ValueError(msg)  # noqa: TRY004 - of the file, like the others
    if not isinstance(row, dict):
        found = _JSON_WORDS.get(type(row), "number")
        remedy = f"; {_ONE_A_LINE}" if isinstance(row, list) else ""
        msg = f'each line must be one JSON object, such as {{"request_id": ...}}, not a {found}{remedy}'
        raise ValueError(msg)  # noqa: TRY004 - as above
    if b"\\ud" in line or b"\\uD" in line:  # JSON can spell half a surrogate pair
        half = _HALF_PAIR.search(json.dumps(row, ensure_ascii=False))
        if half:
            written = ascii(half[0])[1:-1]
            msg = f"{written} is half of a surrogate pair, and no character (surrogates not allowed); write the whole"
            raise ValueError(msg)
    return row


_ONE_A_LINE = "write one object on each line (pandas: to_json(..., orient='records', lines=True); jq -c)"

_HALF_PAIR = re.compile("[\ud800-\udfff]")


class _Repeated(dict[str, Any]):
    """A JSON object in which a name is repeated."""

    name = ""


def _unique(pairs: list[tuple[str, Any]], repeated: list[_Repeated]) -> dict[str, Any]:
    """Return an object; one in which a name is repeated is marked, and added to `repeated`."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    marked = _Repeated(found)
    marked.name = next(name for name in names if names.count(name) > 1)
    repeated.append(marked)
    return marked


def _members(row: dict[str, Any], line: bytes, column_map: ColumnMap, repeated: Sequence[_Repeated]) -> dict[str, Any]:
    """Return the members of an object under our names; key prompts are text, or every row would have all frames.

    Raises:
        ValueError: An object inside has a name twice, of which the last would win. That of key prompts may have one:
            their own check rejects the row.
    """
    members = column_map.members(row)
    for one in repeated:
        if not any(one is members.get(name) for name in key_prompts.NAMES):
            msg = f"an object inside has the name {one.name!r} more than once; rename or drop the others"
            raise ValueError(msg)
    if any(isinstance(members.get(name), dict) for name in key_prompts.NAMES):
        members = column_map.members(key_prompts.with_repetitions(line))
    return members | {name: key_prompts.json_text(members[name]) for name in key_prompts.NAMES if name in members}


_JSON_WORDS = {bool: "truth value", list: "list", str: "text", type(None): "null"}


def _infer(name: str, values: list[Any]) -> pa.Array:
    """Return an Arrow column. Values of several types, and empty objects, become JSON texts.

    A column of requests that takes texts or lists keeps the other values apart, for validation to reject these alone.
    """
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        array = None
    wanted = REQUEST.field(name).type if name in REQUEST.names else None
    is_apart = wanted is not None and (pa.types.is_string(wanted) or pa.types.is_list(wanted))
    if array is not None and not _has_empty_struct(array.type) and not (is_apart and _is_other(name, array.type)):
        return array
    if is_apart:
        return _apart(name, values, wanted)
    return pa.array([value if isinstance(value, str) else _json(value) for value in values], pa.string())


def _is_other(name: str, data_type: pa.DataType) -> bool:
    """Return True if a column takes texts, and all of its values are others; an image may be a struct."""
    if name == "image" and pa.types.is_struct(data_type):
        return False
    is_text = pa.types.is_string(REQUEST.field(name).type)
    return is_text and not (pa.types.is_null(data_type) or pa.types.is_string(data_type))


def _apart(name: str, values: list[Any], wanted: pa.DataType) -> pa.Array:
    """Return values of the `wanted` type next to the JSON of all others, as `mixed_type`."""
    if name == "request_id":  # integer ids are common, and their text is exact
        values = [str(value) if type(value) is int else value for value in values]
    fits = [_fits(value, wanted) for value in values]
    good = [value if fit else None for value, fit in zip(values, fits, strict=True)]
    if all(fit or value is None for value, fit in zip(values, fits, strict=True)):
        return pa.array(good, mixed_type(wanted).field(0).type)
    others = [None if fit else _json(value) for value, fit in zip(values, fits, strict=True)]
    return mixed(pa.array(good, mixed_type(wanted).field(0).type), pa.array(others, pa.string()))


def _fits(value: Any, wanted: pa.DataType) -> bool:
    if pa.types.is_string(wanted):
        return isinstance(value, str)
    numbers = isinstance(value, list) and all(isinstance(one, float) or type(one) is int for one in value)
    return numbers and all(math.fabs(one) < 2.0**53 for one in value if not math.isnan(one))


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _has_empty_struct(data_type: pa.DataType) -> bool:
    """Return True if an object without any name is anywhere in the type: Parquet cannot store it."""
    if not is_nested(data_type):
        return False
    children = [data_type.field(number).type for number in range(data_type.num_fields)]
    return not children or any(map(_has_empty_struct, children))
