"""Columns of key prompts: reads lists, maps, structs and JSON text as one type, and validates frames and texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.key_prompts import KEY_PROMPTS_TYPE, KeyPrompt, key_prompts
from pia_batch.schema.settings import BY_NAME, MAX_PROMPT_BYTES

NAMES = tuple(name for name, setting in BY_NAME.items() if setting.data_type == KEY_PROMPTS_TYPE)
"""Columns of key prompts."""

FORM = (
    'a list such as [{"frame": 0, "prompt": "..."}, {"frame": 8, "prompt": "..."}], a map such as '
    '{"0": "...", "8": "..."}, or either as JSON text; frames are whole numbers'
)
"""Allowed forms in words, for messages."""

_LAST_FRAME = 2**31 - 1
"""Largest frame that KEY_PROMPTS_TYPE can hold."""


def read(column: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    """Return a column as KEY_PROMPTS_TYPE, and the rows that cannot be read, which are null in it.

    Lists keep their order; maps, structs and objects in JSON are sorted by frame.

    Args:
        column: Lists of structs or maps of any types that hold frames and texts; structs with one field for each frame,
            whose nulls are frames that the row lacks; or JSON text. Empty text is null.

    Returns:
        The column, and bool of the same length; None if its type has none of the forms.
    """
    data_type = column.type
    if pa.types.is_string(data_type) or pa.types.is_large_string(data_type):
        return _from_values(map(_parsed, column.to_pylist()))
    if pa.types.is_map(data_type):
        key = data_type.key_type
        if not _is_text(data_type.item_type) or pa.types.is_nested(key) or pa.types.is_temporal(key):
            return None
        return _from_values(None if row is None else _pairs(row) for row in column.to_pylist())
    if pa.types.is_struct(data_type):
        return _from_fields(column)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(data_type) for test in lists):
        return _from_lists(column)
    return None


def json_text(value: Any) -> str | None:
    """Return the JSON text of a value of a JSONL file; text stays as it is, and null is null."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def with_repetitions(line: bytes) -> dict[str, Any]:
    """Return the object on a line of JSON, in which an object that has a name twice is a list of pairs."""

    def read_object(pairs: list[tuple[str, Any]]) -> Any:
        return dict(pairs) if len(dict(pairs)) == len(pairs) else pairs

    return dict(json.loads(line, object_pairs_hook=read_object))


def check(name: str, column: pa.Array, num_frames: pa.Array, reject: Callable[[pa.Array, str, str], None]) -> None:
    """Reject the rows of a column of KEY_PROMPTS_TYPE whose frames or texts are not allowed.

    Args:
        name: Name of the column.
        column: The column.
        num_frames: Number of frames of each row, int64.
        reject: Function that rejects the rows of a mask, by an error kind and with what is allowed.
    """
    if column.null_count == len(column):
        return
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    rows = np.repeat(np.arange(len(column)), lengths)

    def refuse(entries: npt.NDArray[np.bool_], kind: str, allowed: str) -> None:
        bad = np.zeros(len(column), bool)
        bad[rows[entries]] = True
        reject(pa.array(bad), kind, allowed)

    empty = pc.and_(pc.is_valid(column), pa.array(lengths == 0))
    reject(empty, "missing_value", "at least the text of frame 0")
    frames, texts = column.flatten().flatten()
    refuse(_flags(pc.or_(pc.is_null(frames), pc.is_null(texts))), "missing_value", "a frame and a text in every entry")
    numbers = np.asarray(pc.fill_null(frames, 0), np.int64)
    refuse(numbers < 0, "out_of_range", "frames from 0")
    least = np.full(len(column), _LAST_FRAME)
    np.minimum.at(least, rows, numbers)
    refuse(least[rows] != 0, "out_of_range", "0 as the first frame; give the text that the clip begins with")
    order = np.lexsort((numbers, rows))
    again = np.zeros(len(rows), bool)
    again[order] = _follows(rows[order]) & (np.diff(numbers[order], prepend=-1) == 0)
    refuse(again, "invalid_value", "one text for each frame")
    falling = _follows(rows) & (np.diff(numbers, prepend=-1) < 0)
    refuse(falling, "invalid_value", "frames that rise; sort the list by frame")
    refuse(numbers >= np.asarray(num_frames)[rows], "out_of_range", "frames below num_frames")
    if name == "prompts":  # an empty negative prompt means none
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, "."))), 0)
        refuse(_flags(blank), "missing_value", "texts that are not empty")
    sizes = np.bincount(rows, np.asarray(pc.fill_null(pc.binary_length(texts), 0)), len(column))
    reject(pa.array(sizes > MAX_PROMPT_BYTES), "out_of_range", f"at most {MAX_PROMPT_BYTES} bytes of text together")


def first_of_each(column: pa.Array, find: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Return for each row of KEY_PROMPTS_TYPE the first value that `find` has for one of its texts, or null.

    Args:
        column: The column.
        find: Function of texts, which returns a string or null for each.
    """
    found = find(pc.struct_field(column.flatten(), "prompt"))
    hits = np.flatnonzero(_flags(found.is_valid()))
    rows, first = np.unique(np.asarray(pc.list_parent_indices(column))[hits], return_index=True)
    at = np.zeros(len(column), np.int64)
    missing = np.ones(len(column), bool)
    at[rows], missing[rows] = hits[first], False
    return found.take(pa.array(at, mask=missing)) if len(hits) else pa.nulls(len(column), pa.string())


def joined_texts(column: pa.Array) -> pa.Array:
    """Return the texts of each row of KEY_PROMPTS_TYPE on lines of their own; null where the row is null."""
    texts = pc.struct_field(column.flatten(), "prompt")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lines = pa.ListArray.from_arrays(offsets, pc.fill_null(texts, ""), mask=column.is_null())
    return pc.binary_join(lines, "\n")


def split_single(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return the text of each row with a single key prompt, else null; and the column without these rows."""
    single = pc.fill_null(pc.equal(pc.list_value_length(column), 1), False)
    texts = pc.struct_field(pc.list_element(pc.if_else(single, column, _PLACEHOLDER), 0), "prompt")
    return pc.if_else(single, texts, None), pc.if_else(single, None, column)


_PLACEHOLDER = pa.scalar([{"frame": 0, "prompt": ""}], KEY_PROMPTS_TYPE)


def _follows(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return for each entry if the one before it belongs to the same row."""
    follows: npt.NDArray[np.bool_] = np.diff(rows, prepend=-1) == 0
    return follows


def _flags(column: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(column.to_numpy(zero_copy_only=False), bool)


def _is_text(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_null(data_type))


def _from_lists(column: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    """Read lists of structs without a loop over the rows."""
    items = column.type.value_type
    if pa.types.is_null(items):
        return pc.cast(column, KEY_PROMPTS_TYPE), pa.repeat(False, len(column))
    if not pa.types.is_struct(items) or {item.name for item in items} != set(KeyPrompt._fields):
        return None
    values = pc.list_flatten(column)
    stored = dict(zip((item.name for item in items), values.flatten(), strict=True))
    frames, texts = stored["frame"], stored["prompt"]
    if not _is_text(texts.type) or not (pa.types.is_integer(frames.type) or pa.types.is_floating(frames.type)):
        return None
    numbers = frames.cast(pa.float64(), safe=False)
    whole = pc.and_(pc.equal(numbers, pc.round(numbers)), pc.less_equal(pc.abs(numbers), _LAST_FRAME))
    fits = pc.or_(pc.is_null(frames), pc.fill_null(whole, False))
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    unread = np.zeros(len(column), bool)
    unread[np.repeat(np.arange(len(column)), lengths)[~_flags(fits)]] = True
    entries = pa.StructArray.from_arrays(
        [pc.if_else(fits, numbers, None).cast(pa.int32()), texts.cast(pa.string())],
        fields=list(KEY_PROMPTS_TYPE.value_type),
    )
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = pa.array(unread | _flags(column.is_null()))
    return pa.ListArray.from_arrays(offsets, entries, type=KEY_PROMPTS_TYPE, mask=mask), pa.array(unread)


def _from_fields(column: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    """Read structs with one field for each frame, as objects become where all rows have one type."""
    fields = list(column.type)
    if not fields or not all(item.name.isascii() and item.name.isdigit() and _is_text(item.type) for item in fields):
        return None
    return _from_values(None if row is None else _pairs(_present(row)) for row in column.to_pylist())


def _from_values(rows: Iterable[Any]) -> tuple[pa.Array, pa.Array]:
    """Read Python values: None, mappings, pairs or entries, row by row; anything else cannot be read."""
    read_rows: list[list[KeyPrompt] | None] = []
    unread: list[bool] = []
    for row in rows:
        keys = None if row is None else key_prompts(row)
        fits = row is None or (isinstance(keys, tuple) and all(map(_is_key_prompt, keys)))
        read_rows.append([key._asdict() for key in keys] if fits and keys is not None else None)
        unread.append(not fits)
    return pa.array(read_rows, KEY_PROMPTS_TYPE), pa.array(unread, pa.bool_())


def _is_key_prompt(key: Any) -> bool:
    if not isinstance(key, KeyPrompt):
        return False
    frame, prompt = key
    is_frame = frame is None or (type(frame) is int and abs(frame) <= _LAST_FRAME)
    return is_frame and (prompt is None or (isinstance(prompt, str) and _is_unicode(prompt)))


def _parsed(text: str | None) -> Any:
    """Return the value that JSON text holds; text that is no JSON unchanged, so that it cannot be read."""
    if text is None or not text.strip():
        return None
    try:
        value = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list) and text.lstrip().startswith("{"):
        return _pairs(value)
    return [_entry(item) for item in value] if isinstance(value, list) else 0 if value is not None else None


def _entry(item: Any) -> Any:
    """Return an object in JSON, which was read as pairs, as a mapping; one with repeated names cannot be read."""
    is_object = isinstance(item, list) and all(isinstance(pair, tuple) for pair in item)
    return dict(item) if is_object and len(dict(item)) == len(item) else item


def _pairs(pairs: Iterable[tuple[Any, Any]]) -> list[KeyPrompt] | Any:
    """Return pairs in the order of their frames, repeated frames included."""
    keys = key_prompts(list(pairs))
    if isinstance(keys, tuple) and all(isinstance(key, KeyPrompt) and type(key.frame) is int for key in keys):
        return sorted(keys, key=lambda key: key.frame)
    return keys


def _present(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((frame, prompt) for frame, prompt in row.items() if prompt is not None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
