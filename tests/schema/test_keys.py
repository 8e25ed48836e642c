import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch.schema import keys as content
from pia_batch.schema.keys import Keys, KeySet, canonical_json, digest, json_digest, keys_from_hex, keys_to_hex

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = {
    pa.string(): TEXT,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): FINITE,
    pa.list_(pa.float64()): st.lists(FINITE, max_size=4),
}


def keys(*raw: bytes) -> Keys:
    return np.frombuffer(b"".join(raw), dtype="V16")


def one_by_one(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) for row in rows]


@st.composite
def columns(draw: st.DrawFn) -> tuple[dict[str, pa.Array | pa.Scalar], list[dict[str, Any]]]:
    """Columns of one length, some of them sliced or scalar, and the rows that they spell."""
    num_rows = draw(st.integers(0, 5))
    names = draw(st.lists(TEXT, min_size=1, max_size=5, unique=True))
    made: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [{} for _ in range(num_rows)]
    for index, name in enumerate(names):
        data_type = draw(st.sampled_from(list(VALUES)))
        value = st.none() | VALUES[data_type]
        if index and draw(st.booleans()):  # the first is a column: something has to say how many rows there are
            constant = draw(value)
            made[name], values = pa.scalar(constant, data_type), [constant] * num_rows
        else:
            before = draw(st.integers(0, 2))
            longer = draw(st.lists(value, min_size=num_rows + before, max_size=num_rows + before + 2))
            made[name] = pa.array(longer, data_type).slice(before, num_rows)
            values = longer[before : before + num_rows]
        for row, item in zip(rows, values, strict=True):
            row[name] = item
    return made, rows


@settings(max_examples=200)
@given(columns())
def test_canonical_json_is_what_json_writes_row_by_row(made: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    table, rows = made

    assert canonical_json(table).to_pylist() == one_by_one(rows)


@settings(max_examples=200)
@given(columns())
def test_the_hash_of_json_is_that_of_each_row_written_whole(
    made: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    table, rows = made

    expected = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in one_by_one(rows)]
    assert [key.tobytes() for key in json_digest(table)] == expected


def test_canonical_json_escapes_every_control_character_quote_and_backslash_and_nothing_else() -> None:
    texts = [chr(point) for point in [*range(0x180), 0x2028, 0xFFFD, 0xFFFF, 0x1F600, 0x10FFFF]] + ['"\\\\"\n', ""]

    assert canonical_json({"a": pa.array(texts)}).to_pylist() == one_by_one([{"a": text} for text in texts])


def test_canonical_json_writes_floats_as_python_does() -> None:
    floats = [0.0, -0.0, 1.0, 0.1, 1e-7, 1e16, 1e22, 5e-324, 1.7976931348623157e308, 2 / 3]

    assert canonical_json({"a": pa.array(floats)}).to_pylist() == one_by_one([{"a": value} for value in floats])


def test_canonical_json_sees_through_values_that_lie_below_a_null() -> None:
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 1, 3, 4], pa.int32()), pa.array([1.0, 2.0, 3.0, 4.0]), mask=pa.array([False, True, False])
    )

    assert canonical_json({"a": hidden}).to_pylist() == ['{"a":[1.0]}', '{"a":null}', '{"a":[4.0]}']
    assert canonical_json({"a": hidden.slice(1)}).to_pylist() == ['{"a":null}', '{"a":[4.0]}']


HALVES = st.sampled_from([b"\0" * 8, b"\0" * 7 + b"\1", b"\x7f" + b"\xff" * 7, b"\x80" + b"\0" * 7, b"\xff" * 8])
RAW_KEYS = st.lists(st.binary(min_size=16, max_size=16) | st.tuples(HALVES, HALVES).map(b"".join), max_size=30)


@settings(max_examples=200)
@given(RAW_KEYS, RAW_KEYS)
def test_a_key_set_is_a_set_of_keys(members: list[bytes], asked: list[bytes]) -> None:
    made = KeySet.of(keys(*members))

    assert len(made) == len(set(members))
    assert made.contains(keys(*asked, *members)).tolist() == [key in set(members) for key in asked + members]


@pytest.mark.parametrize("high", [b"\0" * 8, b"\xff" * 8])
def test_keys_that_share_their_first_half_are_told_apart(high: bytes) -> None:
    members = [high + number.to_bytes(8, "big") for number in range(0, 200, 2)]
    asked = [high + number.to_bytes(8, "big") for number in range(201)]

    assert KeySet.of(keys(*members)).contains(keys(*asked)).tolist() == [key in members for key in asked]


def test_a_key_set_may_be_asked_through_a_strided_view() -> None:
    raw = keys(*(number.to_bytes(16, "big") for number in range(10)))

    assert KeySet.of(raw[::2]).contains(raw[::-1]).tolist() == [False, True] * 5


@given(RAW_KEYS, st.integers(0, 5))
def test_keys_come_back_from_hex_whole_sliced_and_chunked(raw: list[bytes], cut: int) -> None:
    column = keys_to_hex(keys(*raw))
    column.validate(full=True)

    assert column.to_pylist() == [key.hex() for key in raw]
    assert keys_from_hex(column).tobytes() == b"".join(raw)
    assert keys_from_hex(column.slice(cut)).tobytes() == b"".join(raw[cut:])
    assert keys_from_hex(pa.chunked_array([column[:cut], column[cut:]], pa.string())).tobytes() == b"".join(raw)
    assert keys_from_hex(column.cast(pa.large_string()).slice(cut)).tobytes() == b"".join(raw[cut:])


def test_no_keys_are_no_keys_in_every_form() -> None:
    nothing = keys()
    for column in (keys_to_hex(nothing), pa.chunked_array([], pa.string()), pa.array([], pa.string())):
        assert len(keys_from_hex(column)) == 0
    assert len(KeySet.of(nothing)) == 0
    assert KeySet.of(nothing).contains(keys(b"k" * 16)).tolist() == [False]
    assert KeySet.of(keys(b"k" * 16)).contains(nothing).tolist() == []


def test_a_digest_is_of_the_bytes_of_each_value_also_in_a_slice() -> None:
    texts = pa.array(["", "a", "é😀", "a"])
    known = ["cae66941d9efbd404e4d88758ea67670", "27c35e6e9373877f29e562464e46497e"]

    assert [key.tobytes().hex() for key in digest(texts)[:2]] == known
    for column in (texts, texts.cast(pa.binary()), texts.cast(pa.large_binary())):
        assert digest(column.slice(1, 2)).tobytes() == digest(texts)[1:3].tobytes()
    assert digest(texts, 8).itemsize == 8


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_keys_are_found_the_same_in_blocks_and_in_any_order(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_BLOCK", block)
    monkeypatch.setattr(content, "_MANY", 5)
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 40), dtype="V16")
    members = KeySet.of(keys[:25])

    assert members.contains(keys).tolist() == [True] * 25 + [False] * 15
    assert KeySet.of(keys).contains_members(members).all()
    assert int(members.contains_members(KeySet.of(keys)).sum()) == 25
    assert len(members | KeySet.of(keys[20:30])) == 30
