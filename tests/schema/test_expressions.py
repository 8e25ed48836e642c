"""Filter expressions: a grammar of their own, SQL's null logic, and errors with position and remedy."""

from __future__ import annotations

import datetime as dt
import math
import pickle
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.errors import ConfigError
from pia_batch.schema.expressions import MAX_EXPRESSION_BYTES, RowFilter, RowNumber

ROWS = pa.table(
    {
        "id": [0, 1, 2, 3],
        "width": [256, 512, 1024, None],
        "aesthetic": [5.0, 6.5, None, 7.0],
        "style": ["ink", "oil", None, "Oil"],
        "big": pa.array(["a cat", "a dog", "cats", None], pa.large_string()),
        "tag": pa.array(["x", "y", "x", None]).dictionary_encode(),
        "ok": [True, False, None, True],
        "meta": [{"size": {"w": 1}}, {"size": {"w": 2}}, {"size": None}, None],
        "price": pa.array([Decimal("1.50"), Decimal("2.00"), None, Decimal("3.25")]),
        "count": pa.array([1, 2, 2**64 - 1, None], pa.uint64()),
        "when": pa.array([0, 86_400_000_000, None, 1], pa.timestamp("us", tz="UTC")),
        "day": pa.array([dt.date(2026, 1, 1), dt.date(2026, 2, 1), None, None]),
        "two words": [1, 2, 3, 4],
        "blob": [b"", b"x", None, b"y"],
    }
)


def kept(text: str) -> list[int]:
    ids: list[int] = RowFilter(text).keep(ROWS)["id"].to_pylist()
    return ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width >= 512", [1, 2]),
        ("width >= 512 and aesthetic > 5.5", [1]),
        ("width >= 512 or aesthetic > 6.8", [1, 2, 3]),
        ("not width >= 512", [0]),
        ("width is null", [3]),
        ("width is not null and not (style is null)", [0, 1]),
        ("300 < width < 1000", [1]),
        ("style in ('ink', 'oil')", [0, 1]),
        ("style not in ['ink', 'oil']", [3]),
        ("not style in ('ink',)", [1, 3]),
        ("width in (512, 1024.0, 0.5)", [1, 2]),
        ("count in (-1, 2)", [1]),
        ("count > 1", [1, 2]),
        ('"cat" in big', [0, 2]),
        ("'cat' not in big", [1]),
        ("tag == 'x'", [0, 2]),
        ("tag in ('y',)", [1]),
        ("ok", [0, 3]),
        ("not ok", [1]),
        ("ok == false", [1]),
        ("meta.size.w == 2", [1]),
        ("meta.size is null", [2, 3]),
        ("price >= 2", [1, 3]),
        ("width / 512 >= 1", [1, 2]),
        ("(width + 256) * 2 - 1 > 1023", [1, 2]),
        ("-width < -512", [2]),
        ("aesthetic / 0 > 1", [0, 1, 3]),
        ("when >= '1970-01-02'", [1]),
        ("when < '1970-01-01T00:00:00.000001Z'", [0]),
        ("day == '2026-02-01'", [1]),
        ('column("two words") > 3', [3]),
        ("  width\n>= 512", [1, 2]),
        ("blob is null", [2]),
        ("width is NULL or ok is None", [2, 3]),
    ],
)
def test_a_condition_keeps_the_rows_that_satisfy_it(text: str, expected: list[int]) -> None:
    assert kept(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("widht >= 512", ["character 1", "no column 'widht'", "did you mean 'width'"]),
        ("style == 'ink' and qqqqqq == 1", ["character 20", "no column 'qqqqqq'", "there are id, width"]),
        ("meta.szie.w == 2", ["no column 'meta.szie'", "did you mean 'size'"]),
        ("width.x == 2", ["no column 'width.x'", "no fields"]),
        ("style == 'é' and width == '512'", ["character 18", "cannot compare width (a number)", "512 without quotes"]),
        ("style > 5", ["write '5' in quotes"]),
        ("width = 512", ["character 7", "write == to compare"]),
        ("width > 1 AND ok", ["write AND in small letters"]),
        ("width <> 1", ["write != in place of <>"]),
        ("width > 1 && ok", ["write and, or, not"]),
        ("width == null", ["character 10", "write `is null`"]),
        ("style is 'ink'", ["after `is`, write null"]),
        ("width", ["width is a number, not a condition"]),
        ("style + 1 > 2", ["style is a text", "only numbers"]),
        ("width % 2 == 1", ["only + - * /"]),
        ("style in ('ink', 5)", ["character 18", "5 is a number, but style is a text"]),
        ("style in ('ink', null)", ["test null by `is null`"]),
        ("style in width", ["after `in`"]),
        ("__import__('os').system('x')", ["is not a column"]),
        ("(lambda: 1)() == 1", ["is not a column"]),
        ("[x for x in y] == 1", ["is not a column"]),
        ("width > 1j", ["not a number"]),
        (f"width > {10**30}", ["does not fit into 64 bits"]),
        ("when > 'yesterday'", ["'yesterday' is not a time", "'2026-11-28'"]),
        ("blob == 'x'", ["cannot compare blob (another type)"]),
        ("1 < 2", ["names no column"]),
        ("", ["empty"]),
        ("width > 1\0", ["not a condition"]),
        ("(" * 500 + "width" + ")" * 500, ["character"]),
        ("not " * 1500 + "ok", ["write a simpler"]),
        ("width +" * 900 + "1 > 2", ["simpler"]),
    ],
)
def test_an_error_names_position_and_remedy(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        kept(text)
    assert all(word in str(raised.value) for word in ["--where", *words]), str(raised.value)


def test_the_length_is_limited() -> None:
    fitting = f"style == '{'x' * (MAX_EXPRESSION_BYTES - 11)}'"
    assert len(fitting) == MAX_EXPRESSION_BYTES
    assert kept(fitting) == []
    with pytest.raises(ConfigError, match=str(MAX_EXPRESSION_BYTES)):
        RowFilter(fitting + " ")


def test_the_columns_are_known_without_a_schema_and_a_filter_travels() -> None:
    found = RowFilter("width * 2 > 1 and meta.size.w in (1, 2) and not column('two words') is null")
    assert found.columns == {"width", "meta", "two words"}
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301 - its own


# --- against a model of SQL's three-valued logic ----------------------------------------------------------------------

_numbers = st.one_of(st.integers(-5, 5), st.sampled_from([0.5, -1.5, 2.25]))
_columns = st.sampled_from(["a", "b"])
Tree = tuple[Any, ...]


def _trees() -> st.SearchStrategy[Tree]:
    number = st.recursive(
        st.one_of(st.tuples(st.just("number"), _numbers), st.tuples(st.just("column"), _columns)),
        lambda inner: st.tuples(st.sampled_from("+-*"), inner, inner),
        max_leaves=4,
    )
    leaf = st.one_of(
        st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), number, number),
        st.tuples(st.just("null"), _columns),
        st.tuples(st.just("in"), _columns, st.lists(st.integers(-3, 3), max_size=3)),
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["and", "or"]), inner, inner), st.tuples(st.just("not"), inner)
        ),
        max_leaves=6,
    )


def _text(tree: Tree) -> str:
    kind, *rest = tree
    if kind in ("number", "column"):
        return str(rest[0])
    if kind == "null":
        return f"{rest[0]} is null"
    if kind == "in":
        return f"{rest[0]} in {rest[1]}"
    if kind == "not":
        return f"not ({_text(rest[0])})"
    return f"({_text(rest[0])}) {kind} ({_text(rest[1])})"


def _evaluated(tree: Tree, row: dict[str, Any]) -> Any:  # noqa: PLR0911 - one for each kind of node
    kind, *rest = tree
    if kind == "number":
        return rest[0]
    if kind == "column":
        return row[rest[0]]
    if kind == "null":
        return row[rest[0]] is None
    if kind == "in":
        return None if row[rest[0]] is None else row[rest[0]] in rest[1]
    sides = [_evaluated(side, row) for side in rest]
    if kind == "not":
        return None if sides[0] is None else not sides[0]
    if kind in ("and", "or"):
        decisive = kind == "or"
        return decisive if decisive in sides else None if None in sides else not decisive
    if None in sides:
        return None
    left, right = sides
    return {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "==": lambda: left == right,
        "!=": lambda: left != right,
        "<": lambda: left < right,
        "<=": lambda: left <= right,
        ">": lambda: left > right,
        ">=": lambda: left >= right,
    }[kind]()


@given(
    _trees(),
    st.lists(
        st.fixed_dictionaries(
            {"a": st.none() | st.integers(-5, 5), "b": st.none() | st.sampled_from([0.5, 1.0, -2.0])}
        ),
        max_size=6,
    ),
)
def test_any_condition_agrees_with_three_valued_logic(tree: Tree, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(
        [row | {"at": at} for at, row in enumerate(rows)],
        schema=pa.schema([("a", pa.int64()), ("b", pa.float64()), ("at", pa.int64())]),
    )
    if not re.search(r"\b[ab]\b", _text(tree)):
        with pytest.raises(ConfigError, match="names no column"):
            RowFilter(_text(tree))
        return
    condition = RowFilter(_text(tree))
    expected = [at for at, row in enumerate(rows) if _evaluated(tree, row) is True]
    assert condition.keep(table)["at"].to_pylist() == expected


@given(st.text(max_size=30))
def test_any_text_is_a_condition_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        RowFilter(text).keep(ROWS)


def test_not_a_number_equals_nothing() -> None:
    table = pa.table({"a": [math.nan, 1.0]})
    assert RowFilter("a == a").keep(table)["a"].to_pylist() == [1.0]


def test_a_number_of_each_row_is_computed_in_order() -> None:
    table = pa.table({"a": pa.array([1, None, 3], pa.int32()), "b": [0.5, 1.0, 0.0]})

    assert RowNumber("a + 0.5 * b").of(table).to_pylist() == [1.25, None, 3.0]
    assert RowNumber("-a").of(table).to_pylist() == [-1.0, None, -3.0]
    assert RowNumber("a / b").of(table).to_pylist() == [2.0, None, float("inf")]
    assert RowNumber("b").columns == {"b"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [("c", "no column 'c'"), ("a > 1", "a > 1 is a boolean; only numbers"), ("a ** 2", "only . - . / are known")],
)
def test_what_is_no_number_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RowNumber(text).of(pa.table({"a": [1], "b": ["x"]}))
