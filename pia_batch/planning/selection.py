"""Selection of the requests that a run animates if its budget allows fewer than all, and of those that come first.

It holds a few numbers per request and no rows: the ranks of a manifest take 8 bytes each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError
from pia_batch.manifest.reader import Manifest
from pia_batch.schema.keys import Keys, KeySet

_HASHES = 2.0**64


def select(
    config: RunConfig,
    manifest: Manifest,
    keys: Keys,
    id_hashes: npt.NDArray[np.uint64],
    ordinals: npt.NDArray[np.int64],
) -> KeySet | None:
    """Return the keys that a run animates within its `budget`; None: all of them.

    A sample is selected by the hash of the request ids: it has the same requests whatever their settings are, and a
    larger sample contains a smaller one. A limit takes the first rows of the manifest, or those with the highest
    priority, for which one column is read once more.

    Args:
        config: Config with `budget.sample`, `budget.limit` and `budget.priority`.
        manifest: Manifest with the priority column.
        keys: Keys of the pending requests, copies included; shape (n,).
        id_hashes: Hashes of their request ids, uniform over uint64; shape (n,).
        ordinals: Their row numbers in the manifest; shape (n,).

    Raises:
        ConfigError: the manifest has no such numeric column.
    """
    budget = config.budget
    check_priority(config, manifest.schema)
    sampled = np.arange(len(keys))
    if budget.sample is not None and budget.sample < 1:
        sampled = np.flatnonzero(id_hashes < budget.sample * _HASHES)
    if budget.limit is not None:
        order = sampled[_order(config, manifest, ordinals[sampled])]
        first_copies = np.sort(np.unique(id_hashes[order], return_index=True)[1])
        if len(first_copies) > budget.limit:
            sampled = order[first_copies[: budget.limit]]
    return None if len(sampled) == len(keys) else KeySet.of(keys[sampled])


def check_priority(config: RunConfig, schema: pa.Schema) -> None:
    """Refuse a `budget.priority` that is not a column of numbers, or of texts, which is how CSV stores numbers.

    Raises:
        ConfigError: the column does not exist or is not numeric; the message names the numeric columns.
    """
    name = config.budget.priority
    if name is None or (name in schema.names and _is_ranked(schema.field(name).type)):
        return
    known = ", ".join(field.name for field in schema if _is_number(field.type)) or "none"
    msg = f"budget.priority: the manifest has no numeric column {name!r}; its numeric columns: {known}"
    raise ConfigError(msg)


def ranks(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.float64]:
    """Return the numbers of a column as float64, shape (n,). Null, NaN and other texts become -inf: they come last."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        numbers = np.array([_number(text) for text in column.to_pylist()], np.float64)
    else:
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        numbers = np.asarray(pc.fill_null(column.cast(pa.float64(), safe=False), -np.inf), np.float64)
    return np.where(np.isnan(numbers), -np.inf, numbers)


def _order(config: RunConfig, manifest: Manifest, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the order in which these rows are animated: by descending priority, then as in the manifest."""
    name = config.budget.priority
    if name is None:
        return np.argsort(ordinals, kind="stable")
    found = np.empty(len(ordinals))
    by_row = np.argsort(ordinals, kind="stable")
    sorted_rows = ordinals[by_row]
    default = getattr(config.defaults, name, None)
    for batch in manifest.batches([name]):
        low, high = np.searchsorted(sorted_rows, [batch.ordinal, batch.ordinal + len(batch.table)])
        column = batch.table[name].take(pa.array(sorted_rows[low:high] - batch.ordinal))
        found[by_row[low:high]] = ranks(column if default is None else pc.fill_null(column, default))
    return np.lexsort((ordinals, -found))


def _is_number(data_type: pa.DataType) -> bool:
    types = pa.types
    return any(check(data_type) for check in (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean))


def _is_ranked(data_type: pa.DataType) -> bool:
    return _is_number(data_type) or pa.types.is_string(data_type) or pa.types.is_large_string(data_type)


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else -np.inf
    except ValueError:
        return -np.inf
