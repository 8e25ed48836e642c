"""Filter expressions over columns, such as `width >= 512 and aesthetic > 5.5`: parsed from text into Arrow expressions.

Python's own parser reads the text, and only the nodes of the grammar below are accepted; nothing is evaluated as code.

    condition   `and`, `or`, `not`, parentheses; a column of booleans is a condition too
    comparison  == != < <= > >=, also chained: `0.5 < score <= 0.9`
    null test   `caption is null`, `caption is not null`
    membership  `style in ("ink", "oil")`, `style not in ("ink", "oil")`; `"cat" in caption` finds a part of a text
    arithmetic  + - * / of numbers, in 64-bit floating point
    value       a number, 'text', true, false, a column, a field of a struct (`meta.width`), `column("any name")`

As in SQL, a comparison with null is null, and rows whose condition is null are left out.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pia_batch.errors import ConfigError, message_of

MAX_EXPRESSION_BYTES = 8192
"""Longest expression, in bytes of UTF-8."""

_NULL, _BOOLEAN, _NUMBER, _TEXT, _TIME, _OTHER = "null", "a boolean", "a number", "a text", "a time", "another type"

_CONSTANTS = {"null": None, "none": None, "true": True, "false": False}

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda left, right: left == right,
    ast.NotEq: lambda left, right: left != right,
    ast.Lt: lambda left, right: left < right,
    ast.LtE: lambda left, right: left <= right,
    ast.Gt: lambda left, right: left > right,
    ast.GtE: lambda left, right: left >= right,
}

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}


@dataclass(frozen=True)
class _RowExpression(ABC):
    """A parsed expression over the columns of a row. It can be pickled, and applied to tables of different schemas.

    Attributes:
        text: Expression as it was written.
        option: Option or parameter that gave it, for messages.
    """

    text: str
    option: str

    EXAMPLE: ClassVar[str]

    def __post_init__(self) -> None:
        """Parse the text.

        Raises:
            ConfigError: It is not an expression of the grammar; the message has the position and the remedy.
        """
        if not self.columns:
            raise ConfigError(f"{self.option}: {self.text!r} names no column; write such as {self.EXAMPLE}")

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the expression reads."""
        named: set[str] = set()
        self._translated(_Binder(self, None, named))
        return frozenset(named)

    def bind(self, schema: pa.Schema) -> pc.Expression:
        """Return the Arrow expression over tables of `schema`.

        Raises:
            ConfigError: A column is unknown, or a value does not have the type that its operator needs.
        """
        return self._translated(_Binder(self, schema, set()))

    @abstractmethod
    def _translated(self, binder: _Binder) -> pc.Expression: ...

    def _not_computed(self, err: Exception) -> ConfigError:
        return ConfigError(f"{self.option}: {self.text!r} cannot be computed: {message_of(err)}")


@dataclass(frozen=True)
class RowFilter(_RowExpression):
    """A condition on rows, such as `width >= 512 and aesthetic > 5.5`."""

    option: str = "--where"

    EXAMPLE: ClassVar = "width >= 512"

    def keep(self, table: pa.Table) -> pa.Table:
        """Return the rows of `table` whose condition is true, in their order.

        Raises:
            ConfigError: The reasons of `bind`, or a value cannot be computed.
        """
        condition = self.bind(table.schema)
        try:
            return table.filter(condition)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
            raise self._not_computed(err) from None

    def _translated(self, binder: _Binder) -> pc.Expression:
        return binder.condition(binder.parsed())


@dataclass(frozen=True)
class RowNumber(_RowExpression):
    """A number of each row, such as `clip_t + 0.5 * clip_i`."""

    option: str = "--by"

    EXAMPLE: ClassVar = "clip_t + 0.5 * clip_i"

    def of(self, table: pa.Table) -> pa.ChunkedArray:
        """Return the number of each row of `table`, float64; null where a column is null.

        Raises:
            ConfigError: A column is unknown or is not a number, or a value cannot be computed.
        """
        number = self.bind(table.schema)
        try:
            return ds.dataset(table).to_table(columns={"number": number})["number"]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
            raise self._not_computed(err) from None

    def _translated(self, binder: _Binder) -> pc.Expression:
        return binder.number(binder.parsed())


@dataclass(frozen=True)
class _Value:
    """One operand: its Arrow expression, its kind in words, its Arrow type, and its text in the condition."""

    expression: Any
    kind: str | None
    """None: the schema is not known."""
    data_type: pa.DataType | None
    shown: str
    constant: Any = None


class _Binder:
    """Translator of one condition's tree for one schema."""

    def __init__(self, condition: _RowExpression, schema: pa.Schema | None, named: set[str]) -> None:
        self._option, self._schema, self._named = condition.option, schema, named
        self._is_number = isinstance(condition, RowNumber)
        self._text = condition.text.replace("\n", " ").replace("\t", " ")
        self._indent = len(self._text) - len(self._text.lstrip())
        self._source = self._text.strip()

    def parsed(self) -> ast.expr:
        if len(self._text.encode("utf-8", "surrogatepass")) > MAX_EXPRESSION_BYTES:
            raise ConfigError(f"{self._option}: longer than {MAX_EXPRESSION_BYTES} bytes; write a shorter condition")
        if not self._source:
            raise ConfigError(f"{self._option}: empty; write a condition such as width >= 512")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self._source, mode="eval").body
        except SyntaxError as err:
            at = self._indent + (err.offset or 1)
            raise ConfigError(f"{self._option}: character {at}: {self._syntax_problem()}") from None
        except (ValueError, RecursionError, MemoryError):
            raise ConfigError(f"{self._option}: {self._text!r:.80} is not a condition; write a simpler one") from None

    def condition(self, node: ast.expr) -> pc.Expression:
        try:
            return self._condition(node)
        except RecursionError:
            raise ConfigError(f"{self._option}: too deeply nested; write a simpler condition") from None

    def number(self, node: ast.expr) -> pc.Expression:
        try:
            value = self._number(node)
        except RecursionError:
            raise ConfigError(f"{self._option}: too deeply nested; write a simpler expression") from None
        return value.expression.cast(pa.float64(), safe=False)

    def _syntax_problem(self) -> str:
        outside = re.sub(r"'[^']*'|\"[^\"]*\"", "''", self._source)
        if word := re.search(r"\b(AND|OR|NOT|IN|IS|NULL)\b", outside):
            return f"write {word[1]} in small letters"
        if re.search(r"(?<![=!<>])=(?!=)", outside):
            return "write == to compare"
        if "<>" in outside:
            return "write != in place of <>"
        if "&&" in outside or "||" in outside or "!" in outside.replace("!=", ""):
            return "write and, or, not"
        if self._is_number:
            return f"not a number; write such as {RowNumber.EXAMPLE}"
        return 'not a condition; write such as width >= 512 and style in ("ink", "oil")'

    def _fail(self, node: ast.AST, problem: str) -> NoReturn:
        before = self._source.encode()[: getattr(node, "col_offset", 0)].decode("utf-8", "ignore")
        raise ConfigError(f"{self._option}: character {self._indent + len(before) + 1}: {problem}")

    def _shown(self, node: ast.AST) -> str:
        return ast.get_source_segment(self._source, node) or self._source

    def _condition(self, node: ast.expr) -> pc.Expression:
        """Return a boolean expression."""
        if isinstance(node, ast.BoolOp):
            parts = [self._condition(part) for part in node.values]
            whole = parts[0]
            for part in parts[1:]:
                whole = whole & part if isinstance(node.op, ast.And) else whole | part
            return whole
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._condition(node.operand)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        value = self._value(node)
        if value.kind not in (None, _BOOLEAN):
            self._fail(
                node, f"{value.shown} is {value.kind}, not a condition; compare it, such as {value.shown} == ..."
            )
        return value.expression

    def _comparison(self, node: ast.Compare) -> pc.Expression:
        whole = None
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            part = self._compare(left, operator, right)
            whole = part if whole is None else whole & part
            left = right
        return whole

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(operator, ast.Is | ast.IsNot):
            if not _is_null(right):
                self._fail(right, "after `is`, write null or not null; write == to compare")
            tested = self._value(left)
            return tested.expression.is_null() if isinstance(operator, ast.Is) else tested.expression.is_valid()
        if isinstance(operator, ast.In | ast.NotIn):
            found = self._membership(left, right)
            return found if isinstance(operator, ast.In) else ~found
        for side in (left, right):
            if _is_null(side):
                self._fail(side, "nothing equals null; write `is null` or `is not null`")
        one, other = self._value(left), self._value(right)
        one, other = self._as_time(one, other, left), self._as_time(other, one, right)
        if None not in (one.kind, other.kind) and (one.kind != other.kind or one.kind == _OTHER):
            self._fail(
                left, f"cannot compare {one.shown} ({one.kind}) with {other.shown} ({other.kind}){_hint(one, other)}"
            )
        return _COMPARISONS[type(operator)](_comparable(one), _comparable(other))

    def _membership(self, left: ast.expr, right: ast.expr) -> pc.Expression:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            return self._part_of_text(left, right)
        sought, items = self._value(left), [self._value(item) for item in right.elts]
        for item, node in zip(items, right.elts, strict=True):
            if not isinstance(item.expression, pc.Expression) or item.constant is None:
                self._fail(node, "a list holds numbers, texts or booleans only; test null by `is null`")
            if sought.kind is not None and item.kind != sought.kind:
                self._fail(
                    node, f"{item.shown} is {item.kind}, but {sought.shown} is {sought.kind}{_hint(item, sought)}"
                )
        if sought.data_type is None:
            return sought.expression.is_valid()  # only the names are of interest
        values = _fitting([item.constant for item in items], sought.data_type)
        null = pc.scalar(pa.scalar(None, pa.bool_()))  # as in SQL: null is neither in a list nor outside of it
        return pc.if_else(sought.expression.is_valid(), sought.expression.isin(values), null)

    def _part_of_text(self, left: ast.expr, right: ast.expr) -> pc.Expression:
        part, whole = self._value(left), self._value(right)
        if not isinstance(part.constant, str) or whole.kind not in (None, _TEXT):
            self._fail(
                right, 'after `in`, write a list such as ("ink", "oil"), or a column of texts after one \'text\''
            )
        return pc.match_substring(whole.expression, part.constant)

    def _value(self, node: ast.expr) -> _Value:
        if isinstance(node, ast.Constant):
            return self._constant(node, node.value)
        if isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS:
            return self._constant(node, _CONSTANTS[node.id.lower()])
        if isinstance(node, ast.BinOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd)):
            return self._computed(node)
        if isinstance(node, ast.Compare | ast.BoolOp) or (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        ):
            return _Value(self._condition(node), _BOOLEAN, pa.bool_(), self._shown(node))
        return self._column(node)

    def _computed(self, node: ast.BinOp | ast.UnaryOp) -> _Value:
        if isinstance(node, ast.UnaryOp):
            operand = self._number(node.operand)
            sign = -1 if isinstance(node.op, ast.USub) else 1
            if operand.constant is not None:
                return self._constant(node, sign * operand.constant)
            number = operand.expression.cast(pa.float64(), safe=False)
            return _Value(pc.negate(number) if sign < 0 else number, _NUMBER, pa.float64(), self._shown(node))
        if type(node.op) not in _ARITHMETIC:
            self._fail(node, "only + - * / are known; write the condition without other operators")
        sides = [self._number(side).expression.cast(pa.float64(), safe=False) for side in (node.left, node.right)]
        return _Value(_ARITHMETIC[type(node.op)](*sides), _NUMBER, pa.float64(), self._shown(node))

    def _number(self, node: ast.expr) -> _Value:
        value = self._value(node)
        if value.kind not in (None, _NUMBER):
            self._fail(node, f"{value.shown} is {value.kind}; only numbers can be computed with")
        return value

    def _constant(self, node: ast.expr, value: Any) -> _Value:  # what a Python constant can be
        kind = {bool: _BOOLEAN, int: _NUMBER, float: _NUMBER, str: _TEXT, type(None): _NULL}.get(type(value))
        if kind is None:
            self._fail(node, f"{self._shown(node)} is not a number, a text, true, false or null")
        try:
            data = pa.scalar(value)
        except (OverflowError, pa.ArrowInvalid, UnicodeEncodeError):
            self._fail(
                node, f"{self._shown(node)[:40]} does not fit into 64 bits, or is not valid text; write it shorter"
            )
        return _Value(pc.scalar(data), kind, data.type, self._shown(node), value)

    def _column(self, node: ast.expr) -> _Value:
        path = self._path(node)
        self._named.add(path[0])
        if self._schema is None:
            return _Value(pc.field(*path), None, None, self._shown(node))
        fields: Sequence[pa.Field] = list(self._schema)
        data_type = pa.null()
        for depth, name in enumerate(path):
            found = next((field for field in fields if field.name == name), None)
            if found is None:
                self._fail(node, _unknown(".".join(path[: depth + 1]), name, [field.name for field in fields]))
            data_type = found.type
            fields = list(data_type) if pa.types.is_struct(data_type) else []
        expression = pc.field(*path)
        if pa.types.is_dictionary(data_type):
            data_type = data_type.value_type
            expression = expression.cast(data_type)
        return _Value(expression, _kind(data_type), data_type, self._shown(node))

    def _path(self, node: ast.expr) -> tuple[str, ...]:
        """Return the names of a column and of the fields inside it."""
        if isinstance(node, ast.Name):
            return (node.id,)
        if isinstance(node, ast.Attribute):
            return (*self._path(node.value), node.attr)
        name = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
            name = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
        if not isinstance(name, str) or not isinstance(node, ast.Call) or node.keywords:
            shown = self._shown(node)[:40]
            self._fail(node, f"{shown} is not a column, a number or a text; a column is NAME or column('NAME')")
        return (name,)

    def _as_time(self, value: _Value, other: _Value, node: ast.expr) -> _Value:
        """Return a text that is compared with a time as a time."""
        if other.kind != _TIME or not isinstance(value.constant, str) or other.data_type is None:
            return value
        wanted, text = other.data_type, pa.scalar(value.constant)
        try:
            moment = text.cast(wanted)
        except pa.ArrowInvalid:
            try:  # a time without a zone is UTC
                moment = text.cast(pa.timestamp("us")).cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                self._fail(node, f"{value.shown} is not a time of {other.shown} ({wanted}); write such as '2026-11-28'")
        return _Value(pc.scalar(moment), _TIME, wanted, value.shown)


def _is_null(node: ast.expr) -> bool:
    is_name = isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS and _CONSTANTS[node.id.lower()] is None
    return is_name or (isinstance(node, ast.Constant) and node.value is None)


def _kind(data_type: pa.DataType) -> str:
    types = pa.types
    if types.is_boolean(data_type):
        return _BOOLEAN
    if types.is_integer(data_type) or types.is_floating(data_type) or types.is_decimal(data_type):
        return _NUMBER
    if types.is_string(data_type) or types.is_large_string(data_type):
        return _TEXT
    is_time = types.is_timestamp(data_type) or types.is_date(data_type)
    return _TIME if is_time else _OTHER


def _comparable(value: _Value) -> Any:  # an expression of pyarrow's
    """Return an operand in a type that Arrow compares with every other type of its kind."""
    data_type = value.data_type
    if data_type == pa.uint64():  # Arrow would cast it to a signed type, and fail where it does not fit
        return value.expression.cast(pa.float64(), safe=False)
    if data_type is not None and (pa.types.is_decimal(data_type) or pa.types.is_float16(data_type)):
        return value.expression.cast(pa.float64())
    return value.expression


def _fitting(values: Sequence[Any], data_type: pa.DataType) -> pa.Array:
    """Return the values that a column of `data_type` can hold, as an array of it; no row equals any other value."""
    kept = []
    for value in values:
        try:
            kept.append(pa.scalar(value, data_type).as_py())
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            continue
    return pa.array(kept, data_type)


def _hint(one: _Value, other: _Value) -> str:
    if {one.kind, other.kind} == {_NUMBER, _TEXT}:
        literal = next((side for side in (one, other) if side.constant is not None), None)
        if literal is not None and literal.kind == _NUMBER:
            return f"; write '{literal.shown}' in quotes"
        if literal is not None:
            return f"; write {literal.constant} without quotes"
    return ""


def _unknown(path: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"no column {path!r}; did you mean {near[0]!r}?"
    shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")  # noqa: PLR2004 - enough to recognise a table
    return f"no column {path!r}; there are {shown}" if known else f"no column {path!r}: it has no fields"
