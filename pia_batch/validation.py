"""The judgement of manifest rows: effective requests with their keys, or the reason why not.

Everything here works on whole Arrow columns; the one loop per row is the hash of its key. A request that cannot be
animated is not an exception but a row of `Checked.rejected`, with a kind, the column, the value and what is allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import FORMATS, Defaults, RunConfig
from pia_batch.records import (
    REQUEST,
    SETTINGS,
    Keys,
    canonical_json,
    carried_columns,
    digest,
    keys_to_hex,
    redacted,
)

MAX_ID_BYTES = 512
MAX_PROMPT_BYTES = 8192
MAX_URI_BYTES = 4096
MAX_SEED = 2**63 - 1
MAX_GIF_FPS = 50


@dataclass(frozen=True)
class Checked:
    """What `check` found in a table."""

    requests: pa.Table
    """The good rows, effective: REQUEST with every default filled in, then `key`, then the carried columns."""
    rows: npt.NDArray[np.int64]
    """Their row numbers in the table."""
    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    """`hashes_of` their request ids."""
    rejected: pa.Table
    """`row` (int64), `error_kind`, `error`: one line for every bad row."""


def check(table: pa.Table, config: RunConfig, engine_id: str) -> Checked:
    """Split rows into effective requests and rejected ones, without a Python loop per row.

    Args:
        table: rows of a manifest, of any types that `manifest.Manifest.batches` gives.
        config: gives the defaults, and what else decides an animation.
        engine_id: the identity of the engine that would animate them.
    """
    table = table.combine_chunks()
    verdict = _Verdict(len(table))
    columns = _Columns(table, verdict)
    columns.check_identity()
    columns.check_image()
    columns.check_settings(config.defaults)
    columns.check_choices(config)
    columns.check_together(config)
    good = np.flatnonzero(~verdict.bad)
    carried = carried_columns(table)
    if len(good) < len(table):
        carried = carried.take(good)
        columns.take(good)
    constants = columns.fill(config.defaults, config.model.name)
    effective = columns.typed
    keys = _content_keys(effective | constants, config, engine_id)
    requests = pa.table(effective | {"key": keys_to_hex(keys)})
    for name in carried.column_names:
        requests = requests.append_column(carried.schema.field(name), carried[name])
    return Checked(requests, good, keys, columns.id_hashes, verdict.rejected())


def hashes_of(request_ids: pa.Array) -> npt.NDArray[np.uint64]:
    """64 bits of each id's hash: equal ids have equal hashes; shape (n,)."""
    return np.frombuffer(digest(request_ids).tobytes(), dtype=">u8")[::2].astype(np.uint64)


class _Verdict:
    """Which rows are bad so far, and why; the first reason stands."""

    def __init__(self, num_rows: int) -> None:
        self.bad = np.zeros(num_rows, dtype=bool)
        self._found: list[tuple[npt.NDArray[np.int64], str, pa.Array]] = []

    def reject(self, mask: pa.Array, kind: str, explain: Callable[[npt.NDArray[np.int64]], pa.Array | str]) -> None:
        """Mark the rows of `mask` (null counts as false); `explain` is asked only for those that are newly bad."""
        flags = np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), dtype=bool)
        rows = np.flatnonzero(flags & ~self.bad)
        if len(rows):
            message = explain(rows)
            self._found.append((rows, kind, pa.repeat(message, len(rows)) if isinstance(message, str) else message))
            self.bad[rows] = True

    def rejected(self) -> pa.Table:
        schema = pa.schema([("row", pa.int64()), ("error_kind", pa.string()), ("error", pa.string())])
        parts = [
            pa.table([pa.array(rows), pa.repeat(kind, len(rows)), messages], schema=schema)
            for rows, kind, messages in self._found
        ]
        return pa.concat_tables([schema.empty_table(), *parts]).sort_by("row").combine_chunks()


class _Columns:
    """The known columns in their own types; values that cannot be converted are rejected, and null from then on."""

    def __init__(self, table: pa.Table, verdict: _Verdict) -> None:
        self._verdict = verdict
        self._num_rows = len(table)
        self._raw = {name: _flat(table[name]) for name in table.column_names if name in REQUEST.names}
        self.typed: dict[str, pa.Array] = {}
        self.id_hashes: npt.NDArray[np.uint64]
        for name in REQUEST.names:
            self.typed[name] = self._convert(name)

    def take(self, rows: npt.NDArray[np.int64]) -> None:
        """Keep `rows` only."""
        self.typed = {name: column.take(pa.array(rows)) for name, column in self.typed.items()}

    def check_identity(self) -> None:
        """`request_id` and `prompt`: there, printable, not too long."""
        ids, prompts = self.typed["request_id"], self.typed["prompt"]
        self._require("request_id", pc.is_null(ids), f"a string of 1 to {MAX_ID_BYTES} bytes")
        length = pc.binary_length(ids)
        bad = pc.or_kleene(pc.less(length, 1), pc.greater(length, MAX_ID_BYTES))
        self._reject("request_id", bad, "invalid_id", f"1 to {MAX_ID_BYTES} bytes of UTF-8")
        control = pc.match_substring_regex(ids, r"\p{Cc}")
        self._reject("request_id", control, "invalid_id", "a string without control characters")
        blank = pc.or_kleene(pc.is_null(prompts), pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(prompts)), 0))
        self._require("prompt", blank, "a text that is not empty")
        for name in ("prompt", "negative_prompt"):
            long = pc.greater(pc.binary_length(self.typed[name]), MAX_PROMPT_BYTES)
            self._reject(name, long, "out_of_range", f"at most {MAX_PROMPT_BYTES} bytes")

    def check_image(self) -> None:
        """One source of the image, and a sha256 that can be one."""
        uris, data, sha256 = (self.typed[name] for name in ("image", "image_bytes", "image_sha256"))
        no_uri = pc.or_kleene(pc.is_null(uris), pc.equal(pc.binary_length(uris), 0))
        no_data = pc.or_kleene(pc.is_null(data), pc.equal(pc.binary_length(data), 0))
        self._require("image", pc.and_(no_uri, no_data), "a URI, or `image_bytes` with the encoded image")
        both = pc.and_(pc.invert(no_uri), pc.invert(no_data))
        self._reject("image", both, "invalid_value", "either `image` or `image_bytes`, not both")
        long = pc.greater(pc.binary_length(uris), MAX_URI_BYTES)
        self._reject("image", long, "out_of_range", f"a URI of at most {MAX_URI_BYTES} bytes")
        not_hex = pc.invert(pc.match_substring_regex(sha256, "^[0-9a-fA-F]{64}$"))
        self._reject("image_sha256", not_hex, "invalid_value", "64 hexadecimal digits, or null")
        unsupported = pc.is_valid(self.typed["ip_adapter_image"])
        self._reject("ip_adapter_image", unsupported, "unsupported", "null; no IP-Adapter is loaded in this version")

    def check_settings(self, defaults: Defaults) -> None:
        """Every number inside its range."""
        for name in SETTINGS.names:
            if pa.types.is_integer(SETTINGS.field(name).type) or pa.types.is_floating(SETTINGS.field(name).type):
                self._check_range(name, _Range.of(name))
        curves = self.typed["motion_curve"]
        length = pc.list_value_length(curves)
        frames = pc.fill_null(self.typed["num_frames"], defaults.num_frames)
        bad = pc.or_kleene(pc.less(length, 1), pc.greater(length, frames))
        self._reject("motion_curve", bad, "out_of_range", "1 to num_frames numbers, or null")
        # NaN compares false, so what is asked is whether a value is inside.
        values = pc.list_flatten(curves)
        inside = pc.fill_null(pc.and_kleene(pc.greater_equal(values, 0), pc.less_equal(values, 1)), False)
        rows = np.repeat(np.arange(self._num_rows), pc.fill_null(length, 0))
        outside = np.zeros(self._num_rows, dtype=bool)
        outside[rows[~inside.to_numpy(zero_copy_only=False)]] = True
        self._reject("motion_curve", pa.array(outside), "out_of_range", "numbers from 0 to 1")

    def check_choices(self, config: RunConfig) -> None:
        """Names out of a list."""
        for name, allowed in (("format", FORMATS), ("model", (config.model.name,))):
            unknown = pc.invert(pc.is_in(self.typed[name], value_set=pa.array(allowed), skip_nulls=False))
            wrong = pc.and_(unknown, pc.is_valid(self.typed[name]))
            self._reject(name, wrong, "invalid_value", ", ".join(allowed) + ", or null for the default")

    def check_together(self, config: RunConfig) -> None:
        """Settings that are fine alone but not with each other."""
        defaults = config.defaults
        get = {name: pc.fill_null(self.typed[name], getattr(defaults, name)) for name in _FILLED}
        drawn = pc.floor(pc.multiply(get["strength"], pc.cast(get["num_inference_steps"], pa.float64(), safe=False)))
        self._reject("strength", pc.less(drawn, 1), "out_of_range", "num_inference_steps x strength of at least 1")
        too_fast = pc.and_(pc.equal(get["format"], "gif"), pc.greater(get["fps"], MAX_GIF_FPS))
        self._reject("fps", too_fast, "out_of_range", f"at most {MAX_GIF_FPS} in a GIF")
        area = pc.multiply(pc.multiply(get["width"], get["height"]), get["num_frames"])
        cap = config.limits.max_frame_pixels
        large = pc.greater(area, cap)
        self._reject("width", large, "out_of_range", f"width x height x num_frames up to {cap} (limits)")

    def fill(self, defaults: Defaults, model_name: str) -> dict[str, pa.Scalar]:
        """Replace nulls by their defaults; returns the settings that every row takes from there."""
        constants = {}
        self.id_hashes = hashes_of(self.typed["request_id"])
        for name in SETTINGS.names:
            column, default = self.typed[name], getattr(defaults, name, None)
            if column.null_count == len(column) and name != "seed":
                constants[name] = pa.scalar(default, column.type)
            if default is not None:
                self.typed[name] = _filled(column, default)
        if self.typed["seed"].null_count:
            derived = pa.array(self.id_hashes & np.uint64(MAX_SEED)).cast(pa.int64())
            self.typed["seed"] = pc.coalesce(self.typed["seed"], derived)
        self.typed["image_sha256"] = pc.utf8_lower(self.typed["image_sha256"])
        self.typed["model"] = pc.fill_null(self.typed["model"], model_name)
        return constants

    def _check_range(self, name: str, allowed: _Range) -> None:
        values = self.typed[name]
        if pa.types.is_floating(values.type):
            self._reject(name, pc.invert(pc.is_finite(values)), "not_finite", str(allowed))
        if values.null_count == len(values):
            return
        bad = pc.greater(values, allowed.maximum)
        below = pc.less_equal if allowed.open_below else pc.less
        bad = pc.or_kleene(bad, below(values, allowed.minimum))
        if allowed.multiple_of > 1:
            multiple = pc.multiply(pc.divide(values, allowed.multiple_of), allowed.multiple_of)
            bad = pc.or_kleene(bad, pc.not_equal(multiple, values))
        self._reject(name, bad, "out_of_range", str(allowed))

    def _require(self, name: str, missing: pa.Array, wanted: str) -> None:
        self._verdict.reject(missing, "missing_value", lambda _: f"column '{name}' is empty; required: {wanted}")

    def _reject(self, name: str, bad: pa.Array, kind: str, allowed: str) -> None:
        def explain(rows: npt.NDArray[np.int64]) -> pa.Array:
            raw = self._raw.get(name)
            shown = pa.nulls(len(rows), pa.string()) if raw is None else _shown(raw.take(pa.array(rows)))
            shown = pc.fill_null(shown, "the default")
            return pc.binary_join_element_wise(f"column '{name}': ", shown, f" is not allowed; allowed: {allowed}", "")

        self._verdict.reject(bad, kind, explain)

    def _convert(self, name: str) -> pa.Array:
        wanted, raw = REQUEST.field(name).type, self._raw.get(name)
        if raw is None or pa.types.is_null(raw.type):
            return pa.nulls(self._num_rows, wanted)
        if raw.type == wanted:
            return raw
        if pa.types.is_string(wanted):
            return self._to_string(name, raw)
        if pa.types.is_integer(wanted) or pa.types.is_floating(wanted):
            return self._to_number(name, raw, wanted)
        return self._to_container(name, raw, wanted)

    def _to_string(self, name: str, raw: pa.Array) -> pa.Array:
        # Integer ids are common in databases; an integer prompt is a mistake.
        if pa.types.is_large_string(raw.type) or (name == "request_id" and pa.types.is_integer(raw.type)):
            return raw.cast(pa.string())
        self._reject(name, pc.is_valid(raw), "invalid_type", f"a string, and not {raw.type}")
        return pa.nulls(self._num_rows, pa.string())

    def _to_number(self, name: str, raw: pa.Array, wanted: pa.DataType) -> pa.Array:
        allowed = str(_Range.of(name))
        if pa.types.is_large_string(raw.type) or pa.types.is_string(raw.type) or pa.types.is_decimal(raw.type):
            return self._parse(name, raw, wanted)
        if pa.types.is_integer(raw.type):
            if pa.types.is_integer(wanted):
                unsigned = pa.types.is_uint64(raw.type)
                limit = pc.greater(raw, pa.scalar(MAX_SEED, raw.type)) if unsigned else pa.repeat(False, len(raw))
                self._reject(name, limit, "out_of_range", allowed)
                return pc.if_else(limit, None, raw).cast(wanted)
            return raw.cast(wanted, safe=False)
        if pa.types.is_floating(raw.type):
            values = raw.cast(pa.float64())
            if pa.types.is_floating(wanted):
                return values
            self._reject(name, pc.invert(pc.is_finite(values)), "not_finite", allowed)
            whole = pc.and_(pc.equal(values, pc.round(values)), pc.less(pc.abs(values), 2.0**63))
            self._reject(name, pc.invert(whole), "invalid_type", allowed)
            return pc.if_else(whole, values, None).cast(wanted, safe=False)
        self._reject(name, pc.is_valid(raw), "invalid_type", f"{allowed}, and not {raw.type}")
        return pa.nulls(self._num_rows, wanted)

    def _parse(self, name: str, raw: pa.Array, wanted: pa.DataType) -> pa.Array:
        """Numbers out of text, digit by digit where a float would round large seeds."""
        text = pc.utf8_trim_whitespace(raw.cast(pa.string()))
        text = pc.if_else(pc.equal(text, ""), None, text)
        numeric = pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
        self._reject(name, pc.invert(numeric), "invalid_type", str(_Range.of(name)))
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
        self._reject(name, pc.is_valid(raw), "invalid_type", f"{wanted}, and not {raw.type}")
        return pa.nulls(self._num_rows, wanted)


@dataclass(frozen=True)
class _Range:
    """The range of a numeric setting, read from `config.Defaults` so that both edges agree."""

    minimum: float
    maximum: float
    open_below: bool
    multiple_of: int
    integer: bool

    @classmethod
    def of(cls, name: str) -> _Range:
        limits = {"ge": 0, "gt": None, "le": MAX_SEED, "multiple_of": 1}  # a seed's, which has no default
        for rule in Defaults.model_fields[name].metadata if name != "seed" else ():
            limits |= {key: getattr(rule, key, value) for key, value in limits.items()}
        low = limits["gt"] if limits["gt"] is not None else limits["ge"]
        integer = pa.types.is_integer(SETTINGS.field(name).type)
        return cls(low or 0, limits["le"] or 0, limits["gt"] is not None, limits["multiple_of"] or 1, integer)

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        many = f" that is a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        bounds = f"above {self.minimum:g} up to" if self.open_below else f"from {self.minimum:g} to"
        maximum = "2^63-1" if self.maximum == MAX_SEED else f"{self.maximum:g}"
        return f"{kind}{many} {bounds} {maximum}, or null for the default"


_FILLED = ("strength", "num_inference_steps", "format", "fps", "width", "height", "num_frames")


def _content_keys(effective: dict[str, pa.Array | pa.Scalar], config: RunConfig, engine_id: str) -> Keys:
    uris, data, sha256 = effective["image"], effective["image_bytes"], effective["image_sha256"]
    if data.null_count < len(data):
        sha256 = pc.coalesce(sha256, _sha256_hex(data))
    by_hash = pc.binary_join_element_wise("sha256:", sha256, "")
    by_uri = pc.binary_join_element_wise("uri:", uris, "")
    file_format = effective["format"]
    if isinstance(file_format, pa.Scalar):
        encoder = pa.scalar(config.encoding.identity(file_format.as_py()))
    else:
        identities = pa.array([config.encoding.identity(name) for name in FORMATS])
        encoder = identities.take(pc.index_in(file_format, value_set=pa.array(FORMATS)))
    described: dict[str, pa.Array | pa.Scalar] = {name: effective[name] for name in SETTINGS.names}
    described |= {
        "request_id": effective["request_id"],
        "prompt": effective["prompt"],
        "image": pc.coalesce(by_hash, by_uri),
        "fit": pa.scalar(f"{config.images.fit} {config.images.background.lower()}"),
        "encoder": encoder,
        "engine_id": pa.scalar(engine_id),
    }
    return digest(canonical_json(described))


def _sha256_hex(data: pa.Array) -> pa.Array:
    return pa.array([hashlib.sha256(value).hexdigest() if value else None for value in data.to_pylist()], pa.string())


def _filled(column: pa.Array, default: Any) -> pa.Array:  # the default of any setting
    if pa.types.is_list(column.type):
        filler = pa.array([list(default)] * len(column), column.type)
        return pc.coalesce(column, filler)
    return pc.fill_null(column, default)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _shown(values: pa.Array) -> pa.Array:
    try:
        text = values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        text = pa.array([str(value)[:80] for value in values.to_pylist()], pa.string())
    textual = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    quoted = pc.binary_join_element_wise("'", redacted(text), "'", "") if textual else text
    return pc.utf8_slice_codeunits(quoted, 0, 80)
