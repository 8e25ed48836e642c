"""Columns of a manifest in their declared types; rows with values that cannot be converted are rejected."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import printable
from pia_batch.manifest import key_prompts, lora_scales
from pia_batch.manifest.arrow_types import plain_column
from pia_batch.schema.columns import REQUEST, is_mixed, redacted
from pia_batch.schema.settings import BY_NAME, MAX_SEED


class Rejections:
    """Rejected rows so far, with the first reason of each.

    Attributes:
        bad: True for rejected rows; bool, shape (num_rows,).
    """

    def __init__(self, num_rows: int) -> None:
        self.bad = np.zeros(num_rows, dtype=bool)
        self._found: list[tuple[npt.NDArray[np.int64], str, pa.Array]] = []

    def reject(self, mask: pa.Array, kind: str, explain: Callable[[npt.NDArray[np.int64]], pa.Array | str]) -> None:
        """Reject the rows of `mask` (null counts as false); `explain` is called only for newly rejected ones."""
        flags = np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), dtype=bool)
        rows = np.flatnonzero(flags & ~self.bad)
        if len(rows):
            message = explain(rows)
            self._found.append((rows, kind, pa.repeat(message, len(rows)) if isinstance(message, str) else message))
            self.bad[rows] = True

    def table(self) -> pa.Table:
        """`row` (int64, rising), `error_kind`, `error`."""
        schema = pa.schema([("row", pa.int64()), ("error_kind", pa.string()), ("error", pa.string())])
        parts = [
            pa.table([pa.array(rows), pa.repeat(kind, len(rows)), messages], schema=schema)
            for rows, kind, messages in self._found
        ]
        return pa.concat_tables([schema.empty_table(), *parts]).sort_by("row").combine_chunks()


class Columns:
    """Known columns in their declared types; values that cannot be converted are rejected, and become null.

    Args:
        table: Rows, with any columns of any types.
        rejections: Rejected rows so far, to which more are added.
        label: Function that returns a column's name for messages.

    Attributes:
        num_rows: Number of rows.
        typed: Columns by name, with the types of REQUEST.
    """

    def __init__(self, table: pa.Table, rejections: Rejections, label: Callable[[str], str] = repr) -> None:
        self._rejections, self._label = rejections, label
        self.num_rows = len(table)
        self._raw = {name: _flat(table[name]) for name in table.column_names if name in REQUEST.names}
        self.typed: dict[str, pa.Array] = {}
        for name in REQUEST.names:
            self.typed[name] = self._convert(name)

    def take(self, rows: npt.NDArray[np.int64]) -> None:
        """Keep only `rows`, given by number."""
        self.typed = {name: column.take(pa.array(rows)) for name, column in self.typed.items()}
        self.num_rows = len(rows)

    def require(self, name: str, missing: pa.Array, wanted: str) -> None:
        """Reject the rows of `missing`, which lack a value of column `name`."""
        self._rejections.reject(
            missing, "missing_value", lambda _: f"column {self._label(name)} is empty; required: {wanted}"
        )

    def reject(self, name: str, bad: pa.Array, kind: str, allowed: str) -> None:
        """Reject the rows of `bad` for their value of column `name`; `allowed` describes the allowed values."""

        def explain(rows: npt.NDArray[np.int64]) -> pa.Array:
            raw = self._raw.get(name)
            shown = pa.nulls(len(rows), pa.string()) if raw is None else _shown(raw.take(pa.array(rows)))
            shown = pc.fill_null(shown, "the default")
            return pc.binary_join_element_wise(
                f"column {self._label(name)}: ", shown, f" is not allowed; allowed: {allowed}", ""
            )

        self._rejections.reject(bad, kind, explain)

    def _convert(self, name: str) -> pa.Array:
        wanted, raw = REQUEST.field(name).type, self._raw.get(name)
        if raw is None or pa.types.is_null(raw.type):
            return pa.nulls(self.num_rows, wanted)
        if is_mixed(raw.type):
            values, others = raw.flatten()
            self._raw[name] = others
            self.reject(name, pc.is_valid(others), "invalid_type", f"{_NAMES.get(wanted, wanted)}; correct the value")
            raw = self._raw[name] = values
        if name in key_prompts.NAMES or name == lora_scales.NAME:
            return self._to_scales(name, raw) if name == lora_scales.NAME else self._to_key_prompts(name, raw)
        if raw.type == wanted:
            return raw
        if pa.types.is_string(wanted):
            return self._to_string(name, raw)
        if pa.types.is_integer(wanted) or pa.types.is_floating(wanted):
            return self._to_number(name, raw, wanted)
        return self._to_boolean(name, raw) if pa.types.is_boolean(wanted) else self._to_container(name, raw, wanted)

    def _to_scales(self, name: str, raw: pa.Array) -> pa.Array:
        values, unread, wrong = lora_scales.read(raw)
        self.reject(name, unread, "invalid_type", f"{BY_NAME[name].allowed}, and not {raw.type}")
        self.reject(name, wrong, "invalid_value", BY_NAME[name].allowed)
        return values

    def _to_key_prompts(self, name: str, raw: pa.Array) -> pa.Array:
        found = key_prompts.read(raw)
        if found is None:
            self.reject(name, pc.is_valid(raw), "invalid_type", f"{key_prompts.FORM}, and not {raw.type}")
            return pa.nulls(self.num_rows, REQUEST.field(name).type)
        values, unread = found
        self.reject(name, unread, "invalid_type", key_prompts.FORM)
        return values

    def _to_string(self, name: str, raw: pa.Array) -> pa.Array:
        # Integer ids are common in databases; an integer prompt is a mistake.
        if pa.types.is_large_string(raw.type) or (name == "request_id" and pa.types.is_integer(raw.type)):
            return raw.cast(pa.string())
        self.reject(name, pc.is_valid(raw), "invalid_type", f"a string, and not {raw.type}{_remedy(name, raw.type)}")
        return pa.nulls(self.num_rows, pa.string())

    def _to_boolean(self, name: str, raw: pa.Array) -> pa.Array:
        """Return booleans from text, which CSV has: true and false in any case; empty text is null."""
        if not (pa.types.is_large_string(raw.type) or pa.types.is_string(raw.type)):
            self.reject(name, pc.is_valid(raw), "invalid_type", f"true, false, or null, and not {raw.type}")
            return pa.nulls(self.num_rows, pa.bool_())
        text = pc.utf8_lower(pc.utf8_trim_whitespace(raw.cast(pa.string())))
        text = pc.if_else(pc.equal(text, ""), None, text)
        known = pc.is_in(text, value_set=pa.array(["true", "false"]))
        self.reject(name, pc.and_(pc.is_valid(text), pc.invert(known)), "invalid_type", "true, false, or null")
        return pc.if_else(known, pc.equal(text, "true"), None)

    def _to_number(self, name: str, raw: pa.Array, wanted: pa.DataType) -> pa.Array:
        allowed = str(Range.of(name))
        if pa.types.is_large_string(raw.type) or pa.types.is_string(raw.type) or pa.types.is_decimal(raw.type):
            return self._parse(name, raw, wanted)
        if pa.types.is_integer(raw.type):
            if pa.types.is_integer(wanted):
                unsigned = pa.types.is_uint64(raw.type)
                limit = pc.greater(raw, pa.scalar(MAX_SEED, raw.type)) if unsigned else pa.repeat(False, len(raw))
                self.reject(name, limit, "out_of_range", allowed)
                return pc.if_else(limit, None, raw).cast(wanted)
            return raw.cast(wanted, safe=False)
        if pa.types.is_floating(raw.type):
            values = raw.cast(pa.float64())
            if pa.types.is_floating(wanted):
                return values
            self.reject(name, pc.invert(pc.is_finite(values)), "not_finite", allowed)
            whole = pc.and_(pc.equal(values, pc.round(values)), pc.less(pc.abs(values), 2.0**63))
            self.reject(name, pc.invert(whole), "invalid_type", allowed)
            return pc.if_else(whole, values, None).cast(wanted, safe=False)
        self.reject(name, pc.is_valid(raw), "invalid_type", f"{allowed}, and not {raw.type}")
        return pa.nulls(self.num_rows, wanted)

    def _parse(self, name: str, raw: pa.Array, wanted: pa.DataType) -> pa.Array:
        """Return numbers from text, digit by digit where a float would round large seeds."""
        text = pc.utf8_trim_whitespace(raw.cast(pa.string()))
        text = pc.if_else(pc.equal(text, ""), None, text)
        numeric = pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
        self.reject(name, pc.invert(numeric), "invalid_type", str(Range.of(name)))
        text = pc.if_else(numeric, text, None)
        if not pa.types.is_integer(wanted):
            return text.cast(wanted)
        digits = pc.replace_substring_regex(text, r"\.0*$", "")
        whole = pc.match_substring_regex(digits, r"^[0-9]{1,19}$")
        exact = pc.if_else(whole, digits, None).cast(pa.uint64())
        others = pc.if_else(whole, None, text).cast(pa.float64())
        return pc.coalesce(self._to_number(name, exact, wanted), self._to_number(name, others, wanted))

    def _to_container(self, name: str, raw: pa.Array, wanted: pa.DataType) -> pa.Array:
        is_list = (
            pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type) or pa.types.is_fixed_size_list(raw.type)
        )
        fits = is_list and any(
            test(raw.type.value_type) for test in (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
        )
        if pa.types.is_list(wanted) and fits:
            return raw.cast(wanted, safe=False)
        binary = pa.types.is_binary(raw.type) or pa.types.is_fixed_size_binary(raw.type)
        if pa.types.is_large_binary(wanted) and binary:
            return raw.cast(pa.binary()).cast(wanted)
        self.reject(name, pc.is_valid(raw), "invalid_type", f"{wanted}, and not {raw.type}{_remedy(name, raw.type)}")
        return pa.nulls(self.num_rows, wanted)


_NAMES = {pa.string(): "a string", REQUEST.field("motion_curve").type: "a list of numbers"}


def _remedy(name: str, data_type: pa.DataType) -> str:  # noqa: PLR0911 - one line for each kind of type
    """Return what to do with a column of this type, to follow the description of what is allowed."""
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    if name in ("image", "image_bytes") and pa.types.is_struct(data_type) and "bytes" in [f.name for f in data_type]:
        return (
            f"; name one of its fields: --column image_bytes={name}.bytes; a struct of nothing but bytes and path, as "
            "Hugging Face datasets store images, needs no mapping"
        )
    if pa.types.is_struct(data_type) and data_type.num_fields:
        return f"; name one of its fields, such as --column {name}={name}.{data_type.field(0).name}"
    if name == "image" and any(test(data_type) for test in binary):
        return "; name a column of encoded images by --column image_bytes=NAME, or cast a column of URIs to text"
    if any(test(data_type) for test in binary):
        return "; cast the column to text (Impala and Hive: write strings with the UTF8 annotation)"
    if pa.types.is_nested(data_type):
        return "; write one value in each row"
    if name == "image_bytes":
        return "; decode text such as base64 to bytes, in Parquet"
    if name == "motion_curve":
        return "; write the list as a list, in Parquet or JSONL"
    if not pa.types.is_string(REQUEST.field(name).type):
        return ""
    missing = ", with null where a value is missing" if pa.types.is_floating(data_type) else ""
    return f"; cast the column to text{missing}"


@dataclass(frozen=True)
class Range:
    """Range of a numeric setting, from its declaration."""

    minimum: float
    maximum: float
    open_below: bool
    multiple_of: int
    integer: bool

    @classmethod
    def of(cls, name: str) -> Range:
        """Return the range of a setting by its name."""
        setting = BY_NAME[name]
        limits, integer = setting.limits, pa.types.is_integer(setting.data_type)
        low = limits["gt"] if "gt" in limits else limits["ge"]
        return cls(low, limits["le"], "gt" in limits, limits.get("multiple_of", 1), integer)

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        many = f" that is a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        bounds = f"above {self.minimum:g} up to" if self.open_below else f"from {self.minimum:g} to"
        maximum = "2^63-1" if self.maximum == MAX_SEED else f"{self.maximum:g}"
        return f"{kind}{many} {bounds} {maximum}, or null for the default"


def _flat(column: pa.ChunkedArray) -> pa.Array:
    with suppress(pa.ArrowException):  # a type that is none of a request's: every value of it is rejected
        column = plain_column(column)
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _shown(values: pa.Array) -> pa.Array:
    try:
        text = values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        text = pa.array([_python_text(value) for value in values], pa.string())
    textual = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    quoted = pc.binary_join_element_wise("'", redacted(text), "'", "") if textual else text
    control = pc.fill_null(pc.match_substring_regex(quoted, r"[\p{Cc}\p{Zl}\p{Zp}]"), False)
    if pc.any(control).as_py():  # a message is one line
        quoted = pc.replace_with_mask(
            quoted, control, pa.array(map(printable, quoted.filter(control).to_pylist()), pa.string())
        )
    return pc.utf8_slice_codeunits(quoted, 0, 80)


def _python_text(value: pa.Scalar) -> str | None:
    try:
        return str(value.as_py())[:80] if value.is_valid else None
    except (ArithmeticError, LookupError, ValueError):  # a date beyond those of Python, an unknown time zone
        return f"a value of {value.type}"
