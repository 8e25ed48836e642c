"""The content key of a request, and sets of millions of them.

A key is a 128-bit BLAKE2b hash of the canonical JSON (sorted names, no spaces, UTF-8) of everything that decides an
animation. Equal keys mean equal work: after a change of a setting or a model the request is pending again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.identity import ALWAYS, is_neutral

KEY_BYTES = 16

JsonColumns = Mapping[str, pa.Array | pa.Scalar]
"""Members of JSON objects by name: one value a row, or one for all."""

Keys = npt.NDArray[np.void]
"""Keys in memory: shape (n,), 16 raw bytes each."""


@dataclass(frozen=True)
class KeySet:
    """A set of keys with exact membership, as two sorted uint64 columns: 16 bytes a key, no hash table."""

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, keys: Keys) -> KeySet:
        """Return the set of `keys`, shape (n,), which may repeat."""
        high, low = halves(keys)
        if not _is_rising(high):
            order = sorted_order(high, low)
            high = high[order]  # one after the other: with ten million keys each of these arrays has 80 MB
            low = low[order]
        return cls._distinct(high, low)

    @classmethod
    def _distinct(cls, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> KeySet:
        """Return the set of keys that are sorted already."""
        first = np.ones(len(high), dtype=bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        return cls(high, low) if first.all() else cls(high[first], low[first])

    def __len__(self) -> int:
        return len(self.high)

    def __or__(self, other: KeySet) -> KeySet:
        """Return the union."""
        if not len(other):
            return self
        high, low = np.concatenate([self.high, other.high]), np.concatenate([self.low, other.low])
        order = sorted_order(high, low)
        return KeySet._distinct(high[order], low[order])

    def filter(self, chosen: npt.NDArray[np.bool_]) -> KeySet:
        """Return the members where `chosen`, bool, shape (n,), is true."""
        return self if chosen.all() else KeySet(self.high[chosen], self.low[chosen])

    def contains_members(self, other: KeySet) -> npt.NDArray[np.bool_]:
        """Return for each member of `other`, in order, if it is a member here; bool, shape (len(other),)."""
        return self._search(other.high, other.low)

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return for each key if it is a member; bool, shape (n,)."""
        return self._search(*halves(keys))

    def _search(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(high), dtype=bool)
        if not len(self):
            return found
        if len(high) > _MANY and not (high[1:] >= high[:-1]).all():  # in order, each search is near the last one
            order = np.argsort(high)
            found[order] = self._search(high[order], low[order])
            return found
        if len(high) > _BLOCK:
            for start in range(0, len(high), _BLOCK):
                block = slice(start, start + _BLOCK)
                found[block] = self._search(high[block], low[block])
            return found
        at = np.searchsorted(self.high, high, side="left")
        same = at < len(self)
        same[same] = self.high[at[same]] == high[same]
        alive = np.flatnonzero(same)
        # Equal high halves are rare (one pair in 10 million keys at 3e-6), but a miss there would lose a request.
        while len(alive):
            here = at[alive]
            hit = self.low[here] == low[alive]
            found[alive[hit]] = True
            alive = alive[~hit]
            at[alive] += 1
            alive = alive[at[alive] < len(self)]
            alive = alive[self.high[at[alive]] == high[alive]]
        return found


def _is_rising(high: npt.NDArray[np.uint64]) -> bool:
    """Return True if keys are sorted and distinct already, as those of a journal's outcomes are."""
    return bool((high[1:] > high[:-1]).all())


def sorted_order(high: npt.NDArray[np.uint64], *others: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the order that sorts by `high`, then by each of `others`: `np.lexsort` of them in reverse, but faster.

    Random halves of keys are almost all different, and then one sort of one column is the whole work.
    """
    order = np.argsort(high)
    in_order = high[order]
    tied = np.zeros(len(order), dtype=bool)
    np.equal(in_order[1:], in_order[:-1], out=tied[1:])
    tied[:-1] |= tied[1:]
    rows = order[tied]
    if len(rows):
        order[tied] = rows[np.lexsort((*(other[rows] for other in reversed(others)), high[rows]))]
    return order


_BLOCK = 2**20
"""Number of keys that are looked up at a time: a look-up needs five numbers for each."""

_MANY = 1000
"""Number of keys from which sorting them before a look-up is faster (measured)."""


def keys_from_hex(column: pa.ChunkedArray | pa.Array) -> Keys:
    """Return the keys of a `key` column (32 hexadecimal digits each, no nulls)."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    text = b"".join(_buffer(chunk)[0] for chunk in chunks)
    return np.frombuffer(bytes.fromhex(text.decode("ascii")), dtype=f"V{KEY_BYTES}")


def keys_to_hex(keys: Keys) -> pa.Array:
    """Return a `key` column, 32 hexadecimal digits each."""
    text = keys.tobytes().hex().encode("ascii")
    offsets = np.arange(0, len(text) + 1, 2 * KEY_BYTES, dtype=np.int32)
    if not len(keys):
        offsets = np.zeros(1, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(text))


def halves(keys: Keys) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return each key as two numbers, which sort like the keys; both of shape (n,)."""
    pairs = np.frombuffer(np.ascontiguousarray(keys), dtype=">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def digest(column: pa.Array, size: int = KEY_BYTES, prefix: str = "") -> Keys:
    """Return the BLAKE2b hash of every value of a string or binary column without nulls; shape (n,), `size` bytes each.

    `prefix` is prepended to each value, and hashed only once.
    """
    data, bounds = _buffer(column)
    begun = hashlib.blake2b(prefix.encode(), digest_size=size).copy  # a copy is cheaper than a new one
    hashes = []
    for start, end in pairwise(bounds):
        one = begun()
        one.update(data[start:end])
        hashes.append(one.digest())
    return np.frombuffer(b"".join(hashes), dtype=f"V{size}")


def canonical_json(columns: JsonColumns, neutral: Mapping[str, Any] | None = None) -> pa.Array:
    """Return one JSON object a row, as `json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)`.

    Args:
        columns: Strings, booleans, integers, float64, or lists of float64 or of structs of these, all of one length;
            scalars stand for every row. At least one is a column, and none that is missing in `neutral`.
        neutral: By name, the value at which a member is left out of a row's object; None or `ALWAYS`: only null is.
            The other names are always there, and at least one is; their nulls are written.
    """
    return pc.binary_join_element_wise(*_json_parts(columns, neutral or {}), "")


def json_digest(columns: JsonColumns, neutral: Mapping[str, Any] | None = None) -> Keys:
    """Return the `digest` of `canonical_json`; text that all rows begin with is written and hashed once."""
    first, *others = _json_parts(columns, neutral or {})
    return digest(pc.binary_join_element_wise(*others, ""), prefix=str(first))


def _json_parts(columns: JsonColumns, neutral: Mapping[str, Any]) -> list[pa.Array | str]:
    """Return the arguments of a join: text that all rows have, then in turns values that vary and such text.

    A member that only some rows have is a value that brings its name and its comma: after it, as long as no member
    stands before it in every row, and else before it.
    """
    parts: list[pa.Array | str] = []
    literal, begun = "{", False  # `literal` is common to all rows: joining few parts is what makes this fast
    for name in sorted(columns):
        column, member = columns[name], json.dumps(name, ensure_ascii=False) + ":"
        left_out = _left_out(column, neutral[name]) if name in neutral else False
        if left_out is True:
            continue
        if left_out is not False:
            before, after = (",", "") if begun else ("", ",")
            text = pc.binary_join_element_wise(before + member, _json_values(column), after, "")
            parts += [literal, pc.if_else(left_out, "", text)]
            literal = ""
            continue
        literal += ("," if begun else "") + member
        if isinstance(column, pa.Scalar):
            literal += json.dumps(column.as_py(), ensure_ascii=False, separators=(",", ":"))
        else:
            parts += [literal, _json_values(column)]
            literal = ""
        if not begun:
            begun = True
    return [*parts, literal + "}"]


def _left_out(column: pa.Array | pa.Scalar, neutral: Any) -> pa.Array | bool:
    """Return which rows leave a member out; True: all of them, False: none."""
    if isinstance(column, pa.Scalar):
        return is_neutral(column.as_py(), neutral)
    if column.null_count == len(column):
        return True
    if neutral is None or neutral is ALWAYS:
        return pc.is_null(column) if column.null_count else False
    mask = pc.fill_null(pc.equal(column, pa.scalar(neutral, column.type)), True)
    count = pc.sum(mask).as_py()
    return count == len(column) if count in (0, len(column)) else mask


def _json_values(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        column = column.take(pa.array(np.arange(len(column))))  # a slice cannot be put together again from its parts
        inner = _json_values(column.values)
        texts = pc.binary_join(pa.ListArray.from_arrays(column.offsets, inner, mask=column.is_null()), ",")
        encoded = pc.binary_join_element_wise("[", texts, "]", "")
    elif pa.types.is_struct(column.type):
        encoded = _json_objects(column)
    elif pa.types.is_floating(column.type):
        encoded = _json_floats(column)
    elif pa.types.is_string(column.type):
        encoded = _json_strings(column)
    else:
        encoded = column.cast(pa.string())
    return pc.fill_null(encoded, "null")


def _json_objects(column: pa.Array) -> pa.Array:
    parts: list[pa.Array | str] = []
    names = [item.name for item in column.type]
    for name, values in sorted(zip(names, column.flatten(), strict=True), key=lambda pair: pair[0]):
        parts += [("," if parts else "{") + json.dumps(name) + ":", _json_values(values)]
    return pc.binary_join_element_wise(*parts, "}", "")


def _json_strings(column: pa.Array) -> pa.Array:
    quoted = pc.binary_join_element_wise('"', column, '"', "")
    text = text_bytes(column)
    if not ((text < ord(" ")) | (text == ord('"')) | (text == ord("\\"))).any():  # far faster than to ask each value
        return quoted
    special = pc.fill_null(pc.match_substring_regex(column, r'["\\\x00-\x1f]'), False)
    if not pc.any(special).as_py():
        return quoted
    escaped = [json.dumps(text, ensure_ascii=False) for text in column.filter(special).to_pylist()]
    return pc.replace_with_mask(quoted, special, pa.array(escaped, pa.string()))


def _json_floats(column: pa.Array) -> pa.Array:
    # Arrow prints 1.0 as "1" and 1e-07 as "1e-7"; few values are distinct, so Python may print those.
    encoded = column.dictionary_encode()
    texts = pa.array([json.dumps(value) for value in encoded.dictionary.to_pylist()], pa.string())
    return texts.take(encoded.indices)


def text_bytes(column: pa.Array) -> npt.NDArray[np.uint8]:
    """Return the UTF-8 of all values of a string column, concatenated, hidden values of nulls included; no copy."""
    if not len(column):
        return np.empty(0, np.uint8)
    wide = pa.types.is_large_string(column.type)
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int64 if wide else np.int32)
    first, end = offsets[column.offset], offsets[column.offset + len(column)]
    return np.frombuffer(column.buffers()[2] or b"", np.uint8)[first:end]


def _buffer(column: pa.Array) -> tuple[bytes, list[int]]:
    """Return the bytes of a string or binary column, the start of each value and the end of the last one."""
    wide = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    offsets = np.frombuffer(column.buffers()[1] or bytes(8), dtype=np.int64 if wide else np.int32)
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    data = memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]]
    return bytes(data), (offsets - offsets[0]).tolist()
